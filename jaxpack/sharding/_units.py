"""UnitShards: a recurrent layer whose hidden units are spread over a mesh axis.

The gates of H units stand side by side in a weight, [F, G*H]. Each of M devices takes H/M whole units: their columns of
every gate, and their memory c. A step then needs all of h, and nothing else of other devices:

    forward   a = W_ih x + W_hh h        this device's units, from all of h
              h' = all-gather of the units' outputs
    backward  d = reduce-scatter of the cotangent of h'
              dh = da W_hh^T             of all units, a part of the sum over devices
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding

from jaxpack._cells.cell import Carry, Cell, Fused, Linearization, Params
from jaxpack._layers.layers import GRU, LSTM, RNN
from jaxpack._layers.params import check_params
from jaxpack._layers.recurrent_layer import RecurrentLayer
from jaxpack._layers.specification import LayerParams
from jaxpack._packed.packed_sequence import PackedSequence
from jaxpack._types import PyTree
from jaxpack.sharding._mapping import run_shards
from jaxpack.sharding._mesh import axis_size, check_shards


@dataclasses.dataclass(frozen=True)
class UnitShards:
    """A layer whose hidden units are spread over the devices along a mesh axis: `RNN`, `LSTM` or `GRU`.

    Each device has whole units, and the layer communicates once a step: an all-gather of h in the forward pass, and a
    reduce-scatter of its cotangent in the backward pass.

    Examples:
      >>> mesh = jax.make_mesh((len(jax.devices()),), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> gru = jaxpack.GRU(2, 4)
      >>> sharded, params = UnitShards(gru, mesh), gru.init(jax.random.key(0))
      >>> split = sharded.split(params)
      >>> split["l0"]["weight_hh"].shape, split["l0"]["weight_hh"].sharding.spec
      ((4, 3, 4), P(None, None, 'model'))
      >>> packed = jaxpack.pack_sequence([jnp.ones((3, 2)), jnp.ones((1, 2))])
      >>> output, h_n = jax.jit(sharded.apply)(split, packed)
      >>> bool(jnp.allclose(h_n, gru.apply(params, packed)[1], atol=1e-6))
      True

    Args:
      layer: the layer, without a projection and without a learned initial state.
      mesh: the devices.
      axis: the mesh axis over which units are spread. Its size divides hidden_size.
      data_axis: the mesh axis over which the shards of a batch are spread, as `put` does it. Default: there is one
        batch, the same on all devices.

    Raises:
      TypeError: if the layer is not an RNN, LSTM or GRU.
      ValueError: if the mesh does not have the axis or it is not automatic, the axis does not divide the units, or the
        layer has a projection, a learned initial state, a merge other than "concat", or regularization.
    """

    layer: RecurrentLayer
    mesh: Mesh
    axis: str = "model"
    data_axis: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.layer, (RNN, LSTM, GRU)):
            raise TypeError(f"UnitShards takes a jaxpack.RNN, LSTM or GRU, got {self.layer!r}.")
        parts, units = axis_size(self.mesh, self.axis), self.layer.hidden_size
        if self.data_axis is not None:
            axis_size(self.mesh, self.data_axis)
        types = dict(zip(self.mesh.axis_names, self.mesh.axis_types, strict=True))
        if any(types[axis] != AxisType.Auto for axis in (self.axis, self.data_axis) if axis is not None):
            raise ValueError(
                "UnitShards needs automatic axes, because joining gates and directions is a reshape across units: make "
                "the mesh with jax.make_mesh(..., axis_types=(jax.sharding.AxisType.Auto,) * axes)."
            )
        if units % parts:
            raise ValueError(
                f"hidden_size={units} is not a multiple of the {parts} devices along the mesh axis {self.axis!r}: make "
                f"it {units + -units % parts}, so that each device has whole units."
            )
        layer = self.layer
        if (
            layer.cell.output_size != units
            or layer.learned_initial_state
            or layer.merge != "concat"
            or layer.regularization
        ):
            raise ValueError(
                "the layer has a projection, a learned initial state, a merge or regularization, which UnitShards does "
                'not split: use proj_size=0 and merge="concat", pass a state as initial_state, and drop inputs and '
                "outputs by jaxpack.dropout."
            )

    def split(self, params: LayerParams) -> LayerParams:
        """Returns parameters with an axis for the gates, [..., G*H] as [..., G, H], units spread over the devices.

        Train these: optimisers keep their sharding. Exact.

        Raises:
          ValueError or TypeError: if params are not those of the layer.
        """
        check_params(params, self.layer.shapes, self.layer)
        gates = len(self.layer.cell.gates)

        def place(leaf: Any) -> jax.Array:
            spec = jax.P(*[None] * np.ndim(leaf), self.axis)
            split = jnp.reshape(leaf, (*np.shape(leaf)[:-1], gates, -1))
            if isinstance(split, jax.core.Tracer):
                return lax.with_sharding_constraint(split, NamedSharding(self.mesh, spec))
            return jax.device_put(split, NamedSharding(self.mesh, spec))

        return jax.tree.map(place, params)

    def join(self, params: LayerParams) -> LayerParams:
        """Returns the layer's own parameters, as for a checkpoint or `to_torch`; of gradients, too. Exact."""
        return jax.tree.map(lambda leaf: jnp.reshape(leaf, (*leaf.shape[:-2], -1)), params)

    def apply(
        self,
        params: LayerParams,
        inputs: PackedSequence,
        initial_state: Any = None,
        dropout_key: jax.Array | None = None,
        *,
        resets: PackedSequence | None = None,
        deterministic: bool = False,
        dtype: Any = None,
    ) -> tuple[PackedSequence, Any]:
        """Runs the layer, under `jax.jit`.

        Args:
          params: as `split` returns them.
          inputs: packed data [S, F]; with data_axis the shards of a batch, [D, S, F].
          initial_state, dropout_key, resets: as in `jaxpack.LSTM.apply`; with data_axis stacked, too.
          deterministic, dtype: as in `jaxpack.LSTM.apply`.

        Returns:
          The output and the final state, as the layer's `apply`, with the units spread over the devices; with data_axis
          they have the leading axis of shards. Map over it with jax.vmap.

        Raises:
          ValueError, TypeError: as the layer's `apply`; ValueError if called inside jax.shard_map, or if arrays differ
            in the axis of shards; TypeError if inputs are padded.
        """
        if not isinstance(inputs, PackedSequence):
            raise TypeError(f"UnitShards.apply takes a PackedSequence, got {type(inputs).__name__}.")
        if jax.sharding.get_abstract_mesh().manual_axes:
            raise ValueError(
                "UnitShards.apply spreads its work by itself, and cannot be called inside jax.shard_map, map_shards or "
                "sum_shards. For data-parallel shards pass data_axis= to UnitShards, and the whole batch."
            )
        batch = inputs, initial_state, dropout_key, resets
        stacked: tuple[str, ...] = () if self.data_axis is None else (self.data_axis,)
        if stacked:
            check_shards(batch, axis_size(self.mesh, stacked), f"the mesh axis {self.data_axis!r}")
        local = _LocalUnits.of(self.layer, self.axis, axis_size(self.mesh, self.axis))

        def run(params: LayerParams, batch: Any) -> Any:
            return local.run(params, *batch, deterministic=deterministic, dtype=dtype)

        def on_device(params: LayerParams, batch: Any) -> Any:
            joined = self.join(params)
            return run_shards(run, joined, (batch,)) if stacked else run(joined, batch)

        units = jax.P(*stacked, None, None, self.axis)
        weights = jax.tree.map(lambda leaf: jax.P(*[None] * (leaf.ndim - 1), self.axis), params)
        whole, states = jax.P(*stacked), self._state_specs(jax.P(*stacked), units)
        data, final = jax.shard_map(
            on_device,
            mesh=self.mesh,
            in_specs=(weights, (whole, None if initial_state is None else states, whole, whole)),
            out_specs=(units, units),
            axis_names={self.axis, *stacked},
        )(params, batch)
        output = inputs.replace(data=data.reshape(*data.shape[:-2], -1))
        structure: Any = jax.tree.structure(self.layer.cell.state_sizes)
        return output, jax.tree.unflatten(structure, final)

    def _state_specs(self, h: jax.P, c: jax.P) -> Any:
        """Returns the partition of an initial state: each device reads all of h, and its own units' c."""
        return (h, c) if isinstance(self.layer.cell.state_sizes, tuple) else h


@dataclasses.dataclass(frozen=True)
class UnitsCell(Cell):
    """The units of a cell that one device has: a cell that reads all of h and returns all of h.

    Attributes:
      hidden_size: the units of this device.
      cell: the cell of that many units.
      axis: the mesh axis.
      parts: the number of devices along it.
    """

    cell: Cell
    axis: str
    parts: int

    gates: ClassVar[tuple[str, ...]] = ()

    @property
    def output_size(self) -> int:
        """The width of h: all units."""
        return self.parts * self.hidden_size

    @property
    def state_sizes(self) -> Any:
        """The widths of h, all units, and of the memory c, those of this device."""
        sizes = self.cell.state_sizes
        return (self.output_size, *sizes[1:]) if isinstance(sizes, tuple) else self.output_size

    @property
    def reads_activations(self) -> bool:  # type: ignore[override]
        """Whether the cell's linearize does."""
        return self.cell.reads_activations

    def own(self, h: jax.Array) -> jax.Array:
        """Returns this device's units of h: [..., H] -> [..., H/M]."""
        return lax.dynamic_slice_in_dim(h, lax.axis_index(self.axis) * self.hidden_size, self.hidden_size, -1)

    def shapes(self, input_size: int, bias: bool) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of this device's parameters."""
        shapes = self.cell.shapes(input_size, bias)
        return shapes | {"weight_hh": (self.output_size, shapes["weight_hh"][1])}

    def on(self, platform: str) -> UnitsCell:
        """Returns the same with the cell for a platform."""
        return dataclasses.replace(self, cell=self.cell.on(platform))

    def fuse(self, params: Params) -> Fused:
        """Fuses this device's columns."""
        return self.cell.fuse(params)

    def activate(self, fused: Fused, projected: jax.Array, h: jax.Array) -> PyTree:
        """Returns the gates of this device's units, from all of h."""
        return self.cell.activate(fused, projected, h)

    def advance(self, fused: Fused, activations: PyTree, carry: Carry) -> Carry:
        """Computes this device's units, and gathers h."""
        h, *c = self.cell.advance(fused, activations, (self.own(carry[0]), *carry[1:]))
        return (self._gathered(h), *c)

    def update(self, activations: PyTree) -> tuple[jax.Array, jax.Array]:
        """Returns those of this device's memory."""
        return self.cell.update(activations)

    def linearize(self, fused: Fused, activations: PyTree, before: Carry, after: Carry) -> Linearization:
        """Returns the derivatives of this device's units; of h' with respect to h, those of all."""
        owned = ((self.own(carry[0]), *carry[1:]) for carry in (before, after))
        at = self.cell.linearize(fused, activations, *owned)
        return at if at.dh_dh.shape[-1] == 1 else at._replace(dh_dh=self._gathered(at.dh_dh))

    def pull_back(
        self, transposed: Fused, at: Linearization, d: jax.Array, dc: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Sums the cotangent of h' over devices, each for its own units."""
        d = lax.psum_scatter(d, self.axis, scatter_dimension=d.ndim - 1, tiled=True)
        return self.cell.pull_back(transposed, at, d, dc)

    def _gathered(self, h: jax.Array) -> jax.Array:
        return lax.all_gather(h, self.axis, axis=h.ndim - 1, tiled=True)


@dataclasses.dataclass(frozen=True)
class _LocalUnits(RecurrentLayer):
    """The layer of the units that one device has."""

    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool
    dropout: float
    bidirectional: bool
    units: UnitsCell

    @classmethod
    def of(cls, layer: RecurrentLayer, axis: str, parts: int) -> _LocalUnits:
        """Returns the layer of one of so many devices."""
        names = [field.name for field in dataclasses.fields(cls)[:-1]]
        size = layer.hidden_size // parts
        cell = dataclasses.replace(layer.cell, hidden_size=size)
        options = {name: getattr(layer, name) for name in names} | {"hidden_size": size}
        return cls(**options, units=UnitsCell(size, cell, axis, parts))

    @property
    def cell(self) -> UnitsCell:
        """The units' cell."""
        return self.units

    def run(
        self, params: LayerParams, packed: PackedSequence, state: Any, key: Any, resets: Any, **options: Any
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Returns the outputs [S, D, H/M] and states [..., H/M] of this device's units."""
        output, final = self.apply(params, packed, state, key, resets=resets, **options)
        outputs = output.data.reshape(-1, self.num_directions, self.cell.output_size)
        h, *c = jax.tree.leaves(final)
        return self.cell.own(outputs), (self.cell.own(h), *c)
