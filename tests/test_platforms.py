"""The names of platforms, and which is the default."""

import types

import jax
import pytest

from jaxpack import _platforms
from jaxpack._platforms import platform_kind


def settings(monkeypatch, *, platform_name="", platforms=None, backend=None):
    """Sets JAX's options and its default backend; without one, asking for it fails the test."""

    def default_backend():
        assert backend, "a backend was started"
        return backend

    config = types.SimpleNamespace(read={"jax_platform_name": platform_name}.get, jax_platforms=platforms)
    monkeypatch.setattr(_platforms, "jax", types.SimpleNamespace(config=config, default_backend=default_backend))


@pytest.mark.parametrize(
    ("name", "kind"), [("cpu", "cpu"), ("gpu", "gpu"), ("cuda", "gpu"), ("rocm", "gpu"), ("tpu", "tpu")]
)
def test_a_platform_is_known_by_all_its_names(name, kind):
    assert platform_kind(name) == kind


@pytest.mark.parametrize("name", ["", "CPU", "cpu,cuda", "h100", 3])
def test_an_unknown_platform_is_named_with_those_that_are_known(name):
    with pytest.raises(ValueError, match=r"one of cpu, gpu, cuda, rocm, tpu, or None .* got " + repr(name)):
        platform_kind(name)


def test_the_default_is_jaxs():
    assert platform_kind() == jax.default_backend()


@pytest.mark.parametrize(("backend", "kind"), [("cpu", "cpu"), ("gpu", "gpu"), ("tpu", "tpu"), ("another", "gpu")])
def test_the_default_backend_is_asked_if_no_platform_is_set(monkeypatch, backend, kind):
    settings(monkeypatch, backend=backend)
    assert platform_kind() == kind


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"platforms": "cuda,cpu"}, "gpu"),
        ({"platforms": "cpu"}, "cpu"),
        ({"platforms": "another,cpu"}, "gpu"),
        ({"platform_name": "cpu", "platforms": "cuda,cpu"}, "cpu"),
    ],
)
def test_no_backend_starts_if_a_platform_is_set(monkeypatch, options, kind):
    settings(monkeypatch, **options)
    assert platform_kind() == kind


def test_a_name_that_is_given_starts_no_backend(monkeypatch):
    settings(monkeypatch)
    assert platform_kind("gpu") == "gpu"
