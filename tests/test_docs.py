import importlib
import inspect
import pathlib
import re
import subprocess
import sys

import jax
import pytest
from public import PACKAGES

import jaxpack

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob(".docs/**/*.md")), *sorted(ROOT.glob(".github/**/*.md"))]


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


COMMANDS = [line for block in blocks(README, "bash") for line in block.splitlines()]


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page.read_text(), "python")], ids=lambda page: page.name
)
def test_every_python_block_of_a_page_runs_and_prints_what_it_says(page, capsys):
    # Output stands in a comment after print, or in a block of its own right after the code.
    text = page.read_text()
    pairs = re.findall(r"^```python\n(.*?)^```\n(?:\n```\n(.*?)^```\n)?", text, re.MULTILINE | re.DOTALL)
    promised = []
    for code, output in pairs:
        promised += re.findall(r"^print\(.*#\s*(.+)$", code, re.MULTILINE) + output.splitlines()
    jax.clear_caches()  # a reader's process starts without programs, and pages count theirs
    exec(compile("".join(code for code, _ in pairs), page.name, "exec"), {})
    assert len(pairs) == len(blocks(text, "python"))
    assert capsys.readouterr().out.splitlines() == promised


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []
    assert links or page != ROOT / "README.md"


def test_the_readme_opens_with_the_two_commands():
    assert COMMANDS[0].endswith("'.[demo]' && .venv/bin/jaxpack demo")
    assert COMMANDS[1].endswith("'.[test]' && .venv/bin/pytest")


def test_ci_runs_the_other_commands_of_the_readme():
    assert len(COMMANDS) == 3
    patterns = re.findall(r"grep -m1 -E '([^']*)' README.md", (ROOT / ".ci" / "run").read_text())
    assert [sum(bool(re.search(pattern, command)) for command in COMMANDS) for pattern in patterns] == [1, 1]


def test_ci_lists_the_parts_it_has():
    script = ROOT / ".ci" / "run"
    listed = subprocess.run(["bash", script, "--list"], check=True, capture_output=True, text=True).stdout.splitlines()
    assert [line.split()[0] for line in listed] == re.findall(r"^part_(\w+)\(", script.read_text(), re.MULTILINE)
    unknown = subprocess.run(["bash", script, "lint", "tset"], capture_output=True, text=True)
    assert unknown.returncode == 2
    assert "no part is named tset" in unknown.stderr


def test_broken_links_inside_a_built_site_are_named(tmp_path):
    def check():
        return subprocess.run(
            [sys.executable, ROOT / ".ci" / "check_links.py", tmp_path], capture_output=True, text=True
        )

    (tmp_path / "guide").mkdir()
    (tmp_path / "index.html").write_text('<a href="guide/plans.html#rows">rows</a> <a href="https://jax.dev/x">JAX</a>')
    (tmp_path / "guide" / "plans.html").write_text('<h2 id="rows">Rows</h2> <a href="../">up</a> <a href="#">top</a>')
    assert check().returncode == 0
    (tmp_path / "guide" / "speed.html").write_text('<a href="plans.html#row">row</a> <img src="../speed.svg">')
    found = check()
    assert found.returncode == 1
    assert found.stderr.splitlines() == [
        "guide/speed.html: plans.html#row leads to no anchor",
        "guide/speed.html: ../speed.svg leads to no file",
    ]


def test_the_changelog_has_this_version_and_known_headings():
    text = (ROOT / "CHANGELOG.md").read_text()
    releases = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert releases[0] == "Unreleased"
    assert re.fullmatch(rf"{re.escape(jaxpack.__version__)} \(\d{{4}}-\d\d-\d\d\)", releases[1])
    headings = set(re.findall(r"^### (.*)$", text, re.MULTILINE))
    assert headings <= {"Added", "Changed", "Fixed", "Deprecated", "Removed", "Breaking"}


def test_a_packed_model_is_trained_on_ones_own_data_in_under_20_lines():
    section = README[README.index("## On your own data") :]
    code = blocks(section, "python")[0]
    lines = [line for line in code.splitlines() if line and not line.startswith(("rng =", "examples ="))]
    assert len(lines) < 20


def test_the_readme_names_everything_public():
    missing = [name for name in jaxpack.__all__ if not re.search(rf"\b{name}\b", README)]
    assert missing == []


def test_the_reference_has_everything_public():
    documented = []
    for page in (ROOT / ".docs" / "reference").glob("*.rst"):
        module = jaxpack
        for directive, name in re.findall(
            r"^\.\. (currentmodule|autofunction|autoclass|py:type):: (\S+)", page.read_text(), re.M
        ):
            if directive == "currentmodule":
                module = importlib.import_module(name)
            else:
                documented.append(getattr(module, name))
                assert inspect.isclass(documented[-1]) == (directive == "autoclass")
    missing = []
    for package in PACKAGES:
        module = importlib.import_module(f"jaxpack{package}")
        exported = [(name, getattr(module, name)) for name in module.__all__]
        missing += [f"{package}.{name}" for name, each in exported if not any(each is other for other in documented)]
    assert missing == []


def test_the_files_that_pages_name_exist_and_have_what_they_name():
    pages = [ROOT / ".docs" / "how-it-works.md", ROOT / ".github" / "CONTRIBUTING.md"]
    named = re.findall(r"`((?:\w+/)+\w+\.py)(?:::(\w+))?`", "".join(page.read_text() for page in pages))
    assert len(named) > 40
    for file, name in named:
        path = ROOT / file if file.startswith(("jaxpack/", "tests/")) else ROOT / "jaxpack" / file
        assert path.is_file(), file
        assert not name or f"def {name}(" in path.read_text(), (file, name)


def test_importing_the_core_needs_no_extra():
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('torch', 'typer', 'matplotlib', 'grain', 'rapidfuzz')))\n"
        "import jaxpack, jaxpack.nnx, jaxpack.datasets, jaxpack.data, jaxpack.metrics, jaxpack.serving\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
