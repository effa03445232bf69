"""First divergence of two runs of a model: tensor, layer, token and head, and by how much.

An error in a port begins at one tensor, and every later tensor is wrong too. Both runs record their
tensors by name, in the order in which they are computed; the first tensor that differs has the
error.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .._text import listed
from .hints import hint
from .report import LeafReport, Scalar
from .tensor_comparison import AXES, Row, along, axis_names, differing, first_index, rows_of


@dataclass(frozen=True)
class Divergence:
    """The first tensor at which two runs differ. It prints as a few lines.

    Attributes:
      name: of the tensor, like "layers.3/attention/query".
      layer: the part of the name before the first "/", like "layers.3".
      agreed: the name of the tensor before, the last that agrees; None for the first tensor.
      shape: of the tensor.
      index: of the first element that differs: of the smallest token, then batch, then the rest.
      meaning: the same index in words, like "batch 1, token 17, head 3, channel 0".
      batch, token, head: of that element; None where the tensor has no such axis.
      value_a, value_b: that element in both runs.
      max_abs: the largest absolute difference of finite elements; of complex numbers that of a real
        or imaginary part.
      relative: the same, divided by the largest finite magnitude in `a`.
      max_ulp: the largest difference in steps from one float to the next; None for other dtypes,
        and where the dtypes differ.
      share: of the elements that differ.
      batches, tokens, heads: which ones differ, in words, like "tokens 5-63" or "all 8 heads"; None
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
            f"the runs first differ at {self.name} {list(self.shape)}, in layer {self.layer}; "
            f"{before}",
            f"first at {self.meaning}: a = {self.value_a}, b = {self.value_b}",
            "; ".join([f"{100 * self.share:.3g}% of the elements differ", *places]),
            f"by at most {self.max_abs:.4g} absolute, {self.relative:.3g} of the largest "
            f"magnitude in a{ulp}",
        ]
        if facts := _facts(self.report):
            lines.append(facts)
        if self.hint:
            lines.append(f"hint: {self.hint}")
        return "\n  ".join(lines)


def first_divergence(
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    *,
    rtol: float = 0.0,
    axes: Sequence[str] = AXES,
) -> Divergence | None:
    """The first tensor, in recorded order, at which two runs differ.

    Elements differ where |a - b| > rtol * max |a|, the largest finite magnitude of that tensor, or
    one of them alone is NaN, of complex numbers in either component. Integers are subtracted
    exactly, everything else in float64. With rtol = 0, elements differ where a bit differs.

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
      what differs first, or None if nothing does.

    Raises:
      ValueError: names, order or shapes that differ, dtypes too if rtol = 0, nothing recorded,
        or an `rtol` or `axes` that make no sense.
      TypeError: for anything but a dense array of numbers, such as a list of arrays or None.

    Example:
      found = first_divergence(torch_activations, jax_activations, rtol=1e-5)
      assert found is None, str(found)
    """
    agreed = None
    for row in rows_of(a, b, rtol, axes):
        if row.differs.any():
            return _divergence(row, agreed, axes)
        agreed = row.name
    return None


def _divergence(row: Row, agreed: str | None, axes: Sequence[str]) -> Divergence:
    names = axis_names(row.differs.ndim, axes)
    index = first_index(row.differs, names)
    return Divergence(
        name=row.name,
        layer=row.name.partition("/")[0],
        agreed=agreed,
        shape=row.a.shape,
        index=index,
        meaning=", ".join(f"{axis} {i}" for axis, i in zip(names, index, strict=True))
        or "its one element",
        batch=along(index, names, "batch"),
        token=along(index, names, "token"),
        head=along(index, names, "head"),
        value_a=row.a[index].item(),
        value_b=row.b[index].item(),
        max_abs=float(row.report.max_abs or 0),
        relative=row.relative,
        max_ulp=row.report.max_ulp,
        share=row.share,
        batches=_which(row.differs, names, "batch", "batches"),
        tokens=_which(row.differs, names, "token", "tokens"),
        heads=_which(row.differs, names, "head", "heads"),
        report=row.report,
        hint=_hint(row, names),
    )


def _hint(row: Row, names: tuple[str, ...]) -> str | None:
    if "token" not in names:
        return None
    order = [names.index(axis) for axis in AXES if axis in names]
    a, b, differs = (x.transpose(order) for x in (row.a, row.b, row.differs))
    return hint(a, b, differs, lambda x, y: not differing(x, y, row.bound).any(), row.bound or 0.0)


def _which(differs: np.ndarray, names: tuple[str, ...], axis: str, plural: str) -> str | None:
    """Indices that differ along an axis, in words; None if the tensor lacks the axis."""
    if axis not in names:
        return None
    place = names.index(axis)
    hits = np.asarray(differs.any(axis=tuple(i for i in range(differs.ndim) if i != place)))
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
