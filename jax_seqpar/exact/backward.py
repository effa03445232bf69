"""The gradients of one KV head, in one visit to each block of queries and keys."""

from dataclasses import dataclass
from math import ceil, log2
from typing import Any

import jax.numpy as jnp
from jax import Array

from ..mask import Spec, Tokens
from ..mask.token_numbers import write
from . import arithmetic
from .arithmetic import flush, left_digits, on_unit, pinned, right_on_grid, slices
from .block_logits import Options, Problem, columns, dots, key_operand, scale_of, scaled_query
from .blocks_across_devices import SplitBlocks
from .elementary import exp
from .forward import Rows, kept_normaliser
from .gradient_exponents import find_anchors
from .kv_replicas import SharedHeads
from .token_blocks import Blocks, Operand, in_both, write_head


@dataclass(frozen=True)
class Head:
    """One KV head with its G query heads; float64, flushed.

    Attributes:
      spec: of one sequence and G heads.
      query: `[G, T, H]`, scaled.
      query_digits, grad_digits: `[G, H, 2, T]`, `[G, V, 2, T]`, left operands.
      key_on_grid, value_on_grid: `[S, H]`, `[S, V]`, right operands.
      correction: D, `[G, T]`.
    """

    spec: Spec
    query: Array
    query_digits: Array
    grad_digits: Array
    key_on_grid: Array
    value_on_grid: Array
    rows: Rows
    correction: Array

    def problem(self, g: Any) -> Problem:
        spec = self.spec.take_heads(0, g, 1)
        return Problem(spec, self.query[g], self.query_digits[g], self.key_on_grid)

    def weights(
        self, g: Any, queries: Tokens, keys: Tokens, belongs: Array | None
    ) -> tuple[Array, Array]:
        """`ds` and the `w` of dv, `[s, t]`."""
        problem = self.problem(g)
        z, slope = problem.logits(queries, keys)
        if belongs is not None:
            z = jnp.where(belongs, z, -jnp.inf)
        top, normaliser, correction = (
            queries.slice(x[g], 0)[None] for x in (*self.rows, self.correction)
        )
        p = exp(z - top).astype(jnp.float64)
        # Also where a NaN stands in a row of which nothing comes here: the anchors bring it back.
        absent = p == 0
        w = pinned(p * normaliser)
        dp = pinned(dots(keys.slice(self.value_on_grid, 0), queries.slice(self.grad_digits[g], 2)))
        kept = w
        if problem.spec.dropout.rate:
            dp = problem.kept(pinned(dp * problem.kept_scale), queries, keys)
            kept = problem.kept(pinned(p * kept_normaliser(problem, normaliser)), queries, keys)
        ds = w * (dp - correction)
        if slope is not None:
            ds = pinned(ds) * slope
        return jnp.where(absent, 0.0, ds), jnp.where(absent, 0.0, kept)


def gradients(
    options: Options,
    spec: Spec,
    query: Array,
    key: Array,
    value: Array,
    out: Array,
    rows: Rows,
    grad: Array,
) -> tuple[Array, Array, Array]:
    """`dq [G, T, H]`, `dk [S, H]` and `dv [S, V]` in float32.

    Args:
      spec: of one sequence and G heads.
      query, key, value: `[G, T, H]`, `[S, H]`, `[S, V]`.
      out, grad: `[G, T, V]`, the float32 output and its gradient.
      rows: of the forward pass, `[G, T]`.
    """
    (G, T, H), (S, V) = query.shape, value.shape
    shared = options.shared_heads or SharedHeads(())
    query, key, value, out, grad = (
        scaled_query(spec, query),
        *map(flush, (key, value, out, grad)),
    )
    grad_rows = left_digits(grad)
    high, low = jnp.einsum("dgtv,gtv->dgt", grad_rows, right_on_grid(out))
    head = Head(
        spec,
        query,
        columns(left_digits(query)),
        columns(grad_rows),
        key_operand(key, value),
        right_on_grid(value),
        rows,
        correction=pinned(high + low),
    )
    blocks = Blocks(spec, G, T, S, options.block)
    c = head.problem(0).kept_scale
    anchors = find_anchors(
        blocks, head.problem, query, key, value, out, rows.normaliser, grad, ceil(log2(c))
    )
    anchors = anchors._replace(key=shared.max(anchors.key), value=shared.max(anchors.value))
    of_dq, *of_sums = map(Operand.of, (key, query, grad))
    columns_of_keys = of_dq.digits.T

    def full(*shape: int, value: float | int = 0, dtype: Any = jnp.float64) -> Array:
        return head.problem(0).full(*shape, value=value, dtype=dtype)

    def block_of_keys(keys: Tokens, of_keys: Array | None, carry: tuple[Array, ...]):
        dq, dk, dv = carry
        key_power = keys.slice(of_dq.power, 0)[:, None]
        key_digits = keys.slice(columns_of_keys, 1)
        key_anchors = [keys.slice(x, 0)[:, None] for x in (anchors.key, anchors.value)]

        def weights(g: Any, index: Any) -> tuple[Array, Array, Tokens]:
            queries, belongs = blocks.of_queries(index)
            ds, w = head.weights(g, queries, keys, in_both(of_keys, belongs))
            return ds, w, queries

        def add_to_queries(dq: Array, g: Any, ds: Array, queries: Tokens) -> Array:
            integers, unit = on_unit(ds * key_power, 0)
            anchor = queries.slice(anchors.query[g], 0)[None]
            part = slices(key_digits @ integers, unit, anchor, axis=0)
            return write_head(dq, queries.slice(dq[:, g], 2) + part, g, queries)

        def block(g: Any, index: Any, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            dq, *sums = carry
            ds, w, queries = weights(g, index)
            for i, (d, operand) in enumerate(zip((ds, w), of_sums, strict=True)):
                integers, unit = on_unit(d * operand.powers(g, queries), 1)
                products = integers @ queries.slice(operand.digits[g], 0)
                sums[i] += slices(products, unit, key_anchors[i], axis=1)
            return add_to_queries(dq, g, ds, queries), *sums

        def block_of_queries(g: Any, index: Any, dq: Array) -> Array:
            ds, _, queries = weights(g, index)
            return add_to_queries(dq, g, ds, queries)

        if options.queries_over is None or T % blocks.size == 0:
            start = (dq, full(2, keys.size, H), full(2, keys.size, V))
            dq, *parts = blocks.for_queries(keys, block, start)
        else:
            sums = SplitBlocks(blocks, options.queries_over, keys, of_sums, weights, full)
            dq = blocks.for_queries(keys, block_of_queries, dq)
            parts = sums.slices(key_anchors)
        # Tokens of the block before this one are among them, with sums of 0.
        added = (keys.slice(x, 1) + part for x, part in zip((dk, dv), parts, strict=True))
        return dq, *(write(x, part, keys, 1) for x, part in zip((dk, dv), added, strict=True))

    start = (full(2, G, H, T), full(2, S, H), full(2, S, V))
    dq, dk, dv = blocks.for_keys(block_of_keys, start)
    dq = arithmetic.value(dq, anchors.query[:, None]) * scale_of(spec)
    dq = arithmetic.out(jnp.where((rows.normaliser == 0)[:, None], 0.0, dq)).transpose(0, 2, 1)
    dk, dv = (
        arithmetic.out(arithmetic.value(shared.sum(x), anchor[:, None]))
        for x, anchor in ((dk, anchors.key), (dv, anchors.value))
    )
    if shared.devices == 1:
        return dq, dk, dv
    first = shared.is_first()
    return dq, jnp.where(first, dk, 0.0), jnp.where(first, dv, 0.0)
