"""The backward pass of blockwise attention, which computes the weights again, block by block.

FlashAttention-2, Dao 2023, https://arxiv.org/abs/2307.08691.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ..mask import Spec, Tokens, accumulated
from ..mask.tokens import for_blocks, full
from .blockwise_head import Head, Plan, add_slice, read_head, read_rows, write_rows
from .residual import Residual


class GradientHead(NamedTuple):
    """A query head, the gradient of its output `[T, V]`, and what its passes read of each query."""

    head: Head
    do: Array
    D: Array  # [T, 1], the sum of gradient times output, less the gradient of the lse
    top: Array  # [T, 1]
    share: Array  # [T, 1], 1 / divisor

    @classmethod
    def of(
        cls,
        b: Any,
        n: Any,
        operands: tuple[Any, ...],
        out_gradient: Array,
        rows: tuple[Array, ...],
    ) -> "GradientHead":
        own = (read_head(x, b, n) for x in (out_gradient, *rows))
        return cls(Head.of(b, n, *operands), *own)

    def weights(self, queries: Tokens, keys: Tokens, fresh: Any) -> Any:
        """The weights `[t, s]`, the gradient of the logits, and the derivative of the latter."""
        head = self.head
        z, pull = head.logits_and_pull(queries, keys)
        p = jnp.exp(z - queries.slice(self.top, 0)) * queries.slice(self.share, 0)
        for axis, mine in zip((1, 0), fresh, strict=True):
            if mine is not None:
                p = jnp.where(jnp.expand_dims(mine, axis), p, 0)
        dp = head.dot("tv,sv->ts", queries.slice(self.do, 0), keys.slice(head.v, 0))
        return p, p * (head.kept(dp, queries, keys) - queries.slice(self.D, 0)), pull


@partial(jax.jit, static_argnums=0)
def backward(
    plan: Plan,
    query: Array,
    key: Array,
    value: Array,
    spec: Spec,
    out: Array,
    residual: Residual,
    out_gradient: Array,
    residual_gradient: Residual,
) -> tuple[Array, Array, Array, dict[str, Array]]:
    """The gradients of query, key and value, and of bias, slopes and sinks where they are given."""
    operands = (query, key, value, spec)
    logits = spec.logits
    dtype = accumulated(query.dtype)
    top, total, share = (x[..., None] for x in (*residual, 1 / residual.divisor))

    def head_with(D: Array) -> Callable[..., GradientHead]:
        rows = (D, top, share)
        return partial(GradientHead.of, operands=operands, out_gradient=out_gradient, rows=rows)

    if query.dtype.itemsize == 2:
        D = _weighted_sums(plan, head_with(jnp.zeros_like(total)), operands)
    else:
        D = _total(_rounded(out_gradient.astype(dtype) * out.astype(dtype), total))
    # The derivative of the lse by a logit is its weight, that of the total as much times the total.
    head_of = head_with(D - residual_gradient.total[..., None] * total)
    dq, dk, dv, added = _operand_gradients(plan, head_of, operands)
    if logits.bias is not None:
        added["bias"] = _bias_gradient(plan, head_of, operands)
    return dq, dk, dv, {n: x.astype(getattr(logits, n).dtype) for n, x in added.items()}


def _weighted_sums(
    plan: Plan, head_of: Callable[..., GradientHead], operands: tuple[Any, ...]
) -> Array:
    """D `[B, T, N, 1]` of 16-bit operands, as the sum over keys of weight times its gradient.

    With it the gradients of a row's logits add up to 0 as float32 does, which slopes times large
    distances and keys with a common offset need. The sum of gradient times output is another
    number, even of an output in float32: that is made of weights rounded to 16 bits.
    """
    query, *_ = operands
    B, T, N, _ = query.shape
    dtype = accumulated(query.dtype)

    def query_head(index: Array, sums: Array) -> Array:
        b, n = index // N, index % N
        one = head_of(b, n)

        def rows(queries: Tokens, _: Any, sums: Array) -> Array:
            def add(keys: Tokens, fresh_keys: Array | None, D: Array) -> Array:
                _, products, _ = one.weights(queries, keys, (None, fresh_keys))
                return D + products.sum(-1, keepdims=True)

            zeros = full((queries.size, 1), 0, dtype, operands)
            return write_rows(
                sums, one.head.for_keys(queries, plan.keys, add, zeros), b, queries, n
            )

        return for_blocks(T, plan.queries, (0, T), rows, sums)

    return jax.lax.fori_loop(0, B * N, query_head, full((B, T, N, 1), 0, dtype, operands))


def _operand_gradients(
    plan: Plan, head_of: Callable[..., GradientHead], operands: tuple[Any, ...]
) -> tuple[Array, Array, Array, dict[str, Array]]:
    """Of query, key, value, slopes and sinks.

    Every matrix product adds up along the last axis of its left factor and the first of its right,
    or the last of both: on a CPU others take twice the time. So dk, dv and their left factors are
    columns here.
    """
    query, key, value, spec = operands
    (B, T, N, H), (_, S, K, V) = query.shape, value.shape
    G, dtype = N // K, accumulated(query.dtype)
    dq, dk, dv = (full(x.shape, 0, x.dtype, operands) for x in (query, key, value))
    per_head = spec.arrays.keys() & {"alibi_slopes", "sinks"}
    start = (dq, dk, dv, {name: full((N,), 0, dtype, operands) for name in per_head})

    def kv_head(index: Array, carry: Any) -> Any:
        """One KV head of one sequence."""
        b, kv = index // K, index % K

        def query_head(g: Array, carry: Any) -> Any:
            n = kv * G + g
            one = head_of(b, n)
            head = one.head
            # Kept apart: XLA:CPU lacks 16-bit products of transposed factors.
            q_columns, do_columns = jax.lax.optimization_barrier((head.q.T, one.do.T))

            def rows(queries: Tokens, fresh_queries: Array | None, carry: Any) -> Any:
                dqs, dk, dv, added = carry

                def add(keys: Tokens, fresh_keys: Array | None, carry: Any) -> Any:
                    dq, dk, dv, added = carry
                    p, dz, pull = one.weights(queries, keys, (fresh_queries, fresh_keys))
                    ddots, _, dslope = pull(dz)
                    ddots, rest = _split(ddots, query.dtype)
                    dq = dq + head.dot("ts,sh->th", ddots, keys.slice(head.k, 0))
                    if rest is not None:
                        dq = dq + head.dot("ts,sh->th", rest, keys.slice(head.k, 0))
                    part = head.dot("ht,ts->hs", queries.slice(q_columns, 1), ddots)
                    dk = add_slice(dk, part, (0, keys.start))
                    p = head.kept(p, queries, keys).astype(query.dtype)
                    part = head.dot("vt,ts->vs", queries.slice(do_columns, 1), p)
                    dv = add_slice(dv, part, (0, keys.start))
                    if dslope is not None:
                        slopes = added["alibi_slopes"].at[n].add(dslope[0, 0, 0, 0])
                        added = added | {"alibi_slopes": slopes}
                    return dq, dk, dv, added

                zeros = full((queries.size, H), 0, dtype, operands)
                dq, dk, dv, added = head.for_keys(queries, plan.keys, add, (zeros, dk, dv, added))
                dq = dq.astype(query.dtype)
                if fresh_queries is not None:
                    dq = jnp.where(fresh_queries[:, None], dq, read_rows(dqs, b, queries, n))
                return write_rows(dqs, dq, b, queries, n), dk, dv, added

            dqs, dk, dv, added = for_blocks(T, plan.queries, (0, T), rows, carry)
            if head.sink is not None:
                part = -jnp.sum(jnp.exp(head.sink - one.top) * one.share * one.D)
                added = added | {"sinks": added["sinks"].at[n].add(part)}
            return dqs, dk, dv, added

        dqs, dks, dvs, added = carry
        zeros = [full((size, S), 0, dtype, operands) for size in (H, V)]
        dqs, dk, dv, added = jax.lax.fori_loop(0, G, query_head, (dqs, *zeros, added))
        all_keys = Tokens(0, S)
        return (
            dqs,
            write_rows(dks, dk.T, b, all_keys, kv),
            write_rows(dvs, dv.T, b, all_keys, kv),
            added,
        )

    return jax.lax.fori_loop(0, B * K, kv_head, start)


def _bias_gradient(
    plan: Plan, head_of: Callable[..., GradientHead], operands: tuple[Any, ...]
) -> Array:
    """In a pass of its own, which is not compiled where nobody asks for it."""
    query, *_, spec = operands
    B, T, N, _ = query.shape
    bias: Any = spec.logits.bias

    def query_head(index: Array, sums: Array) -> Array:
        b, n = index // N, index % N
        one = head_of(b, n)

        def rows(queries: Tokens, fresh_queries: Array | None, sums: Array) -> Array:
            def add(keys: Tokens, fresh_keys: Array | None, sums: Array) -> Array:
                _, dz, pull = one.weights(queries, keys, (fresh_queries, fresh_keys))
                t, s = spec.placed(queries, keys)
                at = zip(bias.shape, (b, n, t.start, s.start), strict=True)
                # An axis of size 1 is added up over.
                return add_slice(sums, pull(dz)[1], tuple(0 if size == 1 else i for size, i in at))

            return one.head.for_keys(queries, plan.keys, add, sums)

        return for_blocks(T, plan.queries, (0, T), rows, sums)

    start = full(bias.shape, 0, accumulated(query.dtype), operands)
    return jax.lax.fori_loop(0, B * N, query_head, start)


def _split(x: Array, dtype: Any) -> tuple[Array, Array | None]:
    """x rounded to dtype, and what the rounding took away, of that dtype, too; None of nothing.

    The gradients of a row's logits add up to 0, which takes a common offset of the keys out of dq.
    Rounded to 16 bits they do not: with keys of mean 8 dq was 4 times less accurate.
    """
    if x.dtype == dtype:
        return x, None
    bits = jnp.finfo(dtype)
    # Not by a conversion and back, which XLA leaves out (xla_allow_excess_precision), and with it
    # the rounding: the rest would be 0.
    rounded = jax.lax.reduce_precision(x, bits.nexp, bits.nmant)
    return rounded.astype(dtype), (x - rounded).astype(dtype)


def _rounded(products: Array, other: Array) -> Array:
    """Products that are rounded before they are added up.

    XLA merges a product and a sum into one rounding, or not, by the strides of the array, and so by
    how many heads there are. It cannot see through a sum of integers.

    Args:
      other: numbers; where one is NaN the products are void.
    """
    bits = jax.lax.bitcast_convert_type(products, f"int{8 * products.dtype.itemsize}")
    nothing = (other != other).astype(bits.dtype)
    return jax.lax.bitcast_convert_type(bits + nothing, products.dtype)


def _total(x: Array) -> Array:
    """The sum over the last axis, kept, in an order of its own: XLA's depends on the shape."""
    while (size := x.shape[-1]) > 1:
        half = (size + 1) // 2
        rest = [(0, 0)] * (x.ndim - 1) + [(0, size % 2)]
        x = x[..., :half] + jnp.pad(x[..., half:], rest)
    return x
