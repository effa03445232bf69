"""Text of messages: lists that are cut, and numbers with their noun."""

from collections.abc import Sequence


def listed(names: Sequence[str], most: int = 10) -> str:
    """The first of the names, and how many more there are."""
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def count(names: Sequence[str], noun: str) -> str:
    """A number with its noun and verb: "1 name is", "2 names are"."""
    return f"1 {noun} is" if len(names) == 1 else f"{len(names):,} {noun}s are"
