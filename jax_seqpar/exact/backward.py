"""The gradients: of queries in chunks with whole rows, of keys and values with whole columns."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ..masks import Block
from . import arithmetic
from .arithmetic import (
    LEAST_EXPONENT,
    TOKEN_BITS,
    WEIGHT_BITS,
    TokenSums,
    exponent,
    grid,
    on_grid,
    power_of_two,
    token_sums,
)
from .forward import integer_weights, reciprocal, row_logits
from .problem import Problem, by_kv_head, by_token, fresh_only, weights_of, write


class Rows(NamedTuple):
    """What the keys' pass reads of each query, `[B, K, G, T, 1]`."""

    top: Array  # m
    normaliser: Array  # r * 2^30
    correction: Array  # D


def query_gradient(problem: Problem, out: Array, grad: Array) -> tuple[Array, Rows]:
    """`dq [B, T, N, H]` in float32, and what it found of each query.

    Args:
      out, grad: the float32 output and its gradient, `[B, T, N, H]`.
    """
    B, K, G, T, H = problem.query.shape
    S = problem.key.shape[2]
    grad_rows = on_grid(by_kv_head(grad, K))
    out_rows = on_grid(by_kv_head(out, K))
    corrections = jnp.einsum("BKGTH,BKGTH->BKGT", grad_rows, out_rows)[..., None]
    value_rows = on_grid(problem.value)
    key_exponent = exponent(problem.key, -2)
    keys_as_integers = grid(problem.key, key_exponent, TOKEN_BITS)
    key_unit = power_of_two(key_exponent - TOKEN_BITS)[:, :, None]

    def chunk(queries: Block, _, carry: tuple[Array, Rows]) -> tuple[Array, Rows]:
        dq, rows = carry
        logits, top = row_logits(problem, queries)
        empty = top == -jnp.inf
        top = jnp.where(empty, 0.0, top)
        own_grad, correction = queries.of(grad_rows, 3), queries.of(corrections, 3)

        def weigh(keys: Block, fresh: Array | None, carry):
            weights, total = carry
            p = weights_of(keys.of(logits, 4), top)
            integers = fresh_only(integer_weights(p), fresh, 4)
            return write(weights, p, keys, 4), total + integers.sum(-1, keepdims=True)

        start = (problem.full(logits.shape, dtype=jnp.float32), problem.full(top.shape))
        weights, total = problem.for_keys(weigh, start, queries)
        normaliser = reciprocal(total) * 2.0**WEIGHT_BITS

        def differentiate(keys: Block, _, carry):
            gradients, e = carry
            dp = jnp.einsum("BKGTH,BKSH->BKGTS", own_grad, keys.of(value_rows, 2))
            p = keys.of(weights, 4)
            ds = logit_gradient(problem, p, normaliser, dp - correction, queries, keys)
            return write(gradients, ds, keys, 4), jnp.maximum(e, exponent(ds, -1))

        # In place of the logits, which nothing reads any more.
        start = (logits, problem.full(top.shape, LEAST_EXPONENT, jnp.int64))
        gradients, e = problem.for_keys(differentiate, start, queries)

        def add(keys: Block, fresh: Array | None, sums: TokenSums) -> TokenSums:
            integers = fresh_only(grid(keys.of(gradients, 4), e, WEIGHT_BITS), fresh, 4)
            values = keys.of(keys_as_integers, 2)
            part = token_sums("BKGTS,BKSH->BKGTH", integers, values, sums.high.dtype)
            return jax.tree.map(jnp.add, sums, part)

        sums = problem.for_keys(add, problem.no_sums((B, K, G, queries.size, H), S), queries)
        part = sums.total() * power_of_two(e - WEIGHT_BITS) * key_unit * problem.options.scale
        part = arithmetic.out(jnp.where(empty, 0.0, part))
        found = Rows(top, normaliser, correction)
        return write(dq, part, queries, 3), jax.tree.map(
            lambda x, part: write(x, part, queries, 3), rows, found
        )

    nothing = problem.full((B, K, G, T, 1))
    start = (problem.full((B, K, G, T, H), dtype=jnp.float32), Rows(nothing, nothing, nothing))
    dq, rows = problem.for_queries(chunk, start)
    return by_token(dq), rows


def key_value_gradients(problem: Problem, rows: Rows, grad: Array) -> tuple[Array, Array]:
    """`dk` and `dv [B, S, K, H]` in float32, summed over all the query heads of each KV head."""
    B, K, G, T, H = problem.query.shape
    S = problem.key.shape[2]
    shared = problem.options.shared_heads
    grads = by_kv_head(grad, K)
    grad_rows, value_rows = on_grid(grads), on_grid(problem.value)
    # What the two contractions read of each query: q for dk, the gradient for dv.
    exponents = [over_devices(shared, exponent(x, (2, 3))) for x in (problem.query, grads)]
    columns = [
        grid(x, e, TOKEN_BITS) for x, e in zip((problem.query, grads), exponents, strict=True)
    ]
    units = [power_of_two(e - TOKEN_BITS)[:, :, 0] for e in exponents]

    def chunk(keys: Block, _, gradients: tuple[Array, Array]) -> tuple[Array, ...]:
        values = keys.of(value_rows, 2)

        def differentiate(queries: Block, _, carry):
            buffers, exponents = carry
            top, normaliser, correction = (queries.of(x, 3) for x in rows)
            p = weights_of(problem.logits(queries, keys), top)
            dp = jnp.einsum("BKGTH,BKSH->BKGTS", queries.of(grad_rows, 3), values)
            ds = logit_gradient(problem, p, normaliser, dp - correction, queries, keys)
            parts = (ds, normalised(p, normaliser))
            return (
                tuple(write(x, part, queries, 3) for x, part in zip(buffers, parts, strict=True)),
                tuple(
                    jnp.maximum(e, exponent(part, (2, 3)))
                    for e, part in zip(exponents, parts, strict=True)
                ),
            )

        buffer = problem.full((B, K, G, T, keys.size))
        e = problem.full((B, K, 1, 1, keys.size), LEAST_EXPONENT, jnp.int64)
        buffers, exponents = problem.for_queries(differentiate, ((buffer,) * 2, (e,) * 2), keys)
        exponents = [over_devices(shared, e) for e in exponents]

        def add(queries: Block, fresh: Array | None, sums):
            return tuple(
                jax.tree.map(
                    jnp.add,
                    total,
                    token_sums(
                        "BKGTS,BKGTH->BKSH",
                        fresh_only(grid(queries.of(x, 3), e, WEIGHT_BITS), fresh, 3),
                        queries.of(column, 3),
                        total.high.dtype,
                    ),
                )
                for total, x, e, column in zip(sums, buffers, exponents, columns, strict=True)
            )

        tokens = G * T * (1 if shared is None else shared.devices)
        start = (problem.no_sums((B, K, keys.size, H), tokens),) * 2
        sums = problem.for_queries(add, start, keys)
        if shared is not None:
            sums = jax.tree.map(shared.sum, sums)
        scales = (problem.options.scale, 1.0)
        parts = (
            arithmetic.out(
                total.total() * power_of_two(e - WEIGHT_BITS).reshape(B, K, -1, 1) * unit * scale
            )
            for total, e, unit, scale in zip(sums, exponents, units, scales, strict=True)
        )
        return tuple(write(x, part, keys, 2) for x, part in zip(gradients, parts, strict=True))

    start = (problem.full((B, K, S, H), dtype=jnp.float32),) * 2
    gradients = problem.for_keys(chunk, start)
    if shared is not None:
        gradients = tuple(jnp.where(shared.is_first(), x, 0) for x in gradients)
    dk, dv = (x.transpose(0, 2, 1, 3) for x in gradients)
    return dk, dv


def normalised(p: Array, normaliser: Array) -> Array:
    """`w`: weights that add up to 1, in float64."""
    return jnp.where(p == 0, 0.0, p.astype(jnp.float64) * normaliser)


def logit_gradient(
    problem: Problem,
    p: Array,
    normaliser: Array,
    difference: Array,
    queries: Block,
    keys: Block,
) -> Array:
    """`ds`: the gradient of the scaled logits; difference is `dp - D`."""
    ds = normalised(p, normaliser) * difference
    return jnp.where(p == 0, 0.0, problem.through_soft_cap(ds, queries, keys))


def over_devices(shared, e: Array) -> Array:
    """The exponent of what all the devices of a KV head hold."""
    return e if shared is None else shared.max(e)
