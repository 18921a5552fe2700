"""Independent oracles: PyTorch where it is installed, and plain NumPy float64, one sequence at a time."""

import jax.numpy as jnp
import numpy as np
import pytest

try:
    import torch
except ImportError:
    torch = None

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
    return {
        group: {name: jnp.asarray(rng.uniform(-0.5, 0.5, shape), dtype) for name, shape in entries.items()}
        for group, entries in layer.shapes.items()
    }


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


def _sigmoid(a):
    return 1 / (1 + np.exp(-a))


def cell_step(kind, params, state, x):
    """One step of a cell for one sequence, in NumPy; the state is (h,) or (h, c)."""
    get = {name: np.asarray(value, np.float64) for name, value in params.items()}
    hidden = get["weight_hh"].shape[1]
    from_x = x @ get["weight_ih"] + get.get("bias_ih", np.zeros(hidden))
    from_h = state[0] @ get["weight_hh"] + get.get("bias_hh", np.zeros(hidden))
    if kind in ("tanh", "relu"):
        a = from_x + from_h
        return (np.tanh(a) if kind == "tanh" else np.maximum(a, 0),)
    if kind == "gru":
        (xr, xz, xn), (hr, hz, hn) = np.split(from_x, 3), np.split(from_h, 3)
        z, n = _sigmoid(xz + hz), np.tanh(xn + _sigmoid(xr + hr) * hn)
        return ((1 - z) * n + z * state[0],)
    i, f, g, o = np.split(from_x + from_h, 4)
    c = _sigmoid(f) * state[1] + _sigmoid(i) * np.tanh(g)
    h = _sigmoid(o) * np.tanh(c)
    return (h @ get["weight_hr"] if "weight_hr" in get else h), c


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
