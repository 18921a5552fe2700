"""Layers that run step by step in NumPy float64 (or jax.numpy), one step of one sequence, written from their papers."""

import itertools

import numpy as np
from oracles import cell_step


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


def _gru_d(layer, p, state, inputs, xp):
    """Che et al. 2018, equations 9 to 15, with 1 - z for z, and the last values less their means."""
    h, last, since = state
    x, mask, dt = inputs
    m, delta = xp.asarray(mask, np.float64), since + dt
    value = xp.where(mask, x, last + p["mean"])  # the last value, where this one is missing
    decay_x = xp.exp(-xp.maximum(0, p["decay_x"] * delta + p["decay_x_bias"]))
    decay_h = xp.exp(-xp.maximum(0, delta @ p["decay_h"] + p["decay_h_bias"]))
    x_hat = m * value + (1 - m) * (decay_x * value + (1 - decay_x) * p["mean"])
    h = decay_h * h
    weights = zip(*(xp.split(p[f"weight_{name}"], 3, 1) for name in ("ih", "hh", "mask")), strict=True)
    (w_r, u_r, v_r), (w_z, u_z, v_z), (w_n, u_n, v_n) = weights
    b_r, b_z, b_n = xp.split(p["bias"], 3)
    r = _sigmoid(x_hat @ w_r + h @ u_r + m @ v_r + b_r, xp)
    z = _sigmoid(x_hat @ w_z + h @ u_z + m @ v_z + b_z, xp)
    h = (1 - z) * xp.tanh(x_hat @ w_n + (r * h) @ u_n + m @ v_n + b_n) + z * h
    return (h, value - p["mean"], (1 - m) * delta), h


def _cfc(layer, p, h, inputs, xp):
    """Hasani et al. 2022: the closed form, with its backbone; "pure" is that of a liquid time constant."""
    x, t = inputs
    y = 1.7159 * xp.tanh(0.666 * (x @ p["weight_ih"] + h @ p["weight_hh"] + p["bias"]))
    heads = (y @ p["weight_heads"] + p["bias_heads"]).reshape(-1, len(h))
    g = xp.tanh(heads[0])
    if layer.mode == "pure":
        h = p["A"] * (1 - xp.exp(-t * (abs(p["w_tau"]) + abs(g))) * g)
        return h, h
    k, f = xp.tanh(heads[1]), -heads[2] * t - heads[3]
    h = (1 if layer.mode == "no_gate" else _sigmoid(f, xp)) * g + (1 - _sigmoid(f, xp)) * k
    return h, h


def _lstm_with_decay(layer, p, state, inputs, xp):
    """PyTorch's LSTM of what is left of h and c after an exponential decay."""
    x, t = inputs
    left = xp.exp(-xp.logaddexp(p["decay"], 0) * t)
    state = cell_step("lstm", p, [s * part for s, part in zip(state, xp.split(left, 2), strict=True)], x, xp)
    return state, state[0]


STEPS = {
    "conv_lstm": _conv_lstm,
    "conv_gru": _conv_gru,
    "slstm": _slstm,
    "gru_d": _gru_d,
    "cfc": _cfc,
    "decay": _lstm_with_decay,
}
