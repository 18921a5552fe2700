"""The adapters to Grain: its datasets in our batchers, and our batchers as its datasets."""

from __future__ import annotations

import copy
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
from jaxpack.data._form import Form
from jaxpack.data._joint_buffer import make_buffer
from jaxpack.data._slot_filling import BUFFERED_BATCHES
from jaxpack.data._source import LOOKAHEAD, Length, Piece, too_long_message
from jaxpack.data._trend import Trend

grain: Any = import_extra("grain", "data", "batches in Grain's pipelines")

State = dict[str, Any]


def pack_fn(plans: Plans | Sequence[Plans], *, time_varying: PyTree = None) -> Callable[[Sequence[PyTree]], Batch]:
    """Grain's `batch_fn`: lays a list of examples out, under the plan of fewest cells that it fits.

    Examples:
      >>> words = grain.MapDataset.source([[1, 2, 3], [4], [5, 6]])
      >>> dataset = words.batch(2, batch_fn=pack_fn(jaxpack.plan_padded(2, 3)))
      >>> [batch.inputs.lengths.tolist() for batch in dataset]
      [[3, 1], [2, 0]]

    Args:
      plans: one, or several to choose from. Where time axes have names each is a dict of a plan for every one.
      time_varying: as in the batchers.

    Returns:
      A function from a list of examples to a Batch, whose `indices` are places in the list. Rows that are left are
      empty. Dtypes are promoted. It raises ValueError where there is no example, they fit no plan, or they differ in
      structure or features.

    Raises:
      ValueError: if there is no plan.
    """
    names = axis_names(time_varying)
    given = [plans] if isinstance(plans, (BucketPlan, Mapping)) else plans
    choice = sorted((plans_of(each, names) for each in given), key=lambda each: sum(plan.size for plan in each))
    if not choice:
        raise ValueError("plans is empty: at least one is needed.")

    x64 = jax.config.read("jax_enable_x64")  # of this thread; Grain packs in others

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
    """Raises ValueError, naming the time axis where there are several, unless lengths [n, A] fit their plans."""
    for axis, plan in enumerate(plans):
        try:
            plan.check(lengths[:, axis])
        except ValueError as error:
            if len(plans) == 1:
                raise
            raise ValueError(f"on the time axis {names[axis]!r}, {error}") from None


class BatcherIterDataset(grain.IterDataset):
    """A batcher's batches, epoch after epoch, as a grain.IterDataset.

    An iterator's state is the batcher's. With `mp_prefetch` each of n worker processes lays out every n-th batch, so
    batches and their order are the same as without; each reads all of a source that has no index.

    Examples:
      >>> from jaxpack.data import SlotFilling
      >>> dataset = BatcherIterDataset(SlotFilling([[1, 2, 3], [4], [5, 6]], batch_size=2), num_epochs=2)
      >>> sum(1 for batch in dataset)
      4

    Args:
      batcher: a SlotFilling, BucketByLength or SortedChunks. Every iterator starts where it stood when it was given.
      num_epochs: how many, each with its own shuffle; None goes on without end. As in grain's `repeat`.

    Raises:
      TypeError: if batcher is no batcher, or num_epochs no int.
      ValueError: if that is below 1.
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
        """Keeps to every n-th batch: what grain calls in each of its workers."""
        del sequential_slice  # says where workers read; ours decide alike, so that order can be kept
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
                if state["epoch"] == self._last or not state["batch"]:  # an epoch of nothing would never end
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
    """Fills the slots of one plan from a stream of examples, by a shuffle buffer: every batch has one shape.

    As `SlotFilling` with a buffer, which says how examples are drawn; and where the stream ends those that are left
    come in as few batches as they need, some rows of which may be empty. Every example comes once.

    No example is in an iterator's state, so it is small: the parent's state some examples back, and which of those
    that followed still wait. To come back to it these are read again: in the steady state about eight times as many as
    the buffer holds, since a few wait long.

    Batches' `indices` count examples as the parent gives them. With `mp_prefetch` each worker has its own part of the
    source, its own buffer and its own count.

    Examples:
      >>> words = grain.MapDataset.source([[1, 2, 3], [4], [5, 6], [7]]).to_iter_dataset()
      >>> dataset = words.pipe(SlotFillIterDataset, jaxpack.plan_padded(2, 3))
      >>> sum(1 for batch in dataset)
      2

    Args:
      parent: of examples, each an array [L, *F], a list of numbers or a pytree of them, all of one structure and
        features, and of dtypes that the first one's hold.
      plan: of every batch; where time axes have names, a dict of a plan for each.
      buffer_size: how many examples are held. Default: 64 batches of them.
      seed: of the draws; None takes the middle of each part.
      time_varying: as in the batchers.

    Raises:
      ValueError: if buffer_size is below 1; in iterating, naming the example, if one is longer than the plan has room
        for, they differ in structure or features, or a value does not fit its dtype.
      TypeError: in iterating, naming the example, if the dtype of the first cannot hold its.

    In iterating it warns if the stream is ordered by length, which a buffer cannot make up for.
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
        self._plans = plans_of(plan, axis_names(time_varying))
        if buffer_size is None:
            buffer_size = BUFFERED_BATCHES * self._plans[0].num_sequences
        at_least_one("buffer_size", buffer_size)
        self._buffer_size, self._time_varying = buffer_size, time_varying
        self._x64 = jax.config.read("jax_enable_x64")  # of this thread; Grain may iterate in another
        self._seed = None if seed is None else as_int("seed", seed)

    def __iter__(self) -> grain.DatasetIterator:
        examples = _Examples([plan.max_length for plan in self._plans], self._time_varying)
        parent = iter(self._parent)
        return _SlotFillDatasetIterator(parent, self._plans, self._buffer_size, self._seed, examples, self._x64)

    def __str__(self) -> str:
        return f"SlotFillIterDataset(num_sequences={self._plans[0].num_sequences}, buffer_size={self._buffer_size})"


class _Examples:
    """Takes examples apart into leaves of its own, and raises unless all are alike and none is longer than the limit.

    The first example that has a dtype says what batches have. What was said is part of an iterator's state: the first
    that is read after a resume is another.
    """

    def __init__(self, limits: Sequence[int], time_varying: PyTree) -> None:
        self._limits, self._time_varying = limits, time_varying
        self.form = Form(time_varying)

    def resume(self, dtypes: str) -> None:
        """Starts anew with the dtypes that were said before."""
        self.form = Form(self._time_varying, dtypes=dtypes)

    def piece(self, example: PyTree, number: int) -> tuple[Piece, Length]:
        """The example, ready to be laid out, and its length."""
        leaves = self.form.learn(example, number, promote=False)
        lengths = self.form.lengths(leaves)
        if any(length > limit for length, limit in zip(lengths, self._limits, strict=True)):
            shorten = "shorten examples (.map) or leave them out (.filter) before"
            raise ValueError(too_long_message(number, lengths, self._limits, self.form.names, shorten))
        return Piece(number, self.form.own(leaves, number)), lengths[0] if len(lengths) == 1 else lengths


class _SlotFillDatasetIterator(grain.DatasetIterator):
    """Fills and draws from a SlotBuffer, in a way that can be found again.

    An *anchor* is the number of an example, and the parent's state before it. There is one every batch of examples;
    those that lie behind the oldest waiting example are forgotten, so the first is the one to go back to.
    """

    def __init__(
        self,
        parent: grain.DatasetIterator,
        plans: tuple[BucketPlan, ...],
        buffer_size: int,
        seed: int | None,
        examples: _Examples,
        x64: bool,
    ) -> None:
        super().__init__(parent)
        self._x64 = x64
        self._plans, self._buffer_size, self._examples = plans, buffer_size, examples
        self._trend = Trend(buffer_size)
        self._rng = None if seed is None else np.random.default_rng([abs(seed), int(seed < 0)])
        self._clear(0, parent.get_state())

    def _clear(self, number: int, parent: State) -> None:
        """Holds nothing; the parent stands before this example, in this state."""
        self._read, self._anchors = number, [(number, parent)]
        self._buffer = make_buffer(self._plans, self._buffer_size, 1, self._rng)
        self._held: dict[int, Piece] = {}
        self._taken: list[PyTree] = []  # from the parent, until it was found to be right
        self._drawn = _rng_state(self._rng)  # the generator's state after the last draw
        self._rest: Iterator[Sequence[Any]] | None = None
        self._dealt = 0  # batches of the rest

    def __next__(self) -> Batch:
        """The next batch.

        An exception of the parent passes through, one about an example comes again when asked again; the state is that
        before the batch, with more examples read.
        """
        with jax.enable_x64(self._x64):
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
            pieces = [self._held[number] for number, _ in drawn]  # kept: dealing again starts from all of them
            self._dealt += 1
        return lay_out(self._examples.form, pieces, [length for _, length in drawn], self._plans)

    def _fill(self) -> bool:
        """Reads until it is time to draw, and known what a batch is like; False if the parent ended before."""
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
        """Reads the next example, holds it if it waits, and returns its length then."""
        length = None
        if not self._taken:
            if self._read - self._anchors[-1][0] >= self._plans[0].num_sequences:
                self._anchors.append((self._read, self._parent.get_state()))
            self._taken.append(next(self._parent))
        if waiting:
            self._held[self._read], length = self._examples.piece(self._taken[0], self._read)
            self._buffer.add((self._read, length))
        self._taken.clear()
        self._read += 1
        return length

    def get_state(self) -> State:
        """Where it is: numbers, and a string with a bit for each example since the anchor. Can be written as JSON."""
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
                    f"the state was given after {state['read']} examples, but now there are {self._read}. Resume "
                    f"with the examples that it was made with."
                ) from error

    def __str__(self) -> str:
        return f"SlotFillDatasetIterator(num_sequences={self._plans[0].num_sequences}, buffer_size={self._buffer_size})"


def _rng_state(rng: np.random.Generator | None) -> Any:
    return None if rng is None else rng.bit_generator.state
