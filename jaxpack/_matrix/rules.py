"""Rules: linear attention, the gated delta rule and mLSTM over one chunk of steps, in matrix products.

For one head with keys k, queries q [K], values v [V] and a state S [K, V], these are the recurrences

    linear attention   S_t = a_t S_{t-1} + k_t v_tᵀ                            y_t = S_tᵀ q_t
    gated delta rule   S_t = a_t (I - β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ     y_t = S_tᵀ q_t
    mLSTM              see `mlstm`

where a_t is a number, or, for linear attention, a number for each key (a_t S is diag(a_t) S). All decays stay
logarithms until their sums are known: with g = log a and D[t, s] = g_{s+1} + ... + g_t, for s <= t in a chunk,

    y_t = Σ_s (q_t · k_s) exp(D[t, s]) v_s + exp(D[t, 0]) S_0ᵀ q_t
    S_C = Σ_s exp(D[C, s]) k_s v_sᵀ + exp(D[C, 0]) S_0

(Dao & Gu 2024, "Transformers are SSMs", section 6). The delta rule writes k_t u_tᵀ with u_t = β_t (v_t - a_t S_{t-1}ᵀ
k_t). Its u of a chunk solve a unit lower triangular system (Yang et al. 2024, "Parallelizing linear transformers with
the delta rule"), and the rest is linear attention with values u.

Axes: R rows, G groups of heads that share a key and a query, P heads of a group, C steps, K, V. Decays have a last axis
of 1, or of K. Everything is computed in float32 or wider.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxpack._matrix.chunks import Chunk


class _Decays(NamedTuple):
    """Sums of log decays in a chunk, with a last axis of 1 or K; -inf where a border of episodes is between.

    Attributes:
      within: [R, G, P, C, C, 1 or K], from step s (excluded) to step t (included).
      into: [R, G, P, C, 1 or K], from the state before the chunk, or the episode, to step t (included).
      out: [R, G, P, C, 1 or K], from step s (excluded) to the end of the chunk.
      follows: bool [R, 1, 1, C, 1], whether step t follows the state before the chunk, not the initial state; None if
        all do.
    """

    within: jax.Array
    into: jax.Array
    out: jax.Array
    follows: jax.Array | None

    @classmethod
    def of(cls, chunk: Chunk) -> _Decays:
        """Sums the log decays of a chunk.

        Whole parts are summed by themselves, exactly. A difference of sums of large decays is then as precise as one of
        small decays: after a decay of exp(-50) a float32 sum alone would leave an error of 4e-6 in all later ratios.
        """
        g = _heads(_wide(chunk.arrays["log_decay"]))
        whole = lax.stop_gradient(jnp.round(g))
        parts = (whole, g - whole)
        sums = [jnp.cumsum(part, -2) for part in parts]
        coarse, fine = (each[..., :, None, :] - each[..., None, :, :] for each in sums)
        within = coarse + fine
        size = g.shape[-2]
        passes = np.tril(np.ones((size, size), bool))[None]
        into, follows = sums[0] + sums[1], None
        if chunk.episodes is not None:
            episodes = chunk.episodes
            passes = passes & (episodes[:, :, None] == episodes[:, None, :])
            begin = lax.cummax(jnp.where(jnp.diff(episodes, axis=1, prepend=0) > 0, jnp.arange(size)[None], 0), 1)
            starts = (each - part for each, part in zip(sums, parts, strict=True))
            coarse, fine = (jnp.take_along_axis(each, _expanded(begin), -2) for each in starts)
            into = (sums[0] - coarse) + (sums[1] - fine)
            follows = _expanded(episodes == 0)
        within = jnp.where(jnp.asarray(passes)[:, None, None, :, :, None], within, -jnp.inf)
        return cls(within, into, within[..., -1, :, :], follows)

    def products(self, rows: jax.Array, columns: jax.Array) -> jax.Array:
        """Computes (row_t · column_s) exp(D[t, s]) from [R, G, 1, C, K] each: [R, G, P, C, C]."""
        if self.within.shape[-1] == 1:
            return jnp.einsum("...tk,...sk->...ts", rows, columns) * jnp.exp(self.within[..., 0])
        return jnp.einsum("...tk,...sk,...tsk->...ts", rows, columns, jnp.exp(self.within))

    def read(self, rows: jax.Array, state: jax.Array, initial: jax.Array) -> jax.Array:
        """Computes exp(D[t, 0]) Sᵀ row_t: [R, G, P, C, V]."""
        rows = rows * jnp.exp(self.into)
        seen = rows @ state
        return seen if self.follows is None else jnp.where(self.follows, seen, rows @ initial)

    def write(self, keys: jax.Array, values: jax.Array, state: jax.Array, initial: jax.Array) -> jax.Array:
        """Computes the state after the chunk: [R, G, P, K, V]."""
        written = jnp.einsum("...sk,...sv->...kv", keys * jnp.exp(self.out), values)
        return written + jnp.exp(self.into[..., -1, :])[..., None] * self.last_seen(state, initial)

    def last_seen(self, state: jax.Array, initial: jax.Array) -> jax.Array:
        """Returns the state that the last step of the chunk follows."""
        if self.follows is None:
            return state
        last = self.follows[:, 0, 0, -1, 0]
        return jnp.where(last.reshape(-1, *(1,) * (state.ndim - 1)), state, initial)


def linear_attention(state: jax.Array, initial: jax.Array, chunk: Chunk) -> tuple[jax.Array, jax.Array]:
    """Computes a chunk of linear attention.

    Args:
      state: [R, G, P, K, V], after the previous chunk.
      initial: [R, G, P, K, V], before each episode.
      chunk: arrays query and key [R, C, G, K], value [R, C, G, P, V], log_decay [R, C, G, P, 1 or K].

    Returns:
      The state after the chunk, and the outputs [R, C, G, P, V].
    """
    decays, (query, key) = _Decays.of(chunk), _shared(chunk)
    value = _heads(_wide(chunk.arrays["value"]))
    outputs = decays.products(query, key) @ value + decays.read(query, state, initial)
    return decays.write(key, value, state, initial), _steps(outputs, chunk)


def delta_rule(state: jax.Array, initial: jax.Array, chunk: Chunk) -> tuple[jax.Array, jax.Array]:
    """Computes a chunk of the gated delta rule. As `linear_attention`, with a further array beta [R, C, G, P]."""
    decays, (query, key) = _Decays.of(chunk), _shared(chunk)
    value, beta = (_heads(_wide(each)) for each in (chunk.arrays["value"], chunk.arrays["beta"][..., None]))
    expected = decays.read(key, state, initial)
    # (I + M) u = β (v - expected); the solver reads M below its diagonal alone.
    u = lax.linalg.triangular_solve(
        beta * decays.products(key, key), beta * (value - expected), left_side=True, lower=True, unit_diagonal=True
    )
    outputs = decays.products(query, key) @ u + decays.read(query, state, initial)
    return decays.write(key, u, state, initial), _steps(outputs, chunk)


MLSTMState = tuple[jax.Array, jax.Array]


def mlstm(state: MLSTMState, initial: MLSTMState, chunk: Chunk) -> tuple[MLSTMState, jax.Array]:
    """Computes a chunk of mLSTM (Beck et al. 2024, "xLSTM", equations 19 to 27), with log f and log i as its gates:

        C_t = f_t C_{t-1} + i_t k_t v_tᵀ;  n_t = f_t n_{t-1} + i_t k_t;  h_t = C_tᵀ q_t / max(abs(n_tᵀ q_t), 1)

    The state holds exp(-m) C and exp(-m) n, side by side, and m >= 0, which keeps all exponents at or below 0; h does
    not depend on m. (The paper's m may be negative, where exp(-m) in its denominator overflows.)

    Args:
      state: [R, G, P, K, V + 1] for C and n, and [R, G, P] for m.
      initial: the same, before each episode.
      chunk: arrays query and key [R, C, G, K], value [R, C, G, P, V], log_decay (log f) and log_input (log i)
        [R, C, G, P, 1].

    Returns:
      The state after the chunk, and h [R, C, G, P, V].
    """
    decays, (query, key) = _Decays.of(chunk), _shared(chunk)
    value = _heads(_wide(chunk.arrays["value"]))
    value = jnp.concatenate([value, jnp.ones_like(value[..., :1])], -1)
    gate = _heads(_wide(chunk.arrays["log_input"]))
    gate = jnp.where(_expanded(chunk.real), gate, -jnp.inf)
    (memory, m), (start, start_m) = state, initial
    m, start_m = m[..., None, None], start_m[..., None, None]

    among = decays.within[..., 0] + jnp.swapaxes(gate, -1, -2)
    before = decays.into + (m if decays.follows is None else jnp.where(decays.follows, m, start_m))
    largest = jnp.maximum(jnp.maximum(among.max(-1, keepdims=True), before), 0)
    scores = jnp.einsum("...tk,...sk->...ts", query, key) * jnp.exp(among - largest)
    seen = query @ memory
    seen = seen if decays.follows is None else jnp.where(decays.follows, seen, query @ start)
    both = scores @ value + jnp.exp(before - largest) * seen
    floor = jnp.maximum(jnp.exp(-largest), jnp.finfo(both.dtype).tiny)
    divisor = jnp.maximum(jnp.abs(both[..., -1:]), floor)
    scale = lax.stop_gradient(1 / divisor)  # the derivative squares the divisor, and exp(-50)² is 0 in float32
    outputs = both[..., :-1] * scale / (divisor * scale)

    out, before = decays.out + gate, before[..., -1:, :]
    least = jnp.where(chunk.real.any(1), 0, -jnp.inf).reshape(-1, 1, 1, 1, 1)  # without steps m stays as it is
    largest = jnp.maximum(jnp.maximum(out.max(-2, keepdims=True), before), least)
    written = jnp.einsum("...sk,...sv->...kv", key * jnp.exp(out - largest), value)
    memory = written + jnp.exp(before - largest) * decays.last_seen(memory, start)
    return (memory, largest[..., 0, 0]), _steps(outputs, chunk)


def _shared(chunk: Chunk) -> tuple[jax.Array, jax.Array]:
    """Returns queries and keys [R, G, 1, C, K]."""
    query, key = (jnp.swapaxes(_wide(chunk.arrays[name]), 1, 2)[:, :, None] for name in ("query", "key"))
    return query, key


def _heads(array: jax.Array) -> jax.Array:
    """Moves the axis of steps behind those of heads: [R, C, G, P, X] to [R, G, P, C, X]."""
    return jnp.moveaxis(array, 1, 3)


def _steps(outputs: jax.Array, chunk: Chunk) -> jax.Array:
    """Returns outputs [R, G, P, C, V] as [R, C, G, P, V], in the dtype of the values."""
    return jnp.moveaxis(outputs, 3, 1).astype(chunk.arrays["value"].dtype)


def _expanded(steps: jax.Array) -> jax.Array:
    """Reshapes an array of steps [R, C] to [R, 1, 1, C, 1]."""
    return steps[:, None, None, :, None]


def _wide(array: jax.Array) -> jax.Array:
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))
