"""One step of each further cell for one sequence, in the equations and symbols of its paper."""

from typing import Any

import numpy as np

EPSILON = 1e-5


def variant_step(kind, params, state, x, xp=np):
    """Computes one step; the state is (h,) or (h, c).

    Args:
      kind: a name in `VARIANTS`.
      xp: NumPy, in whose float64 it computes, or jax.numpy.
    """
    weights = {name: xp.asarray(value, np.float64) for name, value in params.items()}
    return VARIANTS[kind](Gates(weights, x, state[0], xp), *state)


class Gates:
    """The parameters of one direction as the papers have them: W x and U h of a gate, its biases and its scales."""

    def __init__(self, weights, x, h, xp):
        self.weights, self.x, self.h, self.xp = weights, x, h, xp

    def part(self, name, gate, count):
        """The part of a gate, or of several side by side, of an array that has `count` gates."""
        array = self.weights.get(name)
        if array is None:  # a layer without biases
            return 0.0
        size = array.shape[-1] // count
        gates = range(gate, gate + 1) if isinstance(gate, int) else gate
        return self.xp.concatenate([array[..., i * size : (i + 1) * size] for i in gates], -1)

    def wx(self, gate, count):
        return self.x @ self.part("weight_ih", gate, count)

    def uh(self, gate, count, h=None):
        return (self.h if h is None else h) @ self.part("weight_hh", gate, count)

    def b(self, gate, count):
        return self.part("bias_ih", gate, count) + self.part("bias_hh", gate, count)

    def sigmoid(self, a):
        return 1 / (1 + self.xp.exp(-a))

    def norm(self, a, scale, shift):
        mean = a.mean()
        return scale * (a - mean) / self.xp.sqrt(((a - mean) ** 2).mean() + EPSILON) + shift


def gru_before(p, h):
    """Cho et al. 2014, equations 5 to 8, with gates r, z, n and z the share of the old state."""
    r, z = (p.sigmoid(p.wx(i, 3) + p.uh(i, 3) + p.b(i, 3)) for i in (0, 1))
    candidate = p.xp.tanh(p.wx(2, 3) + p.uh(2, 3, r * h) + p.b(2, 3))
    return (z * h + (1 - z) * candidate,)


def mgu(p, h):
    """Zhou et al. 2016, equations 5a to 5c."""
    f = p.sigmoid(p.wx(0, 2) + p.uh(0, 2) + p.b(0, 2))
    candidate = p.xp.tanh(p.wx(1, 2) + p.uh(1, 2, f * h) + p.b(1, 2))
    return ((1 - f) * h + f * candidate,)


def mgu_after(p, h):
    """The docstring of flax.linen.MGUCell."""
    f = p.sigmoid(p.wx(0, 2) + p.uh(0, 2) + p.b(0, 2))
    recurrent = p.uh(1, 2) + p.part("bias_hh", 1, 2)
    n = p.xp.tanh(p.wx(1, 2) + p.part("bias_ih", 1, 2) + f * recurrent)
    return ((1 - f) * n + f * h,)


def mgu_none(p, h):
    """The docstring of flax.linen.MGUCell, for reset_gate=False."""
    f = p.sigmoid(p.wx(0, 2) + p.uh(0, 2) + p.b(0, 2))
    n = p.xp.tanh(p.wx(1, 2) + p.uh(1, 2) + p.b(1, 2))
    return ((1 - f) * n + f * h,)


def peephole(p, h, c):
    """Gers & Schmidhuber 2000, with gates i, f, g, o."""
    peepholes = [p.part("weight_ch", i, 3) for i in range(3)]
    net = [p.wx(i, 4) + p.uh(i, 4) + p.b(i, 4) for i in range(4)]
    new = p.sigmoid(net[1] + peepholes[1] * c) * c + p.sigmoid(net[0] + peepholes[0] * c) * p.xp.tanh(net[2])
    return p.sigmoid(net[3] + peepholes[2] * new) * p.xp.tanh(new), new


def ind_rnn(p, h):
    """Li et al. 2018, equation 2."""
    return (p.xp.maximum(p.wx(0, 1) + p.weights["weight_hh"] * h + p.b(0, 1), 0),)


def ind_rnn_tanh(p, h):
    """Li et al. 2018, equation 2, with tanh."""
    return (p.xp.tanh(p.wx(0, 1) + p.weights["weight_hh"] * h + p.b(0, 1)),)


def layer_norm_lstm(p, h, c):
    """Ba et al. 2016, equations 20 to 22: one norm for the four gates of each product, and one for the memory."""
    every = range(4)
    from_h = p.norm(p.uh(every, 4), p.weights["scale_hh"], p.part("bias_hh", every, 4))
    from_x = p.norm(p.wx(every, 4), p.weights["scale_ih"], p.part("bias_ih", every, 4))
    i, f, g, o = p.xp.split(from_h + from_x, 4)
    c = p.sigmoid(f) * c + p.sigmoid(i) * p.xp.tanh(g)
    return p.sigmoid(o) * p.xp.tanh(p.norm(c, p.weights["scale_c"], p.weights.get("bias_c", 0.0))), c


def layer_norm_gru(p, h):
    """Ba et al. 2016, equations 23 to 25, with gates r, z, n, and z the share of the old state."""
    side = {"weight_hh": p.uh, "weight_ih": p.wx}

    def norm(which, gates):
        scale, shift = (p.part(f"{name}_{which}", gates, 3) for name in ("scale", "bias"))
        return p.norm(side[f"weight_{which}"](gates, 3), scale, shift)

    r, z = p.xp.split(p.sigmoid(norm("hh", (0, 1)) + norm("ih", (0, 1))), 2)
    candidate = p.xp.tanh(norm("ih", (2,)) + r * norm("hh", (2,)))
    return (z * h + (1 - z) * candidate,)


VARIANTS: dict[str, Any] = {
    "gru before": gru_before,
    "mgu": mgu,
    "mgu after": mgu_after,
    "mgu none": mgu_none,
    "peephole": peephole,
    "ind_rnn": ind_rnn,
    "ind_rnn tanh": ind_rnn_tanh,
    "layer_norm_lstm": layer_norm_lstm,
    "layer_norm_gru": layer_norm_gru,
}
