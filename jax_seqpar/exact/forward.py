"""The output: queries in chunks, each with its whole row of weights, in four visits to the keys.

The logits with their maximum; the weights with their sum and the largest of them times its value;
the sum that says how fine their unit may be; the weighted values.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ..mask import Spec, Tokens
from ..mask.token_numbers import for_blocks, write
from . import arithmetic
from .arithmetic import (
    LEAST_EXPONENT,
    NORM_BITS,
    WEIGHT_BITS,
    finite,
    flush,
    halves,
    joined,
    pinned,
    power_of_two,
    row_bits,
    row_value,
    token_digits,
)
from .block_logits import Options, Problem, for_range, key_operand
from .elementary import exp
from .heads import first_head, map_heads


class Rows(NamedTuple):
    """Residuals of the rows of weights for the backward pass: `[T]`.

    Attributes:
      top: m, float32, +inf where it is NaN.
      normaliser: r, float64.
    """

    top: Array
    normaliser: Array


class Values(NamedTuple):
    """Values as tokens on their grids, with as many tokens as whole tiles have: `S'`.

    Attributes:
      exponents: E, int32 `[S', 1]`; the least for a value with a NaN, whose logit is NaN: here it
        must not reach who may not attend to it.
      powers: 2^E, `[S', 1]`.
      columns: both digits of every channel, `[2 V, S']`.
    """

    exponents: Array
    powers: Array
    columns: Array

    @classmethod
    def on_grids(cls, value: Array, tile: int) -> "Values":
        e, digits = token_digits(flush(value))
        return cls._of(finite(e), digits, tile)

    @classmethod
    def without_digits(cls, exponents: Array, tile: int) -> "Values":
        """Values with their exponents only, for visits that read how large a value is."""
        return cls._of(exponents, jnp.zeros((exponents.shape[0], 0)), tile)

    @classmethod
    def _of(cls, e: Array, digits: Array, tile: int) -> "Values":
        e, digits = (jnp.pad(x, ((0, -x.shape[0] % tile), (0, 0))) for x in (e, digits))
        return cls(e, power_of_two(e), digits.T)


def outputs_of_all_keys(
    options: Options, spec: Spec, kv_heads: int, query: Array, key: Array, value: Array
) -> tuple[Array, Rows]:
    """`[B K, G, T, V]`, and of each row what the gradients read.

    Args:
      spec: of all sequences and query heads.
      query, key, value: `[B K, G, T, H]`, `[B K, S, H]`, `[B K, S, V]`.
    """

    def one_kv_head(index: Array, q: Array, k: Array, v: Array) -> tuple[Array, Rows]:
        keys = key_operand(k, v)
        sequence, first = first_head(index, kv_heads, q.shape[0])

        def one_head(g: Array, q: Array) -> tuple[Array, Rows]:
            own = spec.take_heads(sequence, first + g, 1)
            return output(options, Problem.of(own, q, keys), v)

        return map_heads(one_head, q)

    return map_heads(one_kv_head, query, key, value)


def output(options: Options, problem: Problem, value: Array) -> tuple[Array, Rows]:
    """`[T, V]` in float32, before any rounding to 16 bits.

    Args:
      value: `[S, V]`.
    """
    (T, _), (S, V) = problem.scaled_query.shape, value.shape
    size = options.key_chunk
    values = Values.on_grids(value, size)

    def chunk(queries: Tokens, _, carry: tuple[Array, Rows]) -> tuple[Array, Rows]:
        rows = ChunkOfRows(problem, values, queries, S, size)
        logits, largest_logit = rows.logits()
        m, sink = with_sink(problem.spec, largest_logit)
        # The weights take the place of the logits, which nothing reads any more.
        weights, total, largest = rows.weights(logits, m)
        bits = row_bits(largest, 1.0 + rows.weight_count(weights, largest))
        sums = rows.weighted_values(weights, bits)
        own = rounded_output(problem.spec, largest_logit, m, total + halves(sink), bits, sums)
        return jax.tree.map(lambda x, part: write(x, part, queries, 0), carry, own)

    nothing = Rows(problem.full(T, dtype=jnp.float32), problem.full(T))
    start = (problem.full(T, V, dtype=jnp.float32), nothing)
    return for_blocks(T, options.query_chunk, (0, T), chunk, start)


def rounded_output(
    spec: Spec, largest_logit: Array, m: Array, total: Array, bits: Array, sums: Array
) -> tuple[Array, Rows]:
    """`[t, V]` in float32, of one query head.

    Args:
      spec: of that head.
      largest_logit, m, total, bits: of each row, of all its keys; total is the two halves of L.
      sums: the two halves of `S1` and `S0`, `[2, 2 V, t]`.
    """
    is_empty = largest_logit == -jnp.inf
    normaliser = jnp.where(is_empty, 0.0, reciprocal(joined(total), m))
    weighted = row_value(joined(sums), bits[None], axis=0)
    weighted = weighted * kept_normaliser(spec, normaliser)[None]
    out = arithmetic.out(jnp.where(is_empty[None], 0.0, weighted)).T
    return out, Rows(m, normaliser)


@dataclass(frozen=True)
class ChunkOfRows:
    """Chunk of queries with their whole rows of weights, and the four visits to the keys.

    With a part of the keys each visit returns the maxima and sums of integers of that part.

    Attributes:
      key_tokens: S.
      size: keys of a tile.
    """

    problem: Problem
    values: Values
    queries: Tokens
    key_tokens: int
    size: int

    @property
    def bounds(self) -> tuple[Any, Any]:
        """Half-open range of the keys that some of the queries may attend to."""
        return self.problem.spec.keys_of(self.queries, self.key_tokens)

    def for_tiles(self, step: Callable[[Tokens, Any], Any], carry: Any) -> Any:
        """`carry = step(keys, carry)` for the tiles of keys within the bounds."""
        low, high = self.bounds
        tokens, size = self.values.exponents.shape[0], self.size
        tiles = (0, 1) if tokens == size else (low // size, (high + size - 1) // size)
        return for_range(*tiles, lambda i, carry: step(Tokens(i * size, size), carry), carry)

    def logits(self) -> tuple[Array, Array]:
        """`[S', t]` in float32, -inf where nobody attends, and the largest of each row."""
        S, full = self.key_tokens, self.problem.full

        def fill(keys: Tokens, _, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            logits, largest = carry
            z, _ = self.problem.logits(self.queries, keys)
            # A maximum that passes over a NaN is what some libraries under XLA:CPU give.
            of_tile = jnp.where(jnp.isnan(z), jnp.inf, z).max(0)
            return write(logits, z, keys, 0), jnp.maximum(largest, of_tile)

        shapes = (self.values.exponents.shape[0], self.queries.size), (self.queries.size,)
        start = tuple(full(*shape, value=-jnp.inf, dtype=jnp.float32) for shape in shapes)
        return for_blocks(S, min(self.size, S), self.bounds, fill, start)

    def weights(self, logits: Array, m: Array) -> tuple[Array, Array, Array]:
        """`p` in float32, the two halves of `L`, and the largest `E(p) + E(v)` of each row.

        The weight of a sink is not in `L`.
        """

        def weigh(keys: Tokens, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            weights, total, largest = carry
            p = exp(keys.slice(weights, 0) - m[None])
            total = total + halves(as_integers(p).sum(0))
            p = self.problem.kept(p, self.queries, keys)
            exponents_of_p = jnp.where(p == 0, LEAST_EXPONENT * 4, _exponent(p))
            w = exponents_of_p + keys.slice(self.values.exponents, 0)
            return write(weights, p, keys, 0), total, jnp.maximum(largest, w.max(0))

        t, full = self.queries.size, self.problem.full
        nothing = full(t, value=LEAST_EXPONENT, dtype=jnp.int32)
        return self.for_tiles(weigh, (logits, full(2, t), nothing))

    def weight_count(self, weights: Array, largest: Array) -> Array:
        """`t - 1`: the weights times the powers of their values, counted in a coarse unit."""

        def count(keys: Tokens, sums: Array) -> Array:
            w = self._on_values(weights, keys)
            return sums + jnp.ceil(w * power_of_two(NORM_BITS - largest)[None]).sum(0)

        return self.for_tiles(count, self.problem.full(self.queries.size))

    def weighted_values(self, weights: Array, bits: Array) -> Array:
        """The two halves of `S1` and `S0` of every channel, `[2, 2 V, t]`."""

        def add(keys: Tokens, sums: Array) -> Array:
            integers = jnp.rint(self._on_values(weights, keys) * power_of_two(bits)[None])
            return sums + halves(keys.slice(self.values.columns, 1) @ integers)

        start = self.problem.full(2, self.values.columns.shape[0], self.queries.size)
        return self.for_tiles(add, start)

    def _on_values(self, weights: Array, keys: Tokens) -> Array:
        """`w`, weights times the powers of their values, `[s, t]`."""
        return keys.slice(weights, 0).astype(jnp.float64) * keys.slice(self.values.powers, 0)


def with_sink(spec: Spec, largest_logit: Array) -> tuple[Array, Array]:
    """`m` of each row of one query head, and `rint(p 2^41)` of the sink."""
    is_empty = largest_logit == -jnp.inf
    sinks = spec.logits.sinks
    if sinks is None:
        return jnp.where(is_empty, 0.0, largest_logit), jnp.zeros_like(largest_logit, jnp.float64)
    sink = flush(sinks)[0].astype(jnp.float32)
    m = jnp.maximum(largest_logit, jnp.where(jnp.isnan(sink), jnp.inf, sink))
    m = jnp.where(is_empty, 0.0, m)
    return m, as_integers(exp(sink - m))


def _exponent(p: Array) -> Array:
    """Exponent E of each normal positive float32, int32."""
    return (jnp.abs(p).view(jnp.int32) >> 23) - 126


def as_integers(p: Array) -> Array:
    """Weights in units of 2^-41."""
    return jnp.rint(p.astype(jnp.float64) * 2.0**WEIGHT_BITS)


def reciprocal(total: Array, m: Array) -> Array:
    """`r`: 2^41 / L; NaN where m is not finite."""
    r = pinned(2.0**WEIGHT_BITS / jnp.where(total == 0, 1.0, total))
    return jnp.where(jnp.isfinite(m), r, jnp.nan)


def kept_normaliser(spec: Spec, normaliser: Array) -> Array:
    """`r c`: the normaliser times the factor of the weights that dropout keeps."""
    return pinned(normaliser * spec.dropout.inverse_keep_probability)
