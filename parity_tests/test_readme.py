"""The README's code runs, its examples too, and what the pages say of the tree is so."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
WORKFLOW = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
EIGHT_DEVICES = 'import jax; jax.config.update("jax_num_cpu_devices", 8)\n'


def run(*command):
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_there_is_code_to_run():
    assert len(BLOCKS) >= 4
    assert "@@" not in README


def test_the_code_runs():
    """Every block as it stands, with names of its own, on simulated devices."""
    lines = [
        f"exec(compile({block!r}, 'block {i} of the README', 'exec'), {{}})\n"
        for i, block in enumerate(BLOCKS)
    ]
    run(sys.executable, "-W", "error", "-c", EIGHT_DEVICES + "".join(lines))


def test_the_first_example_is_eight_lines():
    assert len([line for line in BLOCKS[0].splitlines() if line.strip()]) == 8


def test_the_quickstart_runs():
    output = run(sys.executable, "examples/quickstart.py")
    assert "float32[2@data,1024@seq,8,64]" in output
    assert re.search(r"all-to-alls [78] ", output)


def test_the_files_that_the_pages_name_exist():
    pages = (ROOT / "README.md", *sorted((ROOT / ".github").glob("*.md")))
    folders = r"jax_seqpar|torch_ref|parity_tests|examples|\.ci|\.github"
    named = {
        (page.name, path)
        for page in pages
        for path in re.findall(rf"`((?:{folders})/[\w./]*)`", page.read_text())
    }
    assert {page for page, _ in named} >= {"README.md", "CONTRIBUTING.md"}
    assert [(page, path) for page, path in sorted(named) if not (ROOT / path).exists()] == []


def make_targets(text):
    """What `make` is asked for in a script, a workflow or a page."""
    return set(re.findall(r"\bmake ([a-z][a-z-]*)", text))


def test_the_workflow_runs_all_that_a_change_must_pass():
    asked = make_targets("\n".join(re.findall(r"- run: (.*)", WORKFLOW)))
    needed = make_targets((ROOT / ".ci" / "run").read_text())
    assert needed == {"lint", "test"}
    assert asked == needed | {"test-newest"}


def test_the_make_targets_that_contributors_are_told_exist():
    told = make_targets((ROOT / ".github" / "CONTRIBUTING.md").read_text())
    assert len(told) >= 4
    assert told <= set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_the_top_level_is_the_one_agreed():
    """Nothing but these and dot-files, of what git knows."""
    listed = run("git", "ls-files").split()
    top = {path.split("/")[0] for path in listed if not path.startswith(".")}
    assert top == {
        *("pyproject.toml", "README.md", "LICENSE", "Makefile"),
        *("jax_seqpar", "torch_ref", "parity_tests", "examples"),
    }
