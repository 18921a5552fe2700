import pathlib
import re
import subprocess
import sys

import jaxpack

README = (pathlib.Path(__file__).parent.parent / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_every_python_block_runs_and_prints_what_it_says(capsys):
    # Output stands in a comment after print, or in a block of its own right after the code.
    pairs = re.findall(r"^```python\n(.*?)^```\n(?:\n```\n(.*?)^```\n)?", README, re.MULTILINE | re.DOTALL)
    promised = []
    for code, output in pairs:
        promised += re.findall(r"^print\(.*#\s*(.+)$", code, re.MULTILINE) + output.splitlines()
    exec(compile("".join(code for code, _ in pairs), "README.md", "exec"), {})
    assert len(pairs) == len(blocks("python"))
    assert capsys.readouterr().out.splitlines() == promised


def test_opens_with_the_two_commands():
    commands = [line for block in blocks("bash") for line in block.splitlines()]
    assert len(commands) == 2
    assert commands[0].endswith("'.[demo]' && .venv/bin/jaxpack demo")
    assert commands[1].endswith("'.[test]' && .venv/bin/pytest")


def test_names_everything_public():
    missing = [name for name in jaxpack.__all__ if not re.search(rf"\b{name}\b", README)]
    assert missing == []


def test_relative_links_lead_somewhere():
    root = pathlib.Path(__file__).parent.parent
    links = re.findall(r"\]\((?!https?:|#)([^)]+)\)", README)
    assert links
    assert all((root / link).exists() for link in links)


def test_importing_the_core_needs_no_extra():
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('torch', 'typer', 'matplotlib', 'grain', 'rapidfuzz')))\n"
        "import jaxpack, jaxpack.nnx, jaxpack.datasets, jaxpack.data, jaxpack.metrics, jaxpack.serving\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
