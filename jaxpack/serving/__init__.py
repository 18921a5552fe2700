"""Serving: programs compiled ahead of time, one for each plan; a queue for many threads; sessions; and a load test."""

from jaxpack._namespace import publish as _publish
from jaxpack.serving._load import LoadReport, counted_compilations, measure_load
from jaxpack.serving._queue import Queue, Tally
from jaxpack.serving._routing import Route
from jaxpack.serving._server import Server
from jaxpack.serving._sessions import SessionServer, UnknownSessionError

__all__ = [
    "LoadReport",
    "Queue",
    "Route",
    "Server",
    "SessionServer",
    "Tally",
    "UnknownSessionError",
    "counted_compilations",
    "measure_load",
]

_publish(__name__)
