"""The output: queries in chunks, each against its whole row of keys."""

import jax.numpy as jnp
from jax import Array

from ..mask import Tokens
from ..mask.tokens import write
from . import arithmetic
from .arithmetic import TOKEN_BITS, digits, exponent, grid, pinned, power_of_two, token_sums
from .problem import Problem, mask_overlap, weights_of


def output(problem: Problem) -> Array:
    """`[G, T, V]` in float32, before any rounding to 16 bits."""
    G, T, _ = problem.query.shape
    S, V = problem.value.shape
    e = exponent(problem.value, 0)
    values = digits(grid(problem.value, e, TOKEN_BITS))
    unit = power_of_two(e - TOKEN_BITS)[None]

    def chunk(queries: Tokens, _, out: Array) -> Array:
        logits, top, empty = row_logits(problem, queries)

        def add(keys: Tokens, fresh: Array | None, sums):
            weight, weighted = sums
            p = weights_of(keys.slice(logits, 2), top)
            weights = mask_overlap(as_integers(p), fresh, 2)
            kept = problem.kept(weights, queries, keys)
            part = token_sums("GTS,SV->GTV", kept, keys.slice(values, 0), weighted.dtype)
            return weight + weights.sum(-1, keepdims=True), weighted + part

        t = queries.size
        start = (problem.full(G, t, 1), problem.no_sums(G, t, V, tokens=S))
        weight, weighted = problem.for_keys(add, start, queries)
        normaliser = kept_normaliser(problem, reciprocal(weight + sink_weight(problem, top)))
        rows = arithmetic.combine_digits(weighted) * unit * normaliser
        return write(out, arithmetic.out(jnp.where(empty, 0.0, rows)), queries, 1)

    return problem.for_queries(chunk, problem.full(G, T, V, dtype=jnp.float32))


def row_logits(problem: Problem, queries: Tokens) -> tuple[Array, Array, Array]:
    """The logits of whole rows, `m` of each, and which rows have no key to attend to.

    Returns:
      `[G, t, S]`, defined where a query may attend; `[G, t, 1]`; `[G, t, 1]`.
    """
    G, t, S = problem.query.shape[0], queries.size, problem.key.shape[0]

    def fill(keys: Tokens, _, carry):
        logits, top = carry
        part = problem.logits(queries, keys)
        part_top = part.max(-1, keepdims=True)
        # A maximum that passes over a NaN is what some libraries under XLA:CPU give.
        part_top = jnp.where(jnp.isnan(part).any(-1, keepdims=True), jnp.nan, part_top)
        return write(logits, part, keys, 2), jnp.maximum(top, part_top)

    start = (problem.full(G, t, S), problem.full(G, t, 1, value=-jnp.inf))
    logits, top = problem.for_keys(fill, start, queries)
    empty = top == -jnp.inf
    sinks = problem.sinks
    if sinks is not None:
        top = jnp.where(jnp.isnan(sinks), jnp.nan, jnp.maximum(top, sinks))
    return logits, jnp.where(top == -jnp.inf, 0.0, top), empty


def sink_weight(problem: Problem, top: Array) -> Array | float:
    """What a sink adds to the sum of `P`."""
    sinks = problem.sinks
    return 0.0 if sinks is None else as_integers(weights_of(sinks, top))


def kept_normaliser(problem: Problem, normaliser: Array) -> Array:
    """`r * c`."""
    return pinned(normaliser * problem.kept_scale)


def as_integers(p: Array) -> Array:
    """`P`: weights in units of 2^-32."""
    return jnp.rint(p.astype(jnp.float64) * 2.0**TOKEN_BITS)


def reciprocal(total: Array) -> Array:
    """1 / total, and 0 for 0."""
    return jnp.where(total == 0, 0.0, 1.0 / jnp.where(total == 0, 1.0, total))
