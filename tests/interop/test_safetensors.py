"""Weights in safetensors files: round trips, PyTorch's files, refusals; nothing is unpickled."""

import pickle
import sys

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from jaxpack import GRU, LSTM, RNN
from jaxpack.interop import load_safetensors, save_safetensors

F, H = 3, 4
LAYERS = [
    RNN(F, H, nonlinearity="relu", bias=False),
    LSTM(F, H, num_layers=2, bidirectional=True, proj_size=2),
    GRU(F, H, num_layers=2),
]
each_layer = pytest.mark.parametrize("layer", LAYERS, ids=str)


@pytest.fixture
def safetensors():
    return pytest.importorskip("safetensors", reason="safetensors, of the extra interop, is not installed")


@each_layer
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_parameters_come_back_bit_for_bit(layer, dtype, tmp_path, safetensors):
    params = oracles.random_params(layer, dtype)
    save_safetensors(tmp_path / "rnn.safetensors", layer, params)
    back = load_safetensors(str(tmp_path / "rnn.safetensors"), layer)
    assert jax.tree.map(lambda leaf: leaf.dtype, back) == jax.tree.map(lambda leaf: jnp.dtype(dtype), params)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_float64_comes_back_under_x64_and_is_refused_without(tmp_path, safetensors):
    layer, path = GRU(F, H), tmp_path / "rnn.safetensors"
    with jax.enable_x64(True):
        params = oracles.random_params(layer)
        save_safetensors(path, layer, params)
        jax.tree.map(np.testing.assert_array_equal, load_safetensors(path, layer), params)
    with pytest.raises(ValueError, match=r"rnn.safetensors: .* has dtype float64, which JAX would round. .*enable_x64"):
        load_safetensors(path, layer)


@oracles.needs_torch
def test_torch_reads_the_file_and_we_read_torchs(tmp_path, safetensors):
    torch, files = oracles.torch, pytest.importorskip("safetensors.torch")
    layer, path = LSTM(F, H, bidirectional=True), tmp_path / "rnn.safetensors"
    params = oracles.random_params(layer)
    save_safetensors(path, layer, params)
    module = torch.nn.LSTM(F, H, bidirectional=True, batch_first=True)
    module.load_state_dict(files.load_file(path))
    x = oracles.random_batch([5, 5], F, dtype=np.float32)
    with torch.no_grad():
        expected, _ = module(torch.from_numpy(x))
    np.testing.assert_allclose(layer.apply(params, x)[0], expected.numpy(), atol=1e-6)
    model = torch.nn.ModuleDict({"rnn": module.to(torch.bfloat16), "head": torch.nn.Linear(2 * H, 2)})
    files.save_file(model.state_dict(), path)
    loaded = load_safetensors(path, layer, prefix="rnn.")
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    jax.tree.map(np.testing.assert_array_equal, loaded, rounded)


def write(path, layer, prefix="", **extra):
    numpy_files = pytest.importorskip("safetensors.numpy")
    state_dict = layer.to_torch(oracles.random_params(layer))
    numpy_files.save_file({f"{prefix}{name}": array for name, array in state_dict.items()} | extra, path)


def test_a_prefix_picks_a_module_of_a_larger_one(tmp_path, safetensors):
    layer, path = GRU(F, H), tmp_path / "model.safetensors"
    write(path, layer, "encoder.rnn.", step=np.array(7))
    params = load_safetensors(path, layer, prefix="encoder.rnn.")
    jax.tree.map(np.testing.assert_array_equal, params, oracles.random_params(layer))
    for prefix in ("", "encoder.rnn", "decoder."):
        with pytest.raises(KeyError, match=r"which GRU.* begins with. Pass prefix= one of \['encoder.rnn.'\]"):
            load_safetensors(path, layer, prefix=prefix)


def test_wrong_keys_and_shapes_are_named(tmp_path, safetensors):
    path = tmp_path / "rnn.safetensors"
    write(path, GRU(F, H, num_layers=2))
    with pytest.raises(KeyError, match=r"not known \['bias_hh_l1'"):
        load_safetensors(path, GRU(F, H))
    write(path, GRU(F, H))
    with pytest.raises(KeyError, match=r"missing \['weight_ih_l1'"):
        load_safetensors(path, GRU(F, H, num_layers=2))
    with pytest.raises(ValueError, match=r"state_dict\['weight_ih_l0'\] must have shape \(16, 3\), got \(12, 3\)"):
        load_safetensors(path, LSTM(F, H))
    pytest.importorskip("safetensors.numpy").save_file({"head.weight": np.ones(2)}, path)
    with pytest.raises(KeyError, match=r"has no 'weight_ih_l0', .* It holds \['head.weight'\]"):
        load_safetensors(path, GRU(F, H))


def test_other_dtypes_are_refused(tmp_path, safetensors):
    layer, path = RNN(F, H), tmp_path / "rnn.safetensors"
    write(path, layer, weight_hh_l0=np.ones((H, H), np.int8))
    with pytest.raises(TypeError, match=r"weight_hh_l0 has dtype I8, but must have one of F64, F32, F16, BF16"):
        load_safetensors(path, layer)


class Trap:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["m.pt", "m.PTH", "pytorch_model.bin", "m.ckpt", "m.pkl"])
def test_pickles_are_refused_and_never_run(name, tmp_path):
    path, sprung = tmp_path / name, tmp_path / "sprung"
    path.write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(ValueError, match=r"is a pickle, .*torch.load\(.*weights_only=True\), '.*\.safetensors'\)"):
        load_safetensors(path, GRU(F, H))
    with pytest.raises(ValueError, match=r"would be taken for a pickle, which it is not. Name it .*\.safetensors"):
        save_safetensors(path, GRU(F, H), oracles.random_params(GRU(F, H)))
    assert not sprung.exists()


def test_pickles_by_another_name_and_damaged_files_are_refused(tmp_path, safetensors):
    path, sprung = tmp_path / "m.safetensors", tmp_path / "sprung"
    write(tmp_path / "good.safetensors", GRU(F, H))
    good = (tmp_path / "good.safetensors").read_bytes()
    for content in (pickle.dumps(Trap(sprung)), b"", b"PK\x03\x04" + bytes(99), good[:-9]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"m.safetensors is not a safetensors file, or is damaged: "):
            load_safetensors(path, GRU(F, H))
    assert not sprung.exists()
    with pytest.raises(FileNotFoundError):
        load_safetensors(tmp_path / "absent.safetensors", GRU(F, H))


def test_foreign_and_traced_parameters_are_not_written(tmp_path, safetensors):
    layer, path = GRU(F, H), tmp_path / "rnn.safetensors"
    with pytest.raises(TypeError, match=r"l0.weight_ih is missing"):
        save_safetensors(path, layer, {})
    with pytest.raises(TypeError, match=r"params\['l0'\]\['bias_hh'\] is traced"):
        jax.jit(lambda params: save_safetensors(path, layer, params))(oracles.random_params(layer))
    for call in (lambda layer: save_safetensors(path, layer, {}), lambda layer: load_safetensors(path, layer)):
        with pytest.raises(TypeError, match=r"layer must be a jaxpack.RNN, LSTM or GRU, got str"):
            call("GRU")
    assert not path.exists()


def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "safetensors"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [_Absent(), *sys.meta_path])
    layer, path = GRU(F, H), tmp_path / "rnn.safetensors"
    way_out = r"pip install 'jaxpack\[interop\]'"
    with pytest.raises(ImportError, match=way_out):
        save_safetensors(path, layer, oracles.random_params(layer))
    with pytest.raises(ImportError, match=way_out):
        load_safetensors(path, layer)


class _Absent:
    """An import finder that knows no safetensors."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "safetensors":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
