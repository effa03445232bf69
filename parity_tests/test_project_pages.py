"""The code of every page runs, the examples too, and what the pages say of the tree is so."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import jax_seqpar
import jax_seqpar.flax
import jax_seqpar.plan

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
# Each folder's page, that of the reference, that of the examples, and what the code host shows.
PATTERNS = ("README.md", "jax_seqpar/**/README.md", "torch_ref/README.md", "examples/**/README.md")
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for pattern in (*PATTERNS, ".github/*.md")
    for path in sorted(ROOT.glob(pattern))
}
WORKFLOW = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
EIGHT_DEVICES = 'import jax; jax.config.update("jax_num_cpu_devices", 8)\n'


def run(*command, **environment):
    options = {"capture_output": True, "text": True, "cwd": ROOT, "timeout": 500}
    result = subprocess.run(command, **options, env=os.environ | environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def blocks(page):
    """The Python of a page."""
    return re.findall(r"```python\n(.*?)```", PAGES[page], re.DOTALL)


def anchors(page):
    """Anchors of the headings of a page, as code hosts name them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page, flags=re.DOTALL), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_there_is_code_to_run():
    with_code = [page for page in PAGES if blocks(page)]
    assert len(with_code) >= 9
    assert sum(map(len, map(blocks, with_code))) >= 12
    assert [page for page in PAGES if "@@" in PAGES[page]] == []


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_the_code_runs(page):
    """Every block runs as it stands, with separate names, on simulated devices.

    Programs are compiled in less time than a user's: what the blocks assert is bits that no
    compiler may change, or two runs of one program.
    """
    lines = [
        f"exec(compile({block!r}, '<block {i} of {page}>', 'exec'), {{}})\n"
        for i, block in enumerate(blocks(page))
    ]
    code = EIGHT_DEVICES + "".join(lines)
    run(sys.executable, "-W", "error", "-c", code, JAX_DISABLE_MOST_OPTIMIZATIONS="1")


def test_the_first_page_is_one_screen():
    assert len(README.splitlines()) <= 120


def test_the_first_example_is_eight_lines():
    assert len([line for line in blocks("README.md")[0].splitlines() if line.strip()]) == 8


def test_the_quickstart_runs():
    output = run(sys.executable, "examples/quickstart.py")
    assert "float32[2@data,1024@seq,8,64]" in output
    assert re.search(r"all-to-alls [78] ", output)


def test_the_files_that_the_pages_name_exist():
    folders = r"jax_seqpar|torch_ref|parity_tests|examples|\.ci|\.github"
    named = {
        (page, path)
        for page, text in PAGES.items()
        for path in re.findall(rf"`((?:{folders})/[\w./]*)`", text)
    }
    assert {page for page, _ in named} >= {"README.md", ".github/CONTRIBUTING.md"}
    assert [(page, path) for page, path in sorted(named) if not (ROOT / path).exists()] == []
    files = {path.name for path in ROOT.rglob("*.py") if ".venv" not in str(path)}
    alone = {
        (page, name) for page, text in PAGES.items() for name in re.findall(r"`(\w+\.py)`", text)
    }
    assert [(page, name) for page, name in sorted(alone) if name not in files] == []


def test_the_links_between_pages_lead_somewhere():
    links = {
        (page, target)
        for page, text in PAGES.items()
        for target in re.findall(r"\]\(([^)\s]+)\)", text)
        if not re.match(r"\w+:", target)
    }
    assert len(links) >= 20
    broken = []
    for page, target in sorted(links):
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        if not path.is_file() or (anchor and anchor not in anchors(path.read_text())):
            broken.append((page, target))
    assert broken == []


def test_every_page_is_linked_from_the_first():
    """Every README is reached from the first page, in one or more steps."""
    seen, todo = set(), ["README.md"]
    while todo:
        page = todo.pop()
        seen.add(page)
        targets = re.findall(r"\]\(([^)\s#:]+\.md)[^)]*\)", PAGES[page])
        paths = {((ROOT / page).parent / target).resolve() for target in targets}
        found = {str(path.relative_to(ROOT.resolve())) for path in paths}
        todo += found & set(PAGES) - seen
    assert [page for page in PAGES if page.endswith("README.md") and page not in seen] == []


def make_targets(text):
    """Targets of `make` in a script, a workflow or a page."""
    return set(re.findall(r"\bmake ([a-z][a-z-]*)", text))


def test_the_workflow_runs_all_that_a_change_must_pass():
    asked = make_targets("\n".join(re.findall(r"- run: (.*)", WORKFLOW)))
    needed = make_targets((ROOT / ".ci" / "run").read_text())
    assert needed == {"lint", "test"}
    assert asked == needed | {"test-newest", "reference"}


def test_the_make_targets_that_the_pages_name_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    told = {page: set(re.findall(r"`make ([a-z][a-z-]*)", PAGES[page])) for page in PAGES}
    assert len(told[".github/CONTRIBUTING.md"]) >= 4
    assert {page: names - targets for page, names in told.items() if names - targets} == {}


def test_the_top_level_is_the_one_agreed():
    """Tracked files at the top are these and dot-files alone."""
    listed = run("git", "ls-files").split()
    top = {path.split("/")[0] for path in listed if not path.startswith(".")}
    assert top == {
        *("pyproject.toml", "README.md", "LICENSE", "Makefile"),
        *("jax_seqpar", "torch_ref", "parity_tests", "examples"),
    }


def test_the_reference_has_every_public_name(tmp_path):
    """The reference has every public name, and explains every keyword of the attention."""
    run(sys.executable, ".ci/reference.py", str(tmp_path), PYTHONPATH=str(ROOT))
    for package in (jax_seqpar, jax_seqpar.mask, jax_seqpar.flax, jax_seqpar.plan):
        page = (tmp_path / f"{package.__name__.replace('.', '/')}.html").read_text()
        shown = set(re.findall(r'<section id="(\w+)">', page))
        public = {name for name, x in vars(package).items() if not isinstance(x, ModuleType)}
        assert shown >= {name for name in public if not name.startswith("_")}
    signature = inspect.signature(jax_seqpar.dot_product_attention)
    page = (tmp_path / "jax_seqpar.html").read_text()
    explained = page[page.index('<section id="dot_product_attention">') :].split("</section>")[0]
    for keyword in signature.parameters:
        assert re.search(rf"<li><strong>([^<]*, )?{keyword}(, [^<]*)?:</strong>", explained), (
            keyword
        )
