"""The files that commands read and write: lengths, JSON and plots. Errors name the option of the file."""

from __future__ import annotations

import codecs
import contextlib
import csv
import json
import math
import os
import pathlib
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

import numpy as np
import typer

from jaxpack import plot

STANDARD_INPUT = "-"
_MOST = np.iinfo(np.int32).max
_LIST = re.compile(r"[-+0-9,\s]*[0-9][-+0-9,\s]*")  # 4,6,8,5
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?", re.ASCII)
_SPACE = " \t\v\f"  # within a line; lines end with LF, CRLF or CR
_COLUMN = ("length", "lengths")  # the names of a table's column of lengths
_OTHERS = {  # other encodings by byte order mark; UTF-32 first, since its mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_LONGEST_WORD = 40  # the most characters of a word that an error shows


def read_lengths(path: pathlib.Path, parameter: str) -> np.ndarray:
    """Reads lengths, int64 [B], from a text file, or from standard input if the path is `-`.

    The text is UTF-8, with or without a byte order mark. White space, commas and line ends separate lengths, and text
    after # on a line is skipped. A number may be written as 12, 12.0 or 1.2e+01. If the first line names columns, one
    of them must be named length or lengths, and is read.

    Args:
      path: the file.
      parameter: the option or argument that named it, for errors.

    Raises:
      typer.BadParameter: if a line holds no length (the error names it), or there are no lengths.
    """
    try:
        return _lengths(_read(path), name_of(path))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=f"'{parameter}'") from error


def read_or_parse_lengths(argument: str, parameter: str) -> np.ndarray:
    """Reads lengths, int64 [B], from a file of this name or, if there is none, from a list such as 4,6,8,5.

    Raises:
      typer.BadParameter: as `read_lengths`, and if the argument is neither.
    """
    # Path.exists raises if a long list is not a valid name; os.path.exists does not.
    if argument == STANDARD_INPUT or os.path.exists(argument):
        return read_lengths(pathlib.Path(argument), parameter)
    try:
        if not _LIST.fullmatch(argument):
            raise ValueError(f"{_brief(argument)} is neither a file that exists nor a list of lengths such as 4,6,8,5.")
        return _lengths(argument, _brief(argument), lines=False)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=f"'{parameter}'") from error


def name_of(path: pathlib.Path) -> str:
    """Returns the name of a file of lengths for errors and reports."""
    return "standard input" if str(path) == STANDARD_INPUT else str(path)


def check_file(path: pathlib.Path | None) -> pathlib.Path | None:
    """Checks the option of a file: raises, before anything is measured, if it cannot be written."""
    if path is not None:
        _check_writable(path)
    return path


JsonFile = Annotated[
    pathlib.Path | None,
    typer.Option("--json", metavar="FILE", callback=check_file, help="Write all results to FILE, as JSON."),
]


def write_json(path: pathlib.Path | None, result: Any) -> None:
    """Writes a result to a JSON file, if the option names one."""
    if path is not None:
        with writing(path):
            path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def check_plot(path: pathlib.Path | None) -> pathlib.Path | None:
    """Checks the option of a plot: raises, before anything is measured, if it cannot be drawn or written."""
    if path is None:
        return None
    _check_writable(path)
    try:
        formats = plot.formats()
    except ModuleNotFoundError as error:
        raise typer.BadParameter(str(error)) from error
    if path.suffix.removeprefix(".").lower() not in formats:
        raise typer.BadParameter(f"{path} does not end in a format that can be drawn: {', '.join(formats)}.")
    return path


def check_directory(path: pathlib.Path | None) -> pathlib.Path | None:
    """Checks the option of a folder: raises if it cannot be made, or be written to."""
    if path is None:
        return None
    try:
        there = next(place for place in (path.absolute(), *path.absolute().parents) if _is_there(place))
    except OSError as error:
        raise _refusal(path, error) from error
    if not there.is_dir():
        raise typer.BadParameter(f"{path} cannot be written: {there} is not a folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise typer.BadParameter(f"{path} cannot be written: the folder {there} does not permit it.")
    return path


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
    """A context that writes a file. If that fails, as on a full device, it prints one line and ends the command.

    Raises:
      typer.Exit: with status 1, if the file could not be written.
    """
    try:
        yield
    except OSError as error:
        typer.echo(f"{path} cannot be written: {error.strerror or error}.", err=True)
        raise typer.Exit(1) from error


def _check_writable(path: pathlib.Path) -> None:
    """Raises unless a file can be written; a missing one is made and removed again."""
    target = pathlib.Path(os.path.realpath(path))  # the target of a link
    folder = target.parent
    if not os.path.isdir(folder):  # Path.is_dir raises if a name is too long
        what = "is not a folder" if os.path.exists(folder) else "does not exist"
        raise typer.BadParameter(f"{path} cannot be written: the folder {folder} {what}.")
    if os.path.isdir(target):
        raise typer.BadParameter(f"{path} cannot be written: it is a folder.")
    try:
        if os.path.isfile(target):
            target.open("ab").close()
        elif not _is_there(target):
            target.open("xb").close()
            target.unlink()
        # Anything else is a device, or a pipe, whose opening may wait for a reader.
    except OSError as error:
        raise _refusal(path, error) from error


def _is_there(path: pathlib.Path) -> bool:
    """Whether anything has this name; raises OSError if nothing can have it."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _refusal(path: pathlib.Path, error: OSError) -> typer.BadParameter:
    return typer.BadParameter(f"{path} cannot be written: {error.strerror}.")


def _read(path: pathlib.Path) -> str:
    """Reads the text of a file or of standard input; raises ValueError if it cannot be read or is not UTF-8."""
    name = name_of(path)
    try:
        data = sys.stdin.buffer.read() if str(path) == STANDARD_INPUT else path.read_bytes()
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror}.") from error
    for mark, encoding in _OTHERS.items():
        if data.startswith(mark):
            raise ValueError(f"{name} is not a text file in UTF-8, but in {encoding}. Save it as UTF-8.")
    try:
        text = data.decode("utf-8-sig")
        if "\0" in text:
            raise ValueError
    except ValueError as error:
        raise ValueError(
            f"{name} is not a text file in UTF-8. It must hold whole numbers, such as one per line: "
            f'numpy.savetxt(path, lengths, fmt="%d") writes them.'
        ) from error
    return text


def _lengths(text: str, source: str, *, lines: bool = True) -> np.ndarray:
    """Reads lengths, int64 [B], from a text. Raises ValueError, with the number of the line if it has lines."""
    rows = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    plain = [row for row in (row.strip(_SPACE) for row in rows) if row]
    if text.isascii() and all(map(str.isdigit, plain)) and max(map(len, plain), default=0) < len(str(_MOST)):
        lengths = list(map(int, plain))  # one per line, as in most files
    else:
        filled = [(number, row) for number, row in enumerate((row.partition("#")[0] for row in rows), start=1)]
        filled = [(number, row) for number, row in filled if row.strip(_SPACE + ",")]
        lengths = _of_lines(filled, source, lines=lines)
    if not lengths:
        raise ValueError(f"{source} holds no lengths. It must hold at least one whole number, 0 or more.")
    return np.array(lengths, np.int64)


def _of_lines(rows: list[tuple[int, str]], source: str, *, lines: bool) -> list[int]:
    """Reads lengths from the lines that are not blank, each with its number."""
    table = _column(rows[0][1], source) if rows else None
    words = list(_flat(rows, source) if table is None else _of_column(rows[1:], *table, source))
    hint = " A first line that names columns must name one of them length."
    first = rows[0][0] if rows and lines and table is None else None
    lengths = [
        _length(
            f"{source}, line {number}" if lines else source,
            word,
            hint if number == first and any(map(str.isalpha, word)) else "",
        )
        for number, word in words
    ]
    if table is None and words:
        _check_no_table(np.array([number for number, _ in words]), np.array(lengths), source)
    return lengths


def _column(first: str, source: str) -> tuple[int, int, str | None] | None:
    """Finds the column of lengths in the first line of a table: its place, the number of columns, and the separator.

    Returns None if no column is named length.
    """
    separator = next((mark for mark in ",;\t" if mark in first), None)
    names = [name.lower() for name in _fields(first, separator)]
    places = [place for place, name in enumerate(names) if name in _COLUMN]
    if len(places) > 1:
        raise ValueError(f"{source}: the first line names {len(places)} columns length. Leave one of them.")
    return (places[0], len(names), separator) if places else None


def _fields(row: str, separator: str | None) -> list[str]:
    """Splits a line of a table into fields, which may be quoted; at white space if there is no separator."""
    fields = row.split() if separator is None else next(csv.reader([row], delimiter=separator))
    return [field.strip().strip('"') for field in fields]


def _of_column(
    rows: Iterable[tuple[int, str]], place: int, columns: int, separator: str | None, source: str
) -> Iterator[tuple[int, str]]:
    """Yields the entries of one column of a table, each with the number of its line."""
    for number, row in rows:
        fields = _fields(row, separator)
        if len(fields) != columns:
            raise ValueError(f"{source}, line {number}: {len(fields)} columns, but the first line names {columns}.")
        yield number, fields[place]


def _flat(rows: Iterable[tuple[int, str]], source: str) -> Iterator[tuple[int, str]]:
    """Yields the words of all lines, each with the number of its line."""
    for number, row in rows:
        parts = [part.strip(_SPACE) for part in row.split(",")]
        if not parts[-1]:
            parts.pop()
        if not all(parts):
            raise ValueError(f"{source}, line {number}: a number is missing beside a comma.")
        for part in parts:
            yield from ((number, word) for word in re.split(f"[{_SPACE}]+", part))


def _check_no_table(numbers: np.ndarray, lengths: np.ndarray, source: str) -> None:
    """Raises ValueError if the numbers look like a table that has columns other than lengths.

    This is the case if every line has two numbers, or the same larger number of them with a column that counts lines.

    Args:
      numbers: [B] the line of each length.
      lengths: [B] the lengths.
      source: the name of the text, for the error.
    """
    _, counts = np.unique(numbers, return_counts=True)
    columns = counts[0]
    if columns < 2 or len(counts) < 2 or (counts != columns).any():
        return
    if columns == 2 or (len(counts) > 2 and (np.diff(lengths.reshape(-1, columns), axis=0) == 1).all(axis=0).any()):
        raise ValueError(
            f"{source} has {columns} numbers on every line, like a table with an index or other columns that are not "
            f"lengths. Name its columns in the first line, and the one to read length; or write one length per line."
        )


def _length(place: str, word: str, hint: str = "") -> int:
    """Reads a length from a word. Raises ValueError, with its place, and a hint if the word is not a number."""
    if not _NUMBER.fullmatch(word):
        digits = " in the digits 0 to 9" if "_" in word or any(c.isdigit() and not c.isascii() for c in word) else ""
        raise ValueError(f"{place}: {_brief(word)} is not a whole number{digits}.{hint}")
    value = int(word) if len(word) <= len(str(_MOST)) and "." not in word and "e" not in word.lower() else float(word)
    if value < 0:
        raise ValueError(f"{place}: {word} is negative. A length is a number of steps, 0 or more.")
    if value > _MOST:
        raise ValueError(f"{place}: {_brief(word, quoted=False)} is longer than int32 can count ({_MOST} steps).")
    if value != math.floor(value):
        raise ValueError(f"{place}: {_brief(word)} is not a whole number.")
    return int(value)


def _brief(text: str, *, quoted: bool = True) -> str:
    """Returns a text for an error: quoted, and not too long."""
    shown = text if len(text) <= _LONGEST_WORD else f"{text[:_LONGEST_WORD]}..."
    return repr(shown) if quoted else shown
