"""Examples in docstrings run and print what they say, and every public class and function has one."""

import doctest
import importlib
import inspect
import os
import pkgutil
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from public import PACKAGES

import jaxpack

os.environ.setdefault("KERAS_BACKEND", "jax")  # for the example that imports keras

KNOWN = {"jaxpack": jaxpack, "jax": jax, "jnp": jnp, "np": np}  # to examples, beside the names of their own module
ABSENT = re.compile(r"pip install 'jaxpack\[|No module named '(keras|orbax|typer)'")  # what is not always installed
MODULES = ["jaxpack", *(info.name for info in pkgutil.walk_packages(jaxpack.__path__, "jaxpack."))]
PUBLIC = [package for package in PACKAGES if package != ".plot"]  # a benchmark's result is too long


def docstrings():
    """Yields a test for each docstring with examples, and a skipped one for each module whose packages are missing."""
    for name in MODULES:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if not ABSENT.search(str(error)):
                raise
            yield pytest.param(None, id=name, marks=pytest.mark.skip(reason=str(error)))
        else:
            yield from (pytest.param(test, id=test.name) for test in examples_in(module) if test.examples)


def examples_in(module):
    """Yields the docstrings of a module, and of the functions and classes whose source it holds."""
    finder, names = doctest.DocTestFinder(), vars(module) | KNOWN
    yield from finder.find(types.ModuleType(module.__name__, module.__doc__), globs=names)
    for name, member in vars(module).items():
        source = getattr(inspect.unwrap(member), "__globals__", None) if callable(member) else None
        of_class = isinstance(member, type) and vars(member).get("_module_source", member.__module__) == module.__name__
        if source is vars(module) or of_class:
            yield from finder.find(member, f"{module.__name__}.{name}", module=False, globs=names)


@pytest.mark.parametrize("examples", list(docstrings()))
def test_examples_print_what_they_say(examples):
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    failures: list[str] = []
    runner.run(examples, out=failures.append)
    report = "".join(failures)
    for line in re.findall(r"ModuleNotFoundError: .*", report):
        if ABSENT.search(line):
            pytest.skip(line)
    assert not report, report


@pytest.mark.parametrize("package", PUBLIC)
def test_every_public_class_and_function_has_an_example(package):
    module = importlib.import_module("jaxpack" + package)
    ours = {name: each for name in module.__all__ if (each := getattr(module, name)).__module__.startswith("jaxpack")}
    parser = doctest.DocTestParser()
    assert [name for name, each in ours.items() if not parser.get_examples(each.__doc__ or "")] == []
