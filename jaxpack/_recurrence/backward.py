"""The backward pass of the fast recurrence: one direction of one layer, from the last chunk to the first.

Work that is not sequential is done for a whole chunk at once, while it is in cache: the coefficients of the sequential
recurrence, and the gradients of inputs and weights. Cotangents pass through slack unchanged, to the last real cell of
the slot.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpack._cells.cell import Carry, Fused, Linearization, transpose
from jaxpack._recurrence.buffers import Outputs, buffer, loop, read, run_steps, write
from jaxpack._recurrence.loops import Loops, Operands, Residuals, Results, factors, widened
from jaxpack._recurrence.slots import Entry, Keeps, Scale
from jaxpack._recurrence.windows import Stair, Window
from jaxpack._types import PyTree


def backward(loops: Loops, residuals: Residuals, cotangents: Results) -> Operands:
    """Returns the cotangents of the operands.

    Args:
      loops: as in the forward pass.
      residuals: from the forward pass.
      cotangents: of the results; slack may hold anything.
    """
    weights, x, initial, fresh = residuals.operands
    dfinal = cotangents.carry
    weights = lax.optimization_barrier(factors(weights, x.dtype))
    transposed = lax.optimization_barrier(jax.tree.map(lambda w: w.T, weights))  # once: the loops would copy it
    wide = initial[0].shape[1] == loops.sizes[0]
    run = _Backward(loops, weights, transposed, residuals, cotangents, loops.real.entering(initial, fresh), wide)
    dcarry, nothing = loops.start(dfinal), jax.tree.map(jnp.zeros_like, dfinal) if fresh else ()
    left = jax.tree.map(jnp.zeros_like, dcarry) if wide and loops.real.resets is not None else ()
    rows = _RowCotangents(dcarry, left)
    dbegun = (*dfinal, *nothing) if wide else ()
    dx = buffer(x, (loops.size, x.shape[1]), 0)
    dweights = jax.tree.map(lambda w: buffer(x, w.shape, 0, w.dtype), residuals.operands.weights)
    first, *_ = loops.start(widened(loops.cell, initial))
    for k in reversed(range(len(loops.stairs))):
        stair = loops.stairs[k]
        before = residuals.y[stair.offset - loops.stairs[k - 1].rows :] if k else first
        # A count that the compiler cannot see: it would inline a single chunk, and keep all buckets' arrays at once.
        count = stair.number if loops.wide else lax.optimization_barrier(jnp.int32(stair.number))
        alive = jax.tree.map(lambda leaf, stair=stair: leaf[: stair.rows], rows)
        state = _BackwardState(alive, dbegun, dx, dweights)
        state = loop(0, count, functools.partial(run.chunk, stair, before[: stair.rows]), state)
        alive, dbegun, dx, dweights = state
        rows = jax.tree.map(lambda leaf, row: write(leaf, row, 0), rows, alive)
    dx = loops.real.restore(dx)
    if not wide:
        return Operands(dweights, dx, jax.tree.map(jnp.zeros_like, initial))
    dbegun = rows.begun(bool(fresh)) if loops.real.borders is None else dbegun
    dinitial, dfresh = dbegun[: len(initial)], dbegun[len(initial) :]
    if loops.real.borders is not None:
        dinitial = loops.where_real(dinitial, dfinal)
        dfresh = loops.where_real(dfresh, nothing) if fresh else ()
    return Operands(dweights, dx, dinitial, dfresh)


class _RowCotangents(NamedTuple):
    """The cotangents that the backward recurrence hands on, for each row.

    Attributes:
      carry: of the carry.
      left: of the carry to which resets return, from those in the slot so far; () if there are none, or nothing is
        differentiated by it.
    """

    carry: Carry
    left: Carry = ()

    def begun(self, has_fresh: bool) -> Carry:
        """Returns the cotangent of the initial carry, where a slot begins, and behind it that of a fresh one."""
        if has_fresh:
            return (*self.carry, *self.left)
        return tuple(map(jnp.add, self.carry, self.left)) if self.left else self.carry

    def enter(self, entry: Entry, cells: Any) -> _RowCotangents:
        """Enters a slot at its end."""
        here, _ = cells
        left = self.left if here is None else tuple(jnp.where(here, 0, leaf) for leaf in self.left)
        return _RowCotangents(entry.step(cells, self.carry), left)

    def leave(self, here: jax.Array | None) -> _RowCotangents:
        """Lets the cotangents of the carry leave where a reset is: bool [rows, 1], or None."""
        if here is None:
            return self
        left = tuple(jnp.where(here, leaf + d, leaf) for leaf, d in zip(self.left, self.carry, strict=False))
        return _RowCotangents(tuple(jnp.where(here, 0, d) for d in self.carry), left)


class _BackwardState(NamedTuple):
    """The state of the loop over chunks.

    Attributes:
      rows: the cotangents of the stair's rows.
      dbegun: the cotangent of each slot's initial carry, and behind it that of its fresh one, where the slot is done
        and slots share rows.
      dx: the cotangents of the inputs.
      dweights: the cotangents of the weights, as far as they are summed up.
    """

    rows: _RowCotangents
    dbegun: Carry
    dx: jax.Array
    dweights: Fused


class _Backward(NamedTuple):
    """What the chunks of the backward pass read.

    Attributes:
      loops, residuals, cotangents: as in `backward`.
      weights, transposed: the weights, and their transposes.
      entering: the carries that enter.
      wide: whether to differentiate by them.
    """

    loops: Loops
    weights: Fused
    transposed: Fused
    residuals: Residuals
    cotangents: Results
    entering: Carry
    wide: bool

    def chunk(self, stair: Stair, first: jax.Array, index: Any, state: _BackwardState) -> _BackwardState:
        """Runs one chunk, counted from the last; `first` is h before the stair."""
        rows, dbegun, dx, dweights = state
        index = stair.number - 1 - index
        window, cell, real = stair.window(index), self.loops.cell, self.loops.real
        # Tied to the loop's state, or the compiler would do all chunks' work, and keep it, before the loop.
        y, kept, rows = lax.optimization_barrier((self.residuals.y, self.residuals.kept, rows))
        live = window.read(real.mask)[:, None]
        own = live & window.own
        x = jnp.where(live, real.read(window, self.residuals.operands.x), 0)
        entry = real.at_begins(window, self.entering)
        scale, keeps = real.scale(window), real.keeps(window, self.loops.zoneout, y.dtype)
        before: Carry = entry.window((real.before(window, y, first),))
        seen = scale.window(before[0])
        activations = jax.tree.map(window.read, kept.activations)
        if not jax.tree.leaves(activations):
            projected = cell.project(self.weights, x).astype(y.dtype)
            activations = cell.activate(self.weights, projected, seen.astype(x.dtype))
        after: Carry = (_unzoned(keeps, before[0], real.read(window, y)),)
        if kept.checkpoints:
            update = cell.update(activations)
            start = read(kept.checkpoints[0], stair.checkpoint_row(index), stair.rows)
            memory = self._recall(window, entry.memory, _zoned(keeps, update), own, start)
            before, after = (*before, memory), (*after, update[0] * memory + update[1])
        point = _Point(activations, before, after, own, live, seen, keeps)
        rows, da, d, history = self._pull_back(window, point, scale, self._douts(window, own), rows)
        dprojected = cell.pull_back_projected(self.weights, x, da)
        dx = window.write(dx, dprojected.astype(x.dtype) @ self.transposed.w_x)
        h, out = self._multiplied(point)
        if history:
            dbegun = tuple(window.collect(real.first, *each) for each in zip(history, dbegun, strict=True))
        product = functools.partial(_weight_gradient, x.dtype)
        dweights = Fused(
            dweights.w_x + product(x, dprojected),
            None if h is None else dweights.w_h + product(h, da[:, -dweights.w_h.shape[1] :]),
            dweights.bias + da.sum(0),
            None if out is None or dweights.w_out is None else dweights.w_out + product(out, d),
            jax.tree.map(jnp.add, dweights.more, self._more_gradients(point, x, da)),
        )
        return _BackwardState(rows, dbegun, dx, dweights)

    def _douts(self, window: Window, own: jax.Array) -> Carry:
        """Returns the cotangents of h [M, P] after each step and, if it is a result, of c, zero in slack."""
        if self.loops.final_only:
            return (jnp.zeros((window.size, self.loops.sizes[0]), self.residuals.y.dtype),)
        leaves = self.cotangents.y, *self.cotangents.memory
        return tuple(jnp.where(own, self.loops.real.read(window, leaf), 0) for leaf in leaves)

    def _multiplied(self, point: _Point) -> tuple[jax.Array | None, jax.Array | None]:
        """Returns what a chunk multiplies with w_h and w_out; None for weights that the cell does not have."""
        h = None if self.weights.w_h is None else point.owned(point.seen)
        return h, None if self.weights.w_out is None else point.owned(self._linearize(point).out)

    def _more_gradients(self, point: _Point, x: jax.Array, da: jax.Array) -> PyTree:
        """Returns a chunk's share of the cotangents of the cell's further weights."""
        if not jax.tree.leaves(self.weights.more):
            return ()
        before = point.seen, *point.before[1:]
        activations, before, after = point.owned((point.activations, before, point.after))
        return self.loops.cell.more_gradients(self.weights, x, activations, before, after, da)

    def _linearize(self, point: _Point) -> Linearization:
        """Returns the derivatives of steps, which cotangents pass unchanged in slack."""
        linear = self.loops.cell.linearize(self.weights, point.activations, point.before, point.after)
        slack = {"dh_dh": 1, "dh_dc": 0, "dc_dc": 1}
        given = {name: leaf for name, leaf in linear._asdict().items() if leaf is not None}
        passed = {name: jnp.where(point.live, given[name], at) for name, at in slack.items() if name in given}
        more = jax.tree.map(lambda leaf: jnp.where(point.live, leaf, 0), linear.more)
        return linear._replace(**passed, da_gates=jnp.where(point.own, linear.da_gates, 0), more=more)

    def _recall(
        self, window: Window, entry: Entry, update: tuple[jax.Array, jax.Array], own: jax.Array, start: jax.Array
    ) -> jax.Array:
        """Returns the memory before each step of a chunk [M, H], from the memory at its first own step [rows, H]."""
        if self.loops.wide:
            return _recall_in_parallel(window, entry, update, own, start)

        def step(memory: jax.Array, xs: Any, _: Any) -> Any:
            (decay, inject), live, cells = xs
            (before,) = entry.step(cells, (memory,))
            return jnp.where(live, decay * before + inject, before), (), before

        outputs = Outputs((), buffer(start, update[0].shape, 4))
        return run_steps(window, step, start, (update, own, entry.cells), outputs, self.loops.steps)[1].own

    def _pull_back(
        self, window: Window, point: _Point, scale: Scale, douts: Carry, rows: _RowCotangents
    ) -> tuple[_RowCotangents, jax.Array, jax.Array, Carry]:
        """Runs the backward recurrence over a chunk, last step first.

        Args:
          window: the chunk.
          point: its cells.
          scale: of h, where the gates see it.
          douts: the cotangents of h [M, P] and, if it is a result, of c [M, H] after each step, zero in slack.
          rows: the rows' cotangents after the chunk.

        Returns:
          The rows' cotangents before the chunk; da [M, G] and d [M, P] of its cells, written over what they are
          computed from; and `_RowCotangents.begun` if a slot begins at a cell, where it is collected.
        """
        cell, transposed, real, (d, *dmemory) = self.loops.cell, self.transposed, self.loops.real, douts
        projects = transposed.w_out is not None
        entry = real.at_ends(window, self.cotangents.carry)
        collects, has_fresh = self.wide and real.borders is not None, bool(self.residuals.operands.fresh)

        def step(rows: _RowCotangents, xs: Any, old: Any) -> Any:
            (at, d, dmemory, ends, reset, scaled, keep), (da_gates, old_d, _) = xs, old
            at = self._linearize(at) if in_steps else at._replace(da_gates=da_gates)
            rows = rows.enter(entry, ends)
            dh, *dc = rows.carry
            dc = list(map(jnp.add, dc, dmemory)) if dmemory else dc
            dcarry: Carry = (dh + (old_d if projects else d), *dc)
            dkept, (total, *dc) = _split(keep, dcarry)
            if scale.values is None:
                da, dcarry = cell.step_back(transposed, at, total, dc[0] if dc else None)
            else:  # the part of dh that comes through the gates is scaled
                through = at._replace(dh_dh=jnp.zeros_like(at.dh_dh))
                da, (dh, *dc) = cell.step_back(transposed, through, total, dc[0] if dc else None)
                dcarry = scale.step(scaled, dh) + at.dh_dh * total, *dc
            dcarry = tuple(map(jnp.add, dcarry, dkept)) if keep else dcarry
            rows = rows._replace(carry=dcarry).leave(reset)
            return rows, (), (da, total if projects else (), rows.begun(has_fresh) if collects else ())

        # On GPUs, in the steps: fused into the kernel of a step, the derivatives need no memory. Other platforms are
        # faster with few operations in a step.
        in_steps = self.loops.steps.stacked
        if in_steps:
            at: Any = point
            da_gates = buffer(d, (window.size, self.weights.bias.shape[0]), 7)
        else:
            linear, d = lax.optimization_barrier((self._linearize(point)._replace(out=None), d))
            at, da_gates = linear._replace(da_gates=None), linear.da_gates
        begun = rows.begun(has_fresh) if collects else ()
        history = tuple(buffer(leaf, (window.size, leaf.shape[1]), 6) for leaf in begun)
        outputs = Outputs((), (da_gates, d if projects else (), history))
        xs = at, None if projects else d, dmemory, entry.cells, real.resets_of(window), scale.cells, point.keeps
        rows, outputs = run_steps(window, step, rows, xs, outputs, self.loops.steps, reverse=True)
        da, total, history = outputs.own
        return rows, da, total if projects else d, history


class _Point(NamedTuple):
    """The cells of a chunk or a step, around which the recurrence is linearized.

    Attributes:
      activations, before, after: as `Cell.linearize` takes them.
      own: bool [M, 1], which cells are real and belong to the chunk.
      live: bool [M, 1], which are real.
      seen: [M, P], h before as the gates see it.
      keeps: the share of its value that each part of the carry keeps.
    """

    activations: PyTree
    before: Carry
    after: Carry
    own: jax.Array
    live: jax.Array
    seen: jax.Array
    keeps: Keeps

    def owned(self, tree: Any) -> Any:
        """Returns arrays [M, ...] with zeros in the other cells. The initial state of an empty sequence may be NaN."""
        return jax.tree.map(lambda leaf: jnp.where(self.own, leaf, 0), tree)


def _zoned(keeps: Keeps, update: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Returns decay and inject of the memory with zoneout."""
    if not keeps or keeps[1] is None:
        return update
    (decay, inject), keep = update, keeps[1]
    return keep + (1 - keep) * decay, (1 - keep) * inject


def _unzoned(keeps: Keeps, before: jax.Array, after: jax.Array) -> jax.Array:
    """Returns h after a step without zoneout, from that with it; where all of h is kept, anything finite."""
    if not keeps or keeps[0] is None:
        return after
    keep = keeps[0]
    return jnp.where(keep < 1, (after - keep * before) / jnp.where(keep < 1, 1 - keep, 1), 0)


def _split(keeps: Keeps, dcarry: Carry) -> tuple[Carry, Carry]:
    """Returns the parts of a carry's cotangent that zoneout hands to the carry before, and to the step's result."""
    if not keeps:
        return (), dcarry
    pairs = zip(keeps, dcarry, strict=True)
    dkept = tuple(jnp.zeros_like(d) if keep is None else keep * d for keep, d in pairs)
    return dkept, tuple(d - kept for d, kept in zip(dcarry, dkept, strict=True))


def _weight_gradient(dtype: Any, operand: jax.Array, cotangent: jax.Array) -> jax.Array:
    """Returns a chunk's share of the cotangent of a weight, a product of factors in a dtype.

    Args:
      dtype: the dtype.
      operand: what the weight multiplies.
      cotangent: of the product.
    """
    factor = transpose(operand.astype(dtype))
    return jnp.matmul(factor, cotangent.astype(dtype), preferred_element_type=cotangent.dtype)


def _recall_in_parallel(
    window: Window, entry: Entry, update: tuple[jax.Array, jax.Array], own: jax.Array, start: jax.Array
) -> jax.Array:
    """Does what `_recall` does, by an associative scan, in which entries are steps without decay."""
    decay, inject = jnp.where(own, update[0], 1), jnp.where(own, update[1], 0)
    if entry.here is not None:
        here, (value,) = entry.here, entry.spread()
        decay, inject = jnp.where(here, 0, decay), jnp.where(here, decay * value + inject, inject)

    def compose(early: Any, late: Any) -> Any:
        return late[0] * early[0], late[0] * early[1] + late[1]

    shape = (window.stair.steps, *start.shape)
    products, sums = lax.associative_scan(compose, (decay.reshape(shape), inject.reshape(shape)))
    after = (products * start[None] + sums).reshape(decay.shape)
    (before,) = entry.window((jnp.concatenate([start, after[: -len(start)]]),))
    return before
