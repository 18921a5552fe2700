"""RGLRU, the real-gated linear recurrent unit of Griffin (De et al. 2024).

    r_t = σ(W_r x_t + b_r)                          recurrence gate
    i_t = σ(W_i x_t + b_i)                          input gate
    log a_t = -c softplus(Λ) ⊙ r_t,   c = 8
    h_t = a_t ⊙ h_{t-1} + sqrt(1 - a_t²) ⊙ (i_t ⊙ x_t)

W_r and W_i are block-diagonal, a block for each head. a_t is computed from its logarithm, and 1 - a_t² as
-expm1(2 log a_t), which keeps its digits where a_t is close to 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxpack._checks import at_least_one
from jaxpack._layers.params import floating
from jaxpack._linear.convert import Arrays, converted
from jaxpack._linear.diagonal import DiagonalLayer, split
from jaxpack._linear.solve import accumulator
from jaxpack._types import PyTree

_C = 8.0
_RING = 0.9, 0.999  # of exp(-softplus(Λ)), the decay where r is 1 / c


@dataclasses.dataclass(frozen=True)
class RGLRU(DiagonalLayer):
    """A real-gated linear recurrent unit, the recurrence of Griffin and RecurrentGemma. Returns (output, h_n).

        r = σ(W_r x + b_r);  i = σ(W_i x + b_i);  a = exp(-8 softplus(Λ) r);  h' = a h + sqrt(1 - a²) (i x)

    Examples:
      >>> layer = jaxpack.RGLRU(input_size=4, hidden_size=4, num_heads=2)
      >>> params = layer.init(jax.random.key(0))
      >>> output, h_n = layer.apply(params, jaxpack.pack_sequence([np.ones((3, 4)), np.ones((1, 4))]))
      >>> output.shape, h_n.shape
      ((4, 4), (2, 4))

    The parameters have the names and shapes of RecurrentGemma: a_param [H] is Λ, and input_gate and a_gate have blocks
    w [num_heads, H / num_heads, H / num_heads] and biases b [num_heads, H / num_heads].

    Args:
      input_size: the number of features of each step, at least 1.
      hidden_size: the width of h, which is input_size: each feature has its own memory.
      num_heads: the number of blocks of the gates' weights, which divides hidden_size.
      scale_first: whether the input of a step that starts from zeros is scaled by sqrt(1 - a²), too, as in the paper.
        RecurrentGemma does not scale it.

    Raises:
      TypeError: if an argument has another type.
      ValueError: if an argument is out of range, hidden_size is not input_size, or num_heads does not divide it.
    Source: De et al. 2024, https://arxiv.org/abs/2402.19427.
    """

    input_size: int
    hidden_size: int
    num_heads: int = 1
    scale_first: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_size != self.input_size:
            raise ValueError(
                f"hidden_size must be input_size, since each feature has its own memory, got {self.hidden_size} and "
                f"{self.input_size}. Project the inputs first."
            )
        if self.hidden_size % at_least_one("num_heads", self.num_heads):
            raise ValueError(f"num_heads must divide hidden_size={self.hidden_size}, got {self.num_heads}.")
        if not isinstance(self.scale_first, bool):
            raise TypeError(f"scale_first must be a bool, got {self.scale_first!r}.")

    @property
    def output_size(self) -> int:
        """The width of the output, hidden_size."""
        return self.hidden_size

    @property
    def shapes(self) -> dict[str, Any]:
        """The shape of every parameter."""
        size = self.hidden_size // self.num_heads
        gate = {"w": (self.num_heads, size, size), "b": (self.num_heads, size)}
        return {"a_param": (self.hidden_size,), "input_gate": gate, "a_gate": dict(gate)}

    def init(self, key: jax.Array, dtype: Any = None) -> dict[str, Any]:
        """Draws parameters as in the paper: exp(-softplus(Λ)) in [0.9, 0.999], blocks normal, biases 0.

        Args:
          key: a JAX random key.
          dtype: a floating dtype. Default: JAX's (float32, or float64 under x64).

        Raises:
          TypeError: if key is not a random key, or dtype is not floating.
        """
        dtype = floating(float if dtype is None else dtype)
        wide = accumulator(dtype)
        decay_key, *gate_keys = split(key, 3)
        low, high = _RING
        squared = jax.random.uniform(decay_key, (self.hidden_size,), wide, low**2, high**2)  # even on a ring's area
        decay = jnp.log(jnp.expm1(-0.5 * jnp.log(squared)))
        gates = {}
        for name, gate_key in zip(("input_gate", "a_gate"), gate_keys, strict=True):
            shapes = self.shapes[name]
            blocks = jax.random.normal(gate_key, shapes["w"], wide) / jnp.sqrt(shapes["w"][-1])
            gates[name] = {"w": blocks.astype(dtype), "b": jnp.zeros(shapes["b"], dtype)}
        return {"a_param": decay.astype(dtype), **gates}

    def from_recurrentgemma(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the parameters of an RG-LRU of RecurrentGemma, in the layout of its Flax or its PyTorch code.

        Flax has the names of this layer. Hugging Face's transformers, and the safetensors files for it, have
        recurrent_param, input_gate_weight, input_gate_bias, recurrent_gate_weight and recurrent_gate_bias.

        Examples:
          >>> layer = jaxpack.RGLRU(4, 4, num_heads=2, scale_first=False)
          >>> gates = {f"{gate}_gate_weight": np.ones((2, 2, 2), np.float32) for gate in ("input", "recurrent")}
          >>> gates |= {f"{gate}_gate_bias": np.ones((2, 2), np.float32) for gate in ("input", "recurrent")}
          >>> params = layer.from_recurrentgemma(gates | {"recurrent_param": np.ones(4, np.float32)})
          >>> params["a_gate"]["w"].shape
          (2, 2, 2)

        Args:
          params: the parameters of one layer: a nested dict of arrays, or tensors or arrays by name.

        Raises:
          KeyError: if names are missing or not known.
          TypeError: if values are not floating numbers.
          ValueError: if a shape is wrong, JAX would round a value, or the layer has scale_first, with which it would
            compute something else.
        """
        if self.scale_first:
            raise ValueError(
                "RecurrentGemma does not scale the input of the first step: make the layer with scale_first=False."
            )
        shapes: Any = self.shapes
        nested = not any(name.startswith("recurrent_") for name in params)
        names = {"input_gate": "input_gate", "a_gate": "a_gate" if nested else "recurrent_gate"}
        entries: dict[str, Any] = {"a_param": Arrays("a_param" if nested else "recurrent_param", shapes["a_param"])}
        for gate, name in names.items():
            join = {"w": f"{name}.w", "b": f"{name}.b"} if nested else {"w": f"{name}_weight", "b": f"{name}_bias"}
            entries[gate] = {each: Arrays(join[each], shape) for each, shape in shapes[gate].items()}
        return converted(params, entries)

    def prepare(self, params: PyTree) -> PyTree:
        """Returns -c softplus(Λ), and the blocks and biases of both gates side by side."""
        rate = params["a_param"]
        gates = params["input_gate"], params["a_gate"]
        return {
            "rate": -_C * jax.nn.softplus(rate.astype(accumulator(rate.dtype)))[None],
            "blocks": jnp.concatenate([gate["w"] for gate in gates], axis=-1),
            "biases": jnp.concatenate([gate["b"] for gate in gates], axis=-1)[None],
        }

    def gates(self, params: PyTree, x: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns a and sqrt(1 - a²) i x."""
        wide = accumulator(x.dtype)
        heads = x.reshape(len(x), self.num_heads, -1).astype(wide)
        # In bfloat16 a CPU would also add up a chunk's gradient of the blocks in bfloat16 (JAX 0.12).
        projected = jnp.einsum("mhi,hij->mhj", heads, params["blocks"].astype(wide))
        gates = jnp.split(projected + params["biases"].astype(wide), 2, axis=-1)
        i, r = (jax.nn.sigmoid(gate.reshape(x.shape)) for gate in gates)
        log_a = params["rate"] * r
        # The floor keeps the derivative of the root finite where a gate is shut. It is far below any 1 - a² in use.
        scale = jnp.sqrt(jnp.maximum(-jnp.expm1(2 * log_a), jnp.finfo(wide).tiny))
        if not self.scale_first:
            scale = jnp.where(start[:, None], 1, scale)
        return jnp.exp(log_a), scale * i * x.astype(wide)
