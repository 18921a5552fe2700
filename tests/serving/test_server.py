"""Servers: results, order, routes, refusals, no compilation after warm-up, and what is saved and loaded."""

import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.tree_util import register_pytree_node_class
from scipy import optimize

import jaxpack
from jaxpack import LSTM, BucketPlan, CostModel, plan_buckets, plan_padded, plan_rows
from jaxpack.serving import Server, counted_compilations
from jaxpack.serving._routing import Router

F, H = 3, 4
STAIRS = BucketPlan((3, 7), (4, 2))
ROWS = BucketPlan((7,), (2,), ((0, 3), (0, 4)))
LONG = plan_padded(1, 10)
PLANS = (STAIRS, ROWS, LONG)
EXAMPLE = {"x": np.zeros((1, F)), "number": np.zeros(1, np.int32)}
LAYER = LSTM(F, H)
COSTS = CostModel()
request_lengths = st.lists(st.integers(0, LONG.max_length), max_size=9)


def answer(params, packed):
    """Values per sequence and per step, some of which say whose they are."""
    numbers = packed.replace(data=packed.data["number"])
    output, (h_n, _) = LAYER.apply(params, packed.replace(data=packed.data["x"]))
    return {"steps": (output, numbers), "state": h_n[-1], "number": jaxpack.segment_max(numbers)}


def requests_of(lengths, seed=0):
    """Sequences of these lengths, each of whose steps carries the sequence's number."""
    generator = np.random.default_rng([seed, *lengths])
    return [
        {"x": generator.standard_normal((length, F)), "number": np.full(length, i, np.int32)}
        for i, length in enumerate(lengths)
    ]


def check(params, requests, results):
    """Results against NumPy's, computed one sequence at a time."""
    assert len(results) == len(requests)
    for i, (request, result) in enumerate(zip(requests, results, strict=True)):
        zeros = np.zeros((1, 1, H))
        (output,), (h_n, _) = oracles.layer("lstm", params, [request["x"]], (zeros, zeros))
        np.testing.assert_allclose(result["steps"][0], output, atol=1e-10)
        np.testing.assert_allclose(result["state"], h_n[-1, 0], atol=1e-10)
        np.testing.assert_array_equal(result["steps"][1], request["number"])
        assert result["number"] == (i if len(request["number"]) else np.iinfo(np.int32).min)


@pytest.fixture(scope="module")
def params():
    with jax.enable_x64(True):
        return LAYER.init(jax.random.key(0))


@pytest.fixture(scope="module")
def server(params):
    with jax.enable_x64(True):  # which the server keeps: no test that calls it is in 64-bit mode itself
        return Server(answer, params, PLANS, EXAMPLE)


@pytest.fixture(scope="module")
def small():
    """A server that compiles fast, of bare arrays and parameters of several kinds."""
    params = {"scale": jnp.ones(F, jnp.bfloat16), "shift": 2.5, "node": Node(jnp.arange(F))}
    return Server(shifted, params, [BucketPlan((2, 4), (3, 2))], jax.ShapeDtypeStruct((1, F), np.float32))


@register_pytree_node_class
class Node:
    """A pytree that no other process knows."""

    def __init__(self, child):
        self.child = child

    def tree_flatten(self):
        return (self.child,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


def shifted(params, packed):
    return jaxpack.segment_sum(packed) * params["scale"] + params["shift"] + params["node"].child


@given(lengths=request_lengths)
def test_each_sequence_gets_its_own_result_in_order(server, params, lengths):
    requests = requests_of(lengths)
    check(params, requests, server(requests))


def test_results_are_numpy_arrays_with_memory_of_their_own(server):
    first, second = server(requests_of([3, 2]))
    assert {type(leaf) for leaf in jax.tree.leaves(first)} == {np.ndarray, np.int32}
    assert first["steps"][0].shape == (3, H)
    before = second["steps"][0].copy()
    for leaf in (first["state"], first["steps"][0]):
        leaf[:] = np.nan
    np.testing.assert_array_equal(second["steps"][0], before)


def test_threads_that_call_at_once_get_their_own_results(server, params):
    calls = [requests_of(lengths, seed=1) for lengths in itertools.product([1, 4, 9], repeat=3)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for requests, results in zip(calls, pool.map(server, calls), strict=True):
            check(params, requests, results)


def test_nothing_is_compiled_after_the_warm_up(server):
    with counted_compilations() as compiled:
        for lengths in ([0], [7], [10], [4, 4], [3, 3, 7, 1], [10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0]):
            server(requests_of(lengths))
    assert not compiled
    with counted_compilations() as compiled:  # the count is no constant
        jax.jit(lambda x: x + 41)(1.0)
    assert len(compiled) == 1


def test_no_sequences_have_no_results(server):
    assert server([]) == []


@given(lengths=request_lengths)
def test_a_batch_runs_whole_under_the_cheapest_plan_that_it_fits(lengths):
    routes = Router.of(PLANS, COSTS).route(lengths)
    assert sorted(row for route in routes for row in route.rows) == list(range(len(lengths)))
    for plan, rows in routes:
        assert plan.fits([lengths[row] for row in rows])
        assert list(rows) == sorted(rows)
    fitting = [plan for plan in PLANS if plan.fits(lengths)]
    if lengths and fitting:
        assert [route.plan for route in routes] == [min(fitting, key=COSTS.run_time)]


def test_the_cost_model_says_which_plan_is_cheapest():
    few_cells, few_steps = BucketPlan((8,), (1,), ((0, 4),)), plan_padded(5, 4)
    for model, plan in ((CostModel(step=0), few_cells), (CostModel(step=1), few_steps)):
        assert Router.of([few_cells, few_steps], model).route([4, 4])[0].plan == plan


FAMILIES = [
    [plan_padded(1, 60), plan_padded(8, 60), plan_padded(8, 15), plan_padded(32, 10)],
    [plan_buckets([60, 30, 20, 15, 12, 10, 8, 4], 3), plan_buckets([60, 20, 10, 5]), plan_padded(1, 60)],
    [plan_rows([60, 30, 20, 15, 12, 10, 8, 4]), plan_buckets([20] * 8), plan_padded(2, 60)],
]


@pytest.mark.parametrize("plans", FAMILIES)
def test_a_split_costs_little_more_than_the_cheapest(plans):
    generator = np.random.default_rng(0)
    ratios = []
    for size in (9, 20, 40, 100):
        for _ in range(3):
            lengths = np.clip(generator.lognormal(2.5, 0.8, size), 1, 60).astype(int)
            router = Router.of(plans, COSTS)
            costs = dict(zip(router.plans, router.costs, strict=True))
            if not any(plan.fits(lengths) for plan in plans):
                ratios.append(sum(costs[plan] for plan, _ in router.route(lengths)) / cheapest_split(lengths, costs))
    assert len(ratios) > 6
    assert min(ratios) > 0.999
    assert max(ratios) < 1.35
    assert np.mean(ratios) < 1.08


def cheapest_split(lengths, costs):
    """By integer programming: for every length there must be slots enough for all that are at least as long."""
    steps = np.unique(lengths)
    slots = [[(plan.room >= step).sum() for plan in costs] for step in steps]
    needed = [(lengths >= step).sum() for step in steps]
    constraint = optimize.LinearConstraint(slots, needed, np.inf)
    ones = np.ones(len(costs))
    return optimize.milp(list(costs.values()), integrality=ones, constraints=constraint).fun


REFUSED = {
    "too long": ([[1], [1] * 11], ValueError, "sequences[1] has 11 steps, but the longest plan has room for 10"),
    "features": ([[1], np.zeros((2, 5))], ValueError, "sequences[1]['x'] must have shape [L, 3] for its L steps, got"),
    "no time": (
        [{"x": 1.0, "number": 1}],
        ValueError,
        "sequences[0]['number'] must have shape [L] for its L steps, got",
    ),
    "dtype": ([np.zeros((2, F), complex)], TypeError, "sequences[0]['x'] has dtype complex128"),
    "steps": (
        [{"x": np.zeros((2, F)), "number": np.zeros(3, int)}],
        ValueError,
        "the same number of steps, got [3, 2]",
    ),
    "structure": ([{"x": np.zeros((2, F))}], ValueError, "sequences[0] has the structure PyTreeDef({'x': *})"),
    "no list": ({"x": np.zeros((2, F))}, TypeError, "a server takes a list of sequences, got dict"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_names_the_sequence_and_what_would_be_right(server, case):
    sequences, error, message = REFUSED[case]
    if isinstance(sequences, list):
        sequences = [bare if isinstance(bare, dict) else request(bare) for bare in sequences]
    with pytest.raises(error, match=re.escape(message)):
        server(sequences)


def request(x):
    """A request that is right but for `x`; a list stands for its steps."""
    x = np.zeros((len(x), F)) if isinstance(x, list) else x
    return {"x": x, "number": np.zeros(np.shape(x)[:1], int)}


def test_a_sequence_too_long_is_told_the_way_out(server):
    with pytest.raises(ValueError, match=re.escape("jaxpack.plan_padded(1, 11)")):
        server([request([0] * 11)])


def test_lists_of_numbers_are_a_sequence_where_one_array_is_expected(small):
    np.testing.assert_allclose(small([[[1, 2, 3], [4, 5, 6]]])[0], [7.5, 10.5, 13.5])
    with pytest.raises(ValueError, match=r"sequences\[0\] is a nested list whose rows have different lengths"):
        small([[[1, 2, 3], [4, 5]]])


def test_results_may_be_of_fewer_steps_than_the_request():
    def every_second(_, packed):
        plan = packed.plan
        half = plan_padded(plan.num_sequences, plan.max_length // 2)
        padded, _ = jaxpack.pad_packed_sequence(packed, batch_first=True)
        return jaxpack.pack_padded_sequence(padded[:, 1::2], packed.lengths // 2, True, plan=half)

    results = Server(every_second, None, [plan_padded(3, 4)], np.zeros(1))([np.arange(4.0), np.arange(3.0), []])
    assert [result.tolist() for result in results] == [[1, 3], [1], []]


WRONG: dict[str, tuple[Callable, Any, Any, type[Exception], str]] = {
    "no plan": (answer, [], EXAMPLE, ValueError, "plans is empty"),
    "one plan": (answer, LONG, EXAMPLE, TypeError, "plans must be a sequence of BucketPlans, got BucketPlan"),
    "no plans": (answer, [LONG, 3], EXAMPLE, TypeError, "plans must hold BucketPlans, got int as plans[1]"),
    "no example": (answer, PLANS, (), ValueError, "example must hold at least one array"),
    "a list": (answer, PLANS, {"x": [1.0]}, TypeError, "example['x'][0] must be an array or a jax.ShapeDtypeStruct"),
    "no time": (answer, PLANS, np.float32(1), ValueError, "example must have a leading time axis"),
    "layers first": (lambda p, x: LAYER.apply(p, x)[1][0], PLANS, EXAMPLE["x"], ValueError, "jnp.moveaxis(h_n, 1, 0)"),
    "padded": (
        lambda p, x: jaxpack.pad_packed_sequence(x, True)[0],
        PLANS,
        EXAMPLE["x"],
        ValueError,
        "a sequence's result must not depend on the plan",
    ),
    "nothing": (lambda p, x: None, PLANS, EXAMPLE["x"], ValueError, "must return at least one array"),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_served_is_refused_at_once(params, case):
    function, plans, example, error, message = WRONG[case]
    with pytest.raises(error, match=re.escape(message)):
        Server(function, params, plans, example)


def test_plans_are_the_cheapest_first_and_each_once():
    wide, narrow = plan_padded(3, 4), plan_padded(1, 4)
    server = Server(lambda _, packed: jaxpack.last(packed), None, [wide, narrow, wide], np.zeros(1))
    assert server.plans == (narrow, wide)
    assert (server.max_length, server.batch_size) == (4, 3)
    assert repr(server) == "Server(2 plans, max_length=4, batch_size=3)"


LOADED = """
import sys
import numpy as np
from jaxpack.serving import Server, counted_compilations

requests = np.load(sys.argv[2])
requests = [{"x": requests[f"x{i}"], "number": requests[f"n{i}"]} for i in range(len(requests.files) // 2)]
server = Server.load(sys.argv[1])
with counted_compilations() as compiled:
    results = server(requests)
np.savez(sys.argv[3], compiled=len(compiled), **{f"s{i}": r["state"] for i, r in enumerate(results)})
"""


def test_another_process_serves_what_was_saved_without_the_model(server, params, tmp_path):
    requests = requests_of([4, 10, 0, 7, 3, 3])
    server.save(tmp_path / "server")
    arrays = {f"x{i}": request["x"] for i, request in enumerate(requests)}
    np.savez(tmp_path / "in.npz", **arrays, **{f"n{i}": request["number"] for i, request in enumerate(requests)})
    script = [sys.executable, "-c", LOADED, tmp_path / "server", tmp_path / "in.npz", tmp_path / "out.npz"]
    subprocess.run(script, check=True, env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"})
    found = np.load(tmp_path / "out.npz")
    assert found["compiled"] == 0
    for i, result in enumerate(server(requests)):
        np.testing.assert_allclose(found[f"s{i}"], result["state"], atol=1e-12)


def test_a_loaded_server_is_the_saved_one(small, tmp_path):
    sequences = [np.random.default_rng(i).standard_normal((i, F)).astype(np.float32) for i in (3, 0, 2, 4, 1)]
    small.save(tmp_path / "a", platforms=["cpu", "cuda"])
    with counted_compilations() as compiled:
        loaded = Server.load(tmp_path / "a", cost_model=CostModel(step=1))
    assert len(compiled) == len(small.plans) == len(loaded.plans)
    loaded.save(tmp_path / "b")
    again = Server.load(tmp_path / "b")
    with counted_compilations() as compiled:
        results = [each(sequences) for each in (small, loaded, again)]
    assert not compiled
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])
    with pytest.raises(ValueError, match="the longest plan has room for 4"):
        loaded([np.zeros((5, F))])


MANIFEST, WEIGHTS, PROGRAM = "manifest.json", "weights.msgpack", "plan-000.jaxexport"


@pytest.fixture(scope="module")
def folders(small, tmp_path_factory):
    """Two servers on disk, the second of other sequences and parameters."""
    folder = tmp_path_factory.mktemp("servers")
    small.save(folder / "small")
    weight = np.ones(2, np.float32)
    other = Server(lambda w, x: w[0] * jaxpack.segment_sum(x), weight, [plan_padded(1, 1)], np.zeros(1))
    other.save(folder / "other")
    return folder / "small", folder / "other"


def truncated(path):
    path.write_bytes(path.read_bytes()[:-9])


def listed(path, data=None):
    """The manifest gives the checksum of what is there now, as if it had been saved so."""
    if data is not None:
        path.write_bytes(data)
    manifest = json.loads((path.parent / MANIFEST).read_text())
    manifest["sha256"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    (path.parent / MANIFEST).write_text(json.dumps(manifest))


def edited(**entries):
    """A manifest with other entries; None: without one."""

    def damage(folder, other):
        manifest = json.loads((folder / MANIFEST).read_text()) | entries
        (folder / MANIFEST).write_text(json.dumps({key: value for key, value in manifest.items() if value is not None}))

    return damage


def manifest_of(data):
    return lambda folder, other: (folder / MANIFEST).write_bytes(data)


SETTINGS = {"x64": False, "cost_model": dataclasses.asdict(COSTS)}
DAMAGES = {
    "truncated program": (PROGRAM, lambda folder, other: truncated(folder / PROGRAM)),
    "empty program": (PROGRAM, lambda folder, other: (folder / PROGRAM).write_bytes(b"")),
    "missing program": (PROGRAM, lambda folder, other: (folder / PROGRAM).unlink()),
    "program is a folder": (PROGRAM, lambda folder, other: [(folder / PROGRAM).unlink(), (folder / PROGRAM).mkdir()]),
    "another's program": (PROGRAM, lambda folder, other: shutil.copy(other / PROGRAM, folder)),
    "another's program, listed": (PROGRAM, lambda folder, other: listed(Path(shutil.copy(other / PROGRAM, folder)))),
    "no program, listed": (PROGRAM, lambda folder, other: listed(folder / PROGRAM, b"no program")),
    "empty program, listed": (PROGRAM, lambda folder, other: listed(folder / PROGRAM, b"")),
    "no packed batch": (PROGRAM, lambda folder, other: listed(folder / PROGRAM, exported())),
    "truncated weights": (WEIGHTS, lambda folder, other: truncated(folder / WEIGHTS)),
    "missing weights": (WEIGHTS, lambda folder, other: (folder / WEIGHTS).unlink()),
    "no weights, listed": (WEIGHTS, lambda folder, other: listed(folder / WEIGHTS, b"no weights")),
    "other weights, listed": (PROGRAM, lambda folder, other: listed(Path(shutil.copy(other / WEIGHTS, folder)))),
    "another's manifest": (PROGRAM, lambda folder, other: shutil.copy(other / MANIFEST, folder)),
    "truncated manifest": (MANIFEST, lambda folder, other: truncated(folder / MANIFEST)),
    **{
        f"manifest {data!r}": (MANIFEST, manifest_of(data))
        for data in (b"", b"\xff\xfe", b"[]", b"null", b"{}", b"server")
    },
    **{f"no {key}": (MANIFEST, edited(**{key: None})) for key in ("format", "jax", "settings", "sha256")},
    "further key": (MANIFEST, edited(more=1)),
    "no files": (MANIFEST, edited(sha256={})),
    "a list of files": (MANIFEST, edited(sha256=[PROGRAM, WEIGHTS])),
    "only weights": (MANIFEST, edited(sha256={WEIGHTS: ""})),
    "other files": (MANIFEST, edited(sha256={WEIGHTS: "", "../" + PROGRAM: ""})),
    "other checksums": (PROGRAM, edited(sha256={WEIGHTS: 1, PROGRAM: None})),
    "settings of no kind": (MANIFEST, edited(settings=[])),
    "no x64": (MANIFEST, edited(settings={"cost_model": SETTINGS["cost_model"]})),
    "x64 of no kind": (MANIFEST, edited(settings=SETTINGS | {"x64": "no"})),
    "other costs": (MANIFEST, edited(settings=SETTINGS | {"cost_model": {"price": 1}})),
    "costs of no kind": (MANIFEST, edited(settings=SETTINGS | {"cost_model": {"cell": "dear"}})),
    "costs out of range": (MANIFEST, edited(settings=SETTINGS | {"cost_model": {"cell": -1}})),
}


def exported():
    return bytes(jax.export.export(jax.jit(lambda x, y: x))(1, 2).serialize())


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_folder_is_refused_by_the_name_of_the_file(folders, tmp_path, case):
    name, damage = DAMAGES[case]
    folder = shutil.copytree(folders[0], tmp_path / "server")
    damage(folder, folders[1])
    with pytest.raises(ValueError, match=re.escape(str(folder / name))):
        Server.load(folder)


def test_a_program_that_is_not_what_was_saved_and_another_format_are_told_apart(folders, tmp_path):
    folder = shutil.copytree(folders[0], tmp_path / "server")
    truncated(folder / PROGRAM)
    with pytest.raises(ValueError, match=r"plan-000\.jaxexport does not have the checksum in manifest\.json"):
        Server.load(folder)
    edited(format=7)(folder, None)
    with pytest.raises(ValueError, match=f"{re.escape(str(folder))} has format 7, but this jaxpack reads 1"):
        Server.load(folder)


@pytest.mark.parametrize("case", ["no folder", "empty folder", "a file"])
def test_where_there_is_no_server_the_error_names_the_folder(folders, tmp_path, case):
    folder = tmp_path / "server"
    if case == "empty folder":
        folder.mkdir()
    elif case == "a file":
        shutil.copy(folders[0] / MANIFEST, folder)
    for kind in (FileNotFoundError, ValueError):
        with pytest.raises(kind, match=f"{re.escape(str(folder))} .* not a server that Server\\.save wrote"):
            Server.load(folder)


@pytest.mark.parametrize("half", [False, True], ids=["", "in the middle of a file"])
@pytest.mark.parametrize("after", range(4))
def test_a_save_that_fails_leaves_no_server(small, folders, tmp_path, monkeypatch, after, half):
    folder = shutil.copytree(folders[1], tmp_path / "server")
    left = [after]

    def failing(write):
        def fail(path, *arguments, **options):
            left[0] -= 1
            if left[0] < 0:
                if half and hasattr(arguments[0], "__len__"):
                    write(path, arguments[0][: len(arguments[0]) // 2], **options)
                raise OSError("disk full")
            return write(path, *arguments, **options)

        return fail

    for name in ("write_bytes", "write_text", "replace"):
        monkeypatch.setattr(Path, name, failing(getattr(Path, name)))
    with pytest.raises(OSError, match="disk full"):
        small.save(folder)
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match=r"has no manifest\.json"):
        Server.load(folder)


def test_a_prng_key_is_not_saved(tmp_path):
    server = Server(lambda _, x: jaxpack.segment_sum(x), jax.random.key(0), [plan_padded(1, 1)], np.zeros(1))
    with pytest.raises(TypeError, match=r"PRNG key of shape \(\)"):
        server.save(tmp_path)


def test_saving_without_flatbuffers_names_the_extra(small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    for use in (small.save, Server.load):
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'jaxpack\[serving\]'"):
            use(tmp_path)
