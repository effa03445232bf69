"""Comparison of each tensor of two runs: which elements differ, and by how much."""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jax import tree_util

from .._text import listed
from .bits import compare_bits
from .hints import wide
from .numpy_conversion import check_leaf, torch_to_numpy
from .report import LeafReport

AXES = ("batch", "token", "head", "channel")


@dataclass(frozen=True)
class Row:
    """Comparison of one tensor; `differs` is True at the elements that differ, in its shape."""

    name: str
    a: np.ndarray
    b: np.ndarray
    bound: float | None
    differs: np.ndarray
    report: LeafReport
    relative: float

    @property
    def share(self) -> float:
        return float(self.differs.mean()) if self.differs.size else 0.0


def rows_of(
    a: Mapping[str, Any], b: Mapping[str, Any], rtol: float, axes: Sequence[str]
) -> Iterator[Row]:
    """Comparison of each tensor of two runs, in recorded order.

    Raises:
      ValueError, TypeError: as `first_divergence`.
    """
    _check_options(rtol, axes)
    _check_runs(a, b, rtol)
    for name in a:
        yield _row(name, a[name], b[name], rtol)


def _row(name: str, x: Any, y: Any, rtol: float) -> Row:
    (report,) = compare_bits({name: x}, {name: y}).leaves
    a, b = _array(x), _array(y)
    equal = report.equal
    if not report.comparable:
        both = np.result_type(wide(a), wide(b))
        (report,) = compare_bits({name: a.astype(both)}, {name: b.astype(both)}).leaves
        report = replace(report, max_ulp=None)
    magnitude = np.abs(wide(a))
    largest = float(magnitude[np.isfinite(magnitude)].max(initial=0))
    # A product that overflows would let every pair of numbers agree, infinities included.
    # So would one of the dtype of a 16-bit rtol.
    bound = min(float(rtol) * largest, sys.float_info.max) if rtol else None
    distance = float(report.max_abs or 0)
    relative = distance / largest if largest else math.inf if distance else 0.0
    differs = np.zeros(a.shape, bool) if equal else differing(a, b, bound)
    return Row(name, a, b, bound, differs, report, relative)


def differing(a: np.ndarray, b: np.ndarray, bound: float | None) -> np.ndarray:
    """Boolean array: True where elements differ by more than a bound, or, with None, in any bit."""
    if bound is None:
        bytes_a, bytes_b = (np.ascontiguousarray(x).reshape(-1, 1).view(np.uint8) for x in (a, b))
        return np.asarray((bytes_a != bytes_b).any(axis=1)).reshape(a.shape)
    with np.errstate(all="ignore"):
        return np.asarray(~(_distance(a, b) <= bound), bool)


def _distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """|a - b|: 0 for equal infinities and two NaNs, NaN where only one of the two is a NaN."""
    if all(x.dtype.kind in "biu" for x in (a, b)):
        # Python's integers are exact; float64 holds no odd number beyond 2^53.
        return np.asarray(np.abs(a.astype(object) - b.astype(object)))

    def component(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.where((x == y) | (np.isnan(x) & np.isnan(y)), 0.0, x - y)

    x, y = wide(a), wide(b)
    real, imaginary = (component(part(x), part(y)) for part in (np.real, np.imag))
    return np.asarray(np.hypot(real, imaginary))


def _array(x: Any) -> np.ndarray:
    # Only tensors have it, and PyTorch need not be there.
    array = torch_to_numpy(x) if hasattr(x, "detach") else np.asarray(x)
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _form(x: Any) -> tuple[tuple[int, ...], str]:
    """Shape and dtype by name, of an array of any framework."""
    x = x if hasattr(x, "shape") and hasattr(x, "dtype") else np.asarray(x)
    return tuple(x.shape), getattr(x.dtype, "name", str(x.dtype).removeprefix("torch."))


def _check_options(rtol: float, axes: Sequence[str]) -> None:
    if isinstance(rtol, str) or not 0 <= rtol < math.inf:
        raise ValueError(
            f"rtol must be 0 (bits) or a positive number, got {rtol!r}. Write rtol=1e-5."
        )
    if sorted(axes) != sorted(AXES):
        raise ValueError(
            f"axes must be {AXES} in the order of the arrays' axes, got {tuple(axes)}. Name each "
            f"once."
        )


def _check_runs(a: Mapping[str, Any], b: Mapping[str, Any], rtol: float) -> None:
    for side, run in (("a", a), ("b", b)):
        if not isinstance(run, Mapping):
            raise TypeError(
                f"{side} must be a mapping of names to arrays, got {type(run).__name__}. "
                f'Write {{"layers.0/attention": x}}.'
            )
        for name, x in run.items():
            if not isinstance(name, str):
                raise TypeError(
                    f"{side} must have names as its keys, got {name!r}. Write "
                    f"{{f'layers.{{i}}/attention': x}} of number i."
                )
            if not tree_util.all_leaves([x]):
                raise TypeError(
                    f"{side}[{name!r}] must be an array, got {type(x).__name__}. "
                    f"Record each array by a name of its own."
                )
            check_leaf(x, f"{side}[{name!r}]")
    problems = []
    if not a and not b:
        problems.append("Nothing is recorded. Record tensors by name in both runs.")
    for side, names in (("a", [x for x in a if x not in b]), ("b", [x for x in b if x not in a])):
        if names:
            problems.append(
                f"Only {side} has {len(names)} of the names: {listed(names)}. Record them in both "
                f"runs, or leave them out."
            )
    pairs = zip(a, b, strict=False)
    if not problems and (swap := next(((x, y) for x, y in pairs if x != y), None)):
        problems.append(
            f"The order differs: where a has {swap[0]}, b has {swap[1]}. Record in the order of "
            f"computation, or write {{name: b[name] for name in a}}."
        )
    forms = {name: (_form(a[name]), _form(b[name])) for name in a if name in b}
    if shapes := [f"{n} a {x[0]}, b {y[0]}" for n, (x, y) in forms.items() if x[0] != y[0]]:
        problems.append(
            f"Shapes differ: {listed(shapes)}. Reshape or transpose one side to the other's axes."
        )
    if not rtol and (
        dtypes := [f"{n} a {x[1]}, b {y[1]}" for n, (x, y) in forms.items() if x[1] != y[1]]
    ):
        problems.append(
            f"Dtypes differ: {listed(dtypes)}. Bits of two dtypes are not compared: write "
            f"rtol=1e-5, say, or run both in one dtype."
        )
    if problems:
        raise ValueError("\n".join(problems))


def axis_names(ndim: int, axes: Sequence[str]) -> tuple[str, ...]:
    """Names of an array's axes: without "head" or "channel" for fewer axes, else by number."""
    names = tuple(axes)
    for lacking in ("head", "channel"):
        if len(names) > ndim:
            names = tuple(name for name in names if name != lacking)
    return names if len(names) == ndim else tuple(f"axis {i}" for i in range(ndim))


def first_index(differs: np.ndarray, names: tuple[str, ...]) -> tuple[int, ...]:
    """Index of the first element that differs: of the smallest token, then batch, then the rest."""
    order = sorted(range(differs.ndim), key=lambda i: {"token": 0, "batch": 1}.get(names[i], 2))
    moved = differs.transpose(order)
    found = np.unravel_index(int(moved.argmax()), moved.shape)
    places = dict(zip(order, found, strict=True))
    return tuple(int(places[i]) for i in range(differs.ndim))


def along(index: tuple[int, ...], names: tuple[str, ...], axis: str) -> int | None:
    """The index along an axis; None where the tensor has no such axis."""
    return index[names.index(axis)] if axis in names else None
