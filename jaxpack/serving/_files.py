"""A server on disk: a folder with an export per plan, the weights and a manifest. Nothing is ever unpickled.

    manifest.json       the format, the server's settings, and the checksum of each other file
    weights.msgpack     the leaves of the parameters, as flax.serialization writes arrays
    plan-000.jaxexport  the program of a plan, as jax.export writes it: it knows the plan and all shapes

The extra `serving` brings flatbuffers, with which jax.export writes and reads. The import of flax takes a while, so it
is left to the functions that need it.
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
    """What the folder holds: a program per plan, the weights they take, and settings as JSON has them."""

    programs: Sequence[jax.export.Exported]
    weights: Sequence[np.ndarray]
    settings: Mapping[str, Any]


class NoServerError(FileNotFoundError, ValueError):
    """There is no server in a folder, or no folder."""


def write_server(directory: str | os.PathLike[str], saved: Saved) -> None:
    """Writes a server. The manifest goes last and an old one first, so that half of a server is never taken for one."""
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
    """Reads what `write_server` wrote.

    Raises:
      NoServerError: if there is no manifest.
      ValueError: naming the file that is damaged.
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
    """Makes any exception a ValueError that names the folder and its file: a name, or a program's number."""
    try:
        yield
    except Exception as error:
        path = pathlib.Path(directory) / (name if isinstance(name, str) else _program(name))
        raise ValueError(f"{path} is damaged, or of another server ({error!r}). Save the server anew.") from error


def check_flatbuffers() -> None:
    """Raises ModuleNotFoundError, with the extra that brings it, if flatbuffers is not installed."""
    import_extra("flatbuffers", "serving", "servers on disk")


def _program(i: int) -> str:
    return f"plan-{i:03}.jaxexport"


def _manifest(folder: pathlib.Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The settings, and the checksums of the files."""
    try:
        text = (folder / _MANIFEST).read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        missing = f"has no {_MANIFEST}" if folder.is_dir() else "is no folder"
        raise NoServerError(f"{folder} {missing}, so it is no server that Server.save wrote.") from error
    with undamaged(folder):
        manifest = json.loads(text)
        found = manifest["format"]
    if found != _FORMAT:
        raise ValueError(f"{folder} has format {found}, but this jaxpack reads {_FORMAT}. Save it anew.")
    with undamaged(folder):
        settings, checksums = manifest["settings"], manifest["sha256"]
        names = [*map(_program, range(len(checksums) - 1)), _WEIGHTS]
        if manifest.keys() != {"format", "jax", "settings", "sha256"} or sorted(checksums) != sorted(names):
            raise ValueError(f"it has the keys {sorted(manifest)}, and lists the files {sorted(checksums)}")
        if len(names) < 2:
            raise ValueError("it lists no program")
        return settings, {name: checksums[name] for name in names}


def _checked(path: pathlib.Path, checksum: str) -> bytes:
    """A file's content, unless it is not what was written."""
    try:
        data = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ValueError(f"{path} is missing, though {_MANIFEST} lists it. Save the server anew.") from error
    if hashlib.sha256(data).hexdigest() != checksum:
        raise ValueError(f"{path} is not what {_MANIFEST} says was written: damaged, or of another save. Save it anew.")
    return data
