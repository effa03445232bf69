"""Blocks of queries and keys, counted from the first of an array; what their sums multiply."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ..mask import Spec, Tokens
from .arithmetic import finite_power, token_digits
from .block_logits import for_range


class Operand(NamedTuple):
    """Operand of a sum over tokens: powers `[..., tokens]` and digits `[..., tokens, 2H]`."""

    power: Array  # 2^e
    digits: Array

    @classmethod
    def of(cls, x: Array) -> "Operand":
        e, digits = token_digits(x)
        return cls(finite_power(e)[..., 0], digits)

    def powers(self, head: Any, tokens: Tokens) -> Array:
        """`[1, t]`."""
        return tokens.slice(self.power[head], 0)[None]


@dataclass(frozen=True)
class Blocks:
    """The blocks of one KV head and its query heads.

    A block is given as tokens of the array that hold it and which of these belong to it:
    `[tokens]`, None where all do. An array that holds a part of the sequence holds whole blocks of
    it, one after another: a sum over blocks asks for no order (`Kernel.block`).

    Attributes:
      spec: of one sequence and all the query heads.
      heads, queries, keys: G, T and S of the arrays.
      size: tokens of a block.
    """

    spec: Spec
    heads: int
    queries: int
    keys: int
    size: int

    def of_queries(self, index: Any) -> tuple[Tokens, Array | None]:
        return _block(index, self.queries, self.size)

    def for_keys(self, step: Callable[..., Any], carry: Any) -> Any:
        """`carry = step(keys, belongs, carry)`."""

        def body(index: Any, carry: Any) -> Any:
            return step(*_block(index, self.keys, self.size), carry)

        return for_range(0, -(-self.keys // self.size), body, carry)

    def for_queries(self, keys: Tokens, step: Callable[..., Any], carry: Any) -> Any:
        """`carry = step(head, index, carry)`, for blocks with queries that see some of the keys."""
        low, high = self._bounds(keys)
        count = high - low

        def body(n: Any, carry: Any) -> Any:
            return step(
                *((0, low + n) if self.heads == 1 else (n // count, low + n % count)), carry
            )

        return for_range(0, self.heads * count, body, carry)

    def _bounds(self, keys: Tokens) -> tuple[Any, Any]:
        if self.queries <= self.size:
            return 0, 1
        low, high = self.spec.queries_of(keys, self.queries)
        return low // self.size, (high + self.size - 1) // self.size


def in_both(keys: Array | None, queries: Array | None) -> Array | None:
    """`[s, t]`: keys and queries that belong to the block; None where all do."""
    if keys is None:
        return None if queries is None else queries[None]
    return keys[:, None] if queries is None else keys[:, None] & queries[None]


def write_head(x: Array, part: Array, head: Any, queries: Tokens) -> Array:
    """`[n, G, ..., T]` with the queries `[n, ..., t]` of one head replaced."""
    start = [0, head, *[0] * (x.ndim - 3), queries.start]
    return jax.lax.dynamic_update_slice(
        x, part[:, None], [jnp.asarray(i, jnp.int32) for i in start]
    )


def _block(index: Any, tokens: int, size: int) -> tuple[Tokens, Array | None]:
    if tokens <= size:
        return Tokens(0, tokens), None
    if tokens % size == 0:
        return Tokens(index * size, size), None
    held = Tokens(jnp.minimum(index * size, tokens - size), size)
    return held, held.numbers // size == index
