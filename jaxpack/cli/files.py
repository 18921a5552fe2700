"""The files that commands read and write: lengths, JSON and plots. Whatever is wrong with one is said by its option."""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Sequence

import numpy as np
import typer

from jaxpack import plot

_MOST = np.iinfo(np.int32).max
_LIST = re.compile(r"[-+\d,\s]*\d[-+\d,\s]*")  # 4,6,8,5


def read_lengths(path: pathlib.Path, parameter: str) -> np.ndarray:
    """The lengths in a file, separated by white space or commas: int64 [B].

    Args:
      path: the file.
      parameter: the option or argument that named it, for errors.

    Raises:
      typer.BadParameter: naming the line that holds no length, or saying why there are none.
    """
    try:
        return _read(path)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=f"'{parameter}'") from error


def read_or_parse_lengths(argument: str, parameter: str) -> np.ndarray:
    """The lengths in a file of that name or, where there is none, in a list such as 4,6,8,5: int64 [B].

    Raises:
      typer.BadParameter: as `read_lengths`, and if the argument is neither.
    """
    if os.path.exists(argument):  # not Path.exists, which raises where a long list could not be a name
        return read_lengths(pathlib.Path(argument), parameter)
    try:
        if not _LIST.fullmatch(argument):
            raise ValueError(f"{argument!r} is neither a file that exists nor a list of lengths such as 4,6,8,5.")
        return _lengths([(repr(argument), word) for word in _words(argument)], repr(argument))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=f"'{parameter}'") from error


def check_json(path: pathlib.Path | None) -> pathlib.Path | None:
    """The callback of an option for a JSON file: raises before anything is measured if it cannot be written."""
    if path is not None:
        _check_folder(path)
    return path


def check_plot(path: pathlib.Path | None) -> pathlib.Path | None:
    """The callback of an option for a plot: raises before anything is measured if it cannot be drawn or written."""
    if path is None:
        return None
    _check_folder(path)
    try:
        formats = plot.formats()
    except ModuleNotFoundError as error:
        raise typer.BadParameter(str(error)) from error
    if path.suffix.removeprefix(".").lower() not in formats:
        raise typer.BadParameter(f"{path} does not end in a format that can be drawn: {', '.join(formats)}.")
    return path


def _check_folder(path: pathlib.Path) -> None:
    if not path.absolute().parent.is_dir():
        raise typer.BadParameter(f"{path} cannot be written: the folder {path.absolute().parent} does not exist.")
    if path.is_dir():
        raise typer.BadParameter(f"{path} cannot be written: it is a folder.")


def _read(path: pathlib.Path) -> np.ndarray:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text file. It must hold whole numbers, such as one a line.") from error
    lines = enumerate(text.splitlines(), start=1)
    return _lengths([(f"{path}, line {number}", word) for number, line in lines for word in _words(line)], str(path))


def _words(line: str) -> list[str]:
    return line.replace(",", " ").split()


def _lengths(words: Sequence[tuple[str, str]], source: str) -> np.ndarray:
    """int64 [B] from words, each with where it stands."""
    if not words:
        raise ValueError(f"{source} holds no lengths. It must hold at least one whole number, 0 or more.")
    return np.array([_length(place, word) for place, word in words], np.int64)


def _length(place: str, word: str) -> int:
    try:
        length = int(word)
    except ValueError as error:
        raise ValueError(f"{place}: {word!r} is not a whole number.") from error
    if length < 0:
        raise ValueError(f"{place}: {length} is negative. A length is a number of steps, 0 or more.")
    if length > _MOST:
        raise ValueError(f"{place}: {length} is longer than int32 can count ({_MOST} steps).")
    return length
