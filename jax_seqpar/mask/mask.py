"""Mask: which query attends to which key, in positions of the whole sequence."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import reduce
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Integer, Shaped

from .._checks import as_boolean
from .array_fields import AnyArray, array_field, pair_field, python_number, register, written
from .token_numbers import AnyTokens

# (left, right); None and -1 are an open side, one integer stands for both sides.
Window = int | Sequence[int | None]
# One array for queries and keys, or a pair of them.
PerToken = Integer[Array, "B S"] | tuple[Integer[Array, "B T"], Integer[Array, "B S"]]

# Distances are clipped here, so that a float32 slope times a distance is exact in float64.
MOST_DISTANT = 1 << 29
# An open side of a window: a larger number plus a position below 2^30 would overflow int32.
OPEN = 1 << 30


@register
@dataclass(frozen=True, repr=False)
class Mask:
    """Attention mask: the conjunction of everything given.

    A query has the position `query_offset + t`, a key the position s, unless `positions` says
    otherwise: without an offset the causal diagonal starts in the top left corner, as in `jax.nn`
    and PyTorch; with `query_offset=S - T` it ends in the bottom right one, as in FlashAttention.

    Args:
      is_causal: keys at or before the query's position.
      query_offset: the position of the first query.
      local_window_size: positions from `left` before the query's to `right` after it; one integer
        stands for both sides, None or -1 opens a side. W tokens with the query's own, as
        `sliding_window=W` elsewhere, are `(W - 1, 0)`.
      array: True attends; each axis that of `[B, N, T, S]` or 1.
      query_seq_lengths: `[B]`; queries `t < length`.
      key_value_seq_lengths: `[B]`; keys `s < length`.
      positions: `[B, S]`, or a pair `[B, T]`, `[B, S]`, in place of the positions above, below 2^30
        in size; causality, window and ALiBi go by them.
      segment_ids: `[B, S]`, or a pair `[B, T]`, `[B, S]`; a query attends to the keys of the same
        segment.

    Example:
      Each query attends to itself and to the key before it. `jax_seqpar.mask.picture.draw` has a
      line for two queries: █ is a key of both, ▒ of one, · of none.

      >>> print(draw(Mask(is_causal=True, local_window_size=(1, 0)), 4, 4))
      █▒··
      ·▒█▒
    """

    is_causal: bool = False
    query_offset: int = 0
    local_window_size: Window | None = None
    array: Bool[AnyArray, "..."] | None = array_field("batch", "heads", "queries", "keys")
    query_seq_lengths: Integer[AnyArray, "B"] | None = array_field("batch")
    key_value_seq_lengths: Integer[AnyArray, "B"] | None = array_field("batch")
    positions: Any = pair_field(("batch", "queries"), ("batch", "keys"))
    segment_ids: Any = pair_field(("batch", "queries"), ("batch", "keys"))

    def __repr__(self) -> str:
        return written(self)

    def __post_init__(self) -> None:
        for f in fields(self):
            if "axes" not in f.metadata:
                object.__setattr__(self, f.name, python_number(getattr(self, f.name)))
        object.__setattr__(self, "local_window_size", _sides(self.local_window_size))
        for name in ("positions", "segment_ids"):
            object.__setattr__(self, name, _pair(getattr(self, name)))
        self._check_options()

    def __and__(self, other: "Mask") -> "Mask":
        """Mask of the pairs that both masks allow.

        Raises:
          ValueError: for two segment ids, or causality and windows that go by two offsets or two
            positions, of which an attention has one; and for arrays that no attention takes.
        """
        if not isinstance(other, Mask):
            return NotImplemented
        check_mask_arrays(self)
        check_mask_arrays(other)
        both: dict[str, Any] = {"is_causal": self.is_causal or other.is_causal}
        # The offset and positions of a mask that does not depend on them are ignored.
        placed = [mask for mask in (self, other) if mask._goes_by_positions]
        for name in ("query_offset", "positions"):
            given = [getattr(mask, name) for mask in placed]
            if len(given) == 2 and not _same(*given):
                raise _have_two(name, self, other)
            both[name] = given[0] if given else (0 if name == "query_offset" else None)
        given = [x for x in (self.segment_ids, other.segment_ids) if x is not None]
        if len(given) == 2 and not _same(*given):
            raise _have_two("segment_ids", self, other)
        both["segment_ids"] = given[0] if given else None
        for name, join in (
            ("array", jnp.logical_and),
            ("query_seq_lengths", _shorter),
            ("key_value_seq_lengths", _shorter),
        ):
            given = [x for x in (getattr(self, name), getattr(other, name)) if x is not None]
            both[name] = join(*given) if len(given) == 2 else given[0] if given else None
        windows = [mask.window for mask in (self, other) if mask.window is not None]
        if windows:
            both["local_window_size"] = tuple(map(min, zip(*windows, strict=True)))
        return Mask(**both)

    @property
    def window(self) -> tuple[int, int] | None:
        """`(left, right)` of the window; None without one."""
        if self.local_window_size is None:
            return None
        size: Any = self.local_window_size
        left, right = size if isinstance(size, tuple) else (size, size)
        return min(left, OPEN), min(right, OPEN)

    @property
    def _goes_by_positions(self) -> bool:
        """Whether the mask depends on the positions of tokens, or sets those that ALiBi uses."""
        says_where = self.query_offset != 0 or self.positions is not None
        return says_where or self.is_causal or self.window is not None

    @property
    def reach(self) -> tuple[int | None, int | None]:
        """Reach of a query before and after its position; None without limit."""
        before, after = self.window or (OPEN, OPEN)
        after = 0 if self.is_causal else after
        return None if before == OPEN else before, None if after == OPEN else after

    def attends(self, queries: AnyTokens, keys: AnyTokens) -> Bool[Array, "..."] | None:
        """True where a query may attend to a key; None where all may.

        Broadcastable to `[B, N, queries.size, keys.size]`.
        """
        conditions = []
        if self.array is not None:
            conditions.append(keys.slice(queries.slice(self.array, 2), 3))
        t, s = self._positions(queries, keys)
        if self.is_causal:
            conditions.append(s <= t)
        if self.window is not None:
            left, right = self.window
            # No number is large enough for an open side: positions may be 2^31 apart.
            if left < OPEN:
                conditions.append(t - left <= s)
            if right < OPEN:
                conditions.append(s <= t + right)
        if self.query_seq_lengths is not None:
            numbers = queries.numbers[None, None, :, None]
            conditions.append(numbers < _per_sequence(self.query_seq_lengths))
        if self.key_value_seq_lengths is not None:
            numbers = keys.numbers[None, None, None, :]
            conditions.append(numbers < _per_sequence(self.key_value_seq_lengths))
        if self.segment_ids is not None:
            query_ids, key_ids = self.segment_ids
            query_ids, key_ids = queries.slice(query_ids, 1), keys.slice(key_ids, 1)
            conditions.append(query_ids[:, None, :, None] == key_ids[:, None, None, :])
        if not conditions:
            return None
        return reduce(jnp.logical_and, conditions)

    def distance(self, queries: AnyTokens, keys: AnyTokens) -> Int[Array, "..."]:
        """Distance of the positions of queries and keys, at most `MOST_DISTANT`."""
        t, s = self._positions(queries, keys)
        return jnp.minimum(jnp.abs(t - s), MOST_DISTANT)

    def _check_options(self) -> None:
        """Raises ValueError unless the options are plain Python values in range."""
        if not isinstance(self.is_causal, bool):
            raise ValueError(
                f"is_causal must be Python's True or False, got {self.is_causal!r}. Under jax.jit "
                f"name it in static_argnames; choose between two calls with jax.lax.cond if it is "
                f"an array."
            )
        offset, window = self.query_offset, self.local_window_size
        if type(offset) is not int or abs(offset) >= 1 << 29:
            raise ValueError(
                f"query_offset must be a Python integer below 2^29, got {offset!r}. Write "
                f"int(...), or give positions= if it is an array."
            )
        if window is None:
            return
        sizes = window if isinstance(window, tuple) else (window,) * 2
        if len(sizes) != 2 or not all(type(n) is int and n >= 0 for n in sizes):
            raise ValueError(
                f"local_window_size must be one Python integer or a tuple (left, right), none "
                f"negative, got {window!r}. (255, 0) is a query and the 255 keys before it; write "
                f"None or -1 to leave a side open."
            )

    def _positions(self, queries: AnyTokens, keys: AnyTokens) -> tuple[Array, Array]:
        """`[B, 1, t, 1]` and `[B, 1, 1, s]`; B is 1 where all sequences have the same."""
        if self.positions is not None:
            t, s = self.positions
            t, s = queries.slice(t, 1).astype(jnp.int32), keys.slice(s, 1).astype(jnp.int32)
        else:
            t, s = (queries.numbers + self.query_offset)[None], keys.numbers[None]
        return t[:, None, :, None], s[:, None, None, :]


def _pair(x: Any) -> Any:
    """Arrays of queries and keys, where one array stands for both. Lists are refused later."""
    return x if x is None or isinstance(x, tuple | list) else (x, x)


def _sides(window: Any) -> Any:
    """A window with `OPEN` for its open sides; None if both are."""
    sides = tuple(map(python_number, window)) if isinstance(window, list | tuple) else window
    both = sides if isinstance(sides, tuple) else (sides, sides)
    limits = tuple(OPEN if n is None or (type(n) is int and n == -1) else n for n in both)
    if all(type(n) is int and n == OPEN for n in limits) and len(limits) == 2:
        return None
    return limits if isinstance(sides, tuple) else sides


def int32_lengths(lengths: Any) -> Any:
    """Lengths as int32; longer ones become its largest number, longer than any sequence."""
    xp: Any = np if isinstance(lengths, np.ndarray) else jnp
    limits = np.iinfo(np.int32)
    if lengths.dtype.itemsize >= 4 and lengths.dtype != np.int32:
        lengths = xp.minimum(lengths, limits.max)
        if lengths.dtype.kind == "i":
            lengths = xp.maximum(lengths, limits.min)
    return lengths.astype(np.int32)


def _have_two(name: str, a: Mask, b: Mask) -> ValueError:
    return ValueError(
        f"{a} & {b} have two {name}. Write one Mask with the {name} of both, segments as numbers "
        f"of their own for every pair of documents."
    )


def check_mask_arrays(mask: Mask) -> None:
    """Raises ValueError for arrays of a dtype or of axes that no attention takes."""
    x = mask.array
    if x is not None and x.dtype != bool:
        raise ValueError(
            f"{mask} has an array that is not boolean; write {as_boolean('array', x.dtype)}."
        )
    if x is not None and len(x.shape) != 4:
        raise ValueError(
            f"{mask} has an array that is not [B, N, T, S], each axis that or 1. Write "
            f"array[None] for an axis that it lacks."
        )
    for name in ("query_seq_lengths", "key_value_seq_lengths"):
        x = getattr(mask, name)
        if x is not None and (not jnp.issubdtype(x.dtype, jnp.integer) or len(x.shape) != 1):
            raise ValueError(
                f"{mask} has {name} that are not integers [B]. Write {name}.astype(jnp.int32)."
            )


def _shorter(a: Any, b: Any) -> Array:
    return jnp.minimum(int32_lengths(a), int32_lengths(b))


def _same(a: Any, b: Any) -> bool:
    """Whether two options are equal, or two arrays, or pairs of them, are the same object."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        return all(x is y for x, y in zip(a, b, strict=True))
    return a is b or (isinstance(a, int) and isinstance(b, int) and a == b)


def _per_sequence(lengths: Shaped[Array, "B"]) -> Int[Array, "B 1 1 1"]:
    return lengths.astype(jnp.int32)[:, None, None, None]
