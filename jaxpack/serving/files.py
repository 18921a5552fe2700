"""A server on disk: a folder with an export per plan, the weights and a manifest. Nothing is ever unpickled.

    manifest.json       the format, the server's settings, and the checksum of each other file
    weights.msgpack     the leaves of the parameters, as flax.serialization writes arrays
    plan-000.jaxexport  the program of a plan, as jax.export writes it: it knows the plan and all shapes

The extra `serving` brings flatbuffers, with which jax.export writes and reads. The import of flax takes a while, so it
is left to the functions that need it.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.export
import numpy as np

from jaxpack.extras import import_extra

_FORMAT = 1
_MANIFEST, _WEIGHTS = "manifest.json", "weights.msgpack"


class Saved(NamedTuple):
    """What the folder holds: a program per plan, the weights they take, and settings as JSON has them."""

    programs: Sequence[jax.export.Exported]
    weights: Sequence[np.ndarray]
    settings: Mapping[str, Any]


def write_server(directory: str | os.PathLike[str], saved: Saved) -> None:
    """Writes a server. The manifest goes last and an old one first, so that half of a server is never taken for one."""
    check_flatbuffers()
    from flax import serialization

    folder = pathlib.Path(directory)
    files = {f"plan-{i:03}.jaxexport": bytes(program.serialize()) for i, program in enumerate(saved.programs)}
    files[_WEIGHTS] = serialization.msgpack_serialize({str(i): leaf for i, leaf in enumerate(saved.weights)})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MANIFEST).unlink(missing_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    checksums = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    manifest = {"format": _FORMAT, "jax": jax.__version__, "settings": saved.settings, "sha256": checksums}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def read_server(directory: str | os.PathLike[str]) -> Saved:
    """Reads what `write_server` wrote."""
    check_flatbuffers()
    from flax import serialization

    folder = pathlib.Path(directory)
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{folder} has no {_MANIFEST}, so it is no server that Server.save wrote.") from error
    if manifest["format"] != _FORMAT:
        raise ValueError(f"{folder} has format {manifest['format']}, but this jaxpack reads {_FORMAT}. Save it anew.")
    files = {name: _checked(folder / name, checksum) for name, checksum in manifest["sha256"].items()}
    weights = serialization.msgpack_restore(files.pop(_WEIGHTS))
    programs = [jax.export.deserialize(bytearray(data)) for data in files.values()]
    return Saved(programs, [weights[str(i)] for i in range(len(weights))], manifest["settings"])


def check_flatbuffers() -> None:
    """Raises ModuleNotFoundError, with the extra that brings it, if flatbuffers is not installed."""
    import_extra("flatbuffers", "serving", "servers on disk")


def _checked(path: pathlib.Path, checksum: str) -> bytes:
    """A file's content, unless it is not what was written."""
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != checksum:
        raise ValueError(f"{path} is not what {_MANIFEST} says was written: damaged, or of another save. Save it anew.")
    return data
