"""The public namespaces: what is exported, where it says it lives, and how a name is retired."""

import ast
import importlib
import pathlib
import pickle
import re
import sys
import types
import typing

import pytest
from public import PACKAGES

from jaxpack._namespace import deprecated

ROOT = pathlib.Path(__file__).parent.parent
MODULES = ["jaxpack.cli", *(f"jaxpack{package}" for package in PACKAGES)]
NAMES = MODULES[1:]


def exports(name):
    """Returns the classes and functions of jaxpack that a namespace exports."""
    module = importlib.import_module(name)
    found = {each: getattr(module, each) for each in module.__all__}
    return {each: o for each, o in found.items() if getattr(o, "__module__", "").startswith("jaxpack")}


@pytest.mark.parametrize("name", NAMES)
def test_a_namespace_is_its_all(name):
    module = importlib.import_module(name)
    public = {each for each in vars(module) if not each.startswith("_") and f"{name}.{each}" not in MODULES}
    assert public == set(module.__all__)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_public_says_so_and_is_pickled_by_that_name(name):
    for each, exported in exports(name).items():
        home = exported.__module__  # gru_cell is in jaxpack and in jaxpack.cells
        assert home in (name, "jaxpack")
        assert getattr(importlib.import_module(home), each) is exported
        assert pickle.loads(pickle.dumps(exported)) is exported
        assert not isinstance(exported, type) or repr(exported) == f"<class '{home}.{each}'>"


@pytest.mark.parametrize("name", [name for name in NAMES if name != "jaxpack.linen"])  # Flax's own do not resolve
def test_the_annotations_of_public_classes_resolve(name):
    for exported in exports(name).values():
        if isinstance(exported, type) and exported.__module__ == name:
            typing.get_type_hints(exported)
            assert sys.modules[vars(exported)["_module_source"]].__file__


def test_everything_outside_the_package_imports_public_modules_only():
    pages = [
        *ROOT.glob("*.md"),
        *ROOT.glob(".docs/**/*.md"),
        *ROOT.glob(".github/**/*.md"),
        *ROOT.glob("notebooks/*.ipynb"),
    ]
    private = [
        page.name for page in pages if re.search(r"(from|import) jaxpack(\.\w+)*\._", page.read_text(encoding="utf-8"))
    ]
    assert len(pages) > 10
    assert private == []


def imported_rooms(path):
    """The rooms (modules and folders right below the package) that a module imports when it is imported."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for package, *rest in (module.split(".") for module in modules):
            if package == "jaxpack":
                yield rest[0] if rest and rest[0] in ROOMS else "jaxpack"


ROOMS = {path.stem for path in (ROOT / "jaxpack").iterdir() if path.suffix in ("", ".py") and path.name[:2] != "__"}


def test_imports_run_downward_on_the_map():
    page = (ROOT / ".docs" / "how-it-works.md").read_text(encoding="utf-8")
    floors = page.split("## The map")[1].split("```")[1].splitlines()
    height = {room: -i for i, floor in enumerate(floors) for room in floor.split()}
    assert ROOMS | {"jaxpack"} == set(height)
    upward = set()
    for path in (ROOT / "jaxpack").rglob("*.py"):
        room = path.relative_to(ROOT / "jaxpack").parts[0].removesuffix(".py").replace("__init__", "jaxpack")
        if room != "__main__":
            others = set(imported_rooms(path)) - {room}
            upward |= {(room, other) for other in others if height[other] >= height[room]}
    assert upward == set()


def test_a_deprecated_name_still_works_and_says_what_to_write(monkeypatch):
    module = types.ModuleType("library")
    vars(module).update(new=object(), __getattr__=deprecated("library", {"old": "new"}, removal="0.3.0"))
    monkeypatch.setitem(sys.modules, "library", module)
    with pytest.warns(
        DeprecationWarning, match=r"library\.old is now library\.new, .* removed in jaxpack 0\.3\.0"
    ) as caught:
        assert module.old is module.new
    assert [warning.filename for warning in caught] == [__file__]
    with pytest.raises(AttributeError, match="module 'library' has no attribute 'older'"):
        _ = module.older
