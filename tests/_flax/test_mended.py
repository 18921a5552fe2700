"""What Flax gets wrong and the drop-ins do not, each with Flax's result beside ours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax_apis import APIS, F, H
from flax_batch import LENGTHS, REAL, B, T, assert_close, batch, carry_like

pytestmark = pytest.mark.usefixtures("x64")


class TestMended:
    """What Flax gets wrong, each with Flax's result beside ours."""

    @pytest.mark.parametrize("api", APIS)
    def test_no_history_of_carries_is_kept(self, api):
        face = APIS[api]

        def stacked(module, cell, **call):
            """How many [T, B, H] a forward pass stacks up."""
            apply, params = face.pure(module.RNN(face.cell(cell)))
            call = {"seq_lengths": LENGTHS, "return_carry": True, **call}
            jaxpr = jax.make_jaxpr(lambda params, x: apply(params, x, **call))(params, batch(nan=False))
            return _scan_outputs(jaxpr.jaxpr, (T, B, H))

        unknown = "OwnCell" if api == "linen" else "GRUCell"
        assert stacked(face.flax, "LSTMCell") == 3  # c, h and the output
        assert stacked(face.ours, "LSTMCell") <= 1
        assert stacked(face.flax, unknown) == 2
        assert stacked(face.ours, unknown) <= 1

    @pytest.mark.parametrize("api", APIS)
    def test_a_sequence_of_length_0_keeps_its_initial_carry(self, api):
        face = APIS[api]
        lengths = np.array([3, 0, 2, 4])
        carry = carry_like(face, "GRUCell")
        call = {"seq_lengths": lengths, "initial_carry": carry, "return_carry": True}
        apply, params = face.pure(face.ours.RNN(face.cell("GRUCell")))
        flax_apply, _ = face.pure(face.flax.RNN(face.cell("GRUCell")))
        final, outputs = apply(params, batch(nan=False), **call)
        flax_final, flax_outputs = flax_apply(params, batch(nan=False), **call)
        np.testing.assert_array_equal(flax_final[1], flax_outputs[1, -1])  # after all steps of padding
        assert (flax_final[1] != carry[1]).all()
        np.testing.assert_array_equal(final[1], carry[1])
        np.testing.assert_array_equal(outputs[1], np.zeros((T, H)))

    @pytest.mark.parametrize("api", APIS)
    def test_the_carry_of_several_batch_axes(self, api):
        face = APIS[api]
        x, lengths = batch(nan=False).reshape(2, 2, T, F), LENGTHS.reshape(2, 2)
        apply, params = face.pure(face.ours.RNN(face.cell("GRUCell"), return_carry=True))
        flax_apply, _ = face.pure(face.flax.RNN(face.cell("GRUCell"), return_carry=True))
        carry, _ = apply(params, x, seq_lengths=lengths)
        expected, _ = flax_apply(params, batch(nan=False), seq_lengths=LENGTHS)
        assert_close(carry, expected.reshape(2, 2, H))
        wrong, _ = flax_apply(params, x, seq_lengths=lengths)
        assert wrong.shape != (2, 2, H)

    @pytest.mark.parametrize("api", APIS)
    def test_nan_in_padding_does_not_poison_gradients(self, api):
        face = APIS[api]

        def gradients(module):
            apply, params = face.pure(module.RNN(face.cell("LSTMCell")))

            def loss(params, x):
                return jnp.sum(jnp.where(REAL[..., None], apply(params, x, seq_lengths=LENGTHS), 0))

            return jax.tree.leaves(jax.jit(jax.grad(loss))(params, batch()))

        assert all(np.isnan(leaf).any() for leaf in gradients(face.flax))
        assert all(np.isfinite(leaf).all() for leaf in gradients(face.ours))

    @pytest.mark.parametrize("api", APIS)
    def test_outputs_past_a_length_are_zero(self, api):
        face = APIS[api]
        apply, params = face.pure(face.ours.RNN(face.cell("SimpleCell")))
        flax_apply, _ = face.pure(face.flax.RNN(face.cell("SimpleCell")))
        assert (flax_apply(params, batch(nan=False), seq_lengths=LENGTHS)[~REAL] != 0).all()
        assert (apply(params, batch(nan=False), seq_lengths=LENGTHS)[~REAL] == 0).all()


def _scan_outputs(jaxpr, shape):
    """How many outputs of this shape the scans of a jaxpr have, inner ones too."""
    found = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            found += sum(var.aval.shape == shape for var in equation.outvars)
        inner = [
            each for value in equation.params.values() for each in (value if isinstance(value, tuple) else [value])
        ]
        jaxprs = [each for each in (getattr(each, "jaxpr", each) for each in inner) if hasattr(each, "eqns")]
        counts = [_scan_outputs(each, shape) for each in jaxprs]
        found += max(counts, default=0) if equation.primitive.name == "cond" else sum(counts)  # of platforms, one runs
    return found
