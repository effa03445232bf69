"""Errors speak to the reader: each names a value, and says what to write instead."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
ERRORS = (
    *("ValueError", "TypeError", "RuntimeError", "ImportError", "TimeoutError"),
    "_UnknownNameError",
    "problems.append",  # one of several problems, joined to one message
)
# The imperatives that messages use; every one of them is needed.
VERBS = (
    *("add", "broadcast", "call", "cast", "choose", "copy", "decode", "download", "give", "keep"),
    *("leave", "load", "make", "multiply", "name", "number", "pad", "pass", "pip install"),
    *("project", "record", "reshape", "return", "say", "shift", "split", "take"),
    *("tokenise", "transpose", "use", "weigh", "write"),
)
# An imperative starts a sentence or a clause, or stands behind what it is for: "For one sequence
# write x[None]."
ADVICE = re.compile(
    rf"(?:^|[.:;,}}] |\b(?:or|and) )({'|'.join(VERBS)})\b(?!=)|\b(write|give)\b", re.IGNORECASE
)
# Messages made of others, which say what to write.
MADE_OF_OTHERS = {
    "jax_seqpar/bridge/tensor_files.py npz_array": "parity.cases._read says what to write",
    "jax_seqpar/bridge/weights/arrange.py refuse": "the problems joined",
    "jax_seqpar/compare/tensor_comparison.py _check_runs": "the problems joined",
    "jax_seqpar/parity/inputs.py _read": "an _UnknownNameError as a ValueError",
    "jax_seqpar/parity/plan.py plan": "the name of a file before the text of an error",
}
# Messages with nothing to name.
NOTHING_TO_NAME = {
    "jax_seqpar/bridge/shared_kernels.py backward": "a second derivative",
    "jax_seqpar/compare/tensor_comparison.py _check_runs": "no tensor",
    "jax_seqpar/exact/undefined_derivatives.py _no_second_derivative": "a second derivative",
    "jax_seqpar/flax/__init__.py <module>": "no Flax",
    "jax_seqpar/flax/attention_fn.py check_makes_instance": "a class for its instance",
    "jax_seqpar/mesh.py find_mesh": "no mesh",
    "jax_seqpar/training/batch.py check_segments": "two arguments given together",
    "jax_seqpar/training/batch.py check_targets": "two arguments given together",
}


class Message(NamedTuple):
    """The text of an error, with {} for its values, and the function and line that raise it."""

    text: str
    function: str
    line: int

    @property
    def names_a_value(self) -> bool:
        return "{}" in self.text


def raised(node: ast.AST, function: str = "<module>") -> Iterator[Message]:
    """Every message that an error below a node is made of."""
    for child in ast.iter_child_nodes(node):
        inside = child.name if isinstance(child, ast.FunctionDef) else function
        if isinstance(child, ast.Call) and ast.unparse(child.func) in ERRORS and child.args:
            for text in texts_of(child.args[0]):
                yield Message(text, inside, child.lineno)
        yield from raised(child, inside)


def texts_of(node: ast.expr) -> list[str]:
    """Literals as they are, {} for a value, and one text for each branch of a condition.

    A constant of the library, in capitals, is no value; N, K and other sizes are.
    """
    match node:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.JoinedStr(values=parts):
            return ["".join(texts) for texts in product(*map(texts_of, parts))]
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return ["".join(texts) for texts in product(texts_of(left), texts_of(right))]
        case ast.IfExp(body=body, orelse=orelse):
            return texts_of(body) + texts_of(orelse)
    names = [x.id for x in ast.walk(node) if isinstance(x, ast.Name)]
    return ["CONSTANT" if all(x.isupper() and len(x) > 1 for x in names) else "{}"]


@cache
def messages() -> list[tuple[str, Message]]:
    """The library's messages by file and function."""
    return [
        (f"{path.relative_to(ROOT)} {message.function}", message)
        for folder in ("jax_seqpar", "torch_ref")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for message in raised(ast.parse(path.read_text()))
    ]


def test_every_message_says_what_to_write():
    assert len(messages()) > 250
    without = [(where, message) for where, message in messages() if not ADVICE.search(message.text)]
    assert [x for x in without if x[0] not in MADE_OF_OTHERS] == []
    assert sorted(where for where, _ in without) == sorted(MADE_OF_OTHERS)


def test_every_message_names_a_value():
    without = [(where, message) for where, message in messages() if not message.names_a_value]
    assert [x for x in without if x[0] not in NOTHING_TO_NAME] == []
    assert sorted(where for where, _ in without) == sorted(NOTHING_TO_NAME)


def test_every_verb_is_used():
    found = [verb for _, message in messages() for verb in ADVICE.findall(message.text)]
    assert {verb.lower() for verbs in found for verb in verbs if verb} == set(VERBS)


@pytest.mark.parametrize(
    ("argument", "advises", "names"),
    (
        ('"the sizes do not fit."', False, False),
        ('"the sizes do not fit. Write y."', True, False),
        ('f"{x} does not fit the call."', False, True),
        ('f"{x} does not fit. Write y."', True, True),
        ('f"For one x of {CONSTANT} write y."', True, False),
        ('f"{x} needs another mode, decode=True."', False, True),
        ('f"{x}. " + ("Write y." if a else "It is y.")', False, True),
    ),
)
def test_a_message_without_either_would_be_found(argument, advises, names):
    found = list(raised(ast.parse(f"def f():\n raise ValueError({argument})")))
    assert {message.function for message in found} == {"f"}
    assert all(ADVICE.search(message.text) for message in found) == advises
    assert all(message.names_a_value for message in found) == names
