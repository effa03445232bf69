"""The answers to a question, compared with the right ones bit by bit."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Check:
    """The answers to one question.

    Attributes:
      name: of the question.
      wrong: how many of the answers differ in any bit.
      total: of how many.
    """

    name: str
    wrong: int
    total: int

    @property
    def passed(self) -> bool:
        return self.wrong == 0


def compare(name: str, got: np.ndarray, expected: np.ndarray) -> Check:
    """Counts the elements whose bits differ; all of them in another shape or dtype."""
    if (got.shape, got.dtype) != (expected.shape, expected.dtype):
        return Check(name, expected.size, expected.size)
    unsigned = f"u{got.dtype.itemsize}"
    wrong = np.count_nonzero(got.view(unsigned) != np.ascontiguousarray(expected).view(unsigned))
    return Check(name, int(wrong), got.size)


def compare_hash(name: str, got: Iterable[np.ndarray], expected: str) -> Check:
    """One check of all bits, by their SHA-256."""
    return Check(name, int(sha256(got) != expected), 1)


def sha256(arrays: Iterable[np.ndarray]) -> str:
    """SHA-256 of the bits of arrays, one after the other, little-endian."""
    digest = hashlib.sha256()
    for x in arrays:
        digest.update(np.ascontiguousarray(x, x.dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest()
