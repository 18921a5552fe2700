"""Layers that run step by step in NumPy float64 (or jax.numpy), one step of one sequence, written from their papers."""

import itertools

import numpy as np


def stepped_step(kind, layer, params, state, x, xp=np):
    """Computes one step.

    Args:
      kind: a name in `STEPS`.
      layer: the specification, for its options.
      xp: NumPy, in whose float64 it computes, or jax.numpy.

    Returns:
      The new state, and the output.
    """
    weights = {name: xp.asarray(value, np.float64) for name, value in params.items()}
    return STEPS[kind](layer, weights, state, x, xp)


def _sigmoid(a, xp):
    return 1 / (1 + xp.exp(-a))


def _convolved(x, kernel, xp):
    """Sums over the places of a kernel: y_p = Σ_o x_{p + o} K_o, with zeros beyond the border."""
    sizes = kernel.shape[:-2]
    around = [((size - 1) // 2, size // 2) for size in sizes]
    padded = xp.pad(x, [*around, (0, 0)])

    def shifted(offsets):
        return padded[tuple(slice(o, o + size) for o, size in zip(offsets, x.shape, strict=False))]

    return sum(shifted(offsets) @ kernel[offsets] for offsets in itertools.product(*map(range, sizes)))


def _conv_lstm(layer, p, state, x, xp):
    """Shi et al. 2015, equation 3, without peepholes."""
    h, c = state
    net = _convolved(x, p["weight_ih"], xp) + _convolved(h, p["weight_hh"], xp)
    i, f, g, o = xp.split(net + xp.broadcast_to(p["bias"], net.shape), 4, -1)
    c = _sigmoid(f, xp) * c + _sigmoid(i, xp) * xp.tanh(g)
    h = _sigmoid(o, xp) * xp.tanh(c)
    return (h, c), h


def _conv_gru(layer, p, h, x, xp):
    """Ballas et al. 2016, equations 4 to 7, with 1 - z for z."""
    from_x = _convolved(x, p["weight_ih"], xp)
    from_x = xp.split(from_x + xp.broadcast_to(p["bias"], from_x.shape), 3, -1)
    r, z, n = xp.split(p["weight_hh"], 3, -1)
    r, z = (_sigmoid(net + _convolved(h, weight, xp), xp) for net, weight in zip(from_x, (r, z), strict=False))
    h = (1 - z) * xp.tanh(from_x[2] + _convolved(r * h, n, xp)) + z * h
    return h, h


def _slstm(layer, p, state, x, xp):
    """Beck et al. 2024, equations 8 to 14, with c and n themselves; the stabiliser scales what is handed on."""
    h, c, n, m = state
    size = len(h) // layer.num_heads
    mixed = []
    for head in range(layer.num_heads):
        part = h[head * size : (head + 1) * size] @ p["weight_hh"][head]
        mixed.append(part.reshape(4, size))
    i, f, z, o = (x @ p["weight_ih"] + p["bias"]).reshape(4, -1) + xp.concatenate(mixed, 1)
    forget = xp.exp(f) if layer.forget_gate == "exp" else _sigmoid(f, xp)
    c = forget * c * xp.exp(m) + xp.exp(i) * xp.tanh(z)
    n = forget * n * xp.exp(m) + xp.exp(i)
    h = _sigmoid(o, xp) * c / n
    m = xp.maximum(xp.log(forget) + m, i)
    return (h, c * xp.exp(-m), n * xp.exp(-m), m), h


STEPS = {"conv_lstm": _conv_lstm, "conv_gru": _conv_gru, "slstm": _slstm}
