"""Adapters to Grain: batchers as its datasets, and batches from its pipelines."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxpack._checks import as_int, at_least_one
from jaxpack._extras import import_extra
from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack._types import PyTree
from jaxpack.data._axes import Plans, axis_names, plans_of
from jaxpack.data._batch import Batch, lay_out
from jaxpack.data._batcher import Batcher
from jaxpack.data._buffer import Batches
from jaxpack.data._form import Form
from jaxpack.data._joint_buffer import make_buffer
from jaxpack.data._slot_filling import BUFFERED_BATCHES
from jaxpack.data._source import LOOKAHEAD, Length, Piece, too_long_message
from jaxpack.data._trend import Trend

grain: Any = import_extra("grain", "data", "batches in Grain's pipelines")

State = dict[str, Any]


def pack_fn(plans: Plans | Sequence[Plans], *, time_varying: PyTree = None) -> Callable[[Sequence[PyTree]], Batch]:
    """Returns a `batch_fn` for Grain, which packs a list of examples under the smallest plan that it fits.

    Examples:
      >>> words = grain.MapDataset.source([[1, 2, 3], [4], [5, 6]])
      >>> dataset = words.batch(2, batch_fn=pack_fn(jaxpack.plan_padded(2, 3)))
      >>> [batch.inputs.lengths.tolist() for batch in dataset]
      [[3, 1], [2, 0]]

    Args:
      plans: one plan, or several to choose from. Where time axes have names, each is a dict with a plan for every axis.
      time_varying: as in `jaxpack.data.Batcher`.

    Returns:
      A function from a list of examples to a Batch, whose `indices` are places in the list. The remaining rows are
      empty. Dtypes are promoted. The function raises ValueError if the list is empty, the examples fit no plan, or they
      differ in structure or features.

    Raises:
      ValueError: if there is no plan.
    """
    names = axis_names(time_varying)
    given = [plans] if isinstance(plans, (BucketPlan, Mapping)) else plans
    choice = sorted((plans_of(each, names) for each in given), key=lambda each: sum(plan.size for plan in each))
    if not choice:
        raise ValueError("plans is empty: at least one is needed.")

    x64 = jax.config.read("jax_enable_x64")  # this thread's value; Grain packs in others

    def pack(examples: Sequence[PyTree]) -> Batch:
        with jax.enable_x64(x64):
            return lay_out_any(examples)

    def lay_out_any(examples: Sequence[PyTree]) -> Batch:
        form = Form(time_varying)
        read = [form.learn(example, place, promote=True) for place, example in enumerate(examples)]
        if not read:
            raise ValueError("examples is empty: at least one is needed.")
        form.settle()
        pieces = [Piece(place, list(form.whole(leaves, place))) for place, leaves in enumerate(read)]
        lengths = np.array([form.lengths(piece.leaves) for piece in pieces])
        fitting = (each for each in choice if all(plan.fits(x) for plan, x in zip(each, lengths.T, strict=True)))
        chosen = next(fitting, choice[-1])
        _check_fit(chosen, lengths, names)
        return lay_out(form, pieces, lengths, chosen)

    return pack


def _check_fit(plans: Sequence[BucketPlan], lengths: np.ndarray, names: Sequence[str]) -> None:
    """Raises ValueError unless lengths [n, A] fit their plans; with several time axes it names the axis."""
    for axis, plan in enumerate(plans):
        try:
            plan.check(lengths[:, axis])
        except ValueError as error:
            if len(plans) == 1:
                raise
            raise ValueError(f"on the time axis {names[axis]!r}, {error}") from None


class BatcherIterDataset(grain.IterDataset):
    """The batches of a batcher, epoch after epoch, as a grain.IterDataset.

    An iterator's state is the batcher's. With `mp_prefetch` each of n worker processes lays out every n-th batch, so
    batches and their order do not change; each process reads all of a source without an index.

    Examples:
      >>> from jaxpack.data import SlotFilling
      >>> dataset = BatcherIterDataset(SlotFilling([[1, 2, 3], [4], [5, 6]], batch_size=2), num_epochs=2)
      >>> sum(1 for batch in dataset)
      4

    Args:
      batcher: a SlotFilling, BucketByLength or SortedChunks. Every iterator starts from the batcher's state at
        construction.
      num_epochs: how many epochs, each with its own shuffle; None for endless ones, as in Grain's `repeat`.

    Raises:
      TypeError: if batcher is not a batcher, or num_epochs is not an int.
      ValueError: if num_epochs is below 1.
    """

    def __init__(self, batcher: Batcher, *, num_epochs: int | None = 1) -> None:
        super().__init__()
        if not isinstance(batcher, Batcher):
            raise TypeError(f"batcher must be one of jaxpack.data's, such as SlotFilling, got {batcher!r}.")
        if num_epochs is not None:
            at_least_one("num_epochs", num_epochs)
        self._batcher, self._num_epochs = copy.copy(batcher), num_epochs
        self._start, self._step = 0, 1

    def set_slice(self, sl: slice, sequential_slice: bool = False) -> None:
        """Restricts iteration to every n-th batch; Grain calls it in each of its workers."""
        del sequential_slice  # where workers read does not matter: all decide alike, which keeps the order
        self._start, self._step = sl.start or 0, sl.step or 1

    def __iter__(self) -> grain.DatasetIterator:
        return _BatcherDatasetIterator(copy.copy(self._batcher), self._num_epochs, self._start, self._step)

    def __str__(self) -> str:
        return f"BatcherIterDataset({type(self._batcher).__name__}, num_epochs={self._num_epochs})"


class _BatcherDatasetIterator(grain.DatasetIterator):
    """Gives every `step`-th batch, counted over all epochs; `_skipped` are to come before the next."""

    def __init__(self, batcher: Batcher, num_epochs: int | None, start: int, step: int) -> None:
        super().__init__()
        self._batcher, self._step, self._skipped = batcher, step, start
        self._batches = iter(batcher)
        self._last = None if num_epochs is None else self._batches.get_state()["epoch"] + num_epochs - 1

    def __next__(self) -> Batch:
        while True:
            try:
                while self._skipped:
                    self._batches.skip()
                    self._skipped -= 1
                batch = next(self._batches)
            except StopIteration:
                state = self._batches.get_state()
                if state["epoch"] == self._last or not state["batch"]:  # empty epochs would repeat forever
                    raise
                self._batches = iter(self._batcher)
            else:
                self._skipped = self._step - 1
                return batch

    def get_state(self) -> State:
        return {"batches": self._batches.get_state(), "skipped": self._skipped}

    def set_state(self, state: State) -> None:
        self._batcher.set_state(state["batches"])
        self._batches, self._skipped = iter(self._batcher), state["skipped"]

    def __str__(self) -> str:
        return f"BatcherDatasetIterator({type(self._batcher).__name__})"


class SlotFillIterDataset(grain.IterDataset):
    """Fills the slots of one plan from a stream of examples through a shuffle buffer: all batches have one shape.

    Examples are drawn as in `jaxpack.data.SlotFilling` with a buffer. At the end of the stream the remaining examples
    come in as few batches as they need, in which some rows may be empty. Every example comes once.

    An iterator's state is small, since it holds no example: it is the parent's state some examples back, and which of
    the examples since then still wait. Resuming reads these again: in the steady state about eight times as many as the
    buffer holds, since a few wait long.

    The `indices` of a batch count the parent's examples. With `mp_prefetch` each worker has its own part of the source,
    its own buffer and its own count.

    Examples:
      >>> words = grain.MapDataset.source([[1, 2, 3], [4], [5, 6], [7]]).to_iter_dataset()
      >>> dataset = words.pipe(SlotFillIterDataset, jaxpack.plan_padded(2, 3))
      >>> sum(1 for batch in dataset)
      2

    Args:
      parent: a dataset of examples, each an array [L, *F], a list of numbers or a pytree of them. All have the same
        structure and features, and dtypes that those of the first one hold.
      plan: the plan of every batch; where time axes have names, a dict with a plan for each.
      buffer_size: how many examples are held. Default: 64 batches.
      seed: the seed of the draws; None takes the middle of each part.
      time_varying: as in `jaxpack.data.Batcher`.

    Raises:
      ValueError: if buffer_size is below 1. Iteration raises it, with the example's number, if an example is longer
        than the plan has room for, examples differ in structure or features, or a value does not fit its dtype.
      TypeError: iteration raises it, with the example's number, if the first example's dtype cannot hold another's.

    Iteration warns if the stream is ordered by length, which a buffer cannot shuffle.
    """

    def __init__(
        self,
        parent: grain.MapDataset | grain.IterDataset,
        plan: Plans,
        *,
        buffer_size: int | None = None,
        seed: int | None = 0,
        time_varying: PyTree = None,
    ) -> None:
        super().__init__(parent.to_iter_dataset() if isinstance(parent, grain.MapDataset) else parent)
        plans = plans_of(plan, axis_names(time_varying))
        if buffer_size is None:
            buffer_size = BUFFERED_BATCHES * plans[0].num_sequences
        self._filling = _Filling(
            plans,
            at_least_one("buffer_size", buffer_size),
            None if seed is None else as_int("seed", seed),
            time_varying,
            jax.config.read("jax_enable_x64"),
        )

    def __iter__(self) -> grain.DatasetIterator:
        return _SlotFillDatasetIterator(iter(self._parent), self._filling)

    def __str__(self) -> str:
        return f"SlotFillIterDataset({self._filling})"


@dataclasses.dataclass(frozen=True)
class _Filling:
    """The arguments of a SlotFillIterDataset, checked.

    Attributes:
      plans: the plan of each time axis.
      buffer_size, seed, time_varying: as in SlotFillIterDataset.
      x64: jax_enable_x64 in the thread that made the dataset; Grain may iterate in another.
    """

    plans: tuple[BucketPlan, ...]
    buffer_size: int
    seed: int | None
    time_varying: PyTree
    x64: bool

    def __str__(self) -> str:
        return f"num_sequences={self.plans[0].num_sequences}, buffer_size={self.buffer_size}"


class _Examples:
    """The form of a stream's examples, with a check that they have it and that none is longer than the limits.

    The first example with a dtype determines that of the batches. These dtypes are part of an iterator's state, since
    the first example read after a resume is another one.
    """

    def __init__(self, limits: Sequence[int], time_varying: PyTree) -> None:
        self._limits, self._time_varying = limits, time_varying
        self.form = Form(time_varying)

    def resume(self, dtypes: str) -> None:
        """Starts again with the dtypes that an earlier form had."""
        self.form = Form(self._time_varying, dtypes=dtypes)

    def piece(self, example: PyTree, number: int) -> tuple[Piece, Length]:
        """Returns the example, ready to be laid out, and its length."""
        leaves = self.form.learn(example, number, promote=False)
        lengths = self.form.lengths(leaves)
        if any(length > limit for length, limit in zip(lengths, self._limits, strict=True)):
            shorten = "shorten examples (.map) or leave them out (.filter) before"
            raise ValueError(too_long_message(number, lengths, self._limits, self.form.names, shorten))
        return Piece(number, self.form.own(leaves, number)), lengths[0] if len(lengths) == 1 else lengths


class _SlotFillDatasetIterator(grain.DatasetIterator):
    """An iterator that fills a buffer and draws from it, and whose state finds the buffer's content again.

    An *anchor* is the number of an example, with the parent's state before it. There is one per batch of examples.
    Anchors before the oldest waiting example are dropped, so the first is the one to return to.
    """

    def __init__(self, parent: grain.DatasetIterator, filling: _Filling) -> None:
        super().__init__(parent)
        self._filling, seed = filling, filling.seed
        self._examples = _Examples([plan.max_length for plan in filling.plans], filling.time_varying)
        self._trend = Trend(filling.buffer_size)
        self._rng = None if seed is None else np.random.default_rng([abs(seed), int(seed < 0)])
        self._clear(0, parent.get_state())

    def _clear(self, number: int, parent: State) -> None:
        """Empties the buffer; the parent is before this example, in this state."""
        self._read, self._anchors = number, [(number, parent)]
        self._buffer = make_buffer(self._filling.plans, self._filling.buffer_size, 1, self._rng)
        self._held: dict[int, Piece] = {}
        self._taken: list[PyTree] = []  # the parent's next example, until it is checked
        self._drawn = _rng_state(self._rng)  # the generator's state after the last draw
        self._rest: Iterator[Batches] | None = None
        self._dealt = 0  # how many batches of the rest were taken

    def __next__(self) -> Batch:
        """Returns the next batch.

        An exception of the parent passes through; an error about an example is raised again by the next call. The state
        is then that before the batch, with more examples read.
        """
        with jax.enable_x64(self._filling.x64):
            return self._next()

    def _next(self) -> Batch:
        if self._rest is None and self._fill():
            (drawn,) = self._buffer.draw()
            pieces = [self._held.pop(number) for number, _ in drawn]
            self._drawn = _rng_state(self._rng)
            oldest = next(iter(self._held), self._read)
            while len(self._anchors) > 1 and self._anchors[1][0] <= oldest:
                del self._anchors[0]
        else:
            if self._rest is None:
                self._examples.form.settle()
                self._trend.end()
                self._rest = itertools.islice(self._buffer.rest(), self._dealt, None)
            (drawn,) = next(self._rest)
            pieces = [self._held[number] for number, _ in drawn]  # not popped: a resume deals all of them again
            self._dealt += 1
        return lay_out(self._examples.form, pieces, [length for _, length in drawn], self._filling.plans)

    def _fill(self) -> bool:
        """Reads until the buffer is full and the form is known; returns False if the parent ends before."""
        form = self._examples.form
        while not (self._buffer.full and (form.known or self._read >= LOOKAHEAD)):
            try:
                length = self._read_one()
            except StopIteration:
                return False
            self._trend.add((length,) if isinstance(length, int) else length)
        if not form.known:
            form.settle()
        return True

    def _read_one(self, waiting: bool = True) -> Length:
        """Reads the next example; if it waits, holds it and returns its length."""
        length = None
        if not self._taken:
            if self._read - self._anchors[-1][0] >= self._filling.plans[0].num_sequences:
                self._anchors.append((self._read, self._parent.get_state()))
            self._taken.append(next(self._parent))
        if waiting:
            self._held[self._read], length = self._examples.piece(self._taken[0], self._read)
            self._buffer.add((self._read, length))
        self._taken.clear()
        self._read += 1
        return length

    def get_state(self) -> State:
        """Returns the position: numbers, and a string with a bit for each example since the anchor, as in JSON."""
        anchor, parent = self._anchors[0]
        waiting = np.zeros(self._read - anchor, bool)
        waiting[np.fromiter(self._held, int, len(self._held)) - anchor] = True
        return {
            "parent": parent,
            "anchor": anchor,
            "read": self._read,
            "waiting": np.packbits(waiting).tobytes().hex(),
            "drawn": self._drawn,
            "dealt": self._dealt,
            "dtypes": self._examples.form.described,
        }

    def set_state(self, state: State) -> None:
        self._parent.set_state(state["parent"])
        if self._rng is not None:
            self._rng.bit_generator.state = state["drawn"]
        anchor, count = state["anchor"], state["read"] - state["anchor"]
        self._clear(anchor, state["parent"])
        self._examples.resume(state.get("dtypes", ""))
        self._dealt = state["dealt"]
        bits = np.frombuffer(bytes.fromhex(state["waiting"]), np.uint8)
        for waiting in np.unpackbits(bits, count=count).tolist():
            try:
                self._read_one(bool(waiting))
            except StopIteration as error:
                raise ValueError(
                    f"the state was taken after {state['read']} examples, but now there are {self._read}. Resume "
                    f"with the examples that it was made with."
                ) from error

    def __str__(self) -> str:
        return f"SlotFillDatasetIterator({self._filling})"


def _rng_state(rng: np.random.Generator | None) -> Any:
    return None if rng is None else rng.bit_generator.state
