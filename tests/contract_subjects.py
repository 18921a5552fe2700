"""The subjects of the contract: layers, stacks, drop-ins and users' steps, each as pure functions.

One joins by an entry in `LAYERS`, `FLAX`, `STEPS`, `LINEAR`, `MATRIX`, `STEPPED` or `DEEP`. A module of Flax that hands
its parameters to a layer joins by an entry in `MODULES`: it runs the layer's program, and so keeps what the layer
promises.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracles
from flax import nnx
from flax_apis import APIS, F, H
from matrix_oracles import matrix_step
from own_cell import LeakyRNN
from stepped_oracles import stepped_step

import jaxpack
import jaxpack.linen
import jaxpack.nnx
from jaxpack import GRU, LSTM, MGU, RNN, BucketPlan, IndRNN, LayerNormGRU, LayerNormLSTM, PeepholeLSTM

B, T = 3, 6
TORCHS = ("tanh", "relu", "lstm", "gru")  # the equations that PyTorch has


class Call(NamedTuple):
    """One way to call a subject.

    Attributes:
      plan: the plan, or None for lengths alone.
      packed: whether inputs are packed under it, or padded and given beside it.
      misfits: lengths of which the second does not fit, and the others do.
    """

    plan: BucketPlan | None
    packed: bool
    misfits: tuple[tuple[int, ...], ...] = ()


CALLS = {
    "exact": Call(jaxpack.plan_exact([5, 3, 3]), True, ((3, 6, 2),)),
    "buckets": Call(BucketPlan((4, 6), (3, 2)), True, ((6, 5, 6),)),
    "padded": Call(jaxpack.plan_padded(B, T), False),
    "rows": Call(BucketPlan((9,), (2,), ((0, 5), (0,))), True, ((6, 6, 1),)),
    "none": Call(None, False),
}
# An exact plan is a staircase, as "buckets" is, so one subject of each kind runs under it.
# Layers that differ from another by their cell alone. A padded plan, a staircase of one bucket, has nothing new
# for them, and neither has a mask.
ALIKE = (
    *("GRU, reset before", "MGU", "PeepholeLSTM", "LayerNormLSTM", "LayerNormGRU", "LRU", "MinGRU", "Mamba2", "MLSTM"),
    *("ConvGRU", "SLSTM", "CfC", "TimeDecay"),
)
EXACT = ("LSTM bidirectional", "linen.RNN(MGUCell)", "log_step", "MinLSTM", "GatedDeltaNet")


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """Something recurrent as pure functions.

    Attributes:
      params: float64 parameters.
      run: run(params, inputs, state, **options) -> (outputs, final state), for packed inputs, or padded ones with
        options lengths and plan. Leaves of states are [B, ...], outputs are laid out as the inputs. Another option is
        forward_mode, where `own_derivative` is set.
      state: zeros for the state of one sequence.
      one: one(params, xs, state) -> (ys, final state), for one sequence [L, F], by equations that are not jaxpack's.
      layer: the layer of jaxpack that computes the same, where PyTorch has it: its module is the oracle.
      plain: the parameters, or their gradient, as that layer takes them.
      own_derivative: whether forward mode has to be asked for.
      backward: bools that broadcast to the state, True in the states of directions that read from the end.
      takes_fresh: whether a reset may return to another state than the initial one.
    """

    params: Any
    run: Callable[..., tuple[Any, Any]]
    state: Any
    one: Callable[..., tuple[Any, Any]]
    layer: Any = None
    plain: Callable[[Any], Any] = lambda params: params
    own_derivative: bool = True
    backward: Any = None
    takes_fresh: bool = False

    @functools.cached_property
    def output(self):
        """Zeros for the outputs of one step."""
        xs = np.zeros((1, F))
        shapes, _ = jax.eval_shape(self.one, self.params, xs, self.state)
        return jax.tree.map(lambda leaf: np.zeros(leaf.shape[1:]), shapes)


def _swapped(state):
    """A layer's state [num_layers * D, B, H] with its batch first, and back."""
    return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), state)


def _layer_subject(kind, layer, params, apply, plain=lambda params: params):
    def run(params, inputs, state, fresh_state=None, **options):
        if fresh_state is not None:
            options["fresh_state"] = _swapped(fresh_state)
        outputs, final = apply(params, inputs, _swapped(state), **options)
        return outputs, _swapped(final)

    def one(params, xs, state):
        pair = isinstance(state, tuple)
        step = functools.partial(oracles.cell_step, kind, xp=jnp)
        ys, final = oracles.scanned(step, plain(params), xs, state if pair else (state,))
        return ys, final if pair else final[0]

    count = layer.num_layers * layer.num_directions
    state = jax.tree.map(lambda size: np.zeros((count, size)), layer.cell.state_sizes)
    reads_backward = np.arange(count)[:, None] % 2 == layer.num_directions - 1
    backward = jax.tree.map(lambda _: reads_backward & layer.bidirectional, layer.cell.state_sizes)
    torch_layer = layer if kind in TORCHS else None
    return Subject(params, run, state, one, torch_layer, plain, backward=backward, takes_fresh=True)


def of_layer(kind, layer):
    """A layer of jaxpack.

    Args:
      kind: the name of its equations in `oracles.cell_step`.
    """
    return _layer_subject(kind, layer, oracles.random_params(layer), layer.apply)


def of_stack(kind, api, module, layer):
    """A stack of Flax.

    Args:
      api: "linen" or "nnx".
      module: makes the stack.
      layer: what it is a stack of.
    """
    apply, params = APIS[api].pure(module(), jit=False)

    def run(params, inputs, state, lengths=None, **options):
        return apply(params, inputs, state, seq_lengths=lengths, **options)

    def plain(params):
        return params["params"] if api == "linen" else nnx.to_pure_dict(params)

    return _layer_subject(kind, layer, params, run, plain)


def of_dropin(api, *cells):
    """A drop-in RNN over a cell of Flax, or Bidirectional over two; Flax's own is the oracle."""
    face = APIS[api]
    options = {"return_carry": True}

    def module(part):
        rnns = [part.RNN(face.cell(cell), **(options if len(cells) == 1 else {})) for cell in cells]
        return rnns[0] if len(rnns) == 1 else part.Bidirectional(*rnns, **options)

    apply, params = face.pure(module(face.ours), jit=False)
    flax_apply, _ = face.pure(module(face.flax), jit=False)

    def run(params, inputs, state, lengths=None, **options):
        final, outputs = apply(params, inputs, initial_carry=state, seq_lengths=lengths, **options)
        return outputs, final

    def one(params, xs, state):
        carry = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], state)
        final, outputs = flax_apply(params, jnp.asarray(xs)[None], initial_carry=carry)
        return outputs[0], jax.tree.map(lambda leaf: leaf[0], final)

    states = [(np.zeros(H), np.zeros(H)) if "LSTM" in cell else np.zeros(H) for cell in cells]
    known = any(cell != face.unknown for cell in cells)
    state = states[0] if len(cells) == 1 else tuple(states)
    backward = None
    if len(cells) == 2:
        backward = tuple(jax.tree.map(lambda _, i=i: np.bool_(i == 1), each) for i, each in enumerate(states))
    return Subject(params, run, state, one, own_derivative=known, backward=backward)


def of_linear(kind, layer, api=None, module=None, step=oracles.linear_step, shaped=None):
    """A layer that is linear in its state or runs step by step, or a module of Flax that holds one.

    Args:
      kind: the name of its equations in `step`.
      api: "linen" or "nnx", if it is a module.
      module: makes the module.
      step: the oracle, which computes one step of one sequence.
      shaped: makes the layer's inputs of [..., F], if they have another shape.
    """
    shaped = shaped or (lambda x: x)
    params = oracles.random_params(layer)

    def of_arrays(params, inputs, state, **options):
        packed = isinstance(inputs, jaxpack.PackedSequence)
        inputs = inputs.replace(data=shaped(inputs.data)) if packed else shaped(inputs)
        return layer.apply(params, inputs, state, **options)

    apply: Any = of_arrays
    if api is not None:
        call, params = APIS[api].pure(module(), jit=False)

        def apply(params, inputs, state, lengths=None, **options):
            return call(params, inputs, state, seq_lengths=lengths, **options)

    def one(params, xs, state):
        plain = params if api is None else params["params"] if api == "linen" else nnx.to_pure_dict(params)
        final, ys = jax.lax.scan(functools.partial(step, kind, layer, plain, xp=jnp), state, shaped(xs))
        return ys, final

    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape), layer.state_like(float))
    return Subject(params, apply, state, one, own_derivative=step is oracles.linear_step, takes_fresh=True)


def of_deep(api=None):
    """A stack over two directions of different kinds, with all that stands between layers; or a module that holds it.

    Args:
      api: "linen" or "nnx", if it is a module.
    """
    both = jaxpack.Bidirectional(jaxpack.MinGRU(F, H), RNN(F, H), merge="mean")
    layers, options = [both, RNN(H, H)], {"connection": ("residual", "highway"), "norm": True}
    modules: dict[str, Any] = {
        "nnx": functools.partial(jaxpack.nnx.DeepRNN, **FLOAT64),
        "linen": functools.partial(jaxpack.linen.DeepRNN, param_dtype=float),
    }
    make: Any = modules.get(api or "", jaxpack.DeepRNN)
    layer = make(layers, **options)
    apply, params = APIS[api].pure(layer, jit=False) if api else (layer.apply, oracles.random_params(layer))

    def turned(state):  # an RNN has its batch axis behind that of layers
        (forward, backward), last = state
        return (forward, jnp.swapaxes(backward, 0, 1)), jnp.swapaxes(last, 0, 1)

    def run(params, inputs, state, fresh_state=None, **options):
        if fresh_state is not None:
            options["fresh_state"] = turned(fresh_state)
        if api and "lengths" in options:
            options["seq_lengths"] = options.pop("lengths")
        outputs, final = apply(params, inputs, turned(state), **options)
        return outputs, turned(final)

    def one(params, xs, state):
        params = params["params"] if api == "linen" else nnx.to_pure_dict(params) if api else params
        (forward, backward), last = state
        min_gru = functools.partial(oracles.linear_step, "min_gru", both.forward, params["layer_0"]["forward"], xp=jnp)
        rnn = functools.partial(oracles.cell_step, "tanh", xp=jnp)
        forward, ahead = jax.lax.scan(min_gru, forward, xs)
        from_end, (backward,) = oracles.scanned(rnn, params["layer_0"]["backward"], xs[::-1], (backward,))
        x = xs + (ahead + from_end[::-1]) / 2
        norm, gate = params["norm_1"], params["highway_1"]

        def normed(x):
            return (x - x.mean()) / jnp.sqrt(x.var() + 1e-5) * norm["scale"] + norm["bias"]

        def carried(x, y):
            t = 1 / (1 + jnp.exp(-(x @ gate["weight"] + gate["bias"])))
            return t * y + (1 - t) * x

        y, (last,) = oracles.scanned(rnn, params["layer_1"], jax.vmap(normed)(x), (last,))
        return jax.vmap(carried)(x, y), ((forward, backward), last)

    state = (np.zeros(H), np.zeros((1, H))), np.zeros((1, H))
    backward = (np.bool_(False), np.bool_(True)), np.bool_(False)
    return Subject(params, run, state, one, backward=backward, takes_fresh=True)


def of_step(step, params, state):
    """A user's step in packed_scan.

    Args:
      step: step(params, carry, x) -> (carry, y).
    """

    def run(params, packed, state, **options):
        final, outputs = jaxpack.packed_scan(functools.partial(step, params), state, packed, **options)
        return outputs, final

    def one(params, xs, state):
        final, ys = jax.lax.scan(functools.partial(step, params), state, xs)
        return ys, final

    return Subject(params, run, state, one, own_derivative=False)


def log_step(params, carry, x):
    """A recurrence with a pytree for a carry and for outputs, which would make infinities of zeros."""
    logs = jnp.log((x * params["weight"].reshape((1,) * (x.ndim - 1) + (-1,))) ** 2)
    mean = 0.5 * carry["mean"] + logs
    total = 0.9 * carry["total"] + mean.sum(-1)
    return {"mean": mean, "total": total}, {"total": total, "tanh": jnp.tanh(mean)}


LAYERS: dict[str, Callable[[], Subject]] = {
    "RNN, 2 layers, bidirectional": lambda: of_layer("tanh", RNN(F, H, num_layers=2, bidirectional=True)),
    "RNN relu": lambda: of_layer("relu", RNN(F, H, nonlinearity="relu")),
    "LSTM bidirectional": lambda: of_layer("lstm", LSTM(F, H, bidirectional=True)),
    "LSTM projected": lambda: of_layer("lstm", LSTM(F, H, proj_size=2)),
    "GRU": lambda: of_layer("gru", GRU(F, H)),
    "LeakyRNN": lambda: of_layer("leaky", LeakyRNN(F, H)),
    "GRU, reset before": lambda: of_layer("gru before", GRU(F, H, reset_after=False)),
    "MGU": lambda: of_layer("mgu", MGU(F, H)),
    "IndRNN": lambda: of_layer("ind_rnn", IndRNN(F, H)),
    "PeepholeLSTM": lambda: of_layer("peephole", PeepholeLSTM(F, H)),
    "LayerNormLSTM": lambda: of_layer("layer_norm_lstm", LayerNormLSTM(F, H)),
    "LayerNormGRU": lambda: of_layer("layer_norm_gru", LayerNormGRU(F, H)),
}
FLAX: dict[str, Callable[[], Subject]] = {
    "linen.RNN(LSTMCell)": lambda: of_dropin("linen", "LSTMCell"),
    "nnx.RNN(GRUCell)": lambda: of_dropin("nnx", "GRUCell"),
    "linen.RNN(MGUCell)": lambda: of_dropin("linen", "MGUCell"),
    "nnx.RNN(OwnCell)": lambda: of_dropin("nnx", "OwnCell"),
    "nnx.Bidirectional(SimpleCell, SimpleCell)": lambda: of_dropin("nnx", "SimpleCell", "SimpleCell"),
    "linen.Bidirectional(GRUCell, OwnCell)": lambda: of_dropin("linen", "GRUCell", "OwnCell"),
}
STEPS: dict[str, Callable[[], Subject]] = {
    "lstm_cell": lambda: of_step(
        jaxpack.lstm_cell, oracles.random_params(LSTM(F, H))["l0"], (np.zeros(H), np.zeros(H))
    ),
    "log_step": lambda: of_step(
        log_step, {"weight": np.array([0.3, -0.8, 1.2])}, {"mean": np.zeros(F), "total": np.zeros(())}
    ),
}
LINEAR: dict[str, Callable[[], Subject]] = {
    "MinLSTM": lambda: of_linear("min_lstm", jaxpack.MinLSTM(F, H)),
    "RGLRU": lambda: of_linear("rglru", jaxpack.RGLRU(F, F, num_heads=3)),
    "LRU": lambda: of_linear("lru", jaxpack.LRU(F, H + 1)),
    "MinGRU": lambda: of_linear("min_gru", jaxpack.MinGRU(F, H)),
}
MATRIX: dict[str, Callable[[], Subject]] = {
    "Mamba2": lambda: of_linear("mamba2", jaxpack.Mamba2(F, 8, **MAMBA2), step=matrix_step),
    "GatedDeltaNet": lambda: of_linear(
        "gated_delta_net", jaxpack.GatedDeltaNet(F, 4, 2, key_size=3, num_key_heads=1, kernel_size=3), step=matrix_step
    ),
    "MLSTM": lambda: of_linear("mlstm", jaxpack.MLSTM(F, 4, 2, **MLSTM), step=matrix_step),
}
STEPPED: dict[str, Callable[[], Subject]] = {
    "ConvLSTM": lambda: of_linear(
        "conv_lstm", jaxpack.ConvLSTM(1, 2, (F,)), step=stepped_step, shaped=lambda x: x[..., None]
    ),
    "ConvGRU": lambda: of_linear(
        "conv_gru", jaxpack.ConvGRU(1, 2, (F, 1), (2, 1)), step=stepped_step, shaped=lambda x: x[..., None, None]
    ),
    "SLSTM": lambda: of_linear("slstm", jaxpack.SLSTM(F, H + 1, 2), step=stepped_step),
    "GRUD": lambda: of_linear(
        "gru_d",
        jaxpack.GRUD(2, H),
        step=stepped_step,
        shaped=lambda x: (x[..., :2], x[..., 1:] > 0, abs(x[..., 2])),
    ),
    "CfC": lambda: of_linear(
        "cfc", jaxpack.CfC(2, H, 4), step=stepped_step, shaped=lambda x: (x[..., :2], abs(x[..., 2]))
    ),
    "TimeDecay": lambda: of_linear(
        "decay", jaxpack.TimeDecay(LSTM(2, H)), step=stepped_step, shaped=lambda x: (x[..., :2], abs(x[..., 2]))
    ),
}
DEEP: dict[str, Callable[[], Subject]] = {"DeepRNN": of_deep}
MODULES: dict[str, tuple[str, Callable[[], Subject]]] = {  # the name of the layer, and the module that holds it
    "nnx.GRU": ("GRU", lambda: of_stack("gru", "nnx", lambda: jaxpack.nnx.GRU(F, H, **FLOAT64), GRU(F, H))),
    "linen.LSTM": (
        "LSTM projected",
        lambda: of_stack("lstm", "linen", lambda: jaxpack.linen.LSTM(H, proj_size=2), LSTM(F, H, proj_size=2)),
    ),
    "linen.LRU": (
        "LRU",
        lambda: of_linear("lru", jaxpack.LRU(F, H + 1), "linen", lambda: jaxpack.linen.LRU(H + 1)),
    ),
    "nnx.MinGRU": (
        "MinGRU",
        lambda: of_linear("min_gru", jaxpack.MinGRU(F, H), "nnx", lambda: jaxpack.nnx.MinGRU(F, H, **FLOAT64)),
    ),
    "nnx.Mamba2": (
        "Mamba2",
        lambda: of_linear(
            "mamba2",
            jaxpack.Mamba2(F, 8, **MAMBA2),
            "nnx",
            lambda: jaxpack.nnx.Mamba2(F, 8, **MAMBA2, **FLOAT64),
            matrix_step,
        ),
    ),
    "linen.MLSTM": (
        "MLSTM",
        lambda: of_linear(
            "mlstm",
            jaxpack.MLSTM(F, 4, 2, **MLSTM),
            "linen",
            lambda: jaxpack.linen.MLSTM(4, 2, **MLSTM, param_dtype=float),
            matrix_step,
        ),
    ),
    "nnx.SLSTM": (
        "SLSTM",
        lambda: of_linear(
            "slstm",
            jaxpack.SLSTM(F, H + 1, 2),
            "nnx",
            lambda: jaxpack.nnx.SLSTM(F, H + 1, 2, **FLOAT64),
            stepped_step,
        ),
    ),
    "nnx.DeepRNN": ("DeepRNN", lambda: of_deep("nnx")),
    "linen.DeepRNN": ("DeepRNN", lambda: of_deep("linen")),
}
SUBJECTS = LAYERS | FLAX | STEPS | LINEAR | MATRIX | STEPPED | DEEP
FLOAT64: dict[str, Any] = {"param_dtype": float, "rngs": nnx.Rngs(0)}
MAMBA2: dict[str, Any] = {"head_size": 2, "state_size": 3, "num_groups": 2, "kernel_size": 3}
MLSTM: dict[str, Any] = {"block_size": 2, "kernel_size": 3}


@functools.cache
def subject_of(name: str) -> Subject:
    """Returns a subject of the tables."""
    return MODULES[name][1]() if name in MODULES else SUBJECTS[name]()


def calls_of(name: str) -> list[str]:
    """Returns the names of a subject's calls: own steps need a plan."""
    left_out = {"none": name in STEPS, "exact": name not in EXACT, "padded": name in ALIKE}
    return [call for call in CALLS if not left_out.get(call)]


def one_call(name: str, turn: int) -> str:
    """Returns one call of a subject for a promise that compiles a program of its own: they take turns."""
    calls = calls_of(name)
    return calls[(list(SUBJECTS | MODULES).index(name) + turn) % len(calls)]
