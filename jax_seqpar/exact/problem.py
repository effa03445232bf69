"""The attention of one KV head, block by block: operands on their grids, logits, loops.

No bit depends on the blocks: sums are exact, and what two blocks both write is the same.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ..mask import Mask, Spec, Tokens
from ..mask.tokens import for_blocks
from ..mask.tokens import full as full_like
from .arithmetic import flush, left_digits, pinned, right_on_grid, round32, sum_dtype
from .elementary import exp, soft_cap, soft_cap_slope
from .kv_replicas import SharedHeads

# Chunks at a time in the loop inside, which holds no more than that of a row or column.
INNER = 4


@dataclass(frozen=True)
class Options:
    """Static options: tiling, which changes no bit of the result, and who shares the KV head."""

    shared_heads: SharedHeads | None
    query_chunk: int
    key_chunk: int
    sum_limit: int


@dataclass(frozen=True)
class Problem:
    """One sequence, one KV head and its G query heads; float64, flushed.

    Attributes:
      spec: of one sequence and G heads; its scale and soft cap are values of float32.
      query: `[G, T, H]`.
      key, value: `[S, H]`, `[S, V]`.
      query_digits, key_on_grid: the same as operands of dot products, `[2, G, T, H]`, `[S, H]`.
    """

    options: Options
    spec: Spec
    query: Array
    key: Array
    value: Array
    query_digits: Array
    key_on_grid: Array

    @classmethod
    def of(cls, options: Options, spec: Spec, query: Any, key: Any, value: Any):
        q, k, v = map(flush, (query, key, value))
        return cls(options, spec, q, k, v, left_digits(q), right_on_grid(k))

    def logits(self, queries: Tokens, keys: Tokens) -> Array:
        """`[G, t, s]`; -inf where a query may not attend."""
        z = self._scaled_dots(queries, keys)
        cap = self.spec.logits.soft_cap
        if cap is not None:
            z = soft_cap(z, cap)
        terms = self.spec.terms(queries, keys)
        if terms.bias is not None:
            z = pinned(z + flush(terms.bias)[0])
        if terms.alibi_slopes is not None:
            # Exact: a float32 times less than 2^30.
            z = pinned(z - (flush(terms.alibi_slopes) * terms.distance.astype(jnp.float64))[0])
        return z if terms.allowed is None else jnp.where(terms.allowed[0], z, -jnp.inf)

    def through_soft_cap(self, gradient: Array, queries: Tokens, keys: Tokens) -> Array:
        """The gradient of the logits before the soft cap, from that after it."""
        cap = self.spec.logits.soft_cap
        if cap is None:
            return gradient
        return gradient * soft_cap_slope(self._scaled_dots(queries, keys), cap)

    def kept(self, x: Array, queries: Tokens, keys: Tokens) -> Array:
        """`[G, t, s]` with 0 where dropout drops the weight."""
        keep = self.spec.keep(queries, keys)
        return x if keep is None else jnp.where(keep[0], x, 0)

    @property
    def scale(self) -> float:
        scale = self.spec.logits.scale
        assert scale is not None
        return scale

    @property
    def kept_scale(self) -> float:
        """`c`: what dropout multiplies the weights by that it keeps."""
        return self.spec.dropout.inverse_keep_probability

    @property
    def sinks(self) -> Array | None:
        """`[G, 1, 1]`."""
        sinks = self.spec.logits.sinks
        return None if sinks is None else flush(sinks)[:, None, None]

    def _scaled_dots(self, queries: Tokens, keys: Tokens) -> Array:
        q, k = queries.slice(self.query_digits, 2), keys.slice(self.key_on_grid, 0)
        return round32(dots(q, k)).astype(jnp.float64) * self.scale

    def for_queries(self, body: Callable[..., Any], carry: Any, keys: Tokens | None = None) -> Any:
        """A loop over the blocks of queries, all of them or those that see some of the keys."""
        T, size = self.query.shape[1], self.options.query_chunk
        if keys is None:
            return for_blocks(T, size, (0, T), body, carry)
        bounds = self.spec.queries_of(keys, T)
        return for_blocks(T, min(T, INNER * size), bounds, body, carry)

    def for_keys(self, body: Callable[..., Any], carry: Any, queries: Tokens | None = None) -> Any:
        """A loop over the blocks of keys, all of them or those that some of the queries see."""
        S, size = self.key.shape[0], self.options.key_chunk
        if queries is None:
            return for_blocks(S, size, (0, S), body, carry)
        bounds = self.spec.keys_of(queries, S)
        return for_blocks(S, min(S, INNER * size), bounds, body, carry)

    def full(self, *shape: int, value: float | int = 0, dtype: Any = jnp.float64) -> Array:
        """A constant that varies over the mesh as the operands do, to start a loop with."""
        operands = (self.query, self.key, self.value, self.spec)
        return full_like(shape, value, dtype, operands)

    def no_sums(self, *shape: int, tokens: int) -> Array:
        """Sums of digits `[..., 3H]` before the first of so many tokens is added."""
        dtype = sum_dtype(tokens, self.options.sum_limit)
        return self.full(*shape[:-1], 3 * shape[-1], dtype=dtype)


def without_unread_keys(mask: Mask, query: Array, key: Array, value: Array) -> tuple[Array, Array]:
    """Key and value, with 0 for the tokens that lengths and segments hide from every query."""
    # All the queries of the sequence, of which the kernel may have a part.
    T = query.shape[1] if mask.segment_ids is None else mask.segment_ids[0].shape[1]
    queries, keys = (Tokens(0, n).numbers for n in (T, key.shape[1]))
    lengths = (mask.query_seq_lengths, mask.key_value_seq_lengths)
    attending, attended = (
        None if x is None else tokens < x.astype(jnp.int32)[:, None]
        for x, tokens in zip(lengths, (queries[None], keys[None]), strict=True)
    )
    conditions = []
    if attended is not None:
        conditions.append(attended)
    if attending is not None:
        conditions.append(attending[:, :1])
    if mask.segment_ids is not None:
        of_query, of_key = mask.segment_ids
        if attending is not None:
            # The ids of the first query are there anyway, if any query attends.
            of_query = jnp.where(attending, of_query, of_query[:, :1])
        # Sorted, as T * S comparisons of a long sequence would take longer.
        conditions.append(jax.vmap(partial(jnp.isin, method="sort"))(of_key, of_query))
    for condition in conditions:
        read = condition[:, :, None, None]
        key, value = jnp.where(read, key, 0), jnp.where(read, value, 0)
    return key, value


def dots(queries: Array, keys: Array) -> Array:
    """`[2, G, t, H] x [s, H] -> [G, t, s]`: a left and a right operand."""
    high, low = jnp.einsum("DGTH,SH->DGTS", queries, keys)
    return high + low


def mask_overlap(x: Array, fresh: Array | None, axis: int) -> Array:
    """`[G, t, s]` with 0 for tokens that the previous, overlapping block has covered already."""
    if fresh is None:
        return x
    return jnp.where(jnp.expand_dims(fresh, [i for i in range(3) if i != axis]), x, 0)


def weights_of(logits: Array, top: Array) -> Array:
    """`p`: exp(logits - top) correctly rounded to float32; 0 where a logit is -inf."""
    p = exp(round32(logits - top))
    return jnp.where(logits == -jnp.inf, jnp.float32(0), p)
