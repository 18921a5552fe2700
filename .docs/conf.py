"""The site: README, notebooks, pages, and the reference made from the docstrings, by Sphinx.

    sphinx-build -c .docs . build/site

The source folder is the repository itself, so that a link leads to the same file here and on a code host.
"""

import re

from jaxpack import __version__

project = "jaxpack"
release = __version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_copybutton"]
root_doc = ".docs/index"
include_patterns = [
    ".docs/*.md",
    ".docs/guide/*.md",
    ".docs/reference/*.rst",
    ".github/*.md",
    "CHANGELOG.md",
    "README.md",
    "jaxpack/datasets/*.md",
    "notebooks/*.ipynb",
]

html_theme = "furo"
html_title = "jaxpack"
html_extra_path = ["index.html"]
html_static_path = ["site.css"]
html_css_files = ["site.css"]

autodoc_member_order = "bysource"
autodoc_type_aliases = {name: name.split(".")[-1] for name in ("ArrayLike", "npt.ArrayLike", "PyTree")}
default_role = "py:obj"  # `name` is a link where it names something of ours, and code elsewhere
maximum_signature_line_length = 88
python_use_unqualified_type_names = True
napoleon_attr_annotations = False  # the signature has them
napoleon_use_ivar = True  # attributes beside their class, not twice

copybutton_prompt_text = ">>> "
myst_heading_anchors = 3
nb_execution_mode = "off"  # their outputs are in them
nb_merge_streams = True


def _escape(app, what, name, obj, options, lines):
    """Stars in docstrings are shapes such as [S, *F], not emphasis; those in code are left."""
    for i, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            lines[i] = re.sub(r"`[^`]*`|\*", lambda found: found[0] if found[0] != "*" else r"\*", line)


def _short(app, what, name, obj, options, signature, returns):
    """Type aliases by their names, where Sphinx wraps those in unions."""
    return tuple(text and re.sub(r"TypeAliasForwardRef\('(\w+)'\)", r"\1", text) for text in (signature, returns))


def setup(app):
    """Called by Sphinx."""
    app.connect("autodoc-process-signature", _short)
    app.connect("autodoc-process-docstring", _escape, priority=400)  # before napoleon
