"""Interruption of `jaxpack demo g2p`: signals that wait for the end of a step, and checkpoints."""

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

_KEPT = 2  # checkpoints, so that one is whole if the other is damaged


@dataclasses.dataclass
class History:
    """The history of a run, over all resumes, in types of JSON.

    Attributes:
      batches: the batcher's state.
      losses: the loss of each step.
      validation: the scores of each epoch: edits, phonemes, wrong words and words, as in `Scores`.
      seconds, waiting: the time of the steps, without the first of each process, which compiles; and the part of it
        spent making batches.
      letters: how many letters were trained on in that time.
    """

    batches: dict[str, Any] = dataclasses.field(default_factory=dict)
    losses: list[float] = dataclasses.field(default_factory=list)
    validation: list[list[int]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    waiting: float = 0.0
    letters: int = 0


class Interrupted(Exception):  # noqa: N818 - not an error
    """The exception that a signal asked the run to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Interrupt:
    """A context in which SIGINT and SIGTERM wait for a call of `check`. A second signal acts at once."""

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
    """The checkpoints of one run in a directory. Each is whole or absent, whenever the process is killed.

    Args:
      directory: the directory, which is created if it is missing.
      config: the settings that determine the run's steps, in types of JSON.

    Raises:
      ImportError: if orbax-checkpoint is not installed.
      ValueError: if the directory holds another run, or checkpoints of something else.
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
        """Writes a checkpoint, unless there is one of this step; if it cannot, prints one line and ends the command."""
        args = self._orbax.args
        run = {"config": self._config, "history": dataclasses.asdict(history)}
        composite = args.Composite(state=args.StandardSave(state), run=args.JsonSave(run))
        with writing(self._directory):
            self._manager.save(len(history.losses), args=composite)

    def restore(self, like: TrainState) -> tuple[TrainState, History] | None:
        """Reads the last checkpoint into the structure of `like`; returns None if there is none."""
        step = self._manager.latest_step()
        if step is None:
            return None
        args = self._orbax.args
        on_host = jax.device_get(like)  # so that a checkpoint can be restored on another device
        composite = args.Composite(state=args.StandardRestore(on_host), run=args.JsonRestore())
        restored = self._manager.restore(step, args=composite)
        return jax.tree.map(jnp.asarray, restored.state), History(**restored.run["history"])

    def _check(self, directory: pathlib.Path) -> None:
        """Raises ValueError unless the directory's checkpoints are this run's."""
        step = self._manager.latest_step()
        if step is None:
            return
        args = self._orbax.args
        try:
            found = self._manager.restore(step, args=args.Composite(run=args.JsonRestore())).run["config"]
        except (KeyError, FileNotFoundError, TypeError) as error:
            raise ValueError(f"{directory} holds checkpoints of something else. Pass another directory.") from error
        differing = [name for name in sorted({*found, *self._config}) if found.get(name) != self._config.get(name)]
        if differing:
            there, here = (", ".join(f"{name}={of.get(name)}" for name in differing) for of in (found, self._config))
            raise ValueError(
                f"{directory} holds a run with {there}; this one has {here}. Resume with the same options, or pass "
                f"another directory."
            )


def import_orbax() -> Any:
    """Imports orbax.checkpoint; if it is missing, raises ModuleNotFoundError, which names the extra to install."""
    return import_extra("orbax.checkpoint", "demo", "checkpoints", "orbax-checkpoint")
