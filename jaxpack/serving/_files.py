"""A server on disk: a folder with an export per plan, the weights and a manifest. Nothing is unpickled.

    manifest.json       the format, the server's settings, and the checksum of each other file
    weights.msgpack     the leaves of the parameters, as flax.serialization writes arrays
    plan-000.jaxexport  the program of a plan, as jax.export writes it, with the plan and all shapes

The extra `serving` installs flatbuffers, which jax.export needs. Functions import flax themselves, since its import
takes a while.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.export
import numpy as np

from jaxpack._extras import import_extra

_FORMAT = 1
_MANIFEST, _WEIGHTS = "manifest.json", "weights.msgpack"


class Saved(NamedTuple):
    """The content of the folder: a program per plan, the weights they take, and settings of JSON's types."""

    programs: Sequence[jax.export.Exported]
    weights: Sequence[np.ndarray]
    settings: Mapping[str, Any]


class NoServerError(FileNotFoundError, ValueError):
    """The error for a folder without a server, or no folder."""


def write_server(directory: str | os.PathLike[str], saved: Saved) -> None:
    """Writes a server. An old manifest is deleted first and the new one written last, so half a server never loads."""
    check_flatbuffers()
    from flax import serialization

    folder = pathlib.Path(directory)
    files = {_program(i): bytes(program.serialize()) for i, program in enumerate(saved.programs)}
    files[_WEIGHTS] = serialization.msgpack_serialize({str(i): leaf for i, leaf in enumerate(saved.weights)})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MANIFEST).unlink(missing_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    checksums = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    manifest = {"format": _FORMAT, "jax": jax.__version__, "settings": saved.settings, "sha256": checksums}
    unfinished = folder / f"{_MANIFEST}.unfinished"
    unfinished.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(folder / _MANIFEST)


def read_server(directory: str | os.PathLike[str]) -> Saved:
    """Reads a server that `write_server` wrote.

    Raises:
      NoServerError: if there is no manifest.
      ValueError: if a file is damaged; the message names it.
    """
    check_flatbuffers()
    from flax import serialization

    folder = pathlib.Path(directory)
    settings, checksums = _manifest(folder)
    data = {name: _checked(folder / name, checksum) for name, checksum in checksums.items()}
    with undamaged(folder, _WEIGHTS):
        restored = serialization.msgpack_restore(data.pop(_WEIGHTS))
        weights = [restored[str(i)] for i in range(len(restored))]
    programs = []
    for name in data:
        with undamaged(folder, name):
            programs.append(jax.export.deserialize(bytearray(data[name])))
    return Saved(programs, weights, settings)


@contextlib.contextmanager
def undamaged(directory: str | os.PathLike[str], name: str | int = _MANIFEST) -> Iterator[None]:
    """Turns any exception into a ValueError that names the folder and its file, given by name or program number."""
    try:
        yield
    except Exception as error:
        path = pathlib.Path(directory) / (name if isinstance(name, str) else _program(name))
        raise ValueError(f"{path} is damaged, or from another server ({error!r}). Save the server again.") from error


def check_flatbuffers() -> None:
    """Raises ModuleNotFoundError, which names the extra to install, if flatbuffers is missing."""
    import_extra("flatbuffers", "serving", "servers on disk")


def _program(i: int) -> str:
    return f"plan-{i:03}.jaxexport"


def _manifest(folder: pathlib.Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Reads the settings, and the checksums of the files."""
    try:
        text = (folder / _MANIFEST).read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        missing = f"has no {_MANIFEST}" if folder.is_dir() else "is not a folder"
        raise NoServerError(f"{folder} {missing}, so it is not a server that Server.save wrote.") from error
    with undamaged(folder):
        manifest = json.loads(text)
        found = manifest["format"]
    if found != _FORMAT:
        raise ValueError(f"{folder} has format {found}, but this jaxpack reads {_FORMAT}. Save the server again.")
    with undamaged(folder):
        settings, checksums = manifest["settings"], manifest["sha256"]
        names = [*map(_program, range(len(checksums) - 1)), _WEIGHTS]
        if manifest.keys() != {"format", "jax", "settings", "sha256"} or sorted(checksums) != sorted(names):
            raise ValueError(f"it has the keys {sorted(manifest)}, and lists the files {sorted(checksums)}")
        if len(names) < 2:
            raise ValueError("it lists no program")
        return settings, {name: checksums[name] for name in names}


def _checked(path: pathlib.Path, checksum: str) -> bytes:
    """Reads a file; raises ValueError unless it has the checksum."""
    try:
        data = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ValueError(f"{path} is missing, though {_MANIFEST} lists it. Save the server again.") from error
    if hashlib.sha256(data).hexdigest() != checksum:
        raise ValueError(f"{path} does not have the checksum in {_MANIFEST}: it is damaged. Save the server again.")
    return data
