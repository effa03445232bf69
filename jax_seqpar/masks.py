"""Which query attends to which key, in global token positions.

Under Ulysses a device sees whole sequences, so nothing here knows of devices or offsets.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped

Window = int | tuple[int, int]
# Of queries and keys; one array is for both.
SegmentIds = Int[Array, "B S"] | tuple[Int[Array, "B T"], Int[Array, "B S"]]


class Block(NamedTuple):
    """Tokens `start ... start + size`; start may be traced."""

    start: int | Int[Array, ""]
    size: int

    @property
    def tokens(self) -> Int[Array, "size"]:
        # One dtype, whether the caller has switched 64 bits on or not.
        return jnp.asarray(self.start, jnp.int32) + jnp.arange(self.size, dtype=jnp.int32)

    def of(self, x: Shaped[Array, "..."], axis: int) -> Shaped[Array, "..."]:
        """These tokens of an array; all of an axis of size 1, which stands for every token."""
        if x.shape[axis] == 1:
            return x
        return jax.lax.dynamic_slice_in_dim(x, self.start, self.size, axis)


@dataclass(frozen=True)
class Masks:
    """What attends to what: the conjunction of everything given.

    Position t of the queries and position s of the keys both count from 0, so with T != S the
    causal diagonal starts in the top left corner, as in `jax.nn` and PyTorch.

    Attributes:
      mask: True attends; 4-D, each axis that of `[B, N, T, S]` or 1.
      is_causal: keys `s <= t`.
      query_seq_lengths: queries `t < length`, per batch entry.
      key_value_seq_lengths: keys `s < length`, per batch entry.
      local_window_size: keys `t - left <= s <= t + right`; one integer means both.
      segment_ids: a query attends to the keys of its own segment: `[B, S]`, or a pair `[B, T]`,
        `[B, S]`.
    """

    mask: Bool[Array, "..."] | None = None
    is_causal: bool = False
    query_seq_lengths: Int[Array, "B"] | None = None
    key_value_seq_lengths: Int[Array, "B"] | None = None
    local_window_size: Window | None = None
    segment_ids: SegmentIds | None = None

    def attends(self, queries: Block, keys: Block) -> Bool[Array, "..."] | None:
        """True where a query of a block may attend to a key of a block; None where all may.

        Broadcastable to `[B, N, queries.size, keys.size]`.
        """
        t, s = queries.tokens[:, None], keys.tokens[None, :]
        conditions = [] if self.mask is None else [keys.of(queries.of(self.mask, 2), 3)]
        if self.is_causal:
            conditions.append((s <= t)[None, None])
        if self.local_window_size is not None:
            left, right = window(self.local_window_size)
            conditions.append(((t - left <= s) & (s <= t + right))[None, None])
        if self.query_seq_lengths is not None:
            conditions.append(t[None, None] < _per_sequence(self.query_seq_lengths))
        if self.key_value_seq_lengths is not None:
            conditions.append(s[None, None] < _per_sequence(self.key_value_seq_lengths))
        if self.segment_ids is not None:
            pair = self.segment_ids
            of_query, of_key = pair if isinstance(pair, tuple) else (pair, pair)
            of_query, of_key = queries.of(of_query, 1), keys.of(of_key, 1)
            conditions.append(of_query[:, None, :, None] == of_key[:, None, None, :])
        if not conditions:
            return None
        allowed, *rest = conditions
        for condition in rest:
            allowed = allowed & condition
        return allowed

    def keys_of(self, queries: Block, key_tokens: int) -> tuple[Array, Array]:
        """First key, and one past the last, that causality and window leave to some query."""
        left, right = self._reach()
        return _around(queries, left, right, key_tokens)

    def queries_of(self, keys: Block, query_tokens: int) -> tuple[Array, Array]:
        """First query, and one past the last, that causality and window leave to some key."""
        left, right = self._reach()
        return _around(keys, right, left, query_tokens)

    def _reach(self) -> tuple[int | None, int | None]:
        """How far a query sees to the left and to the right; None without limit."""
        left = right = None
        if self.local_window_size is not None:
            left, right = window(self.local_window_size)
        if self.is_causal:
            right = 0
        return left, right


def _per_sequence(lengths: Int[Array, "B"]) -> Int[Array, "B 1 1 1"]:
    return lengths.astype(jnp.int32)[:, None, None, None]


def _around(
    block: Block, before: int | None, after: int | None, tokens: int
) -> tuple[Array, Array]:
    """The tokens at most so far from one of a block; None without limit."""
    low = 0 if before is None else block.start - before
    high = tokens if after is None else block.start + block.size + after
    return jnp.clip(low, 0, tokens), jnp.clip(high, 0, tokens)


def window(local_window_size: Window) -> tuple[int, int]:
    """`(left, right)` of a window given as one integer or two."""
    pair = local_window_size if isinstance(local_window_size, tuple) else (local_window_size,) * 2
    left, right = (min(n, 1 << 30) for n in pair)  # more would leave int32 when a token is added
    return left, right
