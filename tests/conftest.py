"""What all tests share: 64-bit mode on request, and hypothesis's profile."""

import hypothesis
import jax
import pytest

# Two devices, so that shard_map has something to shard over.
jax.config.update("jax_num_cpu_devices", 2)

# An example may compile a program, so there is no deadline, and no more examples than find what they look for.
hypothesis.settings.register_profile("jaxpack", deadline=None, max_examples=30)
hypothesis.settings.load_profile("jaxpack")


@pytest.fixture
def x64():
    """Runs the test in float64."""
    with jax.enable_x64(True):
        yield


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Tests that share a costly fixture of a module share a process: xdist would make it anew in each."""
    for item in items:
        if "run" in item.fixturenames:
            item.add_marker(pytest.mark.xdist_group(item.module.__name__))
