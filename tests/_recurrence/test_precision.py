"""Mixed precision: products of bfloat16, and float32 for everything that is carried or summed over steps.

`PYTHONPATH=.:tests python tests/_recurrence/test_precision.py` writes the table of the guide anew.
"""

import functools
import pathlib
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import nnx

import jaxpack
from jaxpack import GRU, LSTM, RNN, plan_padded
from jaxpack.interop import to_nnx

B, F, H, T = 4, 16, 16, 512
LAYERS = {
    "RNN": RNN(F, H),
    "LSTM": LSTM(F, H),
    "LSTM, projected": LSTM(F, H, proj_size=8),
    "GRU": GRU(F, H),
    "GRU, reset before": GRU(F, H, reset_after=False),
    "MGU": jaxpack.MGU(F, H),
    "PeepholeLSTM": jaxpack.PeepholeLSTM(F, H),
    "LayerNormLSTM": jaxpack.LayerNormLSTM(F, H),
    "LayerNormGRU": jaxpack.LayerNormGRU(F, H),
    "IndRNN": jaxpack.IndRNN(F, H),
}
# Norms divide by deviations that are small where little is remembered, and relu has a kink: rounding of the weights
# alone moves their gradients by more than bfloat16 rounds.
SENSITIVE = ("LayerNormLSTM", "LayerNormGRU", "IndRNN")
LINEAR = {
    "LRU": jaxpack.LRU(F, H),
    "MinGRU": jaxpack.MinGRU(F, H),
    "RGLRU": jaxpack.RGLRU(F, H, num_heads=2),
    "Mamba2": jaxpack.Mamba2(F, H, head_size=8, state_size=8),
    "GatedDeltaNet": jaxpack.GatedDeltaNet(F, H, 2, key_size=8),
    "MLSTM": jaxpack.MLSTM(F, H, 2, block_size=4),
}
ALL: dict[str, Any] = {**LAYERS, **LINEAR}
KINDS = {
    "RNN": "tanh",
    "GRU": "gru",
    "GRU, reset before": "gru before",
    "MGU": "mgu",
    "PeepholeLSTM": "peephole",
    "LayerNormLSTM": "layer_norm_lstm",
    "LayerNormGRU": "layer_norm_gru",
    "IndRNN": "ind_rnn",
}
FLAX = {"LSTM": nnx.OptimizedLSTMCell, "GRU": nnx.GRUCell}
HALF, SINGLE, DOUBLE = jnp.dtype("bfloat16"), jnp.dtype("float32"), jnp.dtype("float64")
STEPS = (32, 512)
MODES = ("mixed", "bfloat16", "flax")
GUIDE = pathlib.Path(__file__).parents[2] / ".docs" / "guide" / "speed.md"
_TABLE = re.compile(r"(?<=<!-- precision -->\n\n).*?(?=\n\n<!-- end -->)", re.DOTALL)


class Errors(NamedTuple):
    """Relative errors ||found - exact|| / ||exact||, the largest of all arrays: of outputs and of both gradients."""

    outputs: float
    inputs: float
    weights: float


def long_memory(layer, steps):
    """Parameters whose gates keep the state for 1 to `steps` steps (chrono initialisation, Tallec & Ollivier 2018).

    The rates of linear layers are drawn for long memories anyway.
    """
    if layer in LINEAR.values():
        return layer.init(jax.random.key(0), SINGLE)
    params = layer.init(jax.random.key(0), SINGLE)["l0"]
    keep = jnp.log(np.random.default_rng(1).uniform(1, steps - 1, H)).astype(SINGLE)
    zeros = jnp.zeros_like(keep)
    by_gates = {2: [-keep, zeros], 3: [zeros, keep, zeros], 4: [-keep, keep, zeros, zeros]}
    biases = by_gates.get(len(layer.cell.gates), [zeros])
    # Flax has one bias.
    return {"l0": params | {"bias_ih": jnp.concatenate(biases), "bias_hh": jnp.zeros_like(params["bias_hh"])}}


def batch(layer, steps):
    """Inputs [B, T, F], and a cotangent of the outputs that is zero after `steps`; both exact in bfloat16."""
    rng = np.random.default_rng(2)
    x, weights = rng.normal(size=(B, T, F)), 1 + rng.normal(size=(B, T, layer.output_size))
    weights[:, steps:] = 0
    return (jnp.asarray(jnp.asarray(each, HALF), SINGLE) for each in (x, weights))


@functools.cache
def differentiated(name, mode):
    """A jitted function of (params, x, cotangent) that returns outputs and the gradients by params and x.

    Args:
      name: of a layer.
      mode: "float64", by the equations, of linear layers by the layer itself, whose contract compares it with them;
        "mixed"; "bfloat16", with all arrays; "flax" in mixed precision, or "flax64".
    """
    layer = ALL[name]

    def exact(params, sequence):
        if name in LINEAR:
            return layer.apply(params, sequence)[0]
        state = tuple(np.zeros((1, size)) for size in jax.tree.leaves(layer.cell.state_sizes))
        return oracles.scanned(
            functools.partial(oracles.cell_step, KINDS.get(name, "lstm"), xp=jnp), params, sequence, state
        )[0]

    def flax(dtype, params_dtype):
        rnn = nnx.RNN(FLAX[name](F, H, dtype=dtype, param_dtype=params_dtype, rngs=nnx.Rngs(0)))
        graph, _, other = nnx.split(rnn, nnx.Param, ...)
        return lambda params, x: nnx.merge(graph, params, other, copy=True)(x)

    run: Any = {
        "float64": lambda params, x: jax.vmap(exact, (None, 0))(params, x),
        "mixed": lambda params, x: layer.apply(params, x, dtype=HALF)[0],
        "bfloat16": lambda params, x: layer.apply(params, x)[0],
        "flax": flax(HALF, SINGLE) if name in FLAX else None,
        "flax64": flax(DOUBLE, DOUBLE) if name in FLAX else None,
    }[mode]

    def loss(params, x, cotangent):
        outputs = run(params, x)
        return jnp.sum(outputs * cotangent.astype(outputs.dtype), dtype=DOUBLE), outputs

    return jax.jit(jax.grad(loss, (0, 1), has_aux=True))


def errors(name, mode, steps):
    """Compares a mode with float64, on weights, inputs and cotangents that are the same but for their dtype."""
    layer, exact = ALL[name], "flax64" if mode == "flax" else "float64"
    params, (x, cotangent) = long_memory(layer, steps), batch(layer, steps)
    if mode == "flax":
        rnn = nnx.RNN(FLAX[name](F, H, param_dtype=SINGLE, rngs=nnx.Rngs(0)))
        nnx.update(rnn, to_nnx(layer, params)[0])
        params = nnx.state(rnn, nnx.Param)
    dtype = HALF if mode == "bfloat16" else SINGLE

    def run(mode, dtype):
        cast = jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.dtype == SINGLE else leaf, (params, x, cotangent))
        (by_params, by_x), outputs = differentiated(name, mode)(*cast)
        return outputs[:, :steps], by_x[:, :steps], by_params

    return Errors(*map(_largest, run(mode, dtype), run(exact, DOUBLE)))


def errors_of_rounded_weights(name, steps):
    """Returns the errors in float64 of matrices that are rounded to bfloat16, as they are in any mixed precision."""
    single = long_memory(ALL[name], steps), *batch(ALL[name], steps)
    params, *given = jax.tree.map(lambda leaf: leaf.astype(DOUBLE), single)
    rounded = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf.astype(HALF).astype(DOUBLE) if "weight" in path[-1].key else leaf, params
    )

    def run(params):
        (by_params, by_x), outputs = differentiated(name, "float64")(params, *given)
        return outputs[:, :steps], by_x[:, :steps], by_params

    return Errors(*map(_largest, run(rounded), run(params)))


def _largest(found, exact):
    leaves = [[np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)] for tree in (found, exact)]
    return max(np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(*leaves, strict=True) if np.any(b))


def in_guide():
    """Returns the errors of the guide's table by layer, mode and steps."""
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in _TABLE.findall(GUIDE.read_text())[0].splitlines()
    ]
    return {
        (name, mode, steps): Errors(*(float(number) for number in cell.split(" / ")))
        for name, mode, *cells in rows[2:]
        for steps, cell in zip(STEPS, cells, strict=True)
    }


@pytest.mark.parametrize("name", SENSITIVE)
def test_errors_of_sensitive_cells_are_no_more_than_those_of_rounded_weights(name, x64):
    for steps in STEPS:
        found, said = errors(name, "mixed", steps), in_guide()[name, "mixed", steps]
        for each in (found, said):
            np.testing.assert_array_less(each, 3 * np.array(errors_of_rounded_weights(name, steps)))


@pytest.mark.parametrize("name", [name for name in LAYERS if name not in SENSITIVE])
def test_errors_of_mixed_precision_do_not_grow_with_steps_and_are_those_of_the_guide(name, x64):
    for steps in STEPS:
        found, said = errors(name, "mixed", steps), in_guide()[name, "mixed", steps]
        assert max(found) < 0.005  # bfloat16 rounds by 0.004; sums over 512 steps in it are wrong by 0.05 to 0.3
        np.testing.assert_array_less(found, 2 * np.array(said))
        np.testing.assert_array_less(said, 2 * np.array(found))


@pytest.mark.parametrize("name", LINEAR)
def test_errors_of_linear_layers_in_mixed_precision_are_those_of_the_guide(name, x64):
    for steps in STEPS:
        found, said = errors(name, "mixed", steps), in_guide()[name, "mixed", steps]
        assert found.outputs < 0.015
        np.testing.assert_array_less(found[:2], 2 * np.array(said[:2]))
        np.testing.assert_array_less(said[:2], 2 * np.array(found[:2]))
        assert found.weights < 3 * said.weights  # the largest is of a gate's bias, in which much cancels


def test_forward_mode_and_second_derivatives_agree_in_mixed_precision():
    layer, lengths = LSTM(F, H, proj_size=8), [7, 5, 3, 1]
    x = oracles.random_batch(lengths, F, dtype=np.float32)
    params = layer.init(jax.random.key(0))

    def gradient(forward_mode, dtype):
        def loss(params):
            options = {"lengths": lengths, "plan": plan_padded(B, 7), "forward_mode": forward_mode, "dtype": dtype}
            leaves = jax.tree.leaves(layer.apply(params, x, **options))
            return sum(jnp.sum(jnp.sin(leaf.astype(SINGLE))) for leaf in leaves)

        return jax.grad(loss)

    def with_second(run):
        return jax.jit(lambda params: jax.jvp(run, (params,), (params,)))(params)

    exact, exact_tangent = with_second(gradient(True, SINGLE))
    fast, tangent = with_second(gradient(False, HALF))
    plain = jax.jit(gradient(True, HALF))(params)
    for found, expected in ((fast, exact), (tangent, exact_tangent), (plain, exact)):
        assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {SINGLE}
        flat = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (found, expected))
        assert _largest(*flat) < 0.02


def _write():
    """Writes the guide's table anew."""
    lines = ["| layer | arrays | 32 steps: outputs / by inputs / by weights | 512 steps |", "|---|---|---|---|"]
    for name, mode in ((name, mode) for name in ALL for mode in MODES if mode != "flax" or name in FLAX):
        each = (" / ".join(f"{error:.4f}" for error in errors(name, mode, steps)) for steps in STEPS)
        lines.append(f"| {name} | {mode} | {' | '.join(each)} |")
    table = "\n".join(lines)
    GUIDE.write_text(_TABLE.sub(lambda _: table, GUIDE.read_text()))


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    _write()
