"""One call of a composed layer: its checks, one program for all its parts, and the layout of the inputs again."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxpack._deep.batch import Batch
from jaxpack._deep.composed import ComposedLayer, Given, Options, checked_state, of_one, takes_tuple
from jaxpack._layers.params import check_params, check_sharding, floating
from jaxpack._layers.stack import explain_forward_mode
from jaxpack._layers.states import shapes_of
from jaxpack._packed.inputs import as_batch, batch_shape, lengths_and_plan, padded_plan
from jaxpack._packed.layout import lay_out, pad
from jaxpack._packed.masks import run_on_valid_steps
from jaxpack._packed.packed_sequence import PackedSequence, check_packed
from jaxpack._packed.resets import Entering, check_fresh, packed_resets, padded_resets
from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack._types import PyTree


class Call(NamedTuple):
    """The arguments of `apply` beside parameters and inputs, as the user gave them."""

    initial_state: Any
    dropout_key: jax.Array | None
    lengths: ArrayLike | Sequence[int] | None
    mask: ArrayLike | None
    plan: BucketPlan | None
    resets: PackedSequence | ArrayLike | None
    fresh_state: Any
    deterministic: bool
    dtype: Any
    forward_mode: bool
    all_outputs: bool = False


def run_composed(layer: ComposedLayer, params: PyTree, inputs: Any, call: Call) -> tuple[Any, ...]:
    """Runs a composed layer over inputs in any layout.

    Returns:
      The output in the layout of the inputs, the final states, and with all_outputs the output of each layer.

    Raises:
      ValueError, TypeError: as `DeepRNN.apply` says.
    """
    name = f"{type(layer).__name__}.apply"
    if call.mask is not None:

        def run(inputs: Any, lengths: Any = None, resets: Any = None) -> tuple[Any, ...]:
            return run_composed(layer, params, inputs, call._replace(mask=None, lengths=lengths, resets=resets))

        feature_axes = len(layer.input_shape)
        return run_on_valid_steps(name, run, inputs, call.mask, call.lengths, call.resets, feature_axes)
    params_dtype = check_params(params, layer.shapes, layer)
    check_sharding(params)
    check_fresh(call.fresh_state, call.resets)
    key = _active_key(layer, call)
    rows: int | None
    length: int | None
    if isinstance(inputs, PackedSequence):
        if call.lengths is not None or call.plan is not None:
            raise TypeError("inputs are packed, and carry their lengths and plan: do not give lengths= or plan=.")
        packed = check_packed(inputs, name)
        packed_resets(name, packed, call.resets)
        batch, rows, length = Batch(packed, None, call.resets), packed.plan.num_sequences, None
        _check_data(layer, packed.data, ("S",))
    else:
        batch, rows, length = _of_padded(name, layer, inputs, call)
    states = (checked_state(each, layer, getattr(call, each), rows) for each in ("initial_state", "fresh_state"))
    dtype = floating(jnp.result_type(*jax.tree.leaves(batch.data), params_dtype) if call.dtype is None else call.dtype)
    options = Options(jnp.dtype(dtype).name, bool(call.forward_mode), bool(call.all_outputs))
    with explain_forward_mode(name, "apply"):
        output, final, *more = _run(layer, options, params, batch, Entering(*states), key)

    def laid_out(data: jax.Array) -> Any:
        if not isinstance(batch.inputs, PackedSequence):
            return data
        packed = batch.inputs.replace(data=data)
        if length is None:
            return packed
        padded = pad(packed, 0, length)
        return padded[0] if rows is None else padded

    output, *more = jax.tree.map(laid_out, (output, *more))
    return output, of_one(layer, final) if rows is None else final, *more


@functools.partial(jax.jit, static_argnames=("layer", "options"))
def _run(
    layer: ComposedLayer, options: Options, params: PyTree, batch: Batch, entering: Entering, key: jax.Array | None
) -> tuple[Any, ...]:
    """Runs all parts. Jitted, so each plan is one compilation."""
    return layer.run(params, batch, Given(entering, key, options))


def _of_padded(name: str, layer: ComposedLayer, inputs: Any, call: Call) -> tuple[Batch, int | None, int | None]:
    """Lays out padded inputs, or one sequence.

    They are packed, except a batch whose lengths come without a plan: each layer has a way of its own to run that.

    Returns:
      The batch; the number of sequences B, or None for one without a batch axis; and the number of steps to which
      outputs are padded, or None if they are so already.
    """
    inputs, resets, lengths, plan = as_batch(inputs, "inputs"), call.resets, call.lengths, call.plan
    lead = _check_data(layer, inputs, ("B", "T"))
    begins = padded_resets(name, resets, lead)
    alone = len(lead) == 1
    if alone:
        if plan is not None or np.ndim(0 if lengths is None else lengths):
            raise ValueError(
                f"inputs of shape {jnp.shape(jax.tree.leaves(inputs)[0])} are one sequence without a batch axis, which "
                f"takes no plan= and one number as lengths=. A batch has one axis more."
            )
        inputs, begins = jax.tree.map(lambda leaf: leaf[None], (inputs, begins))
        if lengths is not None:
            lengths = jnp.reshape(lengths, 1) if isinstance(lengths, jax.Array) else np.reshape(lengths, 1)
    rows, length = batch_shape(inputs, "inputs")
    as_it_is = plan is None and lengths is not None and not alone
    plan = padded_plan(rows, length) if plan is None else plan
    lengths = np.full(rows, length) if lengths is None else lengths
    checked, plan = lengths_and_plan(lengths, plan, rows, length)
    if as_it_is:
        return Batch(inputs, jnp.asarray(checked), begins), rows, None
    both = lay_out((inputs, begins), jnp.asarray(checked), plan)
    data, cells = both.data
    packed = both.replace(data=data)
    return Batch(packed, None, None if cells is None else both.replace(data=cells)), None if alone else rows, length


def _check_data(layer: ComposedLayer, data: PyTree, names: tuple[str, ...]) -> tuple[int, ...]:
    """Returns the leading axes of inputs, `names` or, of one padded sequence, all but the first of them.

    Raises:
      ValueError: if the inputs are not of the layer's shape.
      TypeError: if they are complex.
    """
    leaves = jax.tree.leaves(data)
    if takes_tuple(layer):  # the time between steps is one number a step; the layer checks the rest
        return leaves[-1].shape
    shape, features = jnp.shape(leaves[0]), layer.input_shape
    lead = shape[: len(shape) - len(features)]
    ranks = (len(names), 1)
    if not hasattr(data, "ndim") or shape[len(lead) :] != features or len(lead) not in ranks:
        forms = [f"[{', '.join(map(str, (*names[-rank:], *features)))}]" for rank in dict.fromkeys(ranks)]
        raise ValueError(
            f"inputs must be {' or '.join(forms)} (input_size={layer.input_size}), got {shapes_of(data)}. Pass a list "
            f"of sequences through jaxpack.pack_sequence."
        )
    if jnp.issubdtype(data.dtype, jnp.complexfloating):
        raise TypeError(f"inputs must be real, got dtype {data.dtype}.")
    return lead


def _active_key(layer: ComposedLayer, call: Call) -> jax.Array | None:
    """Returns the key for dropout, or None for no dropout. Raises ValueError if one is missing."""
    if call.deterministic or not layer.has_dropout:
        return None
    if call.dropout_key is None:
        raise ValueError(
            f"{type(layer).__name__} has dropout, between layers or in one, but there is no dropout_key. Pass "
            f"dropout_key=jax.random.key(...) to train, or deterministic=True to evaluate."
        )
    return call.dropout_key
