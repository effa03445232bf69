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

from .numpy_conversion import check_leaf, torch_to_numpy
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
      ValueError: if the structures differ, naming the first path that does; if there is no array.
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
    a, b = _to_numpy(leaf_a, path), _to_numpy(leaf_b, path)
    report = LeafReport(
        path, a.shape, b.shape, a.dtype.name, b.dtype.name, max(a.size, b.size), differing=0
    )
    if not report.comparable:
        return replace(report, differing=report.total)
    parts_a, parts_b = _parts(a), _parts(b)
    bits_a, bits_b = _unsigned(parts_a), _unsigned(parts_b)
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
    differ = _differ_floats if _is(parts_a, jnp.floating) else _differ_integers
    return differ(report, parts_a[rows], parts_b[rows])


def _differ_floats(report: LeafReport, a: np.ndarray, b: np.ndarray) -> LeafReport:
    bits_differ = _unsigned(a) != _unsigned(b)
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
        max_ulp=int(_ulp_distance(a, b)[finite].max(initial=0)),
        max_abs=float(distance[finite].max(initial=0)),
        nan_only_a=count(nan_a & ~nan_b),
        nan_only_b=count(nan_b & ~nan_a),
        nan_payload=count(nan_a & nan_b),
        infinite=count(~finite & ~nan_a & ~nan_b),
        signed_zero=count((x == 0) & (y == 0)),
    )


def _differ_integers(report: LeafReport, a: np.ndarray, b: np.ndarray) -> LeafReport:
    wide = np.int64 if _is(a, jnp.signedinteger) else np.uint64
    x, y = a.astype(wide), b.astype(wide)
    ux, uy = x.astype(np.uint64), y.astype(np.uint64)
    # Modulo 2**64, the larger minus the smaller is exact even from int64's minimum to its maximum.
    return replace(report, max_abs=int(np.where(x > y, ux - uy, uy - ux).max(initial=0)))


def _ulp_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Distance of finite floats along the line on which a float's bits are sign and magnitude."""
    sign = 1 << (_width(a.dtype) - 1)
    if float(jnp.finfo(a.dtype).min) > 0:  # float8_e8m0fnu is an exponent without a sign
        sign <<= 1
    x, y = _unsigned(a).astype(np.uint64), _unsigned(b).astype(np.uint64)
    magnitude_x, magnitude_y = x & (sign - 1), y & (sign - 1)
    same_side = np.maximum(magnitude_x, magnitude_y) - np.minimum(magnitude_x, magnitude_y)
    # Two magnitudes below 2**63 add up without overflow.
    return np.where((x ^ y) & sign, magnitude_x + magnitude_y, same_side)


def _to_numpy(x: Any, path: str) -> np.ndarray:
    check_leaf(x, path or "the leaf")
    # Only tensors have it, and PyTorch need not be there.
    array = torch_to_numpy(x) if hasattr(x, "detach") else np.asarray(x)
    numbers = (jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating)
    width = array.dtype.itemsize // (2 if _is(array, jnp.complexfloating) else 1)
    if width > 8 or not any(_is(array, kind) for kind in numbers):
        raise TypeError(
            f"{path or 'the leaf'} must be an array of numbers of at most 64 bits, got "
            f"{type(x).__name__} of dtype {array.dtype}. Leave it out of both trees."
        )
    if not array.dtype.isnative:
        array = array.byteswap().view(array.dtype.newbyteorder("="))
    return array


def _parts(x: np.ndarray) -> np.ndarray:
    """`[elements, 1]`, or `[elements, 2]` real numbers of a complex array."""
    flat = np.ravel(x)
    if _is(x, jnp.complexfloating):
        return flat.view(f"f{x.dtype.itemsize // 2}").reshape(-1, 2)
    return flat.reshape(-1, 1)


def _unsigned(x: np.ndarray) -> np.ndarray:
    bits = x.view(f"u{x.dtype.itemsize}")
    unused = 8 * x.dtype.itemsize - _width(x.dtype)  # an int4 lies in the low half of a byte
    return bits & ((1 << _width(x.dtype)) - 1) if unused else bits


def _width(dtype: np.dtype) -> int:
    if dtype == np.bool_:
        return 8
    return (jnp.finfo if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo)(dtype).bits


def _is(x: Any, kind: Any) -> bool:
    return jnp.issubdtype(x.dtype, kind)


def _scalar(x: Any) -> Scalar:
    kinds = ((jnp.bool_, bool), (jnp.integer, int), (jnp.floating, float))
    return next((python for kind, python in kinds if _is(x, kind)), complex)(x)


def _hex(bits: np.ndarray, dtype: np.dtype) -> str:
    digits = -(-_width(dtype) // 4)
    return " ".join(f"0x{int(part):0{digits}x}" for part in bits)


def _meaning(index: tuple[int, ...], axes: Sequence[str]) -> str:
    if len(index) != len(axes):
        return f"index {index}"
    return ", ".join(f"{axis} {i}" for axis, i in zip(axes, index, strict=True))
