"""All public functions of packed batches, each listed once; tests/_packed/test_promises.py runs every promise on them.

A new function joins by an entry here. test_every_public_function_is_listed fails until it has one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxpack
from jaxpack import PackedSequence, losses, metrics, rollouts

Array = Any


LAYER = jaxpack.RNN(3, 2)
KEY = jax.random.key(0)
PARAMS = LAYER.init(KEY)


class Function(NamedTuple):
    """A public function, called with a packed batch, and which promises concern it.

    Attributes:
      run: run(packed, batch) calls the function once. The packed data is [S, F], the padded batch [B, T, F].
      takes: "packed", "padded" or "list".
      batches: the number of packed batches that the call is given.
      of_batch: whether the result is one for the whole batch, not one for each sequence or step.
      differentiable: whether both modes of differentiation are promised, with derivatives other than 0.
      programs: the most programs that a call outside jit runs, those of the arguments included; None for many.
      jits: whether it runs under jit.
      resizes: whether a packed result has other lengths than the batch, and therefore another plan.
    """

    run: Callable[[PackedSequence, Array], Any]
    takes: str = "packed"
    batches: int = 1
    of_batch: bool = False
    differentiable: bool = True
    programs: int | None = 1
    jits: bool = True
    resizes: bool = False


def _classes(packed: PackedSequence) -> PackedSequence:
    """A label for each step."""
    return packed.replace(data=jnp.asarray(packed.plan.cell_steps % packed.data.shape[1]))


def _ones(packed: PackedSequence) -> Array:
    """A label, or its length, for each sequence."""
    return jnp.ones(packed.plan.num_sequences, int)


def _layer(packed: PackedSequence) -> tuple[PackedSequence, Array]:
    """The output of a layer, and its final state [B, H]."""
    output, state = LAYER.apply(PARAMS, packed)
    return output, state[0]


def _zeros(packed: PackedSequence) -> Array:
    """A carry of zeros."""
    return jnp.zeros((packed.plan.num_sequences, packed.data.shape[1]))


def _attend(function: Callable[..., Any], packed: PackedSequence, *others: PackedSequence, **options: Any) -> Any:
    """A function of queries, keys and values, all of them the features as one head."""
    heads = packed.replace(data=packed.data[:, None])
    return function(heads, heads, heads, *others, **options)


FUNCTIONS = {
    "pack_padded_sequence": Function(
        lambda p, x: jaxpack.pack_padded_sequence(x, p.lengths, True, plan=p.plan), takes="padded"
    ),
    "pack_sequence": Function(lambda p, x: jaxpack.pack_sequence([x[0], x[1, :2]]).data, takes="list", programs=None),
    "pad_sequence": Function(lambda p, x: jaxpack.pad_sequence([x[0], x[1, :2]]), takes="list", programs=None),
    "pad_packed_sequence": Function(lambda p, x: jaxpack.pad_packed_sequence(p, True, -1.0, 13)),
    "unpack_sequence": Function(lambda p, x: jaxpack.unpack_sequence(p), jits=False),
    "unpad_sequence": Function(lambda p, x: jaxpack.unpad_sequence(x, p.lengths, True), takes="padded", jits=False),
    "reverse_sequences": Function(lambda p, x: jaxpack.reverse_sequences(p)),
    "first": Function(lambda p, x: jaxpack.first(p)),
    "last": Function(lambda p, x: jaxpack.last(p)),
    "segment_sum": Function(lambda p, x: jaxpack.segment_sum(p)),
    "segment_mean": Function(lambda p, x: jaxpack.segment_mean(p)),
    "segment_var": Function(lambda p, x: jaxpack.segment_var(p)),
    "segment_std": Function(lambda p, x: jaxpack.segment_std(p)),
    "segment_max": Function(lambda p, x: jaxpack.segment_max(p)),
    "segment_min": Function(lambda p, x: jaxpack.segment_min(p)),
    "segment_argmax": Function(lambda p, x: jaxpack.segment_argmax(p), differentiable=False),
    "segment_argmin": Function(lambda p, x: jaxpack.segment_argmin(p), differentiable=False),
    "segment_logsumexp": Function(lambda p, x: jaxpack.segment_logsumexp(p)),
    "mean": Function(lambda p, x: jaxpack.mean(p), of_batch=True),
    "var": Function(lambda p, x: jaxpack.var(p), of_batch=True),
    "std": Function(lambda p, x: jaxpack.std(p), of_batch=True),
    "softmax": Function(lambda p, x: jaxpack.softmax(p)),
    "broadcast_to_steps": Function(lambda p, x: jaxpack.broadcast_to_steps(x[:, 0], p), programs=3),
    "concatenate": Function(lambda p, x: jaxpack.concatenate([p, p]), batches=2),
    "dropout": Function(lambda p, x: jaxpack.dropout(p, 0.5, KEY)),
    "causal_conv": Function(lambda p, x: jaxpack.causal_conv(p, np.array([[2.0] * 3, [1.0] * 3], np.float32))),
    "conv": Function(
        lambda p, x: jaxpack.conv(p, np.arange(1, 7, dtype=np.float32).reshape(2, 3, 1), stride=2), resizes=True
    ),
    "subsample": Function(lambda p, x: jaxpack.subsample(p, 2), resizes=True),
    "stack_steps": Function(lambda p, x: jaxpack.stack_steps(p, 2), resizes=True),
    "sum_pool": Function(lambda p, x: jaxpack.sum_pool(p, 2, ceil_mode=True), resizes=True),
    "avg_pool": Function(lambda p, x: jaxpack.avg_pool(p, 3, stride=2, padding="SAME"), resizes=True),
    "max_pool": Function(lambda p, x: jaxpack.max_pool(p, 3, stride=2, padding=(1, 1)), resizes=True),
    "repeat_steps": Function(lambda p, x: jaxpack.repeat_steps(p, 2), resizes=True),
    "to_rows": Function(lambda p, x: jaxpack.from_rows(jaxpack.to_rows(p).data, p), batches=2, programs=2),
    "from_rows": Function(lambda p, x: jaxpack.from_rows(jaxpack.to_rows(p).data * 2, p), batches=2, programs=3),
    "attention": Function(lambda p, x: _attend(jaxpack.attention, p, is_causal=True), batches=3, programs=2),
    "rotary": Function(lambda p, x: jaxpack.rotary(p.replace(data=p.data[:, :2])), programs=None),
    "linear_attention": Function(lambda p, x: _attend(jaxpack.linear_attention, p), batches=3, programs=2),
    "gated_delta_rule": Function(
        lambda p, x: _attend(jaxpack.gated_delta_rule, p, p.replace(data=p.data[:, :1])), batches=4, programs=None
    ),
    "packed_scan": Function(
        lambda p, x: jaxpack.packed_scan(lambda c, v: (c + v, jnp.log(2 + v**2) + c), _zeros(p), p), programs=None
    ),
    "linear_scan": Function(lambda p, x: jaxpack.linear_scan(p, p), batches=2, programs=2),
    "rollouts.burn_in": Function(
        lambda p, x: rollouts.burn_in(jaxpack.linear_scan, 0.5, p, steps=1), batches=3, programs=None
    ),
    "RNN.apply": Function(lambda p, x: _layer(p), differentiable=False, programs=None),
    "map": Function(lambda p, x: p.map(jnp.multiply, p), batches=2, programs=4),
    "astype": Function(lambda p, x: p.astype(jnp.float16), differentiable=False),
    "mask": Function(lambda p, x: p.replace(data=p.mask), batches=0, differentiable=False),
    "fits": Function(lambda p, x: p.fits, batches=0, differentiable=False),
    "add": Function(lambda p, x: p + p, batches=2),
    "subtract": Function(lambda p, x: 1 - p),
    "multiply": Function(lambda p, x: p * np.array([1, 2, 3], np.float32)),
    "divide": Function(lambda p, x: p / 3),
    "negative": Function(lambda p, x: -p, programs=3),
    "losses.token_cross_entropy": Function(
        lambda p, x: losses.token_cross_entropy(p, _classes(p)), batches=2, of_batch=True, programs=5
    ),
    "losses.ctc": Function(lambda p, x: losses.ctc(p, _ones(p)[:, None], _ones(p)), of_batch=True, programs=5),
    "metrics.accuracy": Function(
        lambda p, x: metrics.accuracy(p, _classes(p)), batches=2, of_batch=True, differentiable=False, programs=5
    ),
    "metrics.ctc_greedy_decode": Function(lambda p, x: metrics.ctc_greedy_decode(p), differentiable=False),
}


def names(**conditions: Any) -> list[str]:
    """The names of the functions with these attributes."""
    return [
        name
        for name, function in FUNCTIONS.items()
        if all(getattr(function, attribute) == value for attribute, value in conditions.items())
    ]


def leaves(result: Any) -> list[Any]:
    """The packed batches and arrays in a result."""
    return jax.tree.leaves(result, is_leaf=lambda leaf: isinstance(leaf, PackedSequence))
