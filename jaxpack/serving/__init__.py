"""Serving: programs compiled ahead of time, one a plan of a family; a queue for many threads; and its load test."""

from jaxpack.serving.load_test import LoadReport, counted_compilations, load_test
from jaxpack.serving.queue import Queue, Tally
from jaxpack.serving.routing import Route
from jaxpack.serving.server import Server

__all__ = ["LoadReport", "Queue", "Route", "Server", "Tally", "counted_compilations", "load_test"]
