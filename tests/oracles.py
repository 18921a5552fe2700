"""Independent oracles: PyTorch where it is installed, and plain NumPy float64, one sequence at a time."""

import contextlib
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from variant_oracles import VARIANTS, variant_step

# Fields of a layer that are no keywords of torch.nn's.
NOT_TORCHS = ("input_size", "hidden_size", "learned_initial_state", "reset_after", "merge", "regularization")
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")  # that programs are exported for

torch: Any = None
with contextlib.suppress(ImportError):
    torch = importlib.import_module("torch")

needs_torch = pytest.mark.skipif(torch is None, reason="torch, the oracle, is not installed on this Python")


def random_batch(lengths, features, seed=0, dtype=np.float64, extra=0):
    """A padded batch [B, T, F] with NaN past each length."""
    rng = np.random.default_rng(seed)
    batch = rng.standard_normal((len(lengths), max(lengths, default=0) + extra, features)).astype(dtype)
    for row, length in enumerate(lengths):
        batch[row, length:] = np.nan
    return batch


def random_params(layer, dtype=float):
    """A layer's parameters, none of them zero."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.uniform(-0.5, 0.5, shape), dtype),
        layer.shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def pack(batch, lengths):
    """PyTorch's packed data, step by step, and its batch sizes."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    cells, batch_sizes = [], []
    for step in range(max(lengths)):
        alive = [row for row in order if lengths[row] > step]
        cells += [batch[row][step] for row in alive]
        batch_sizes.append(len(alive))
    return np.array(cells), batch_sizes


def reverse(batch, lengths):
    """Each row's first `length` steps reversed."""
    result = np.array(batch)
    for row, length in enumerate(lengths):
        result[row, :length] = batch[row, :length][::-1]
    return result


def cell_step(kind, params, state, x, xp=np):
    """Computes one step of a cell for one sequence; the state is (h,) or (h, c).

    Args:
      xp: NumPy, in whose float64 it computes, or jax.numpy.
    """
    if kind in VARIANTS:
        return variant_step(kind, params, state, x, xp)
    get = {name: xp.asarray(value, np.float64) for name, value in params.items()}
    hidden = get["weight_hh"].shape[1]

    def sigmoid(a):
        return 1 / (1 + xp.exp(-a))

    from_x = x @ get["weight_ih"] + get.get("bias_ih", np.zeros(hidden))
    from_h = state[0] @ get["weight_hh"] + get.get("bias_hh", np.zeros(hidden))
    if kind in ("tanh", "relu", "leaky"):
        a = from_x + from_h
        if kind == "leaky":
            return (0.5 * state[0] + 0.5 * xp.tanh(a),)
        return (xp.tanh(a) if kind == "tanh" else xp.maximum(a, 0),)
    if kind == "gru":
        (xr, xz, xn), (hr, hz, hn) = xp.split(from_x, 3), xp.split(from_h, 3)
        z, n = sigmoid(xz + hz), xp.tanh(xn + sigmoid(xr + hr) * hn)
        return ((1 - z) * n + z * state[0],)
    i, f, g, o = xp.split(from_x + from_h, 4)
    c = sigmoid(f) * state[1] + sigmoid(i) * xp.tanh(g)
    h = sigmoid(o) * xp.tanh(c)
    return (h @ get["weight_hr"] if "weight_hr" in get else h), c


def linear_step(kind, layer, params, state, x, xp=np):
    """Computes one step of a layer that is linear in its state, for one sequence, by the equations of its paper.

    Args:
      layer: the layer, for its options.
      xp: NumPy, in whose float64 it computes, or jax.numpy.

    Returns:
      The new state and the output.
    """
    get = jax.tree.map(lambda value: xp.asarray(value, np.float64), params)

    def sigmoid(a):
        return 1 / (1 + xp.exp(-a))

    if kind == "lru":
        modulus, phase = xp.exp(-xp.exp(get["nu_log"])), xp.exp(get["theta_log"])
        gamma = xp.exp(get["gamma_log"])
        re = modulus * (xp.cos(phase) * state[0] - xp.sin(phase) * state[1]) + gamma * (get["B_re"] @ x)
        im = modulus * (xp.sin(phase) * state[0] + xp.cos(phase) * state[1]) + gamma * (get["B_im"] @ x)
        return xp.stack([re, im]), get["C_re"] @ re - get["C_im"] @ im + get["D"] * x
    if kind == "rglru":
        gates = {}
        for name in ("input_gate", "a_gate"):
            parts = xp.split(x, layer.num_heads)
            blocks = [part @ block for part, block in zip(parts, get[name]["w"], strict=True)]
            gates[name] = sigmoid(xp.concatenate(blocks) + get[name]["b"].reshape(-1))
        a = xp.exp(-8 * xp.log(1 + xp.exp(get["a_param"])) * gates["a_gate"])
        h = a * state + xp.sqrt(1 - a**2) * gates["input_gate"] * x
        return h, h
    if kind == "min_gru":
        z, v = xp.split(x @ get["weight"] + get["bias"], 2)
        h = (1 - sigmoid(z)) * state + sigmoid(z) * v
        return h, h
    f, i, v = xp.split(x @ get["weight"] + get["bias"], 3)
    f, i = sigmoid(f), sigmoid(i)
    h = (f * state + i * v) / (f + i)
    return h, h


def scanned(step, params, sequence, state):
    """Runs one sequence [L, F] through a stack by lax.scan, which JAX differentiates by itself.

    Args:
      step: step(params, state, x) -> state, whose first leaf is the output.
      state: a tuple of [num_layers * D, size].

    Returns:
      The outputs [L, D*H] and the final state.
    """
    finals: list[Any] = []
    depth, x = 0, sequence
    while f"l{depth}" in params:
        names = [name for name in (f"l{depth}", f"l{depth}_reverse") if name in params]
        outputs = []
        for name in names:

            def body(state, x, group=params[name]):
                state = step(group, state, x)
                return state, state[0]

            start = tuple(leaf[len(finals)] for leaf in state)
            final, ys = jax.lax.scan(body, start, x, reverse=name.endswith("reverse"))
            finals.append(final)
            outputs.append(ys)
        x = jnp.concatenate(outputs, -1)
        depth += 1
    return x, tuple(jnp.stack(leaves) for leaves in zip(*finals, strict=True))


def torch_layer(layer):
    """Returns the torch.nn module with a layer's options."""
    options = {f: getattr(layer, f) for f in layer.__dataclass_fields__ if f not in NOT_TORCHS}
    return getattr(torch.nn, type(layer).__name__)(layer.input_size, layer.hidden_size, **options)


def torch_gradients(layer, params, batch, lengths, states, cotangents):
    """Runs PyTorch's layer on a batch, packed, and pulls cotangents back through it.

    Args:
      params: as the layer of jaxpack takes them.
      batch: [B, T, F].
      lengths: [B], each at least 1.
      states: a tuple of [num_layers * D, B, size].
      cotangents: of the output [B, T, D*H] and of each state.

    Returns:
      The output and final states; the gradients of the parameters, the batch and the initial states.
    """
    module = torch_layer(layer).to(getattr(torch, np.dtype(batch.dtype).name))
    module.load_state_dict({name: torch.tensor(value) for name, value in layer.to_torch(params).items()})
    x, *states = (torch.tensor(np.nan_to_num(a), requires_grad=True) for a in (batch, *states))
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor(lengths), True, False)
    output, final = module(packed, tuple(states) if len(states) == 2 else states[0])
    output, _ = torch.nn.utils.rnn.pad_packed_sequence(output, True, total_length=batch.shape[1])
    values = (output, *(final if len(states) == 2 else (final,)))
    sum((value * torch.tensor(weight)).sum() for value, weight in zip(values, cotangents, strict=True)).backward()
    weights = layer.from_torch({name: p.grad for name, p in module.named_parameters()})
    return [value.detach().numpy() for value in values], [weights, *(leaf.grad.numpy() for leaf in (x, *states))]


def layer(kind, params, sequences, initial):
    """A whole stack, sequence by sequence.

    `initial` is a tuple of [num_layers * D, B, size]. Returns a list of outputs [L_i, D*H] and the final states.
    """
    finals = [np.array(state, np.float64) for state in initial]
    outputs = []
    for b, sequence in enumerate(sequences):
        x = np.asarray(sequence, np.float64)
        depth = 0
        while f"l{depth}" in params:
            names = [n for n in (f"l{depth}", f"l{depth}_reverse") if n in params]
            directions = []
            for d, name in enumerate(names):
                row = depth * len(names) + d
                state = tuple(full[row, b] for full in finals)
                steps = []
                for step in x[::-1] if d else x:
                    state = cell_step(kind, params[name], state, step)
                    steps.append(state[0])
                for full, value in zip(finals, state, strict=True):
                    full[row, b] = value
                hs = np.array(steps).reshape(len(x), len(state[0]))
                directions.append(hs[::-1] if d else hs)
            x = np.concatenate(directions, -1)
            depth += 1
        outputs.append(x)
    return outputs, finals


def count_cell_steps(jaxpr):
    """Rows x steps over all scans of a jaxpr: what a scan hands on has as many rows as it computes in a step."""
    total = 0
    for equation in jaxpr.eqns:
        inner = [getattr(p, "jaxpr", p) for p in equation.params.values() if hasattr(p, "eqns") or hasattr(p, "jaxpr")]
        if equation.primitive.name == "scan":
            body = inner[0].outvars
            handed_on = [v.aval.shape for v, b in zip(equation.outvars, body, strict=True) if v.aval == b.aval]
            total += equation.params["length"] * max(shape[0] for shape in handed_on if shape)
        else:
            total += sum(count_cell_steps(getattr(j, "jaxpr", j)) for j in inner)
    return total
