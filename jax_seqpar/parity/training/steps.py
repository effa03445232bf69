"""Steps of a training with every bit of them, and where two runs differ."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from ..golden import digest
from ..inputs import Arrays

# Prefixes of the names of weights and of the two moments of AdamW.
KINDS = ("weight", "m", "v")


class Step(NamedTuple):
    """A step that was made: its number from 1, its loss, and all arrays after it.

    arrays: weights and moments, float32, as "weight layers.0.q", "m layers.0.q", "v layers.0.q".
    """

    number: int
    loss: np.float32
    arrays: Arrays

    @property
    def loss_bits(self) -> str:
        """The 32 bits of the loss in hexadecimal."""
        return f"{int(self.loss.view(np.uint32)):08x}"

    @property
    def sha256(self) -> str:
        """SHA-256 of loss, weights and moments."""
        return digest({"loss": self.loss, **self.arrays})

    def of_kind(self, kind: str) -> Arrays:
        """The weights, or one of the moments, by the names of the weights."""
        prefix = f"{kind} "
        return {n.removeprefix(prefix): x for n, x in self.arrays.items() if n.startswith(prefix)}


def named(*trees: Arrays) -> Arrays:
    """Weights and moments as the arrays of a step, in the order of their names."""
    return {
        f"{kind} {name}": tree[name]
        for kind, tree in zip(KINDS, trees, strict=True)
        for name in sorted(tree)
    }


def first_difference(a: Sequence[Step], b: Sequence[Step]) -> str | None:
    """The first step, tensor and element whose bits differ, in words; None if all bits agree.

    Raises:
      ValueError: for runs of other steps or of other tensors.
    """
    for one, other in zip(a, b, strict=True):
        lone = sorted(one.arrays.keys() ^ other.arrays.keys())
        if one.number != other.number or lone:
            raise ValueError(
                f"step {one.number} cannot be compared with step {other.number}: in one run alone "
                f"are the tensors {lone}. Give two runs of one training."
            )
        for name, x in one.arrays.items():
            y = other.arrays[name]
            differs = np.argwhere(x.view(np.uint32) != y.view(np.uint32))
            if len(differs):
                at = tuple(map(int, differs[0]))
                return (
                    f"step {one.number}, {name}{list(at)}: {x[at]} and {y[at]}; "
                    f"{len(differs)} of its {x.size} numbers differ"
                )
        if one.loss_bits != other.loss_bits:
            return f"step {one.number}, the loss: {one.loss} and {other.loss}"
    return None


def all_equal(steps: Iterable[Step]) -> bool:
    """Whether a step has the same bits in every run."""
    return len({step.sha256 for step in steps}) == 1
