"""One finding of `seqpar doctor`: what was looked at, how it is, and a sentence."""

from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """State of a finding: as it has to be, worth knowing, or wrong."""

    OK = "ok"
    NOTE = "note"
    FAILS = "FAILS"


@dataclass(frozen=True)
class Finding:
    """A row of the doctor's table.

    Attributes:
      subject: a package, "devices", "attention", ...
      says: whole sentences, the last of which says what to write where something is missing.
    """

    subject: str
    state: State
    says: str


def in_one_line(error: BaseException) -> str:
    """The kind of an error and the first line of its message."""
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}".removesuffix(": ")
