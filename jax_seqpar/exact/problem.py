"""The attention of one KV head, block by block: operands on their grids, logits, loops.

No bit depends on the blocks: sums are exact, and what two blocks both write is the same.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ..masks import Block, Masks, Window
from ..shared_heads import SharedHeads
from .arithmetic import flush, left_digits, pinned, right_on_grid, round32, sum_dtype
from .elementary import exp, soft_cap, soft_cap_slope

# Chunks at a time in the loop inside, which holds no more than that of a row or column.
INNER = 4


@dataclass(frozen=True)
class Options:
    """What is known before any number is: part of the compiled program."""

    scale: float
    logits_soft_cap: float | None
    is_causal: bool
    local_window_size: Window | None
    shared_heads: SharedHeads | None
    query_chunk: int
    key_chunk: int
    sum_limit: int


@dataclass(frozen=True)
class Problem:
    """One sequence, one KV head and its G query heads; float64, flushed.

    Attributes:
      masks: arrays for a batch of one.
      bias: `[1, G, T, S]`, any axis 1; or None.
      query: `[G, T, H]`.
      key, value: `[S, H]`.
      query_digits, key_on_grid: the same as operands of dot products, `[2, G, T, H]`, `[S, H]`.
    """

    options: Options
    masks: Masks
    bias: Array | None
    query: Array
    key: Array
    value: Array
    query_digits: Array
    key_on_grid: Array

    @classmethod
    def of(cls, options: Options, query: Any, key: Any, value: Any, bias: Any, arrays: Any):
        masks = Masks(
            **arrays, is_causal=options.is_causal, local_window_size=options.local_window_size
        )
        q, k, v = map(flush, (query, key, value))
        bias = None if bias is None else flush(bias)
        return cls(options, masks, bias, q, k, v, left_digits(q), right_on_grid(k))

    def logits(self, queries: Block, keys: Block) -> Array:
        """`[G, t, s]`; -inf where a query may not attend."""
        z = self._scaled_dots(queries, keys)
        if self.options.logits_soft_cap is not None:
            z = soft_cap(z, self.options.logits_soft_cap)
        if self.bias is not None:
            z = pinned(z + keys.of(queries.of(self.bias, 2), 3)[0])
        allowed = self.masks.attends(queries, keys)
        return z if allowed is None else jnp.where(allowed[0], z, -jnp.inf)

    def through_soft_cap(self, gradient: Array, queries: Block, keys: Block) -> Array:
        """The gradient of the logits before the soft cap, from that after it."""
        if self.options.logits_soft_cap is None:
            return gradient
        z = self._scaled_dots(queries, keys)
        return gradient * soft_cap_slope(z, self.options.logits_soft_cap)

    def _scaled_dots(self, queries: Block, keys: Block) -> Array:
        q, k = queries.of(self.query_digits, 2), keys.of(self.key_on_grid, 0)
        return round32(dots(q, k)).astype(jnp.float64) * self.options.scale

    def for_queries(self, body: Callable[..., Any], carry: Any, keys: Block | None = None) -> Any:
        """A loop over the blocks of queries, all of them or those that see some of the keys."""
        T, size = self.query.shape[1], self.options.query_chunk
        if keys is None:
            return _for_blocks(T, size, (0, T), body, carry)
        return _for_blocks(T, min(T, INNER * size), self.masks.queries_of(keys, T), body, carry)

    def for_keys(self, body: Callable[..., Any], carry: Any, queries: Block | None = None) -> Any:
        """A loop over the blocks of keys, all of them or those that some of the queries see."""
        S, size = self.key.shape[0], self.options.key_chunk
        if queries is None:
            return _for_blocks(S, size, (0, S), body, carry)
        return _for_blocks(S, min(S, INNER * size), self.masks.keys_of(queries, S), body, carry)

    def full(self, *shape: int, value: float | int = 0, dtype: Any = jnp.float64) -> Array:
        """A constant that varies over the mesh as the operands do, to start a loop with."""
        operands = (self.query, self.key, self.value)
        nothing = sum(jnp.isnan(x.ravel()[0]).astype(dtype) for x in operands) * 0
        return jnp.full(shape, value, dtype) + jnp.asarray(nothing, dtype)

    def no_sums(self, *shape: int, tokens: int) -> Array:
        """Sums of digits `[..., 3H]` before the first of so many tokens is added."""
        dtype = sum_dtype(tokens, self.options.sum_limit)
        return self.full(*shape[:-1], 3 * shape[-1], dtype=dtype)


def dots(queries: Array, keys: Array) -> Array:
    """`[2, G, t, H] x [s, H] -> [G, t, s]`: a left and a right operand."""
    high, low = jnp.einsum("DGTH,SH->DGTS", queries, keys)
    return high + low


def _for_blocks(
    tokens: int, size: int, bounds: tuple[Any, Any], body: Callable[..., Any], carry: Any
) -> Any:
    """`carry = body(block, fresh, carry)` for the blocks that meet `bounds`.

    The last block ends with the last token, so it may begin inside the one before. `fresh` is False
    for the tokens that they share, and None where no blocks do.
    """

    def step(i: Array, carry: Any) -> Any:
        if tokens % size == 0:
            return body(Block(i * size, size), None, carry)
        block = Block(jnp.minimum(i * size, tokens - size), size)
        return body(block, block.tokens >= i * size, carry)

    low, high = bounds
    return jax.lax.fori_loop(low // size, (high + size - 1) // size, step, carry)


def write(x: Array, part: Array, block: Block, axis: int) -> Array:
    """x with a block of tokens replaced."""
    return jax.lax.dynamic_update_slice_in_dim(x, part, block.start, axis)


def fresh_only(x: Array, fresh: Array | None, axis: int) -> Array:
    """`[G, t, s]` with 0 for the tokens of an axis that an earlier block has had."""
    if fresh is None:
        return x
    return jnp.where(jnp.expand_dims(fresh, [i for i in range(3) if i != axis]), x, 0)


def weights_of(logits: Array, top: Array) -> Array:
    """`p`: exp(logits - top) correctly rounded to float32; 0 where a logit is -inf."""
    p = exp(round32(logits - top))
    return jnp.where(logits == -jnp.inf, jnp.float32(0), p)
