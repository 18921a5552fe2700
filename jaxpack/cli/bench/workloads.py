"""The workloads of `jaxpack bench`: named, with fixed seeds, and with the arrays that all libraries get."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

import jaxpack
from jaxpack._layers.recurrent_layer import RecurrentLayer
from jaxpack._linear.chunks import ladder_cells as linear_ladder_cells
from jaxpack._linear.layer import SingleLayer
from jaxpack._matrix.layer import MatrixLayer
from jaxpack._recurrence.derivative import unplanned_cells
from jaxpack._stepped.layer import SteppedLayer
from jaxpack.cli.bench.further_cells import FURTHER_LAYERS
from jaxpack.cli.bench.stepped_cells import CONVOLUTIONAL, IMAGE, IMAGE_SIZES, STEPPED_LAYERS, arrays_beside
from jaxpack.datasets import japanese_vowels

EPOCH = "epoch"  # the name of the workload that is a corpus


def _by_name(*layers: Any) -> Mapping[str, Any]:
    return MappingProxyType({layer.__name__.lower(): layer for layer in layers})


LAYERS: Mapping[str, Callable[..., RecurrentLayer]] = MappingProxyType(
    {**_by_name(jaxpack.LSTM, jaxpack.GRU, jaxpack.RNN), **FURTHER_LAYERS}
)
LINEAR_LAYERS: Mapping[str, Callable[..., SingleLayer]] = _by_name(
    jaxpack.LRU,
    jaxpack.MinGRU,
    jaxpack.MinLSTM,
    jaxpack.RGLRU,
    jaxpack.Mamba2,
    jaxpack.GatedDeltaNet,
    jaxpack.MLSTM,
)
CELLS = (*LAYERS, *LINEAR_LAYERS, *STEPPED_LAYERS)  # all names of cells
_HEAD_SIZE = 64  # of GatedDeltaNet
_NAMES = {
    "grubefore": "GRU, reset before",
    "timedecay": "TimeDecay of an LSTM",
    "convlstm": f"ConvLSTM on images of {IMAGE[0]} x {IMAGE[1]}",
    "convgru": f"ConvGRU on images of {IMAGE[0]} x {IMAGE[1]}",
}


def layer_name(cell: str) -> str:
    """Returns the name of a cell's layer in jaxpack."""
    return _NAMES.get(cell) or ({**LAYERS, **LINEAR_LAYERS, **STEPPED_LAYERS})[cell].__name__


@dataclasses.dataclass(frozen=True, eq=False)
class Workload:
    """A layer and a batch for it, or a corpus.

    Attributes:
      name: the workload's name.
      lengths: int [B], the lengths of all sequences.
      cell: a name in `LAYERS`; or in `LINEAR_LAYERS` or `STEPPED_LAYERS`, which are one layer in one direction.
      features, hidden_size, num_layers, bidirectional: the layer's sizes.
      seed: the seed of weights, inputs and cotangents.
      dtype: "float32" or "bfloat16", of all of these and of the computation.
      mesh: the devices of a CPU, each of which runs a shard of a batch beside the same on one; None for one device.
    """

    name: str
    lengths: np.ndarray
    cell: str = "lstm"
    features: int = 128
    hidden_size: int = 256
    num_layers: int = 1
    bidirectional: bool = False
    seed: int = 0
    dtype: str = "float32"
    mesh: Any = None

    @property
    def layer(self) -> Any:
        """The layer of jaxpack, a RecurrentLayer or a SingleLayer."""
        if self.cell in LAYERS:
            sizes = self.features, self.hidden_size, self.num_layers
            return LAYERS[self.cell](*sizes, bidirectional=self.bidirectional)
        if self.num_layers * (1 + self.bidirectional) != 1:
            raise ValueError(
                f"{layer_name(self.cell)} is one layer in one direction, but {self.name} has {self.num_layers} "
                f"layers in {1 + self.bidirectional}. Choose another workload, such as lognormal."
            )
        if self.cell in STEPPED_LAYERS:
            return STEPPED_LAYERS[self.cell](self.features, self.hidden_size)
        heads = {"num_heads": max(1, self.hidden_size // _HEAD_SIZE)} if self.cell == "gateddeltanet" else {}
        return LINEAR_LAYERS[self.cell](self.features, self.hidden_size, **heads)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one step of `inputs`: (features,), with the axes of images before it."""
        return (*IMAGE, self.features) if self.cell in CONVOLUTIONAL else (self.features,)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """The shape of one step of the outputs."""
        return (*IMAGE, self.hidden_size) if self.cell in CONVOLUTIONAL else (self.layer.output_size,)

    @property
    def batch_size(self) -> int:
        """The number of sequences."""
        return len(self.lengths)

    @property
    def longest(self) -> int:
        """The steps of the longest sequence, at least 1: the time axis of the padded batch."""
        return max(int(self.lengths.max()), 1)

    @property
    def tokens(self) -> int:
        """The number of real steps."""
        return int(self.lengths.sum())

    @property
    def input_sizes(self) -> list[int]:
        """The number of input features of each layer in the stack."""
        return [self.features] + [self.layer.output_size] * (self.num_layers - 1)

    @property
    def int32_lengths(self) -> np.ndarray:
        """The lengths as int32."""
        return self.lengths.astype(np.int32)

    @functools.cached_property
    def plan(self) -> jaxpack.BucketPlan:
        """The plan that `jaxpack.plan_best` chooses."""
        return jaxpack.plan_best(self.lengths)

    @functools.cached_property
    def padded_plan(self) -> jaxpack.BucketPlan:
        """The padded batch as a plan."""
        return jaxpack.plan_padded(self.batch_size, self.longest)

    def cells_under(self, plan: jaxpack.BucketPlan | None) -> int:
        """Counts the cells that jaxpack computes under a plan, or without one."""
        if plan is not None:
            return plan.size
        if isinstance(self.layer, (MatrixLayer, SteppedLayer)):
            return self.padded_plan.size
        if self.cell in LINEAR_LAYERS:
            return linear_ladder_cells(self.padded_plan, self.lengths)
        return unplanned_cells(self.lengths, self.longest)

    @functools.cached_property
    def mask(self) -> np.ndarray:
        """bool [B, T]: True at the real steps of the padded batch."""
        return np.arange(self.longest) < self.lengths[:, None]

    @functools.cached_property
    def inputs(self) -> np.ndarray:
        """The padded batch [B, T, *input_shape]: normal, zero past each length."""
        return self._normal(1, self.input_shape)

    @functools.cached_property
    def beside(self) -> list[np.ndarray]:
        """The arrays [B, T, ...] that the layer reads beside `inputs`, such as the time between steps; often none."""
        drawn = arrays_beside(self.cell, np.random.default_rng([self.seed, 3]), self.mask.shape, self.features)
        return [array.astype(self.dtype) for array in drawn]

    def joined(self, inputs: Any, beside: Sequence[Any]) -> Any:
        """Returns what the layer takes: the inputs, or a tuple of them and the arrays beside them."""
        return (inputs, *beside) if beside else inputs

    @functools.cached_property
    def cotangent(self) -> np.ndarray:
        """The factor of the outputs in the loss, [B, T, *output_shape]: normal, zero past each length.

        It is scaled so that the loss, a sum over all outputs, does not grow with the number of steps.
        """
        return self._normal(2, self.output_shape, 1 / np.sqrt(self.tokens * math.prod(self.output_shape[:-1])))

    @functools.cached_property
    def params(self) -> dict[str, Any]:
        """The layer's weights, which torch gets too."""
        params = self.layer.init(jax.random.key(self.seed), "float32")
        return jax.tree.map(lambda array: array.astype(self.dtype), params)

    def _normal(self, stream: int, shape: tuple[int, ...], scale: float = 1) -> np.ndarray:
        generator = np.random.default_rng([self.seed, stream])
        array = generator.standard_normal((*self.mask.shape, *shape), np.float32)
        array *= np.expand_dims(self.mask, tuple(range(2, array.ndim))) * np.float32(scale)
        return array.astype(self.dtype, copy=False)


def named_workload(name: str, seed: int = 0) -> Workload:
    """Returns the workload with this name; another seed draws other lengths, if they are random, and other weights.

    Raises:
      ValueError: if there is no such workload; the message lists the names.
    """
    if name not in _WORKLOADS:
        raise ValueError(f"{name!r} is not a workload. Choose one of {', '.join(_WORKLOADS)}.")
    draw, options = _WORKLOADS[name]
    return Workload(name, draw(np.random.default_rng(seed)), seed=seed, **options)


def with_cell(workload: Workload, cell: str, **sizes: int) -> Workload:
    """Returns a workload with another cell, in the given sizes, or the workload's, or such as the cell can have."""
    own: Mapping[str, Any] = {}
    if cell in CONVOLUTIONAL:
        own = IMAGE_SIZES
    elif cell == "rglru":  # whose blocks are square
        own = {"features": sizes.get("hidden_size", workload.hidden_size)}
    return dataclasses.replace(workload, cell=cell, **{**own, **sizes})


def workload_names() -> tuple[str, ...]:
    """Returns the names of all workloads."""
    return tuple(_WORKLOADS)


def lognormal_lengths(generator: np.random.Generator, batch_size: int = 64) -> np.ndarray:
    """Draws log-normal lengths: half are above 50, a sixth above 100."""
    return np.clip(np.round(generator.lognormal(np.log(50), 0.7, batch_size)), 1, 200).astype(np.int64)


def _uniform(generator: np.random.Generator) -> np.ndarray:
    return generator.integers(1, 100, 64, endpoint=True)


def equal_lengths(generator: np.random.Generator, batch_size: int = 64, length: int = 100) -> np.ndarray:
    """Returns lengths that are all the same."""
    return np.full(batch_size, length)


def _words(generator: np.random.Generator) -> np.ndarray:
    """Draws the lengths of 128 words: near 9 letters, at most 24."""
    return np.clip(np.round(generator.normal(9, 3, 128)), 1, 24).astype(np.int64)


def _vowels(generator: np.random.Generator) -> np.ndarray:
    """Draws one of the ten batches of an epoch of Japanese Vowels."""
    train, _ = japanese_vowels()
    return generator.permutation(train.lengths)[:27].astype(np.int64)


def _longtail(generator: np.random.Generator) -> np.ndarray:
    """Draws 128 lengths near 30, of which 6 (5 %) are 500."""
    lengths = np.clip(np.round(generator.normal(30, 5, 128)), 1, None).astype(np.int64)
    lengths[generator.permutation(128)[:6]] = 500
    return lengths


_WORKLOADS: Mapping[str, tuple[Callable[[np.random.Generator], np.ndarray], Mapping[str, Any]]] = MappingProxyType(
    {
        "lognormal": (lognormal_lengths, {}),
        "uniform": (_uniform, {}),
        "equal": (equal_lengths, {}),
        "vowels": (_vowels, {"features": 12, "hidden_size": 64}),
        "longtail": (_longtail, {}),
        "bilstm2": (lognormal_lengths, {"num_layers": 2, "bidirectional": True}),
        "gru": (lognormal_lengths, {"cell": "gru"}),
        "rnn": (lognormal_lengths, {"cell": "rnn"}),
        "words": (_words, {"features": 64, "hidden_size": 192}),
        "words-gru": (_words, {"cell": "gru", "features": 64, "hidden_size": 192}),
        "lru": (lognormal_lengths, {"cell": "lru"}),
        "mingru": (lognormal_lengths, {"cell": "mingru"}),
        "rglru": (lognormal_lengths, {"cell": "rglru", "features": 256}),
        "mamba2": (lognormal_lengths, {"cell": "mamba2"}),
        "mlstm": (lognormal_lengths, {"cell": "mlstm"}),
        "delta": (lognormal_lengths, {"cell": "gateddeltanet"}),
        "delta-long": (
            functools.partial(equal_lengths, batch_size=1, length=1024),
            {"cell": "gateddeltanet", "features": 512, "hidden_size": 512},
        ),
        "small": (functools.partial(lognormal_lengths, batch_size=8), {"features": 32, "hidden_size": 32}),
        "wide": (functools.partial(lognormal_lengths, batch_size=256), {"hidden_size": 512}),
        "long": (functools.partial(equal_lengths, batch_size=16, length=10_000), {}),
        EPOCH: (functools.partial(lognormal_lengths, batch_size=4096), {}),
    }
)
