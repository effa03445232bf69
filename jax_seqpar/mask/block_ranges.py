"""Ranges of a mask: the keys that a block of queries may attend to, and the queries of keys.

Kernels skip the tokens outside of a range. A range may be too wide, and never too narrow: mask
arrays are not read, and of segments and positions only the least and the greatest of a block.
Inside of a second range, of partners that meet every token of the block, kernels evaluate no mask:
the second range may be too narrow, and never too wide.
"""

from collections.abc import Iterator
from functools import reduce
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .mask import Mask
from .token_numbers import AnyTokens, Tokens, places


def keys_of(mask: Mask, queries: AnyTokens, keys: AnyTokens) -> tuple[Array, Array]:
    """Half-open range of `keys`, counted from their first, that some query may attend to."""
    return _partners(mask, "queries", queries, keys)


def queries_of(mask: Mask, keys: AnyTokens, queries: AnyTokens) -> tuple[Array, Array]:
    """Half-open range of `queries`, counted from their first, that may attend to some key."""
    return _partners(mask, "keys", keys, queries)


def common_keys(mask: Mask, queries: AnyTokens, keys: AnyTokens) -> tuple[Array, Array]:
    """Half-open range of `keys`, counted from their first, that every query attends to."""
    return _common_partners(mask, "queries", queries, keys)


def common_queries(mask: Mask, keys: AnyTokens, queries: AnyTokens) -> tuple[Array, Array]:
    """Half-open range of `queries`, counted from their first, that attend to every key."""
    return _common_partners(mask, "keys", keys, queries)


def pairs_in_reach(mask: Mask, queries: int, keys: int) -> int:
    """Number of pairs of a query and a key that causality and window leave; all with positions."""
    before, after = (None, None) if mask.positions is not None else mask.reach
    numbers = np.arange(queries, dtype=np.int64) + mask.query_offset
    low = np.zeros_like(numbers) if before is None else numbers - before
    high = np.full_like(numbers, keys) if after is None else numbers + after + 1
    low, high = np.clip(low, 0, keys), np.clip(high, 0, keys)
    return int(np.maximum(high - low, 0).sum())


def _common_partners(
    mask: Mask, side: Literal["queries", "keys"], block: AnyTokens, partners: AnyTokens
) -> tuple[Array, Array]:
    """Half-open range of `partners` that meet every token of a block of queries or keys.

    Args:
      side: "queries" or "keys" of the block; partners are of the other side.
    """
    low, high = partners.bounds
    conditions = []
    if mask.array is not None:
        high = low
    before, after = _reach_of(mask, side)
    if mask.positions is None:
        offset = mask.query_offset if side == "queries" else -mask.query_offset
        first, end = (bound + offset for bound in block.bounds)
        low = low if before is None else jnp.maximum(low, end - 1 - before)
        high = high if after is None else jnp.minimum(high, first + after + 1)
    else:
        positions = tuple(x.astype(jnp.int32) for x in mask.positions)
        of_block, of_partners = _of_sides(positions, side, block, partners)
        if before is not None:
            conditions.append(of_partners >= of_block.max(1, keepdims=True) - before)
        if after is not None:
            conditions.append(of_partners <= of_block.min(1, keepdims=True) + after)
    own, others = mask.query_seq_lengths, mask.key_value_seq_lengths
    if side == "keys":
        own, others = others, own
    if others is not None:
        high = jnp.minimum(high, others.min().astype(jnp.int32))
    if own is not None:
        high = jnp.where(block.bounds[1] <= own.min(), high, low)
    if mask.segment_ids is not None:
        of_block, of_partners = _of_sides(mask.segment_ids, side, block, partners)
        conditions.append(of_partners == of_block.min(1, keepdims=True))
        conditions.append(of_partners == of_block.max(1, keepdims=True))
    if isinstance(partners, Tokens):
        low, high = partners.within(low, high)
    else:
        conditions.append(((partners.numbers >= low) & (partners.numbers < high))[None])
        low, high = 0, partners.size
    if conditions:
        meets = reduce(jnp.logical_and, conditions).all(0)
        numbers = jnp.arange(partners.size, dtype=jnp.int32)
        meets = jnp.broadcast_to(meets, partners.size) & (numbers >= low) & (numbers < high)
        low, _ = places(meets)
        high, _ = places(~meets & (numbers >= low))
    low, high = (jnp.clip(bound, 0, partners.size) for bound in (low, high))
    return jnp.minimum(low, high), high


def _partners(
    mask: Mask, side: Literal["queries", "keys"], block: AnyTokens, partners: AnyTokens
) -> tuple[Array, Array]:
    """Half-open range of `partners` that may meet some token of a block of queries or keys.

    Args:
      side: "queries" or "keys" of the block; partners are of the other side.
    """
    low, high = _reachable(mask, side, block, partners)
    own, others = (mask.query_seq_lengths, mask.key_value_seq_lengths)
    if side == "keys":
        own, others = others, own
    if others is not None:
        high = jnp.minimum(high, others.max().astype(jnp.int32))
    if own is not None:
        high = jnp.where(block.bounds[0] < own.max(), high, 0)
    low, high = partners.within(low, high)
    conditions = [*_near_positions(mask, side, block, partners)]
    if mask.segment_ids is not None:
        of_block, of_partners = _of_sides(mask.segment_ids, side, block, partners)
        conditions.append(of_partners >= of_block.min(1, keepdims=True))
        conditions.append(of_partners <= of_block.max(1, keepdims=True))
    if conditions:
        allowed = reduce(jnp.logical_and, conditions).any(0)
        first, last = places(jnp.broadcast_to(allowed, partners.size))
        low, high = jnp.maximum(low, first), jnp.minimum(high, last)
    low, high = (jnp.clip(bound, 0, partners.size) for bound in (low, high))
    return jnp.minimum(low, high), high


def _reach_of(mask: Mask, side: str) -> tuple[int | None, int | None]:
    """How far a query, or a key, sees before and after its position."""
    before, after = mask.reach
    return (before, after) if side == "queries" else (after, before)


def _reachable(mask: Mask, side: str, block: AnyTokens, partners: AnyTokens) -> tuple[Any, Any]:
    """The range by causality and window, where positions follow the order of the tokens."""
    if mask.positions is not None:
        return partners.bounds
    low, high = partners.bounds
    before, after = _reach_of(mask, side)
    # A query's own position, in the numbers of the keys; and a key's in those of the queries.
    offset = mask.query_offset if side == "queries" else -mask.query_offset
    first, end = (bound + offset for bound in block.bounds)
    return (
        low if before is None else first - before,
        high if after is None else end + after,
    )


def _near_positions(
    mask: Mask, side: str, block: AnyTokens, partners: AnyTokens
) -> Iterator[Array]:
    """Partners within reach of the block's least and largest `positions`, `[B, partners.size]`."""
    if mask.positions is None:
        return
    before, after = _reach_of(mask, side)
    positions = tuple(x.astype(jnp.int32) for x in mask.positions)
    of_block, of_partners = _of_sides(positions, side, block, partners)
    if before is not None:
        yield of_partners >= of_block.min(1, keepdims=True) - before
    if after is not None:
        yield of_partners <= of_block.max(1, keepdims=True) + after


def _of_sides(
    pair: tuple[Array, ...], side: str, block: AnyTokens, partners: AnyTokens
) -> tuple[Array, Array]:
    """Slices of a pair of arrays for queries and keys: the block's tokens, the partners' tokens."""
    of_queries, of_keys = pair
    own, others = (of_queries, of_keys) if side == "queries" else (of_keys, of_queries)
    return block.slice(own, 1), partners.slice(others, 1)
