"""Docstrings begin with the field's noun or a verb, so that their first lines make an index."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("jax_seqpar", "torch_ref", "examples", "parity_tests", ".ci")
# First words of a fragment whose noun is missing: prepositions, pronouns, conjunctions.
FRAGMENTS = (
    *("Against", "As", "Before", "Beside", "Beyond", "By", "In", "Of", "Over", "Through", "Under"),
    *("Until", "Within", "Without", "It", "Its", "That", "Their", "They", "Those", "What"),
    *("Whatever", "Which", "Who", "Also", "And", "But", "Nor", "Or", "So", "Though"),
)
# "In-place sum" begins with an adjective, "As `f` has it" with a fragment.
FRAGMENT = re.compile(rf"({'|'.join(FRAGMENTS)})(?![\w-])")

# Docstrings to rewrite; none may be added.
NOT_YET = {
    "jax_seqpar/strategies/ring.py traffic",
    *(f"jax_seqpar/strategies/ring_plan.py {name}" for name in ("RingPlan", "tokens", "turn")),
}


def docstrings(source: str) -> Iterator[str]:
    """First line of each docstring of a module, of its classes and functions, after the name."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if text := ast.get_docstring(node):
            yield f"{getattr(node, 'name', '<module>')}: {text.splitlines()[0]}"


def fragments(source: str) -> list[str]:
    return [line for line in docstrings(source) if FRAGMENT.match(line.partition(": ")[2])]


def test_no_docstring_begins_with_a_fragment():
    sources = {
        str(path.relative_to(ROOT)): path.read_text()
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
    }
    assert sum(1 for source in sources.values() for _ in docstrings(source)) > 2000
    found = [f"{path} {line}" for path, source in sources.items() for line in fragments(source)]
    assert [line for line in found if line.partition(": ")[0] not in NOT_YET] == []


@pytest.mark.parametrize(
    "first", ("Of every KV head.", "As `f` has it.", "What it sends.", "It's x.")
)
@pytest.mark.parametrize(
    "source",
    (
        '"""{}"""',
        'class A:\n """{}"""',
        'async def f():\n """{}"""',
        'class A:\n def f(self):\n  def g():\n   """{}\n\n   Args:\n   """',
    ),
    ids=("module", "class", "async", "nested"),
)
def test_a_planted_fragment_is_found(source, first):
    (found,) = fragments(source.format(first))
    assert found.endswith(first)


@pytest.mark.parametrize("first", ("Offsets of tokens.", "In-place sum of x.", "Asserts equality."))
def test_a_noun_or_a_verb_passes(first):
    assert fragments(f'"""{first}"""') == []
