"""Configures the site, which Sphinx builds from the README, the guides, the notebooks and the docstrings.

    sphinx-build -c .docs . build/site

The source folder is the repository itself, so the relative links of a page lead to the same file on a code host.
`docname` gives each page its address on the site.
"""

import inspect
import re
import sys
import typing

from sphinx.project import Project

from jaxpack import __version__

project = "jaxpack"
release = __version__
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.githubpages",  # hosts that run Jekyll drop folders such as _static otherwise
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
include_patterns = [
    ".docs/*.md",
    ".docs/guide/*.md",
    ".docs/reference/*.rst",
    ".github/*.md",
    "CHANGELOG.md",
    "README.md",
    "jaxpack/*/*.md",
    "notebooks/*.ipynb",
]
exclude_patterns = [".github/PULL_REQUEST_TEMPLATE.md"]
contents = {
    "Start": ("", ["self", "coming-from"]),
    "Notebooks": ("notebooks/", ["*"]),
    "Guides": (
        "guide/",
        [
            "plans",
            "packed",
            "cells",
            "linear",
            "stacks",
            "hybrids",
            "speech",
            "state",
            "regularization",
            "rollouts",
            "feeding",
            "sharding",
            "clusters",
            "flax",
            "weights",
            "serving",
            "speed",
            "accelerators",
            "commands",
        ],
    ),
    "Reference": (
        "reference/",
        [
            "plans",
            "packed",
            "layers",
            "hybrids",
            "stepped",
            "rollouts",
            "cells",
            "flax",
            "interop",
            "data",
            "sharding",
            "losses",
            "serving",
            "plot",
            "datasets",
        ],
    ),
    "Development": ("", ["how-it-works", "recurrence", "contributing", "code_of_conduct", "security", "changelog"]),
}

html_theme = "furo"
html_title = "jaxpack"
html_copy_source = html_show_copyright = False
html_static_path = ["site.css"]
html_css_files = ["site.css"]

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_type_aliases = {name: f"jaxpack.cells.{name}" for name in ("Carry", "Params", "Tanh")}
autodoc_type_aliases |= {name: name for name in ("ArrayLike", "InitializerByGate", "PyTree")}
autodoc_type_aliases["npt.ArrayLike"] = "ArrayLike"
default_role = "py:obj"  # `name` is a link where it names an object of ours, and code elsewhere
maximum_signature_line_length = 88
python_use_unqualified_type_names = True
napoleon_attr_annotations = False  # the signature has them
napoleon_use_ivar = True  # attributes beside their class, not twice

copybutton_prompt_text = ">>> "
myst_heading_anchors = 3
nb_execution_mode = "off"  # the notebooks are committed with their outputs
nb_merge_streams = True


def docname(path: str) -> str:
    """Returns the address of a page on the site from that of its file, both without their suffix.

    README -> index    .docs/guide/plans -> guide/plans    .github/CONTRIBUTING -> contributing
    jaxpack/_recurrence/README -> recurrence
    """
    name = re.sub(r"^(\.docs|\.github|jaxpack)/", "", path)
    name = re.sub(r"^_?(\w+)/README$", r"\1", name)
    return "index" if name == "README" else name.lower()


def _path2doc(project, filename, path2doc=Project.path2doc):
    """Gives a page its address in Sphinx's `Project`, which otherwise takes the path of the file."""
    path = path2doc(project, filename)
    return path and docname(path)


def _add_contents(app, name, source):
    """Appends the site's table of contents, which a code host would show as text, to the front page."""
    if name == "index":
        for caption, (folder, pages) in contents.items():
            entries = "\n".join(folder + page for page in pages)
            source[0] += f"\n```{{toctree}}\n:hidden:\n:glob:\n:caption: {caption}\n\n{entries}\n```\n"


def _source_module(obj, default):
    """Returns the name of the module that holds the source of a class or function, which may be exported elsewhere."""
    if isinstance(obj, type):
        return vars(obj).get("_module_source", obj.__module__)
    return getattr(inspect.unwrap(obj), "__globals__", {}).get("__name__", default)


def _class_attribute(cls, name, *default):
    """Reads an attribute of a class for autodoc.

    The source of `__module__` has the order of the members. A metaclass or a `__new__` that takes `(*args, **kwargs)`
    hides the signature of `__init__`.
    """
    if name == "__module__":
        return _source_module(cls, None)
    found = getattr(cls, name, *default)
    if name in ("__call__", "__new__") and default and inspect.isfunction(found):
        _, *parameters = inspect.signature(found).parameters.values()
        if all(each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD) for each in parameters):
            return default[0]
    return found


def _follow_import(app, module, name):
    """Returns the module that [source] links to."""
    obj = getattr(sys.modules[module], name.split(".")[0])
    return _source_module(obj, module) if callable(obj) else None


def _spell_out_options(app, obj, bound_method):
    """Replaces `**options: Unpack[Options]` in a signature by the keywords of the TypedDict `Options`."""
    if not inspect.isfunction(obj) or "Unpack[" not in str(obj.__annotations__):
        return
    signature, parameters = inspect.signature(obj), []
    for parameter in signature.parameters.values():
        if parameter.kind is not parameter.VAR_KEYWORD:
            parameters.append(parameter)
            continue
        (options,) = typing.get_args(typing.get_type_hints(obj)[parameter.name])
        for name, hint in options.__annotations__.items():
            text = getattr(hint, "__forward_arg__", hint)
            parameters.append(inspect.Parameter(name, parameter.KEYWORD_ONLY, default=object(), annotation=text))
    obj.__signature__ = signature.replace(parameters=parameters)


def _escape_stars(app, what, name, obj, options, lines):
    """Escapes the stars of docstrings, which are shapes such as [S, *F] and no emphasis, except in code."""
    for i, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            lines[i] = re.sub(r"`[^`]*`|\*", lambda found: found[0] if found[0] != "*" else r"\*", line)


def _shorten(app, what, name, obj, options, signature, returns):
    """Writes type aliases, and defaults that are objects, by their names: Sphinx can then parse the signature."""

    def short(text):
        text = re.sub(r"TypeAliasForwardRef\('([\w.]+)'\)", r"\1", text).replace("npt.ArrayLike", "ArrayLike")
        return re.sub(r"<function (\w+)>|<[\w.]+ object>", lambda found: found[1] or "...", text)

    return tuple(text and short(text) for text in (signature, returns))


def setup(app):
    """Connects the functions above to Sphinx's events."""
    Project.path2doc = _path2doc
    app.connect("source-read", _add_contents)
    app.connect("viewcode-follow-imported", _follow_import)
    app.connect("autodoc-before-process-signature", _spell_out_options, priority=600)  # after defaults are preserved
    app.connect("autodoc-process-signature", _shorten)
    app.connect("autodoc-process-docstring", _escape_stars, priority=400)  # before napoleon
    app.add_autodoc_attrgetter(type, _class_attribute)
