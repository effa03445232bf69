"""Where two runs of a model part: the first tensor, layer, token and head, and by how much.

A port is right or wrong at one place, and everything after it is wrong too. Both runs record their
tensors by name, in the order in which they are computed, and the first that differs is where to
look.
"""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jax import tree_util

from .._extras import require
from .._text import listed
from .arrays import check_leaf, torch_to_numpy
from .bits import compare_bits
from .hints import hint, wide
from .report import LeafReport, Scalar

AXES = ("batch", "token", "head", "channel")


@dataclass(frozen=True)
class Divergence:
    """The first tensor at which two runs part. It prints as a few lines.

    Attributes:
      name: of the tensor, like "layers.3/attention/query".
      layer: the part of the name before the first "/", like "layers.3".
      agreed: the name of the tensor before, the last that agrees; None if there is none.
      shape: of the tensor.
      index: of the first element that parts: of the smallest token, then batch, then the rest.
      meaning: the same index in words, like "batch 1, token 17, head 3, channel 0".
      batch, token, head: of that element; None where the tensor has no such axis.
      value_a, value_b: that element in both runs.
      max_abs: the largest absolute difference of finite elements.
      relative: the same, divided by the largest finite magnitude in `a`.
      max_ulp: the largest difference in steps from one float to the next; None for other dtypes,
        and where the dtypes differ.
      share: of the elements that part.
      batches, tokens, heads: which ones part, in words, like "tokens 5-63" or "all 8 heads"; None
        where the tensor has no such axis.
      report: of its bits, which counts NaNs, infinities and zeros of the other sign. Where the
        dtypes differ, of float64.
      hint: the known porting bug that turns `a` into `b`, if any; None otherwise.
    """

    name: str
    layer: str
    agreed: str | None
    shape: tuple[int, ...]
    index: tuple[int, ...]
    meaning: str
    batch: int | None
    token: int | None
    head: int | None
    value_a: Scalar
    value_b: Scalar
    max_abs: float
    relative: float
    max_ulp: int | None
    share: float
    batches: str | None
    tokens: str | None
    heads: str | None
    report: LeafReport
    hint: str | None

    def __str__(self) -> str:
        before = f"the last that agrees is {self.agreed}" if self.agreed else "it is the first"
        ulp = "" if self.max_ulp is None else f", {self.max_ulp:,} ULP"
        places = [x for x in (self.heads, self.tokens, self.batches) if x is not None]
        lines = [
            f"the runs part at {self.name} {list(self.shape)}, in layer {self.layer}; {before}",
            f"first at {self.meaning}: a = {self.value_a}, b = {self.value_b}",
            "; ".join([f"{100 * self.share:.3g}% of the elements part", *places]),
            f"by at most {self.max_abs:.4g} absolute, {self.relative:.3g} of the largest "
            f"magnitude in a{ulp}",
        ]
        if facts := _facts(self.report):
            lines.append(facts)
        if self.hint:
            lines.append(f"hint: {self.hint}")
        return "\n  ".join(lines)


@dataclass(frozen=True)
class _Row:
    """How one tensor compares: `parts` are the elements that part, True, of its shape."""

    name: str
    a: np.ndarray
    b: np.ndarray
    bound: float | None
    parts: np.ndarray
    report: LeafReport
    relative: float

    @property
    def share(self) -> float:
        return float(self.parts.mean()) if self.parts.size else 0.0


def first_divergence(
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    *,
    rtol: float = 0.0,
    axes: Sequence[str] = AXES,
) -> Divergence | None:
    """The first tensor, in recorded order, at which two runs part.

    Elements part where |a - b| > rtol * max |a|, the largest finite magnitude of that tensor, or
    one of them alone is NaN, of complex numbers in either component. Integers are subtracted
    exactly, everything else in float64. With rtol = 0, elements part where a bit differs.

    Args:
      a, b: arrays `[B, S, ...]` by name, such as "layers.3/attention/query": hidden states
        `[B, S, D]`, heads `[B, S, N, H]`, logits `[B, S, V]`, tokens `[B, S]`. JAX, PyTorch or
        NumPy; the two runs may differ in framework. The same names in the same order, that of
        computation.
      rtol: tolerance, relative to the largest magnitude of each tensor.
      axes: the order of the axes. Arrays of three axes have no "head", arrays of two no "channel"
        either, and of arrays of other numbers of axes only indices are told. What was recorded
        as `[S, B, N, H]` and `[S, B, D]` takes ("token", "batch", "head", "channel").

    Returns:
      what parts first, or None if nothing does.

    Raises:
      ValueError: names, order or shapes that differ, dtypes too if rtol = 0, nothing recorded,
        or an `rtol` or `axes` that make no sense.
      TypeError: for what is no dense array of numbers, such as a list of arrays or None.

    Example:
      found = first_divergence(torch_activations, jax_activations, rtol=1e-5)
      assert found is None, str(found)
    """
    agreed = None
    for row in _rows(a, b, rtol, axes):
        if row.parts.any():
            return _divergence(row, agreed, axes)
        agreed = row.name
    return None


def divergence_table(
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    *,
    rtol: float = 0.0,
    axes: Sequence[str] = AXES,
) -> Any:
    """How far two runs are apart at every tensor: how an error begins, and how it grows.

    Args:
      a, b, rtol, axes: as in `first_divergence`.

    Returns:
      a `rich.table.Table` with one row per tensor: its name and shape, the share of the elements
      that part, the largest absolute difference, that relative to the largest magnitude in `a`,
      and in ULP, and the first token that parts. The first tensor that parts is in bold.

    Raises:
      ValueError, TypeError: as `first_divergence`.

    Example:
      rich.print(divergence_table(torch_activations, jax_activations, rtol=1e-5))
    """
    escape = require("rich.markup").escape
    table = require("rich.table").Table(
        title=f"Where two runs part, rtol = {rtol:g}", box=require("rich.box").SIMPLE
    )
    table.add_column("tensor", overflow="fold")
    for column in ("shape", "parts", "max abs", "relative", "ULP", "first token"):
        table.add_column(column, justify="right")
    parted = False
    for row in _rows(a, b, rtol, axes):
        style = "bold red" if row.parts.any() and not parted else None
        parted = parted or bool(row.parts.any())
        table.add_row(escape(row.name), *map(escape, _cells(row, axes)), style=style)
    return table


def _cells(row: _Row, axes: Sequence[str]) -> list[str]:
    token = None
    if row.parts.any():
        names = _axis_names(row.parts.ndim, axes)
        token = _at(_first(row.parts, names), names, "token")
    ulp = row.report.max_ulp
    return [
        "x".join(map(str, row.a.shape)) or "scalar",
        f"{100 * row.share:.3g}%",
        f"{row.report.max_abs:.3g}",
        f"{row.relative:.2g}",
        "-" if ulp is None else f"{ulp:,}",
        "-" if token is None else str(token),
    ]


def _rows(
    a: Mapping[str, Any], b: Mapping[str, Any], rtol: float, axes: Sequence[str]
) -> Iterator[_Row]:
    _check_options(rtol, axes)
    _check_runs(a, b, rtol)
    for name in a:
        yield _row(name, a[name], b[name], rtol)


def _row(name: str, x: Any, y: Any, rtol: float) -> _Row:
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
    bound = min(rtol * largest, sys.float_info.max) if rtol else None
    distance = float(report.max_abs or 0)
    relative = distance / largest if largest else math.inf if distance else 0.0
    parts = np.zeros(a.shape, bool) if equal else _parts(a, b, bound)
    return _Row(name, a, b, bound, parts, report, relative)


def _parts(a: np.ndarray, b: np.ndarray, bound: float | None) -> np.ndarray:
    """Which elements part: by more than a bound, or, with None, in any bit."""
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


def _divergence(row: _Row, agreed: str | None, axes: Sequence[str]) -> Divergence:
    names = _axis_names(row.parts.ndim, axes)
    index = _first(row.parts, names)
    return Divergence(
        name=row.name,
        layer=row.name.partition("/")[0],
        agreed=agreed,
        shape=row.a.shape,
        index=index,
        meaning=", ".join(f"{axis} {i}" for axis, i in zip(names, index, strict=True))
        or "its one element",
        batch=_at(index, names, "batch"),
        token=_at(index, names, "token"),
        head=_at(index, names, "head"),
        value_a=row.a[index].item(),
        value_b=row.b[index].item(),
        max_abs=float(row.report.max_abs or 0),
        relative=row.relative,
        max_ulp=row.report.max_ulp,
        share=row.share,
        batches=_which(row.parts, names, "batch", "batches"),
        tokens=_which(row.parts, names, "token", "tokens"),
        heads=_which(row.parts, names, "head", "heads"),
        report=row.report,
        hint=_hint(row, names),
    )


def _hint(row: _Row, names: tuple[str, ...]) -> str | None:
    if "token" not in names:
        return None
    order = [names.index(axis) for axis in AXES if axis in names]
    a, b, parts = (x.transpose(order) for x in (row.a, row.b, row.parts))
    return hint(a, b, parts, lambda x, y: not _parts(x, y, row.bound).any(), row.bound or 0.0)


def _axis_names(ndim: int, axes: Sequence[str]) -> tuple[str, ...]:
    names = tuple(axes)
    for lacking in ("head", "channel"):
        if len(names) > ndim:
            names = tuple(name for name in names if name != lacking)
    return names if len(names) == ndim else tuple(f"axis {i}" for i in range(ndim))


def _first(parts: np.ndarray, names: tuple[str, ...]) -> tuple[int, ...]:
    """The index of the first element that parts: the smallest token, then batch, then the rest."""
    order = sorted(range(parts.ndim), key=lambda i: {"token": 0, "batch": 1}.get(names[i], 2))
    moved = parts.transpose(order)
    found = np.unravel_index(int(moved.argmax()), moved.shape)
    places = dict(zip(order, found, strict=True))
    return tuple(int(places[i]) for i in range(parts.ndim))


def _at(index: tuple[int, ...], names: tuple[str, ...], axis: str) -> int | None:
    return index[names.index(axis)] if axis in names else None


def _which(parts: np.ndarray, names: tuple[str, ...], axis: str, plural: str) -> str | None:
    """Which places along an axis part, in words."""
    if axis not in names:
        return None
    place = names.index(axis)
    hits = np.asarray(parts.any(axis=tuple(i for i in range(parts.ndim) if i != place)))
    found = np.flatnonzero(hits)
    if len(found) == 1:
        return f"{axis} {found[0]}"
    if len(found) == len(hits):
        return f"all {len(hits)} {plural}"
    runs = np.split(found, np.flatnonzero(np.diff(found) > 1) + 1)
    texts = [f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs]
    return f"{plural} {listed(texts, most=6)}" + (
        f" ({len(found)} of {len(hits)})" if len(texts) > 1 else ""
    )


def _facts(report: LeafReport) -> str:
    facts = {
        "NaN only in a": report.nan_only_a,
        "NaN only in b": report.nan_only_b,
        "NaN in both, other payload": report.nan_payload,
        "infinite": report.infinite,
        "-0 against +0": report.signed_zero,
    }
    return "; ".join(f"{fact}: {n:,}" for fact, n in facts.items() if n)


def _array(x: Any) -> np.ndarray:
    # Only tensors have it, and PyTorch need not be there.
    array = torch_to_numpy(x) if hasattr(x, "detach") else np.asarray(x)
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _form(x: Any) -> tuple[tuple[int, ...], str]:
    """Shape and dtype by name, of an array of any framework."""
    x = x if hasattr(x, "shape") and hasattr(x, "dtype") else np.asarray(x)
    return tuple(x.shape), getattr(x.dtype, "name", str(x.dtype).removeprefix("torch."))


def _check_options(rtol: float, axes: Sequence[str]) -> None:
    if not 0 <= rtol < math.inf:
        raise ValueError(
            f"rtol must be 0 (bits) or a positive number, got {rtol}. Write rtol=1e-5."
        )
    if sorted(axes) != sorted(AXES):
        raise ValueError(
            f"axes must be {AXES} in the order of the arrays' axes, got {tuple(axes)}."
        )


def _check_runs(a: Mapping[str, Any], b: Mapping[str, Any], rtol: float) -> None:
    for side, run in (("a", a), ("b", b)):
        if not isinstance(run, Mapping):
            raise TypeError(
                f"{side} must be a mapping of names to arrays, got {type(run).__name__}. "
                f'Write {{"layers.0/attention": x}}.'
            )
        for name, x in run.items():
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
