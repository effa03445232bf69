"""The output: queries in chunks, each against its whole row of keys."""

import jax
import jax.numpy as jnp
from jax import Array

from ..masks import Block
from . import arithmetic
from .arithmetic import TOKEN_BITS, WEIGHT_BITS, exponent, grid, power_of_two, token_sums
from .problem import Problem, by_token, fresh_only, top_of, weights_of, write


def output(problem: Problem) -> Array:
    """`[B, T, N, H]` in float32, before any rounding to 16 bits."""
    B, K, G, T, H = problem.query.shape
    S = problem.key.shape[2]
    e = exponent(problem.value, -2)
    values, unit = grid(problem.value, e, TOKEN_BITS), power_of_two(e - TOKEN_BITS)

    def chunk(queries: Block, _, out: Array) -> Array:
        logits, top = row_logits(problem, queries)
        empty = top == -jnp.inf
        top = jnp.where(empty, 0.0, top)

        def add(keys: Block, fresh: Array | None, sums):
            total, weighted = sums
            weights = fresh_only(integer_weights(weights_of(keys.of(logits, 4), top)), fresh, 4)
            part = token_sums("BKGTS,BKSH->BKGTH", weights, keys.of(values, 2), weighted.high.dtype)
            total = total + weights.sum(-1, keepdims=True)
            return total, jax.tree.map(jnp.add, weighted, part)

        rows = (B, K, G, queries.size)
        sums = (problem.full((*rows, 1)), problem.no_sums((*rows, H), tokens=S))
        total, weighted = problem.for_keys(add, sums, queries)
        rows = weighted.total() * unit[:, :, None] * reciprocal(total)
        return write(out, arithmetic.out(jnp.where(empty, 0.0, rows)), queries, 3)

    start = problem.full((B, K, G, T, H), dtype=jnp.float32)
    return by_token(problem.for_queries(chunk, start))


def row_logits(problem: Problem, queries: Block) -> tuple[Array, Array]:
    """The logits of whole rows `[B, K, G, t, S]`, where they are read, and the largest of each."""
    rows = (*problem.query.shape[:3], queries.size)

    def fill(keys: Block, _, carry):
        logits, top = carry
        part = problem.logits(queries, keys)
        return write(logits, part, keys, 4), top_of(part, top)

    start = (problem.full((*rows, problem.key.shape[2])), problem.full((*rows, 1), -jnp.inf))
    return problem.for_keys(fill, start, queries)


def integer_weights(p: Array) -> Array:
    """`P`: weights as integers."""
    return jnp.rint(p.astype(jnp.float64) * 2.0**WEIGHT_BITS)


def reciprocal(total: Array) -> Array:
    """1 / total, and 0 for 0."""
    return jnp.where(total == 0, 0.0, 1.0 / jnp.where(total == 0, 1.0, total))
