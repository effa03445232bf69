"""The output: queries in chunks, each against its whole row of keys."""

import jax.numpy as jnp
from jax import Array

from ..masks import Block
from . import arithmetic
from .arithmetic import TOKEN_BITS, digits, exponent, grid, power_of_two, token_sums
from .problem import Problem, fresh_only, weights_of, write


def output(problem: Problem) -> Array:
    """`[G, T, H]` in float32, before any rounding to 16 bits."""
    G, T, H = problem.query.shape
    S = problem.key.shape[0]
    e = exponent(problem.value, 0)
    values = digits(grid(problem.value, e, TOKEN_BITS))
    unit = power_of_two(e - TOKEN_BITS)[None]

    def chunk(queries: Block, _, out: Array) -> Array:
        logits, top, empty = row_logits(problem, queries)

        def add(keys: Block, fresh: Array | None, sums):
            weight, weighted = sums
            p = weights_of(keys.of(logits, 2), top)
            weights = fresh_only(as_integers(p), fresh, 2)
            part = token_sums("GTS,SH->GTH", weights, keys.of(values, 0), weighted.dtype)
            return weight + weights.sum(-1, keepdims=True), weighted + part

        t = queries.size
        start = (problem.full(G, t, 1), problem.no_sums(G, t, H, tokens=S))
        weight, weighted = problem.for_keys(add, start, queries)
        rows = arithmetic.total(weighted) * unit * reciprocal(weight)
        return write(out, arithmetic.out(jnp.where(empty, 0.0, rows)), queries, 1)

    return problem.for_queries(chunk, problem.full(G, T, H, dtype=jnp.float32))


def row_logits(problem: Problem, queries: Block) -> tuple[Array, Array, Array]:
    """The logits of whole rows, the largest of each (0 for a row of -inf), and which have none.

    Returns:
      `[G, t, S]`, defined where a query may attend; `[G, t, 1]`; `[G, t, 1]`.
    """
    G, t, S = problem.query.shape[0], queries.size, problem.key.shape[0]

    def fill(keys: Block, _, carry):
        logits, top = carry
        part = problem.logits(queries, keys)
        part_top = part.max(-1, keepdims=True)
        # A maximum that passes over a NaN is what some libraries under XLA:CPU give.
        part_top = jnp.where(jnp.isnan(part).any(-1, keepdims=True), jnp.nan, part_top)
        return write(logits, part, keys, 2), jnp.maximum(top, part_top)

    start = (problem.full(G, t, S), problem.full(G, t, 1, value=-jnp.inf))
    logits, top = problem.for_keys(fill, start, queries)
    empty = top == -jnp.inf
    return logits, jnp.where(empty, 0.0, top), empty


def as_integers(p: Array) -> Array:
    """`P`: weights in units of 2^-32."""
    return jnp.rint(p.astype(jnp.float64) * 2.0**TOKEN_BITS)


def reciprocal(total: Array) -> Array:
    """1 / total, and 0 for 0."""
    return jnp.where(total == 0, 0.0, 1.0 / jnp.where(total == 0, 1.0, total))
