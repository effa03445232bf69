"""The output: queries in chunks, each with its whole row of weights, in four visits to the keys.

The logits with their maximum; the weights with their sum and the largest of them times its value;
the sum that says how fine their unit may be; the weighted values.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ..mask import Tokens
from ..mask.tokens import for_blocks, write
from . import arithmetic
from .arithmetic import (
    LEAST_EXPONENT,
    NORM_BITS,
    NOT_A_NUMBER,
    WEIGHT_BITS,
    flush,
    halves,
    joined,
    pinned,
    power_of_two,
    row_bits,
    row_value,
    token_digits,
)
from .elementary import exp
from .problem import Options, Problem, for_range


class Rows(NamedTuple):
    """What the backward pass reads of each query: `[T]`.

    Attributes:
      top: m, float32, +inf where it is NaN.
      normaliser: r, float64.
    """

    top: Array
    normaliser: Array


def output(options: Options, problem: Problem, value: Array) -> tuple[Array, Rows]:
    """`[T, V]` in float32, before any rounding to 16 bits.

    Args:
      value: `[S, V]`.
    """
    (T, _), (S, V) = problem.scaled_query.shape, value.shape
    size = options.key_chunk
    padded = -(-S // size) * size
    e, digits = token_digits(flush(value))
    e, digits = (jnp.pad(x, ((0, padded - S), (0, 0))) for x in (e, digits))
    # A value with a NaN has a logit that is NaN. Here it must not reach who may not attend to it.
    e = jnp.where(e == NOT_A_NUMBER, LEAST_EXPONENT, e)
    exponents, powers, columns = e, power_of_two(e), digits.T

    def chunk(queries: Tokens, _, carry: tuple[Array, Rows]) -> tuple[Array, Rows]:
        t = queries.size
        low, high = problem.spec.keys_of(queries, S)
        tiles = (0, 1) if padded == size else (low // size, (high + size - 1) // size)

        def fill(keys: Tokens, _, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            logits, largest = carry
            z, _ = problem.logits(queries, keys)
            # A maximum that passes over a NaN is what some libraries under XLA:CPU give.
            of_tile = jnp.where(jnp.isnan(z), jnp.inf, z).max(0)
            return write(logits, z, keys, 0), jnp.maximum(largest, of_tile)

        start = (
            problem.full(padded, t, value=-jnp.inf, dtype=jnp.float32),
            problem.full(t, value=-jnp.inf, dtype=jnp.float32),
        )
        logits, largest_logit = for_blocks(S, min(size, S), (low, high), fill, start)
        is_empty = largest_logit == -jnp.inf
        m, sink = _with_sink(problem, largest_logit)

        def weigh(i: Any, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            weights, total, largest = carry
            keys = Tokens(i * size, size)
            p = exp(keys.slice(weights, 0) - m[None])
            total = total + halves(as_integers(p).sum(0))
            p = problem.kept(p, queries, keys)
            exponents_of_p = jnp.where(p == 0, LEAST_EXPONENT * 4, _exponent(p))
            w = exponents_of_p + keys.slice(exponents, 0)
            return write(weights, p, keys, 0), total, jnp.maximum(largest, w.max(0))

        # The weights take the place of the logits, which nothing reads any more.
        start = (
            logits,
            problem.full(2, t) + halves(sink),
            problem.full(t, value=LEAST_EXPONENT, dtype=jnp.int32),
        )
        weights, total, largest = for_range(*tiles, weigh, start)
        normaliser = jnp.where(is_empty, 0.0, reciprocal(joined(total), m))

        def on_values(keys: Tokens) -> Array:
            """`w`, `[s, t]`."""
            return keys.slice(weights, 0).astype(jnp.float64) * keys.slice(powers, 0)

        def count(i: Any, sums: Array) -> Array:
            w = on_values(Tokens(i * size, size))
            return sums + jnp.ceil(w * power_of_two(NORM_BITS - largest)[None]).sum(0)

        bits = row_bits(largest, 1.0 + for_range(*tiles, count, problem.full(t)))

        def add(i: Any, sums: Array) -> Array:
            keys = Tokens(i * size, size)
            integers = jnp.rint(on_values(keys) * power_of_two(bits)[None])
            return sums + halves(keys.slice(columns, 1) @ integers)

        sums = for_range(*tiles, add, problem.full(2, 2 * V, t))
        weighted = row_value(joined(sums), bits[None], axis=0)
        weighted = weighted * kept_normaliser(problem, normaliser)[None]
        out = arithmetic.out(jnp.where(is_empty[None], 0.0, weighted)).T
        own = (out, Rows(m, normaliser))
        return jax.tree.map(lambda x, part: write(x, part, queries, 0), carry, own)

    nothing = Rows(problem.full(T, dtype=jnp.float32), problem.full(T))
    start = (problem.full(T, V, dtype=jnp.float32), nothing)
    return for_blocks(T, options.query_chunk, (0, T), chunk, start)


def _with_sink(problem: Problem, largest_logit: Array) -> tuple[Array, Array]:
    """`m` of each row, and `rint(p 2^41)` of the sink."""
    is_empty = largest_logit == -jnp.inf
    sinks = problem.spec.logits.sinks
    if sinks is None:
        return jnp.where(is_empty, 0.0, largest_logit), jnp.zeros_like(largest_logit, jnp.float64)
    sink = flush(sinks)[0].astype(jnp.float32)
    m = jnp.maximum(largest_logit, jnp.where(jnp.isnan(sink), jnp.inf, sink))
    m = jnp.where(is_empty, 0.0, m)
    return m, as_integers(exp(sink - m))


def _exponent(p: Array) -> Array:
    """E of each positive float32 that is no subnormal, int32."""
    return (jnp.abs(p).view(jnp.int32) >> 23) - 126


def as_integers(p: Array) -> Array:
    """Weights in units of 2^-41."""
    return jnp.rint(p.astype(jnp.float64) * 2.0**WEIGHT_BITS)


def reciprocal(total: Array, m: Array) -> Array:
    """`r`: 2^41 / L; NaN where m is not finite."""
    r = pinned(2.0**WEIGHT_BITS / jnp.where(total == 0, 1.0, total))
    return jnp.where(jnp.isfinite(m), r, jnp.nan)


def kept_normaliser(problem: Problem, normaliser: Array) -> Array:
    """`r c`."""
    return pinned(normaliser * problem.kept_scale)
