"""The gradients: of queries in chunks with whole rows, of keys and values with whole columns."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ..mask import Tokens
from ..mask.tokens import write
from . import arithmetic
from .arithmetic import (
    LEAST_EXPONENT,
    TOKEN_BITS,
    digits,
    exponent,
    flush,
    grid,
    left_digits,
    pinned,
    power_of_two,
    right_on_grid,
    token_sums,
)
from .forward import as_integers, kept_normaliser, reciprocal, row_logits, sink_weight
from .kv_replicas import SharedHeads
from .problem import Problem, dots, mask_overlap, weights_of


class Rows(NamedTuple):
    """What the pass over the keys reads of each query, `[G, T, 1]`."""

    top: Array  # m
    normaliser: Array  # r * 2^32
    kept_normaliser: Array  # (r * c) * 2^32
    correction: Array  # D
    empty: Array  # without a key to attend to


def query_gradient(problem: Problem, out: Array, grad: Array) -> tuple[Array, Rows]:
    """`dq [G, T, H]` in float32, and what it found of each query.

    Args:
      out, grad: `[G, T, V]`, the float32 output and its gradient.
    """
    G, T, H = problem.query.shape
    S = problem.key.shape[0]
    value_rows, grad_rows = right_on_grid(problem.value), left_digits(flush(grad))
    high, low = jnp.einsum("DGTV,GTV->DGT", grad_rows, right_on_grid(flush(out)))
    corrections = pinned(high + low)[..., None]
    key_exponent = exponent(problem.key, 0)
    columns = digits(grid(problem.key, key_exponent, TOKEN_BITS))

    def chunk(queries: Tokens, _, carry: tuple[Array, Rows]) -> tuple[Array, Rows]:
        logits, top, empty = row_logits(problem, queries)

        def weigh(keys: Tokens, fresh: Array | None, carry):
            weights, total = carry
            p = weights_of(keys.slice(logits, 2), top)
            integers = mask_overlap(as_integers(p), fresh, 2)
            return write(weights, p, keys, 2), total + integers.sum(-1, keepdims=True)

        start = (problem.full(*logits.shape, dtype=jnp.float32), problem.full(*top.shape))
        weights, total = problem.for_keys(weigh, start, queries)
        normaliser = reciprocal(total + sink_weight(problem, top))
        rows = Rows(
            top,
            normaliser * 2.0**TOKEN_BITS,
            kept_normaliser(problem, normaliser) * 2.0**TOKEN_BITS,
            queries.slice(corrections, 1),
            empty,
        )

        def differentiate(keys: Tokens, _, carry):
            gradients, e = carry
            dp = dots(queries.slice(grad_rows, 2), keys.slice(value_rows, 0))
            ds = logit_gradient(problem, keys.slice(weights, 2), rows, dp, queries, keys)
            return write(gradients, ds, keys, 2), jnp.maximum(e, exponent(ds, 2))

        # In place of the logits, which nothing reads any more.
        start = (logits, problem.full(*top.shape, value=LEAST_EXPONENT, dtype=jnp.int64))
        gradients, e = problem.for_keys(differentiate, start, queries)

        def add(keys: Tokens, fresh: Array | None, sums: Array) -> Array:
            integers = mask_overlap(grid(keys.slice(gradients, 2), e, TOKEN_BITS), fresh, 2)
            return sums + token_sums("GTS,SH->GTH", integers, keys.slice(columns, 0), sums.dtype)

        start = problem.no_sums(G, queries.size, H, tokens=S)
        dq = arithmetic.combine_digits(problem.for_keys(add, start, queries))
        dq = dq * power_of_two(e - TOKEN_BITS) * power_of_two(key_exponent - TOKEN_BITS)[None]
        dq = arithmetic.out(jnp.where(empty, 0.0, dq * problem.scale))
        return jax.tree.map(lambda x, part: write(x, part, queries, 1), carry, (dq, rows))

    nothing = Rows(*[problem.full(G, T, 1)] * 4, empty=problem.full(G, T, 1, dtype=jnp.bool_))
    start = (problem.full(G, T, H, dtype=jnp.float32), nothing)
    return problem.for_queries(chunk, start)


def key_value_gradients(problem: Problem, rows: Rows, grad: Array) -> tuple[Array, Array]:
    """`dk [S, H]` and `dv [S, V]` in float32, summed over the query heads of the KV head.

    Args:
      rows: of `query_gradient`.
      grad: `[G, T, V]`, the gradient of the output.
    """
    (G, T, _), S = problem.query.shape, problem.key.shape[0]
    channels = (problem.key.shape[1], problem.value.shape[1])
    shared = problem.options.shared_heads or SharedHeads(())
    query, grad = (jnp.where(rows.empty, 0.0, x) for x in (problem.query, flush(grad)))
    value_rows, grad_rows = right_on_grid(problem.value), left_digits(grad)
    # What dk and dv multiply: ds with the queries, w with the gradient of the output.
    exponents = [shared.max(exponent(x, (0, 1))) for x in (query, grad)]
    columns = [
        digits(grid(x, e, TOKEN_BITS)) for x, e in zip((query, grad), exponents, strict=True)
    ]
    units = [power_of_two(e - TOKEN_BITS)[0] for e in exponents]
    scales = (problem.scale, 1.0)

    def chunk(keys: Tokens, _, carry: list[Array]) -> list[Array]:
        def differentiate(queries: Tokens, _, carry: list[tuple[Array, Array]]):
            own = Rows(*(queries.slice(x, 1) for x in rows))
            p = weights_of(problem.logits(queries, keys), own.top)
            dp = dots(queries.slice(grad_rows, 2), keys.slice(value_rows, 0))
            parts = (
                logit_gradient(problem, p, own, dp, queries, keys),
                problem.kept(normalised(p, own.kept_normaliser), queries, keys),
            )
            return [
                (write(x, part, queries, 1), jnp.maximum(e, exponent(part, (0, 1))))
                for (x, e), part in zip(carry, parts, strict=True)
            ]

        buffer = problem.full(G, T, keys.size)
        e = problem.full(1, 1, keys.size, value=LEAST_EXPONENT, dtype=jnp.int64)
        filled = problem.for_queries(differentiate, [(buffer, e)] * 2, keys)
        filled = [(x, shared.max(e)) for x, e in filled]

        def add(queries: Tokens, fresh: Array | None, carry: list[Array]) -> list[Array]:
            totals = []
            for sums, (x, e), column in zip(carry, filled, columns, strict=True):
                integers = mask_overlap(grid(queries.slice(x, 1), e, TOKEN_BITS), fresh, 1)
                column = queries.slice(column, 1)
                totals.append(sums + token_sums("GTS,GTH->SH", integers, column, sums.dtype))
            return totals

        tokens = G * T * shared.devices
        start = [problem.no_sums(keys.size, n, tokens=tokens) for n in channels]
        sums = problem.for_queries(add, start, keys)
        totals = [arithmetic.combine_digits(shared.sum(x)) for x in sums]
        gradients = []
        for x, total, (_, e), unit, scale in zip(carry, totals, filled, units, scales, strict=True):
            part = total * power_of_two(e - TOKEN_BITS)[0, 0, :, None] * unit * scale
            gradients.append(write(x, arithmetic.out(part), keys, 0))
        return gradients

    dk, dv = problem.for_keys(chunk, [problem.full(S, n, dtype=jnp.float32) for n in channels])
    if shared.devices == 1:
        return dk, dv
    # -0 is what adds nothing: a float16 gradient that rounds to -0 would become 0 beside +0.
    first = shared.is_first()
    return jnp.where(first, dk, -0.0), jnp.where(first, dv, -0.0)


def normalised(p: Array, normaliser: Array) -> Array:
    """`w`: weights that add up to 1, float64."""
    return jnp.where(p == 0, 0.0, pinned(p.astype(jnp.float64) * normaliser))


def logit_gradient(
    problem: Problem, p: Array, rows: Rows, dp: Array, queries: Tokens, keys: Tokens
) -> Array:
    """`ds [G, t, s]`: the gradient of the scaled logits, before any soft cap."""
    dp = problem.kept(pinned(dp * problem.kept_scale), queries, keys)
    ds = normalised(p, rows.normaliser) * (dp - rows.correction)
    return jnp.where(p == 0, 0.0, problem.through_soft_cap(ds, queries, keys))
