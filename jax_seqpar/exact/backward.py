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
from .bias_gradient import BiasSums
from .block_logits import (
    Options,
    Problem,
    columns,
    dots,
    key_operand,
    may_attend,
    scale_of,
    scaled_query,
)
from .elementary import exp
from .forward import Rows, kept_normaliser
from .gradient_exponents import Anchors, Exponents, exponents_of_keys
from .heads import first_head, fold_heads
from .kv_replicas import SharedHeads
from .token_blocks import Blocks, Operand, in_both, write_head

# Numbers of a sequence and of a query head.
Place = tuple[Any, Any]


@dataclass(frozen=True)
class Head:
    """One KV head with its G query heads; float64, flushed.

    Attributes:
      spec: of one sequence and G heads.
      query, key, grad: `[G, T, H]`, scaled; `[S, H]`; `[G, T, V]`.
      query_digits, grad_digits: `[G, H, 2, T]`, `[G, V, 2, T]`, left operands.
      key_on_grid, value_on_grid: `[S, H]`, `[S, V]`, right operands.
      correction: D, `[G, T]`.
      place: the sequence, and the first of the query heads, in a bias.
    """

    spec: Spec
    query: Array
    key: Array
    grad: Array
    query_digits: Array
    grad_digits: Array
    key_on_grid: Array
    value_on_grid: Array
    rows: Rows
    correction: Array
    place: Place

    @classmethod
    def of(
        cls,
        spec: Spec,
        query: Array,
        key: Array,
        value: Array,
        out: Array,
        rows: Rows,
        grad: Array,
        place: Place = (0, 0),
    ) -> "Head":
        """Head made of the operands of `gradients`."""
        query, grad = scaled_query(spec, query), flush(grad)
        grad_rows = left_digits(grad)
        high, low = jnp.einsum("dgtv,gtv->dgt", grad_rows, right_on_grid(flush(out)))
        return cls(
            spec,
            query,
            flush(key),
            grad,
            columns(left_digits(query)),
            columns(grad_rows),
            key_operand(key, value),
            right_on_grid(flush(value)),
            rows,
            correction=pinned(high + low),
            place=place,
        )

    def blocks(self, options: Options) -> Blocks:
        (G, T, _), S = self.query.shape, self.key.shape[0]
        return Blocks(self.spec, G, T, S, options.block)

    def problem(self, g: Any) -> Problem:
        spec = self.spec.take_heads(0, g, 1)
        return Problem(spec, self.query[g], self.query_digits[g], self.key_on_grid)

    def weights(
        self, g: Any, queries: Tokens, keys: Tokens, belongs: Array | None
    ) -> tuple[Array, Array, Array]:
        """`ds`, the `w` of dv, and `ds` before the slope, as `add_to_bias` takes it; `[s, t]`."""
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
            kept = problem.kept(
                pinned(p * kept_normaliser(problem.spec, normaliser)), queries, keys
            )
        before_slope = ds = w * (dp - correction)
        if slope is not None:
            ds = pinned(ds) * slope
        return jnp.where(absent, 0.0, ds), jnp.where(absent, 0.0, kept), before_slope

    def add_to_bias(
        self, bias: BiasSums, g: Any, before_slope: Array, queries: Tokens, keys: Tokens
    ) -> BiasSums:
        """The sums of a bias with the `ds` `[s, t]` of one block.

        `ds` is set to 0 where a pair may not attend, and not where p is 0: a NaN in the row is one
        of its bias, too, and no anchor brings it back. That of a pair of another block is 0, or the
        NaN that it is there.
        """
        allowed, (b, n) = may_attend(self.spec.take_heads(0, g, 1), queries, keys), self.place
        ds = before_slope if allowed is None else jnp.where(allowed, before_slope, 0.0)
        return bias.add(ds, b, n + g, queries, keys)


def gradients_of_all_keys(
    options: Options, spec: Spec, kv_heads: int, bias: BiasSums | None, query: Array, *operands: Any
) -> tuple[BiasSums | None, Array, Array, Array]:
    """The gradients of all KV heads, from operands of `gradients` with one axis `B K` more."""
    G = query.shape[1]

    def one(bias: BiasSums | None, index: Array, *operands: Any) -> Any:
        place = first_head(index, kv_heads, G)
        bias, *of_head = gradients(options, spec.take_heads(*place, G), bias, place, *operands)
        return bias, tuple(of_head)

    bias, of_heads = fold_heads(one, bias, query, *operands)
    return bias, *of_heads


def gradients(
    options: Options,
    spec: Spec,
    bias: BiasSums | None,
    place: Place,
    query: Array,
    key: Array,
    value: Array,
    out: Array,
    rows: Rows,
    grad: Array,
) -> tuple[BiasSums | None, Array, Array, Array]:
    """The sums of bias, `dq [G, T, H]`, `dk [S, H]` and `dv [S, V]` in float32.

    Args:
      spec: of one sequence and G heads.
      bias: the sums of the heads before this one; None where nobody asks for them.
      place: the sequence, and the first query head, in the bias.
      query, key, value: `[G, T, H]`, `[S, H]`, `[S, V]`.
      out, grad: `[G, T, V]`, the float32 output and its gradient.
      rows: of the forward pass, `[G, T]`.
    """
    head = Head.of(spec, query, key, value, out, rows, grad, place)
    blocks = head.blocks(options)
    of_keys = exponents_of_keys(*map(flush, (key, value)))
    exponents = Exponents.of(head.query, of_keys, flush(out), rows.normaliser, head.grad)
    anchors = exponents.anchors(*exponents.maxima(blocks), dropout_bits(spec))
    anchors = shared_anchors(options, anchors)
    bias, *sums = block_sums(head, blocks, anchors, bias)
    return bias, *rounded_gradients(options, spec, rows, anchors, tuple(sums))


def dropout_bits(spec: Spec) -> int:
    """Exponent that dropout adds to each anchor: of `inverse_keep_probability`, rounded up."""
    return ceil(log2(spec.dropout.inverse_keep_probability))


def shared_anchors(options: Options, anchors: Anchors) -> Anchors:
    """The anchors of dk and dv over the devices that share the KV head."""
    shared = options.shared_heads or SharedHeads(())
    return anchors._replace(key=shared.max(anchors.key), value=shared.max(anchors.value))


def block_sums(
    head: Head, blocks: Blocks, anchors: Anchors, bias: BiasSums | None = None
) -> tuple[BiasSums | None, Array, Array, Array]:
    """The sums of bias; added slices of dq `[2, G, H, T]`, dk `[2, S, H]` and dv `[2, S, V]`."""
    of_dq, *of_sums = map(Operand.of, (head.key, head.query, head.grad))
    columns_of_keys = of_dq.digits.T
    (G, T, H), (S, V), full = head.query.shape, head.value_on_grid.shape, head.problem(0).full

    def block_of_keys(keys: Tokens, of_keys: Array | None, carry: tuple[Any, ...]):
        rows, dk, dv = carry
        key_power = keys.slice(of_dq.power, 0)[:, None]
        key_digits = keys.slice(columns_of_keys, 1)
        key_anchors = [keys.slice(x, 0)[:, None] for x in (anchors.key, anchors.value)]

        def block(g: Any, index: Any, carry: tuple[Any, ...]) -> tuple[Any, ...]:
            (bias, dq), *sums = carry
            queries, belongs = blocks.of_queries(index)
            ds, w, before_slope = head.weights(g, queries, keys, in_both(of_keys, belongs))
            if bias is not None:
                bias = head.add_to_bias(bias, g, before_slope, queries, keys)
            for i, (d, operand) in enumerate(zip((ds, w), of_sums, strict=True)):
                integers, unit = on_unit(d * operand.powers(g, queries), 1)
                products = integers @ queries.slice(operand.digits[g], 0)
                sums[i] += slices(products, unit, key_anchors[i], axis=1)
            integers, unit = on_unit(ds * key_power, 0)
            anchor = queries.slice(anchors.query[g], 0)[None]
            part = slices(key_digits @ integers, unit, anchor, axis=0)
            dq = write_head(dq, queries.slice(dq[:, g], 2) + part, g, queries)
            return (bias, dq), *sums

        start = (rows, full(2, keys.size, H), full(2, keys.size, V))
        rows, *parts = blocks.for_queries(keys, block, start)
        # Tokens of the block before this one are among them, with sums of 0.
        added = (keys.slice(x, 1) + part for x, part in zip((dk, dv), parts, strict=True))
        return rows, *(write(x, part, keys, 1) for x, part in zip((dk, dv), added, strict=True))

    start = ((bias, full(2, G, H, T)), full(2, S, H), full(2, S, V))
    (bias, dq), dk, dv = blocks.for_keys(block_of_keys, start)
    return bias, dq, dk, dv


def rounded_gradients(
    options: Options, spec: Spec, rows: Rows, anchors: Anchors, sums: tuple[Array, ...]
) -> tuple[Array, Array, Array]:
    """The gradients in float32, from sums over all keys, and over the queries of all devices."""
    dq, *of_keys = sums
    shared = options.shared_heads or SharedHeads(())
    dq = arithmetic.value(dq, anchors.query[:, None]) * scale_of(spec)
    dq = arithmetic.out(jnp.where((rows.normaliser == 0)[:, None], 0.0, dq)).transpose(0, 2, 1)
    dk, dv = (
        arithmetic.out(arithmetic.value(shared.sum(x), anchor[:, None]))
        for x, anchor in zip(of_keys, (anchors.key, anchors.value), strict=True)
    )
    if shared.devices == 1:
        return dq, dk, dv
    first = shared.is_first()
    return dq, jnp.where(first, dk, 0.0), jnp.where(first, dv, 0.0)
