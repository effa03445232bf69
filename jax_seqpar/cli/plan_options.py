"""Options of `seqpar plan`: which target has which, which need others, which exclude each other.

An option that is not given is None, so that none is accepted and ignored.
"""

from collections.abc import Iterable
from typing import Any

FILE = "FILE.py:function"
OF_AN_ATTENTION = ("batch", "heads", "kv_heads", "head_dim", "dtype", "strategy", "train")
OF_A_DECODER = ("layers", "features", "hidden", "vocabulary", "tiles", "offload")
# Options of the sizes of a target, and of how it runs: each target has these and no others.
TARGETS: dict[str, tuple[str, ...]] = {
    "layer": OF_AN_ATTENTION,
    "decoder": OF_AN_ATTENTION + OF_A_DECODER,
    FILE: (),
}
# An option, and those of which it needs one.
NEEDS = {
    "--step": ("--largest",),
    "--points": ("--sweep tokens",),
    "--png": ("--sweep tokens", "--sweep degree", "--largest"),
    "--offload": ("--train",),
}
# Two options, and why a call cannot have both.
EXCLUSIVE = (
    ("--largest", "--sweep", "are two questions"),
    ("--largest", "--no-compile", "contradict each other: the compiler says what fits"),
    ("--overlap", "--no-compile", "contradict each other: the first is for the compiler"),
    ("--dump", "--no-compile", "contradict each other: the compiler's program is written"),
    ("--dump", "--largest", "would write several programs to the same files"),
    ("--dump", "--sweep", "would write several programs to the same files"),
    ("--mesh", "--sweep degree", "both set the mesh"),
)
# Options whose parameter has another name.
SPELLED = {"find_largest": "largest", "json_file": "json", "compiled": "compile"}


def check_options(given: dict[str, Any]) -> None:
    """Raises ValueError for options of another target, and for those that do not go together.

    Args:
      given: values by parameter of the command, `what` among them; None if not given.
    """
    written = {name: as_written(name, value) for name, value in given.items() if value is not None}
    _check_target(given["what"], written)
    for text in written.values():
        option, _, _ = text.partition(" ")
        needed = NEEDS.get(option, ())
        if needed and not set(needed) & set(written.values()):
            other = written.get(needed[0].partition(" ")[0].removeprefix("--"))
            place = ", too" if other is None else f" in place of {other}"
            raise ValueError(
                f"{text} needs {_or(needed)}. Write {needed[0]}{place}, or leave {option} out."
            )
    for first, second, why in EXCLUSIVE:
        found = [x for option in (first, second) for x in written.values() if _is(x, option)]
        if len(found) == 2:
            raise ValueError(f"{' and '.join(found)} {why}. Write only one of them.")


def as_written(name: str, value: Any) -> str:
    """The option of a parameter as the command line has it: "--layers 3", "--no-compile"."""
    option = SPELLED.get(name, name).replace("_", "-")
    if isinstance(value, bool):
        return f"--{option}" if value else f"--no-{option}"
    return f"--{option} {value}"


def _check_target(what: str, written: dict[str, str]) -> None:
    target = FILE if ":" in what else what
    if target not in TARGETS:
        raise ValueError(f"{what!r} is no target. Write layer, decoder or {FILE}.")
    ignored = [x for x in TARGETS["decoder"] if x in written and x not in TARGETS[target]]
    if ignored:
        having = [name for name, options in TARGETS.items() if set(ignored) <= set(options)]
        said, them = ", ".join(written[x] for x in ignored), "it" if len(ignored) == 1 else "them"
        reason = "whose function sets its own sizes" if target == FILE else "which has no such part"
        raise ValueError(
            f"{said} would change nothing of {what}, {reason}. Leave {them} out, or write "
            f"{_or(having)} in place of {what}."
        )


def _is(text: str, option: str) -> bool:
    return text == option or text.startswith(f"{option} ")


def _or(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last
