"""Picture of the differences of two arrays, tokens by heads, in few enough cells for a page."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import tree_util

from .bit_patterns import is_of, real_parts, ulp_distance, unsigned

# Cells of a picture at most, so that one is a PNG of about a kilobyte.
SEQUENCES, ROWS, COLUMNS = 4, 96, 64


@dataclass(frozen=True)
class Picture:
    """Differences of `b [B, S, N, H]` from `a`, in cells of some tokens and some heads.

    Attributes:
      shape: of both arrays.
      sequences: indices of the sequences shown: those with the most differing elements.
      tokens, heads: index of the first token of each row, of the first head of each column.
      share: uint8 `[sequences, rows, columns]`: of a cell's elements those that differ, in 255ths,
        rounded up, so that one differing element is seen.
      source: int64 `[sequences, rows, columns]`: where in `a` the channels lie that `b` has at the
        first token and head of a cell: an index of `[B, S, N]`, flattened; -1 for nowhere. None if
        each lies where it should or nowhere, as after an error of rounding.
      ulp: numbers of finite floats that differ, by distance: 0, 1, 2 to 3, 4 to 7, ...
    """

    shape: tuple[int, ...]
    sequences: np.ndarray
    tokens: np.ndarray
    heads: np.ndarray
    share: np.ndarray
    source: np.ndarray | None
    ulp: tuple[int, ...]

    @property
    def places(self) -> np.ndarray:
        """The index of `[B, S, N]`, flattened, of the first token and head of each cell."""
        _, S, N, _ = self.shape
        b, s, n = np.ix_(self.sequences, self.tokens, self.heads)
        return (b * S + s) * N + n


def pictures(a: Any, b: Any) -> dict[str, Picture]:
    """Picture of each pair of NumPy arrays, by path; pairs without a `picture` are left out.

    Args:
      a, b: pytrees of the same structure.
    """
    leaves_a, leaves_b = (tree_util.tree_leaves_with_path(x) for x in (a, b))
    found = {
        tree_util.keystr(path): picture(leaf_a, leaf_b)
        for (path, leaf_a), (_, leaf_b) in zip(leaves_a, leaves_b, strict=True)
    }
    return {path: x for path, x in found.items() if x is not None}


def picture(a: np.ndarray, b: np.ndarray) -> Picture | None:
    """Picture of the bits that differ; None if all are equal, or the arrays not `[B, S, N, H]`.

    Args:
      a, b: NumPy arrays of numbers.
    """
    if a.ndim != 4 or (a.shape, a.dtype) != (b.shape, b.dtype):
        return None
    bits_a, bits_b = (unsigned(real_parts(x)).reshape(*a.shape[:3], -1) for x in (a, b))
    differs = bits_a != bits_b
    if not differs.any():
        return None
    counts = differs.sum(axis=3)
    worst = np.argsort(-counts.sum(axis=(1, 2)), kind="stable")[:SEQUENCES]
    sequences, tokens, heads = (
        np.sort(worst),
        _starts(a.shape[1], ROWS),
        _starts(a.shape[2], COLUMNS),
    )
    share = _share(counts[sequences], bits_a.shape[3], tokens, heads)
    source = _source(bits_a, bits_b, np.ix_(sequences, tokens, heads))
    return Picture(a.shape, sequences, tokens, heads, share, source, _ulp_counts(a, b))


def _starts(size: int, most: int) -> np.ndarray:
    """Start indices of at most `most` parts of nearly equal size."""
    parts = min(size, most)
    return np.arange(parts) * size // parts


def _share(counts: np.ndarray, channels: int, tokens: np.ndarray, heads: np.ndarray) -> np.ndarray:
    """Differing elements of each cell in 255ths, rounded up, of `[sequences, S, N]`."""
    sums = np.add.reduceat(np.add.reduceat(counts, tokens, axis=1), heads, axis=2)
    sizes = (np.diff(x, append=n) for x, n in zip((tokens, heads), counts.shape[1:], strict=True))
    elements = np.outer(*sizes) * channels
    return -(-255 * sums // elements).astype(np.uint8)


def _source(a: np.ndarray, b: np.ndarray, cells: Any) -> np.ndarray | None:
    """`Picture.source`, of bits `[B, S, N, H]`."""
    keys, wanted = _hashed(a).ravel(), _hashed(b[cells])
    ranked = np.argsort(keys, kind="stable")
    near = np.searchsorted(keys[ranked], wanted).clip(max=keys.size - 1)
    found, own = ranked[near], np.arange(keys.size).reshape(a.shape[:3])[cells]
    # Equal channels, as of padding, stay where they are.
    found = np.where(keys[own] == wanted, own, found)
    found = np.where(keys[found] == wanted, found, -1)
    return found if ((found != own) & (found >= 0)).any() else None


def _hashed(bits: np.ndarray) -> np.ndarray:
    """Hash of the channels of each token and head; others have other hashes, but for chance."""
    weights = np.random.default_rng(0).integers(0, 2**63, bits.shape[-1], np.uint64) * 2 + 1
    return (bits.astype(np.uint64) * weights).sum(axis=-1, dtype=np.uint64)


def _ulp_counts(a: np.ndarray, b: np.ndarray) -> tuple[int, ...]:
    x, y = real_parts(a), real_parts(b)
    if not is_of(x, jnp.floating):
        return ()
    # float64 holds every narrower float.
    finite = np.isfinite(x.astype(np.float64)) & np.isfinite(y.astype(np.float64))
    chosen = finite & (unsigned(x) != unsigned(y))
    distance = ulp_distance(x[chosen], y[chosen])
    powers = np.uint64(1) << np.arange(64, dtype=np.uint64)
    return tuple(np.bincount(np.searchsorted(powers, distance, side="right")).tolist())
