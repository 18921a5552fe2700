"""The drop-in RNN and Bidirectional of both Flax APIs, beside Flax's own, where `contract.py` does not hold them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax_apis import APIS, CELLS, F, H

import jaxpack
from jaxpack import pack_padded_sequence, pad_packed_sequence, plan_buckets, plan_rows
from jaxpack._flax import run as flax_run

run_known: Any = flax_run.run_known

pytestmark = pytest.mark.usefixtures("x64")

LENGTHS = np.array([3, 6, 2, 4])
B, T = 4, 6
REAL = np.arange(T) < LENGTHS[:, None]
ROWS, BUCKETS = plan_rows(LENGTHS), plan_buckets(LENGTHS, 2)
LOOSE = jaxpack.plan_exact([7, 5, 5, 3])

# What a call is given: how inputs lie, and options; each is held against Flax itself for every cell.
CALLS: dict[str, dict[str, Any]] = {
    "no plan": {"seq_lengths": LENGTHS},
    "rows, reversed in order": {"seq_lengths": LENGTHS, "plan": ROWS, "reverse": True, "keep_order": True},
    "buckets, time major, reversed": {"seq_lengths": LENGTHS, "plan": BUCKETS, "reverse": True, "time_major": True},
    "equal lengths": {},
}


def batch(nan=True):
    return oracles.random_batch(LENGTHS, F) if nan else np.nan_to_num(oracles.random_batch(LENGTHS, F))


def weights(tree):
    """Fixed numbers of a tree's shapes, to make a loss of it."""
    generator = np.random.default_rng(3)
    return jax.tree.map(lambda leaf: generator.standard_normal(leaf.shape), tree)


def assert_close(actual, expected):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10), actual, expected)


def carry_like(api, name):
    """An initial carry that is not zero."""
    generator = np.random.default_rng(2)
    h = jnp.asarray(generator.standard_normal((B, H)))
    return (h, h / 2) if "LSTM" in name else h


def losses(apply, options, time_major):
    """The values and gradients of a function of parameters, inputs and initial carry, all real outputs in the loss."""
    real = REAL if "seq_lengths" in options else np.ones_like(REAL)
    real = (real.T if time_major else real)[..., None]

    def loss(params, x, carry):
        carry, outputs = apply(params, x, initial_carry=carry, return_carry=True, **options)
        kept = jnp.where(real, outputs, 0)
        weighted = jax.tree.map(lambda leaf, w: jnp.sum(leaf * w), (kept, carry), weights((kept, carry)))
        return sum(jax.tree.leaves(weighted)), (kept, outputs, carry)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))


# Every call meets a cell with a memory, one without, and one that is not known; any other cell meets one call in turn.
COVER = [
    (api, cell, call)
    for i, (api, cell) in enumerate(CELLS)
    for j, call in enumerate(CALLS)
    if (api, cell) in (("linen", "LSTMCell"), ("nnx", "GRUCell"), ("linen", "MGUCell")) or i % len(CALLS) == j
]


@pytest.mark.parametrize(("api", "cell", "call"), COVER)
def test_values_carries_and_gradients_are_those_of_flax(api, cell, call):
    face, options = APIS[api], CALLS[call]
    apply, params = face.pure(face.ours.RNN(face.cell(cell)))
    flax_apply, _ = face.pure(face.flax.RNN(face.cell(cell)))
    time_major = options.get("time_major", False)
    x, clean = (np.swapaxes(a, 0, 1) if time_major else a for a in (batch(), batch(nan=False)))
    x = x if options else clean
    carry = carry_like(face, cell)
    in_flax = {name: value for name, value in options.items() if name != "plan"}
    (_, (kept, outputs, final)), gradients = losses(apply, options, time_major)(params, x, carry)
    (_, (expected, _, flax_final)), flax_gradients = losses(flax_apply, in_flax, time_major)(params, clean, carry)
    assert_close((kept, final, gradients), (expected, flax_final, flax_gradients))
    np.testing.assert_array_equal(outputs, kept)  # zero past each length


@pytest.mark.parametrize(("api", "cell"), [("linen", "LSTMCell"), ("linen", "MGUCell"), ("nnx", "GRUCell")])
def test_any_number_of_batch_axes(api, cell):
    face = APIS[api]
    apply, params = face.pure(face.ours.RNN(face.cell(cell), return_carry=True, reverse=True))
    flat_carry, flat = apply(params, batch(), seq_lengths=LENGTHS)
    x = batch().reshape(2, 2, T, F)
    carry, outputs = apply(params, x, seq_lengths=LENGTHS.reshape(2, 2))
    assert_close((carry, outputs), jax.tree.map(lambda leaf: leaf.reshape(2, 2, *leaf.shape[1:]), (flat_carry, flat)))
    carry, outputs = apply(params, np.moveaxis(x, 2, 0), seq_lengths=LENGTHS.reshape(2, 2), time_major=True, plan=ROWS)
    assert_close(outputs, np.moveaxis(flat.reshape(2, 2, T, H), 2, 0))
    carry, outputs = apply(params, batch()[1], seq_lengths=LENGTHS[1])
    assert_close((carry, outputs), jax.tree.map(lambda leaf: leaf[1], (flat_carry, flat)))


@pytest.mark.parametrize(
    ("api", "cell", "plan"),
    [("linen", "OptimizedLSTMCell", ROWS), ("nnx", "LSTMCell", BUCKETS), ("linen", "MGUCell", LOOSE)],
    ids=["rows", "buckets", "loose"],
)
def test_packed_inputs_give_packed_outputs(api, cell, plan):
    face = APIS[api]
    apply, params = face.pure(face.ours.RNN(face.cell(cell), return_carry=True, plan=BUCKETS))
    packed = pack_padded_sequence(batch(), LENGTHS, batch_first=True, plan=plan)
    carry, outputs = apply(params, packed, reverse=True)
    expected = apply(params, batch(), seq_lengths=LENGTHS, reverse=True)
    assert outputs.plan == plan
    assert_close((carry, pad_packed_sequence(outputs, batch_first=True, total_length=T)[0]), expected)


PAIRS = {
    "of a kind": ("LSTMCell", "LSTMCell", {}),
    "of two kinds": ("GRUCell", "SimpleCell", {}),
    "added": ("GRUCell", "GRUCell", {"merge_fn": jnp.add}),
}
PAIRED = [("linen", "of a kind"), ("nnx", "of two kinds"), ("nnx", "added"), ("linen", "of two kinds")]


@pytest.mark.parametrize(("api", "pair"), PAIRED)
def test_bidirectional_is_that_of_flax(api, pair):
    face, (forward, backward, options) = APIS[api], PAIRS[pair]

    def layer(module):
        return module.Bidirectional(
            module.RNN(face.cell(forward)), module.RNN(face.cell(backward)), return_carry=True, **options
        )

    apply, params = face.pure(layer(face.ours))
    flax_apply, _ = face.pure(layer(face.flax))
    carry = carry_like(face, forward), carry_like(face, backward)
    time_major = {"of a kind": {}, "added": {"plan": ROWS}}.get(pair, {"plan": BUCKETS, "time_major": True})
    call = {"seq_lengths": LENGTHS, **time_major}
    x, clean = (np.swapaxes(a, 0, 1) if "time_major" in call else a for a in (batch(), batch(nan=False)))
    in_flax = {name: value for name, value in call.items() if name != "plan"}
    (_, (kept, outputs, final)), gradients = losses(apply, call, "time_major" in call)(params, x, carry)
    (_, (expected, _, flax_final)), flax_gradients = losses(flax_apply, in_flax, "time_major" in call)(
        params, clean, carry
    )
    assert_close((kept, final, gradients), (expected, flax_final, flax_gradients))
    np.testing.assert_array_equal(outputs, kept)
    packed = pack_padded_sequence(batch(), LENGTHS, batch_first=True, plan=ROWS)
    merged = apply(params, packed, initial_carry=carry, return_carry=False)
    padded = pad_packed_sequence(merged, batch_first="time_major" not in call, total_length=T)[0]
    assert_close(padded, kept)
    assert_close(apply(params, clean), flax_apply(params, clean))


@pytest.mark.parametrize("api", APIS)
def test_directions_of_a_kind_share_their_steps(api):
    face = APIS[api]

    def directions(*cells):
        apply, params = face.pure(
            face.ours.Bidirectional(*(face.ours.RNN(face.cell(cell)) for cell in cells)), jit=False
        )
        call = {"seq_lengths": LENGTHS, "plan": ROWS}
        jaxpr = jax.make_jaxpr(lambda params, x: apply(params, x, **call))(params, batch(nan=False))
        return [e.params["name"] for e in jaxpr.eqns if e.primitive.name in ("jit", "pjit")].count("run_known")

    assert directions("LSTMCell", "LSTMCell") == 1
    assert directions("LSTMCell", "GRUCell") == 2


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

        unknown = "MGUCell" if api == "linen" else "GRUCell"
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
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                found += _scan_outputs(inner, shape) if hasattr(inner, "eqns") else 0
    return found


@pytest.mark.parametrize("api", APIS)
def test_concrete_lengths_make_one_program(api):
    face = APIS[api]
    apply, params = face.pure(face.ours.RNN(face.cell("GRUCell"), return_carry=True), jit=False)
    apply(params, batch(nan=False), seq_lengths=LENGTHS)
    programs = run_known._cache_size()
    for lengths in ([1, 2, 3, 6], [6, 6, 6, 6], [0, 0, 0, 0]):
        apply(params, batch(nan=False), seq_lengths=np.array(lengths))
    assert run_known._cache_size() == programs > 0


def takes_the_fast_way(face, cell, x=None, **options):
    apply, params = face.pure(face.ours.RNN(cell, **options))
    x = batch(nan=False) if x is None else x
    return "custom_vjp" in str(jax.make_jaxpr(lambda params, x: apply(params, x, seq_lengths=LENGTHS))(params, x))


@pytest.mark.parametrize(("api", "cell"), CELLS)
def test_known_cells_take_the_fast_way(api, cell):
    face = APIS[api]
    assert takes_the_fast_way(face, face.cell(cell)) == (cell != "MGUCell")


@pytest.mark.parametrize("api", APIS)
def test_cells_that_do_something_else_run_as_they_are(api):
    face = APIS[api]

    def agrees(cell, fast):
        assert takes_the_fast_way(face, cell) == fast
        apply, params = face.pure(face.ours.RNN(cell, unroll=2))
        flax_apply, _ = face.pure(face.flax.RNN(cell))
        expected = np.where(REAL[..., None], flax_apply(params, batch(nan=False), seq_lengths=LENGTHS), 0)
        assert_close(apply(params, batch(), seq_lengths=LENGTHS), expected)

    agrees(face.cell("LSTMCell", gate_fn=jax.nn.hard_sigmoid), False)
    agrees(face.cell("GRUCell", activation_fn=jax.nn.relu), False)
    agrees(face.cell("SimpleCell", activation_fn=jax.nn.relu), True)
    agrees(face.cell("SimpleCell", activation_fn=jax.nn.softplus), False)
    agrees(face.cell("SimpleCell", residual=True), True)
    kind = type(face.cell("GRUCell"))
    subclass = type("Doubled", (kind,), {"__call__": lambda self, carry, x: kind.__call__(self, carry, 2 * x)})
    agrees(face.of_kind(subclass, param_dtype=jnp.float64), False)


@pytest.mark.parametrize("api", APIS)
def test_mixed_precision_is_flax_own(api):
    face = APIS[api]
    cell = face.cell("LSTMCell", dtype=jnp.float32)
    assert not takes_the_fast_way(face, cell)


@pytest.mark.parametrize("api", APIS)
def test_bad_input_in_flax_places(api):
    face = APIS[api]
    for cell in ("GRUCell", "LSTMCell"):
        apply, params = face.pure(face.ours.RNN(face.cell(cell)))
        with pytest.raises(ValueError, match=r"inputs must be \[\*batch, time, feature\].*got shape \(3,\)"):
            apply(params, np.zeros(F))
        with pytest.raises(ValueError, match=r"one length for each sequence, shape \(4,\), got shape \(2,\)"):
            apply(params, batch(), seq_lengths=[1, 2])
        with pytest.raises(ValueError, match=r"lengths\[1\] = 7 is longer than the padded batch, which has 6 steps"):
            apply(params, batch(), seq_lengths=[1, 7, 2, 3])
        with pytest.raises(ValueError, match="the plan is for 3 sequences, but the batch has 4"):
            apply(params, batch(), seq_lengths=LENGTHS, plan=plan_buckets([3, 2, 1]))
        with pytest.raises(ValueError, match=r"lengths\[1\] = 6 does not fit the plan"):
            apply(params, batch(), seq_lengths=LENGTHS, plan=plan_buckets([5, 4, 3, 2]))
        with pytest.raises(ValueError, match=r"begin with the batch axes \(4,\), got shape \(2, 4\)"):
            apply(
                params, batch(), seq_lengths=LENGTHS, initial_carry=jax.tree.map(lambda a: a[:2], carry_like(0, cell))
            )
        packed = pack_padded_sequence(batch(), LENGTHS, batch_first=True)
        with pytest.raises(TypeError, match="do not give seq_lengths= or plan="):
            apply(params, packed, seq_lengths=LENGTHS)
    with pytest.raises(ValueError, match=r"initial_carry must be \(c, h\), each \[\*batch, 4\]"):
        apply(params, batch(), seq_lengths=LENGTHS, initial_carry=jnp.zeros((B, H)))
    flax_rnn = face.flax.RNN(face.cell("GRUCell"))
    apply, params = face.pure(face.ours.Bidirectional(flax_rnn, face.flax.RNN(face.cell("GRUCell"))))
    assert apply(params, batch(nan=False), seq_lengths=LENGTHS).shape == (B, T, 2 * H)  # as Flax runs them
    with pytest.raises(TypeError, match="need RNNs of jaxpack, got flax"):
        apply(params, batch(), seq_lengths=LENGTHS, plan=ROWS)


def module_of(api, kind):
    """A drop-in that gives its carries too: of a known cell, of another, both ways; or of both directions."""
    face = APIS[api]
    if kind == "pair":
        pair = (face.ours.RNN(face.cell("LSTMCell")) for _ in range(2))
        return face.ours.Bidirectional(*pair, return_carry=True)
    cell = face.cell("GRUCell" if kind.startswith("known") else face.unknown)
    return face.ours.RNN(cell, return_carry=True, reverse="reversed" in kind, keep_order="in order" in kind)


KINDS = ("known", "known, reversed in order", "any, reversed", "any", "pair")
each_kind = pytest.mark.parametrize(("api", "kind"), [(api, kind) for api in APIS for kind in KINDS])


@each_kind
def test_each_device_has_its_share_of_a_batch(api, kind):
    apply, params = APIS[api].pure(module_of(api, kind), jit=False)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    lengths = (LENGTHS,) if "reversed" in kind else ()  # `contract.py` has the other kinds with lengths

    def run(params, x, *lengths):
        return apply(params, x, **({"seq_lengths": lengths[0]} if lengths else {}))

    specs = (jax.sharding.PartitionSpec(), spec, *[spec] * len(lengths))
    sharded = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=spec))
    x = batch(nan=bool(lengths))
    assert_close(sharded(params, x, *lengths), jax.jit(run)(params, x, *lengths))


@each_kind
def test_each_device_has_parameters_of_its_own(api, kind):
    apply, params = APIS[api].pure(module_of(api, kind), jit=False)
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("model")
    several = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf / 2]), params)
    x = batch(nan=False)

    def one(params):
        return jax.tree.map(lambda leaf: leaf[None], apply(jax.tree.map(lambda leaf: leaf[0], params), x))

    outputs = jax.jit(jax.shard_map(one, mesh=mesh, in_specs=spec, out_specs=spec))(several)
    assert_close(outputs, jax.jit(jax.vmap(lambda params: apply(params, x)))(several))


def symbolic_call(api, kind, with_lengths):
    """The call for any batch and time, exported; as it is; and its parameters."""
    apply, params = APIS[api].pure(module_of(api, kind), jit=False)

    def run(params, x, *lengths):
        return apply(params, x, **({"seq_lengths": lengths[0]} if lengths else {}))

    b, t = jax.export.symbolic_shape("b, t")
    args = [jax.ShapeDtypeStruct((b, t, F), jnp.float64), jax.ShapeDtypeStruct((b,), jnp.int32)]
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    return jax.export.export(jax.jit(run))(like, *args[: 1 + with_lengths]).call, jax.jit(run), params


@pytest.mark.parametrize("with_lengths", [False, True], ids=["full", "lengths"])
@each_kind
def test_one_export_is_for_every_batch_and_time(api, kind, with_lengths):
    exported, run, params = symbolic_call(api, kind, with_lengths)
    batches = [(batch(), LENGTHS), (batch()[:2, :3], np.array([3, 0]))]
    for x, lengths in batches if with_lengths else [(np.nan_to_num(x), None) for x, _ in batches]:
        args = (x,) if lengths is None else (x, lengths.astype(np.int32))
        actual, expected = exported(params, *args), run(params, *args)
        assert_close(actual, expected)


@pytest.mark.parametrize("api", APIS)
def test_in_an_export_lengths_that_do_not_fit_are_nan_and_slack_is_inert_to_it(api):
    exported, _, params = symbolic_call(api, "any", True)
    _, outputs = exported(params, batch(), np.array([3, 7, 2, -1], np.int32))
    assert np.isnan(outputs[np.array([1, 3])]).all()
    assert np.isfinite(outputs[np.array([0, 2])]).all()


@pytest.mark.parametrize("api", APIS)
def test_a_plan_for_a_symbolic_batch_is_refused(api):
    face = APIS[api]
    b, t = jax.export.symbolic_shape("b, t")
    x = jax.ShapeDtypeStruct((b, t, F), jnp.float64)
    for module in (face.ours.RNN(face.cell("GRUCell"), plan=ROWS), face.ours.RNN(face.cell(face.unknown), plan=ROWS)):
        apply, params = face.pure(module, jit=False)
        with pytest.raises(ValueError, match=r"shape \(b, t, 3\) is symbolic in b, t, .* Export without a plan"):
            jax.export.export(jax.jit(lambda x, apply=apply, params=params: apply(params, x)))(x)


@pytest.mark.parametrize(("shape", "axes"), [((0, T), ()), ((0, 0), ()), ((B, 0), ()), ((2, 0, T), (2,))])
@pytest.mark.parametrize("with_lengths", [False, True], ids=["full", "lengths"])
@each_kind
def test_a_batch_of_nothing_gives_nothing(api, kind, with_lengths, shape, axes):
    apply, params = APIS[api].pure(module_of(api, kind), jit=False)
    options = {"seq_lengths": np.zeros(shape[:-1], int)} if with_lengths else {}
    x = jnp.zeros((*shape, F))

    def loss(params, x):
        carry, outputs = apply(params, x, **options)
        return sum(map(jnp.sum, jax.tree.leaves((carry, outputs)))), (carry, outputs)

    gradients, (carry, outputs) = jax.eval_shape(jax.grad(loss, argnums=(0, 1), has_aux=True), params, x)
    assert (outputs.shape, outputs.dtype) == ((*shape, H * (1 + (kind == "pair"))), jnp.float64)
    assert {leaf.shape for leaf in jax.tree.leaves(carry)} == {(*shape[:-1], H)}
    assert jax.tree.map(jnp.shape, gradients) == jax.tree.map(jnp.shape, (params, x))


@each_kind
def test_a_batch_of_nothing_has_zero_gradients_and_keeps_what_it_is_given(api, kind):
    apply, params = APIS[api].pure(module_of(api, kind), jit=False)

    def loss(params, x):
        carry, outputs = apply(params, x, seq_lengths=np.zeros(0, int))
        return sum(map(jnp.sum, jax.tree.leaves((carry, outputs))))

    gradients = jax.jit(jax.grad(loss))(params, jnp.zeros((0, T, F)))
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradients))
    with pytest.raises(ValueError, match="the plan is for 4 sequences, but the batch has 0"):
        apply(params, jnp.zeros((0, T, F)), seq_lengths=[], plan=ROWS)
    packed = pack_padded_sequence(jnp.zeros((0, T, F)), [], batch_first=True)
    carry, outputs = apply(params, packed, return_carry=True)
    assert outputs.data.shape[0] == 0
    assert all(leaf.shape[0] == 0 for leaf in jax.tree.leaves(carry))


@each_kind
def test_ranks_need_no_promotion(api, kind):
    plan = (None, ROWS, BUCKETS)[KINDS.index(kind) % 3]
    apply, params = APIS[api].pure(module_of(api, kind), jit=False)
    packed = pack_padded_sequence(batch(), LENGTHS, batch_first=True, plan=ROWS if plan is None else plan)

    def loss(params, x):
        padded = apply(params, x, seq_lengths=LENGTHS, plan=plan)
        carry, outputs = apply(params, packed.replace(data=packed.data * 2))
        return sum(map(jnp.sum, jax.tree.leaves((padded, carry, outputs.data))))

    with jax.numpy_rank_promotion("raise"):
        jax.eval_shape(jax.value_and_grad(loss, argnums=(0, 1)), params, batch(nan=False))


@pytest.mark.parametrize("planned", [False, True], ids=["no plan", "plan"])
@each_kind
def test_a_call_outside_jit_does_not_wait_for_results(api, kind, planned, monkeypatch):
    apply, params = APIS[api].pure(module_of(api, kind), jit=False)
    lengths, x = np.array(LENGTHS), batch(nan=False)
    options = {"plan": BUCKETS} if planned else {}
    read = []
    array: Any = type(jnp.zeros(()))
    value = array._value

    def watched(self):
        read.append(self.shape)
        return value.fget(self)

    apply(params, x, seq_lengths=lengths, **options)
    monkeypatch.setattr(array, "_value", property(watched))
    apply(params, x, seq_lengths=lengths, **options)
    assert read == []
