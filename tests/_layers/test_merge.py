"""How the outputs of both directions become one, between layers and at the end."""

import operator
import re
from typing import Any

import jax
import numpy as np
import oracles
import pytest
from flax import nnx

import jaxpack.linen
import jaxpack.nnx
from jaxpack import GRU, LSTM, plan_rows

F, H = 3, 4
JOINS = {"sum": operator.add, "mean": lambda a, b: (a + b) / 2, "mul": operator.mul}


@oracles.needs_torch
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("merge", JOINS)
def test_layers_read_the_merged_outputs_of_torchs_directions(merge):
    layer = LSTM(F, H, num_layers=2, bidirectional=True, merge=merge)
    batch, lengths = oracles.random_batch([2, 4], F), [2, 4]
    modules = [oracles.torch_layer(LSTM(size, H, bidirectional=True)).double() for size in (F, H)]
    params: dict[str, Any] = {}
    for i, (size, module) in enumerate(zip((F, H), modules, strict=True)):
        converted = LSTM(size, H, bidirectional=True).from_torch(module.state_dict())
        params |= {name.replace("l0", f"l{i}"): weights for name, weights in converted.items()}
    output, state = layer.apply(params, batch, lengths=lengths, plan=plan_rows([2, 4]))
    only, _ = layer.apply(params, batch, lengths=lengths, return_sequences=False)
    assert layer.output_size == H
    for row, length in enumerate(lengths):
        x = oracles.torch.tensor(batch[row, :length])
        for module in modules:
            x, (h_n, _) = module(x)
            x = JOINS[merge](x[:, :H], x[:, H:])
        np.testing.assert_allclose(output[row, :length], x.detach(), atol=1e-12)
        np.testing.assert_array_equal(output[row, length:], 0)
        final = JOINS[merge](*h_n).detach()
        np.testing.assert_allclose(layer.final_output(state)[row], final, atol=1e-12)
        np.testing.assert_allclose(only[row], final, atol=1e-12)


def test_without_a_merge_there_is_an_output_for_each_direction():
    pair, joined = (GRU(F, H, bidirectional=True, merge=merge) for merge in (None, "concat"))
    params = pair.init(jax.random.key(0))
    batch = oracles.random_batch([2, 3], F, dtype=np.float32)
    calls: list[tuple[Any, dict[str, Any]]]
    calls = [(batch, {"lengths": [2, 3]}), (batch[1], {}), (jaxpack.pack_sequence(list(batch)), {})]
    for inputs, options in calls:
        expected, state = joined.apply(params, inputs, **options)
        outputs, other = pair.apply(params, inputs, **options)
        packed = isinstance(outputs, jaxpack.PackedSequence)
        outputs, expected = (outputs.data, expected.data) if packed else (outputs, expected)
        np.testing.assert_array_equal(np.concatenate(outputs, axis=-1), expected)
        np.testing.assert_array_equal(other, state)
    assert [leaf.shape for leaf in pair.final_output(joined.apply(params, batch)[1])] == [(2, H)] * 2
    assert [leaf.shape for leaf in pair.apply(params, np.zeros((0, 3, F)))[0]] == [(0, 3, H)] * 2


def test_the_modules_of_flax_merge_too():
    batch = oracles.random_batch([2, 3], F, dtype=np.float32)
    for merge, every in (("sum", True), ("mean", False)):
        module = jaxpack.nnx.LSTM(F, H, bidirectional=True, merge=merge, rngs=nnx.Rngs(0))
        params = nnx.to_pure_dict(nnx.state(module.params))
        layer = LSTM(F, H, bidirectional=True, merge=merge)
        expected = layer.apply(params, batch, return_sequences=every)[0]
        np.testing.assert_array_equal(module(batch, return_sequences=every)[0], expected)
        linen: Any = jaxpack.linen.LSTM(H, bidirectional=True, merge=merge)
        np.testing.assert_array_equal(linen.apply({"params": params}, batch, return_sequences=every)[0], expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"merge": "ave"}, "merge must be"),
        ({"merge": "sum"}, "merge='sum' joins the outputs of two directions: set bidirectional=True."),
        ({"merge": None, "bidirectional": True, "num_layers": 2}, "which no next layer can read, but num_layers is 2."),
    ],
)
def test_a_merge_that_does_not_fit_is_an_error(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        LSTM(F, H, **options)
