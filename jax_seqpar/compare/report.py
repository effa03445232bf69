"""Reports of a bit-for-bit comparison, as text and as JSON."""

import math
from dataclasses import asdict, dataclass
from typing import Any

Scalar = bool | int | float | complex


@dataclass(frozen=True)
class LeafReport:
    """Comparison of one array of `a` with its counterpart in `b`.

    Where shape or dtype differ nothing is compared, and every element counts as differing.
    A complex element is a pair of floats: it differs, or is NaN or infinite, if either float is.

    Attributes:
      path: the place in the tree, like "['query'][0]"; "" for a bare array.
      shape_a, shape_b, dtype_a, dtype_b: the dtypes by name, like "bfloat16".
      total, differing: counts of elements; the larger array's, where the shapes differ.
      max_ulp: largest distance, over the differing finite elements, in steps from one float to
        the next; -0 and +0 are 0 apart. None for other dtypes.
      max_abs: largest absolute difference over the same elements, exact for integers; of complex
        numbers that of a real or imaginary part. None where
        nothing is compared.
      first_index: of the first differing element, None if all are equal.
      meaning: the same index in words, like "batch 1, token 17, head 3, channel 0".
      value_a, value_b, bits_a, bits_b: that element on both sides; complex bits are two numbers.
      nan_only_a, nan_only_b: elements that are NaN on that side only.
      nan_payload: elements that are NaN on both sides, of different bits.
      infinite: differing elements that are infinite on one side at least, and NaN on neither.
      signed_zero: elements that are -0 on one side and +0 on the other.
    """

    path: str
    shape_a: tuple[int, ...]
    shape_b: tuple[int, ...]
    dtype_a: str
    dtype_b: str
    total: int
    differing: int
    max_ulp: int | None = None
    max_abs: int | float | None = None
    first_index: tuple[int, ...] | None = None
    meaning: str | None = None
    value_a: Scalar | None = None
    value_b: Scalar | None = None
    bits_a: str | None = None
    bits_b: str | None = None
    nan_only_a: int = 0
    nan_only_b: int = 0
    nan_payload: int = 0
    infinite: int = 0
    signed_zero: int = 0

    @property
    def comparable(self) -> bool:
        """Whether both arrays have the same shape and dtype."""
        return (self.shape_a, self.dtype_a) == (self.shape_b, self.dtype_b)

    @property
    def equal(self) -> bool:
        return self.comparable and not self.differing

    @property
    def share(self) -> float:
        """The share of the elements that differ, 0 for an empty array."""
        return self.differing / self.total if self.total else 0.0

    def __str__(self) -> str:
        name = f"{self.path} " if self.path else ""
        form_a = f"{self.dtype_a}{list(self.shape_a)}"
        if not self.comparable:
            form_b = f"{self.dtype_b}{list(self.shape_b)}"
            return f"{name}a is {form_a}, b is {form_b}: all {_count(self.total, 'element')} differ"
        elements = _count(self.total, "element")
        if self.equal:
            return f"{name}{form_a}: {elements}, 0 bits differ"
        ulp = "" if self.max_ulp is None else f"{self.max_ulp:,} ULP, "
        lines = [
            f"{name}{form_a}: {self.differing:,} of {elements} differ ({100 * self.share:.3g}%)",
            f"first at {self.meaning}: a = {self.value_a} ({self.bits_a}), "
            f"b = {self.value_b} ({self.bits_b})",
            f"finite elements differ by at most {ulp}{self.max_abs:.4g} absolute",
        ]
        facts = {
            "NaN only in a": self.nan_only_a,
            "NaN only in b": self.nan_only_b,
            "NaN in both, other payload": self.nan_payload,
            "infinite": self.infinite,
            "-0 against +0": self.signed_zero,
        }
        if any(facts.values()):
            lines.append("; ".join(f"{fact}: {n:,}" for fact, n in facts.items() if n))
        return "\n  ".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The fields and properties as plain values; complex, NaN and infinity as strings."""
        properties = {"share": self.share, "equal": self.equal}
        return {name: _plain(value) for name, value in (asdict(self) | properties).items()}


@dataclass(frozen=True)
class BitsReport:
    """One `LeafReport` per pair of arrays. A report has no truth value: read `equal`."""

    leaves: tuple[LeafReport, ...]

    @property
    def equal(self) -> bool:
        """Whether every pair agrees in shape, dtype and all bits."""
        return all(leaf.equal for leaf in self.leaves)

    @property
    def differing(self) -> int:
        return sum(leaf.differing for leaf in self.leaves)

    @property
    def total(self) -> int:
        return sum(leaf.total for leaf in self.leaves)

    def __str__(self) -> str:
        arrays, elements = _count(len(self.leaves), "array"), _count(self.total, "element")
        if self.equal:
            return f"equal: {arrays}, {elements}, 0 bits differ"
        unequal = [leaf for leaf in self.leaves if not leaf.equal]
        head = f"different: {len(unequal):,} of {arrays}, {self.differing:,} of {elements}"
        return "\n".join([head, *map(str, unequal)])

    def to_json(self) -> dict[str, Any]:
        """The report as plain values that `json.dumps` takes."""
        return {
            "equal": self.equal,
            "differing": self.differing,
            "total": self.total,
            "leaves": [leaf.to_json() for leaf in self.leaves],
        }


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, complex) or (isinstance(value, float) and not math.isfinite(value)):
        return str(value)
    return value
