"""Weight normalisation against PyTorch's parametrisation, and in Flax's modules of that name."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import linen as nn
from flax import nnx

import jaxpack
import jaxpack.linen
import jaxpack.nnx
from jaxpack import LSTM, IndRNN, join_weight_norm, split_weight_norm

F, H = 3, 4
NAMES = ("weight_ih", "weight_hh")


def assert_close(ours, theirs, tolerance=1e-12):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), ours, theirs)


@oracles.needs_torch
def test_values_and_gradients_are_torchs():
    weight = np.random.default_rng(0).normal(size=(F, 4 * H))
    module = oracles.torch.nn.Linear(F, 4 * H, bias=False, dtype=oracles.torch.float64)
    module.weight.data = oracles.torch.tensor(weight.T)
    module = oracles.torch.nn.utils.parametrizations.weight_norm(module, dim=0)
    theirs = module.parametrizations.weight
    theirs.original0.data *= 2  # so that v is not W
    (module.weight**3).sum().backward()
    with jax.enable_x64(True):
        split = split_weight_norm({"weight_ih": weight}, names=["weight_ih"])
        split["weight_ih"]["g"] *= 2
        gradients = jax.grad(lambda split: (join_weight_norm(split)["weight_ih"] ** 3).sum())(split)["weight_ih"]
        joined = join_weight_norm(split)["weight_ih"]
    assert_close(joined, module.weight.detach().numpy().T)
    for name, original in (("g", theirs.original0), ("v", theirs.original1)):
        assert_close(split["weight_ih"][name], original.detach().numpy().T.reshape(split["weight_ih"][name].shape))
        assert_close(gradients[name], original.grad.numpy().T.reshape(gradients[name].shape))


def test_what_is_split_joins_to_the_same_and_other_parameters_stay():
    layer = LSTM(F, H, num_layers=2, proj_size=2, bidirectional=True)
    params = oracles.random_params(layer, np.float32)
    split = split_weight_norm({"encoder": params, "head": jnp.ones(3)})
    assert {name for name, leaf in split["encoder"]["l1_reverse"].items() if isinstance(leaf, dict)} == set(NAMES)
    assert_close(join_weight_norm(split), {"encoder": params, "head": jnp.ones(3)}, 1e-6)

    ind_rnn = IndRNN(F, H).init(jax.random.key(0))
    assert split_weight_norm(ind_rnn)["l0"]["weight_hh"].shape == (H,)
    with pytest.raises(ValueError, match=r"params have no weight_hr. Pass names="):
        split_weight_norm(ind_rnn, ["weight_ih", "weight_hr"])


def test_a_column_of_zeros_has_finite_gradients():
    split = split_weight_norm({"weight_hh": jnp.array([[0.0, 3.0], [0.0, 4.0]])}, ["weight_hh"])
    np.testing.assert_array_equal(join_weight_norm(split)["weight_hh"], [[0, 3], [0, 4]])
    gradients = jax.grad(lambda split: join_weight_norm(split)["weight_hh"].sum())(split)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_flax_modules_of_weight_norm_take_the_stacks():
    x, plan = np.random.default_rng(0).normal(size=(2, 4, F)).astype(np.float32), jaxpack.plan_padded(2, 4)
    layer = LSTM(F, H)
    module = jaxpack.nnx.LSTM(F, H, rngs=nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(module.params))
    joined = jax.tree.map(jnp.asarray, split_weight_norm(params))
    for name in NAMES:
        joined["l0"][name]["g"] = jnp.ones(4 * H)  # Flax's scales begin at 1
    expected, _ = layer.apply(join_weight_norm(joined), x, plan=plan)
    wrapped = nnx.WeightNorm(module, variable_filter=nnx.filterlib.Any(*map(nnx.PathContains, NAMES)), rngs=nnx.Rngs(0))
    np.testing.assert_allclose(wrapped(x, plan=plan)[0], expected, atol=1e-6)

    class Wrapped(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.WeightNorm(jaxpack.linen.LSTM(H), variable_filter=set(NAMES))(x, plan=plan)

    variables = jax.tree.map(jnp.asarray, Wrapped().init(jax.random.key(0), x))
    variables["params"]["LSTM_0"] = params
    np.testing.assert_allclose(Wrapped().apply(variables, x)[0], expected, atol=1e-6)
