"""The programs that are compiled: layers of jaxpack under each plan, beside plain autodiff and Flax.

All take 64 sequences of at most 128 steps, of log-normal lengths, with 128 features and hidden size 256.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxpack

B, T, D, H = 64, 128, 128, 256
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def _lognormal_lengths() -> np.ndarray:
    lengths = np.exp(np.random.default_rng(0).normal(3.6, 0.7, B)).astype(int).clip(1, T)
    lengths[0] = T
    return lengths


PLANS = {
    "padded": jaxpack.plan_padded(B, T),
    "buckets": jaxpack.plan_buckets(_lognormal_lengths(), 8),
    "rows": jaxpack.plan_rows(_lognormal_lengths()),
}
# A plan runs jaxpack's layer on a packed batch. `none` is padded data with lengths and no plan, `autodiff` jaxpack's
# plain scan under the padded plan, differentiated by JAX, and `flax` is flax.nnx.RNN or flax.nnx.Bidirectional.
FORMS = (*PLANS, "none", "autodiff", "flax")
DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16}


class Case(NamedTuple):
    """What is compiled, and for which target.

    Attributes:
      target: a name in `targets.TARGETS`.
      layer: LSTM, GRU or RNN.
      form: one of FORMS.
      directions: 1 or 2.
      dtype: f32 or bf16, of parameters and data.
      training: whether it returns a loss with its gradients, by parameters and inputs; else outputs and states.
      resets: whether steps begin episodes, as flags say that are known when it runs; not for flax.
    """

    target: str
    layer: str
    form: str
    directions: int = 1
    dtype: str = "f32"
    training: bool = False
    resets: bool = False

    @property
    def name(self) -> str:
        """The case in one word, as in the table and in the names of tests."""
        run = "training" if self.training else "forward"
        return "-".join(
            [
                self.target,
                self.layer,
                self.form,
                *["bi"] * (self.directions == 2),
                *["resets"] * self.resets,
                self.dtype,
                run,
            ]
        )

    @property
    def steps(self) -> int:
        """How many steps the longest row has."""
        return PLANS[self.form].boundaries[-1] if self.form in PLANS else T


class Program(NamedTuple):
    """A function with abstract arguments: parameters, then the data, then whatever has no gradient."""

    run: Any
    arguments: tuple[Any, ...]


def program(case: Case) -> Program:
    """Returns the function that a case compiles, and its abstract arguments."""
    forward = _flax(case) if case.form == "flax" else _jaxpack(case)
    if not case.training:
        return forward

    def loss(params: Any, data: Any, *rest: Any) -> jax.Array:
        return jnp.sum(forward.run(params, data, *rest)[0].astype(jnp.float32) ** 2)

    return Program(jax.value_and_grad(loss, (0, 1)), forward.arguments)


def _padded(case: Case) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    return jax.ShapeDtypeStruct((B, T, D), DTYPES[case.dtype]), jax.ShapeDtypeStruct((B,), jnp.int32)


def _jaxpack(case: Case) -> Program:
    layer = getattr(jaxpack, case.layer)(D, H, bidirectional=case.directions == 2)
    params = jax.eval_shape(lambda: layer.init(jax.random.key(0), DTYPES[case.dtype]))
    if case.form == "none":
        flags = [jax.ShapeDtypeStruct((B, T), bool)] * case.resets

        def run_padded(params: Any, x: Any, lengths: Any, *flags: Any) -> Any:
            return layer.apply(params, x, lengths=lengths, resets=flags[0] if flags else None)

        return Program(run_padded, (params, *_padded(case), *flags))
    plan = PLANS.get(case.form, PLANS["padded"])

    def pack(x: Any, lengths: Any) -> jaxpack.PackedSequence:
        padded = jnp.zeros((plan.num_sequences, plan.max_length, D), x.dtype)
        return jaxpack.pack_padded_sequence(padded, lengths, batch_first=True, plan=plan)

    packed = jax.eval_shape(pack, *_padded(case))

    flags = [jax.ShapeDtypeStruct((plan.size,), bool)] * case.resets

    def run(params: Any, data: Any, packed: Any, *flags: Any) -> Any:
        resets = packed.replace(data=flags[0]) if flags else None
        inputs = packed.replace(data=data)
        output, state = layer.apply(params, inputs, resets=resets, forward_mode=case.form == "autodiff")
        return output.data, state

    return Program(run, (params, packed.data, packed, *flags))


def _flax(case: Case) -> Program:
    cell = {"LSTM": nnx.OptimizedLSTMCell, "GRU": nnx.GRUCell, "RNN": nnx.SimpleCell}[case.layer]
    dtype = DTYPES[case.dtype]
    rnns = [nnx.RNN(cell(D, H, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype)) for _ in range(case.directions)]
    model = nnx.Bidirectional(*rnns) if case.directions == 2 else rnns[0]
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def run(params: Any, x: Any, lengths: Any, rest: Any) -> Any:
        merged = nnx.merge(graph, params, rest, copy=True)  # variables of this trace, since it counts keys
        return (merged(x, seq_lengths=lengths),)

    return Program(run, (params, *_padded(case), rest))
