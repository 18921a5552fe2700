"""What `jaxpack demo g2p` needs to be stopped at any moment: signals that wait for a step's end, and checkpoints."""

from __future__ import annotations

import dataclasses
import pathlib
import signal
from collections.abc import Mapping
from types import FrameType, TracebackType
from typing import Any

import jax
import jax.numpy as jnp

from jaxpack._extras import import_extra
from jaxpack.cli._files import writing
from jaxpack.cli.demo.g2p.model import TrainState

_KEPT = 2  # checkpoints, so that one is whole whatever happens to the other


@dataclasses.dataclass
class History:
    """What a run has seen so far, over all the times that it was resumed; JSON but for the class.

    Attributes:
      batches: where the batcher stands.
      losses: of each step.
      validation: of each epoch: edits, phonemes, wrong words and words, as in `Scores`.
      seconds, waiting: what the steps took, but for the first of a process, which compiles; and how much of it was
        spent on making batches.
      letters: how many were trained on in that time.
    """

    batches: dict[str, Any] = dataclasses.field(default_factory=dict)
    losses: list[float] = dataclasses.field(default_factory=list)
    validation: list[list[int]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    waiting: float = 0.0
    letters: int = 0


class Interrupted(Exception):  # noqa: N818 - it is no error
    """A signal asked the run to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Interrupt:
    """A context in which SIGINT and SIGTERM wait for `check` to be called. A second signal acts at once, as ever."""

    _SIGNALS = signal.SIGINT, signal.SIGTERM

    def __enter__(self) -> Interrupt:
        self._received: int | None = None
        self._before = {number: signal.signal(number, self._receive) for number in self._SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()

    def check(self) -> None:
        """Raises Interrupted if a signal has come."""
        if self._received is not None:
            raise Interrupted(self._received)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Checkpoints:
    """The checkpoints of one run in a directory. Each is whole or not there, whenever the process is killed.

    Args:
      directory: made if it is not there.
      config: what the run's steps follow from, JSON.

    Raises:
      ImportError: if orbax-checkpoint is not installed.
      ValueError: if the directory holds another run, or checkpoints that are no run's.
    """

    def __init__(self, directory: pathlib.Path, config: Mapping[str, Any]) -> None:
        self._orbax = import_orbax()
        self._config = dict(config)
        self._directory = directory
        options = self._orbax.CheckpointManagerOptions(
            max_to_keep=_KEPT, cleanup_tmp_directories=True, enable_async_checkpointing=False
        )
        self._manager = self._orbax.CheckpointManager(directory.absolute(), options=options)
        self._check(directory)

    def save(self, state: TrainState, history: History) -> None:
        """Writes a checkpoint, unless there is one of this step; ends the command in one line if it cannot."""
        args = self._orbax.args
        run = {"config": self._config, "history": dataclasses.asdict(history)}
        composite = args.Composite(state=args.StandardSave(state), run=args.JsonSave(run))
        with writing(self._directory):
            self._manager.save(len(history.losses), args=composite)

    def restore(self, like: TrainState) -> tuple[TrainState, History] | None:
        """The last checkpoint, its state shaped like this one; None if there is none."""
        step = self._manager.latest_step()
        if step is None:
            return None
        args = self._orbax.args
        on_host = jax.device_get(like)  # so that the arrays may go to another device than they came from
        composite = args.Composite(state=args.StandardRestore(on_host), run=args.JsonRestore())
        restored = self._manager.restore(step, args=composite)
        return jax.tree.map(jnp.asarray, restored.state), History(**restored.run["history"])

    def _check(self, directory: pathlib.Path) -> None:
        """Raises ValueError unless what is there is this run's."""
        step = self._manager.latest_step()
        if step is None:
            return
        args = self._orbax.args
        try:
            found = self._manager.restore(step, args=args.Composite(run=args.JsonRestore())).run["config"]
        except (KeyError, FileNotFoundError, TypeError) as error:
            raise ValueError(f"{directory} holds checkpoints of something else. Name another directory.") from error
        differing = [name for name in sorted({*found, *self._config}) if found.get(name) != self._config.get(name)]
        if differing:
            there, here = (", ".join(f"{name}={of.get(name)}" for name in differing) for of in (found, self._config))
            raise ValueError(
                f"{directory} holds a run with {there}; this one has {here}. Resume with the same options, or name "
                f"another directory."
            )


def import_orbax() -> Any:
    """The module orbax.checkpoint; raises ModuleNotFoundError, with the extra that brings it, if it is not there."""
    return import_extra("orbax.checkpoint", "demo", "checkpoints", "orbax-checkpoint")
