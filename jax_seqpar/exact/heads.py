"""One head after another, as exact attention computes them: arrays with their heads in front."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


def map_heads(one: Callable[..., Any], *operands: Any) -> Any:
    """`one(index, *operands of it)` by the first axis: large matrices, and the memory of one."""
    count = jax.tree.leaves(operands)[0].shape[0]
    return jax.lax.map(lambda xs: one(*xs), (jnp.arange(count), *operands))


def fold_heads(one: Callable[..., Any], carry: Any, *operands: Any) -> Any:
    """`carry, result = one(carry, index, *operands of it)`: the last carry, and all the results."""
    count = jax.tree.leaves(operands)[0].shape[0]
    indices = jnp.arange(count, dtype=jnp.int32)
    return jax.lax.scan(lambda carry, xs: one(carry, *xs), carry, (indices, *operands))


def heads_first(x: Array) -> Array:
    """`[B, S, K, H]` as `[B K, S, H]`."""
    B, S, K, H = x.shape
    return x.transpose(0, 2, 1, 3).reshape(B * K, S, H)


def tokens_first(x: Array, like: Array) -> Array:
    """`[B K, ..., S, H]` as `like`, which is `[B, S, N, H]`."""
    B, S, N, _ = like.shape
    return x.reshape(B, N, S, x.shape[-1]).transpose(0, 2, 1, 3)


def grouped(x: Array, kv_heads: int) -> Array:
    """`[B, T, N, H]` as `[B K, G, T, H]`."""
    B, T, N, H = x.shape
    return x.transpose(0, 2, 1, 3).reshape(B * kv_heads, N // kv_heads, T, H)


def first_head(index: Array, kv_heads: int, group: int) -> tuple[Array, Array]:
    """The sequence of a KV head, and the first of its query heads."""
    return index // kv_heads, index % kv_heads * group
