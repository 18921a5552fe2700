"""`--cpu-devices`: the commands' batches over several devices of a CPU equal those on one."""

import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from commands import bench, message
from typer.testing import CliRunner

import jaxpack
from jaxpack.cli._devices import cpu_mesh
from jaxpack.cli.app import app
from jaxpack.cli.bench import epoch
from jaxpack.cli.bench.peers import PEERS
from jaxpack.cli.bench.workloads import Workload
from jaxpack.cli.demo import command as demo
from jaxpack.data import SlotFilling, pack_on_host
from jaxpack.sharding import plan_shards, put

LENGTHS = np.array([3, 8, 2, 5, 1, 7])


@pytest.fixture(scope="module")
def mesh():
    return cpu_mesh(2, len(LENGTHS), "")


@pytest.fixture(scope="module")
def calls(mesh):
    """jaxpack on one device and on two, with the same weights."""
    workload = Workload("tiny", LENGTHS, features=3, hidden_size=4, mesh=mesh)
    return PEERS["jaxpack"](workload), PEERS["jaxpack-devices"](workload)


def test_the_bench_on_two_devices_has_the_loss_and_the_gradients_of_one(calls):
    (loss, (weights, _)), (loss_too, (weights_too, _)) = (each.training() for each in calls)
    np.testing.assert_allclose(loss_too, loss, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-6), weights, weights_too)
    assert calls[1].same_weights
    assert calls[1].cells == 2 * plan_shards(LENGTHS, 2).size


def test_each_device_runs_its_own_shard_and_only_sums_cross(calls):
    outputs = calls[1].forward()
    assert {shard.device for shard in outputs.addressable_shards} == {*jax.devices()[:2]}
    assert {shard.data.shape[0] for shard in outputs.addressable_shards} == {1}
    text = calls[1].training.func.as_text()
    assert 1 <= len(re.findall(r" all-reduce(?:-start)?\(", text)) <= 2  # the loss, and all gradients of weights
    assert not re.search(r" (all-gather|all-to-all|collective-permute)(-start)?\(", text)


def test_an_epochs_step_on_two_devices_is_that_of_one_on_the_same_sequences(mesh):
    layer, optimizer = jaxpack.LSTM(3, 4), optax.sgd(0.1)
    params = layer.init(jax.random.key(0))
    source = [np.random.default_rng(i).standard_normal((length, 3), np.float32) for i, length in enumerate(LENGTHS)]
    (batch,) = SlotFilling(source, batch_size=3, local_shards=2)
    order = batch.indices.ravel()
    whole = pack_on_host([source[i] for i in order], jaxpack.plan_padded(6, 8))
    state = params, optimizer.init(params)
    one, loss = jax.jit(epoch._train_step(layer, optimizer, None))(
        state, jaxpack.data.Batch(whole, order, np.ones(6, np.float32))
    )
    two, loss_too = jax.jit(epoch._train_step(layer, optimizer, mesh))(epoch._placed(state, mesh), put(batch, mesh))
    np.testing.assert_allclose(loss_too, loss, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-6), one, two)


def test_bench_epoch_has_a_row_for_the_devices(tmp_path):
    (tmp_path / "lengths.txt").write_text("1 2 3 4 5 6 " * 30)
    options = "--features", 3, "--hidden-size", 4, "--repeats", 1, "--json", tmp_path / "out.json"
    peers = "--peer", "slot-filled", "--peer", epoch.ON_DEVICES
    found = bench("epoch", "--lengths", tmp_path / "lengths.txt", "--cpu-devices", 2, *options, *peers)
    assert found.exit_code == 0, found.output
    one, two = json.loads((tmp_path / "out.json").read_text())["peers"]
    assert (one["name"], two["name"]) == ("slot-filled", epoch.ON_DEVICES)
    assert (two["epochs"][0]["rows"], two["epochs"][0]["tokens"]) == (180, 630)
    assert two["batches"] == one["batches"] == 3
    assert f"{epoch.ON_DEVICES}: such batches of a shard for each CPU device" in " ".join(found.stdout.split())


def test_a_demo_step_on_two_devices_is_that_of_one(mesh):
    examples, _ = demo.load()
    rows = np.array([[[0, 50, 100, 150, 200, -1]]])
    dealt = demo.deal_batches(examples.lengths, rows, 2)
    assert dealt.shape == (1, 1, 2, 3)
    assert sorted(dealt.ravel()) == sorted(rows.ravel())
    model, optimizer = demo.Classifier(12, 4, 9), optax.sgd(0.1)
    found = []
    for each, on in ((rows, None), (dealt, mesh)):
        step = demo.make_train_step(model, optimizer, demo.plan_run(examples.lengths, each), on)
        state = demo.initial_state(model, optimizer, 0, on)
        found.append(demo.jit_step(step, on)(state, demo.take(examples, each[0, 0])))
    (one, loss), (two, loss_too) = found
    np.testing.assert_allclose(loss_too, loss, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-6), one, two)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("demo", "--cpu-devices", "2"),
            "2 devices cannot have equal shards of a batch of 27 sequences. Pass a --batch",
        ),
        (("bench", "vowels", "--cpu-devices", "2"), "2 devices cannot have equal shards of a batch of 27 sequences."),
        (("bench", "epoch", "--cpu-devices", "3"), "3 devices cannot have equal shards of a batch of 64 sequences."),
        (("bench", "words", "--cpu-devices", "64"), "JAX runs with 2 CPU devices in this process already."),
        (("bench", "words", "--cpu-devices", "0"), "greater than or equal to 1"),
    ],
)
def test_devices_that_do_not_fit_are_refused_before_the_work(arguments, said):
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "80", "TERM": "dumb", "NO_COLOR": "1"})
    assert result.exit_code == 2
    assert "Invalid value for '--cpu-devices'" in message(result)
    assert said in message(result)


def test_a_command_starts_jax_with_as_many_devices():
    code = "import jax; from jaxpack.cli._devices import cpu_mesh; print(cpu_mesh(3, 6, '').size, jax.device_count())"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=300)
    assert found.stdout == "3 3\n"


def test_one_device_is_the_usual_program():
    assert cpu_mesh(1, 27, "") is None
    with pytest.raises(Exception, match="--cpu-devices N adds it"):
        PEERS["jaxpack-devices"](Workload("tiny", LENGTHS, features=3, hidden_size=4))
    assert jnp.ones(()).devices() == {jax.devices()[0]}
