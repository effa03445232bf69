"""Bit-for-bit comparison of two trees of arrays, each of whatever framework.

Elements are compared as unsigned integers, so -0 differs from +0, and a NaN from a NaN of another
payload. For each pair of arrays a report says how many elements differ, where the first one is,
how far apart the finite ones are, and how many of the differences are of a special kind.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import tree_util

from .bit_patterns import is_of, real_parts, to_numpy, ulp_distance, unsigned, width
from .report import BitsReport, LeafReport, Scalar


def compare_bits(
    a: Any, b: Any, *, axes: Sequence[str] = ("batch", "token", "head", "channel")
) -> BitsReport:
    """Compares two trees of arrays bit for bit.

    Args:
      a, b: pytrees of the same structure. Leaves are JAX, PyTorch or NumPy arrays, or Python
        scalars, of any bool, integer, floating or complex dtype; the two sides may differ in
        framework.
      axes: names of the array axes, used to say in words where an array of that many axes
        differs first.

    Returns:
      a report, `.equal` or not, that prints as a summary.

    Raises:
      ValueError: if the structures differ, naming the first path that does; without any array.
      TypeError: if a leaf is not a dense array of numbers.

    Example:
      report = compare_bits({"out": out, "lse": lse}, {"out": torch_out, "lse": torch_lse})
      assert report.equal, str(report)
    """
    leaves_a, structure_a = tree_util.tree_flatten_with_path(a)
    leaves_b, structure_b = tree_util.tree_flatten_with_path(b)
    if structure_a != structure_b:
        difference = _first_difference(a, b, ()) or f"a is {structure_a}, b is {structure_b}"
        raise ValueError(
            f"a and b differ in structure: {difference}. "
            f"Give both sides the same containers with the same keys."
        )
    if not leaves_a:
        raise ValueError(
            f"nothing to compare: a and b have no array. Got {a!r}. Give at least one on both "
            f"sides."
        )
    return BitsReport(
        tuple(
            _compare(tree_util.keystr(path), leaf_a, leaf_b, axes)
            for (path, leaf_a), (_, leaf_b) in zip(leaves_a, leaves_b, strict=True)
        )
    )


def _first_difference(a: Any, b: Any, path: tuple[Any, ...]) -> str | None:
    if not any(tree_util.is_tree_node(type(node)) for node in (a, b)):
        return None
    where = tree_util.keystr(path) or "the root"
    if type(a) is not type(b):
        return f"at {where} a is of type {type(a).__name__}, b of type {type(b).__name__}"
    children_a, children_b = _children(a), _children(b)
    for key, child in children_a.items():
        if key not in children_b:
            return f"only a has {tree_util.keystr(path + key)}"
        if difference := _first_difference(child, children_b[key], path + key):
            return difference
    for key in children_b:
        if key not in children_a:
            return f"only b has {tree_util.keystr(path + key)}"
    if tree_util.tree_structure(a) != tree_util.tree_structure(b):
        return f"at {where} the static data of a {type(a).__name__} differs"
    return None


def _children(node: Any) -> dict[tuple[Any, ...], Any]:
    return dict(tree_util.tree_leaves_with_path(node, is_leaf=lambda x: x is not node))


def _compare(path: str, leaf_a: Any, leaf_b: Any, axes: Sequence[str]) -> LeafReport:
    a, b = to_numpy(leaf_a, path), to_numpy(leaf_b, path)
    report = LeafReport(
        path, a.shape, b.shape, a.dtype.name, b.dtype.name, max(a.size, b.size), differing=0
    )
    if not report.comparable:
        return replace(report, differing=report.total)
    parts_a, parts_b = real_parts(a), real_parts(b)
    bits_a, bits_b = unsigned(parts_a), unsigned(parts_b)
    rows = np.flatnonzero((bits_a != bits_b).any(axis=1))
    report = replace(report, differing=len(rows))
    if len(rows):
        index = tuple(int(i) for i in np.unravel_index(rows[0], a.shape))
        report = replace(
            report,
            first_index=index,
            meaning=_meaning(index, axes),
            value_a=_scalar(a[index]),
            value_b=_scalar(b[index]),
            bits_a=_hex(bits_a[rows[0]], parts_a.dtype),
            bits_b=_hex(bits_b[rows[0]], parts_a.dtype),
        )
    differ = _differ_floats if is_of(parts_a, jnp.floating) else _differ_integers
    return differ(report, parts_a[rows], parts_b[rows])


def _differ_floats(report: LeafReport, a: np.ndarray, b: np.ndarray) -> LeafReport:
    bits_differ = unsigned(a) != unsigned(b)
    # float64 holds every narrower float; what is no number, or overflows, is meant to.
    with np.errstate(all="ignore"):
        x, y = a.astype(np.float64), b.astype(np.float64)
        distance = np.abs(x - y)
    finite = np.isfinite(x) & np.isfinite(y)
    nan_a, nan_b = np.isnan(x), np.isnan(y)

    def count(kind: np.ndarray) -> int:
        return int((kind & bits_differ).any(axis=1).sum())

    return replace(
        report,
        max_ulp=int(ulp_distance(a, b)[finite].max(initial=0)),
        max_abs=float(distance[finite].max(initial=0)),
        nan_only_a=count(nan_a & ~nan_b),
        nan_only_b=count(nan_b & ~nan_a),
        nan_payload=count(nan_a & nan_b),
        infinite=count(~finite & ~nan_a & ~nan_b),
        signed_zero=count((x == 0) & (y == 0)),
    )


def _differ_integers(report: LeafReport, a: np.ndarray, b: np.ndarray) -> LeafReport:
    wide = np.int64 if is_of(a, jnp.signedinteger) else np.uint64
    x, y = a.astype(wide), b.astype(wide)
    ux, uy = x.astype(np.uint64), y.astype(np.uint64)
    # Modulo 2**64, the larger minus the smaller is exact even from int64's minimum to its maximum.
    return replace(report, max_abs=int(np.where(x > y, ux - uy, uy - ux).max(initial=0)))


def _scalar(x: Any) -> Scalar:
    kinds = ((jnp.bool_, bool), (jnp.integer, int), (jnp.floating, float))
    return next((python for kind, python in kinds if is_of(x, kind)), complex)(x)


def _hex(bits: np.ndarray, dtype: np.dtype) -> str:
    digits = -(-width(dtype) // 4)
    return " ".join(f"0x{int(part):0{digits}x}" for part in bits)


def _meaning(index: tuple[int, ...], axes: Sequence[str]) -> str:
    if len(index) != len(axes):
        return f"index {index}"
    return ", ".join(f"{axis} {i}" for axis, i in zip(axes, index, strict=True))
