"""The backward pass of blockwise attention, which computes the weights again, block by block.

FlashAttention-2, Dao 2023, https://arxiv.org/abs/2307.08691.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ..mask import AnyTokens, Spec, Tokens, accumulated
from ..mask.token_numbers import for_blocks
from ..varying_axes import full_varying
from .blockwise_head import Head, Plan, add_slice, read_head, read_rows, split, write_rows
from .parts import output_products, residual_products
from .softmax_residual import Residual


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
    if query.dtype.itemsize == 2:
        zeros = jnp.zeros_like(residual.total)
        D = _weighted_sums(plan, _heads_of(operands, zeros, residual, out_gradient), operands)
    else:
        D = output_products(out, out_gradient)
    D = D - residual_products(residual, residual_gradient)
    dq, dk, dv, added = part_gradients(plan, *operands, D, residual, out_gradient)
    return dq, dk, dv, {n: x.astype(getattr(spec.logits, n).dtype) for n, x in added.items()}


@partial(jax.jit, static_argnums=0)
def part_gradients(
    plan: Plan,
    query: Array,
    key: Array,
    value: Array,
    spec: Spec,
    D: Array,
    residual: Residual,
    out_gradient: Array,
) -> tuple[Array, Array, Array, dict[str, Array]]:
    """The gradients by the keys that are held, which may be a part of those of the rows.

    Args:
      D: `[B, T, N]`, the sum of output times gradient, less `residual_products`.
      residual: of whole rows.

    Returns:
      Gradients of query, key and value; and of bias, slopes and sinks, in the dtype of the sums.
    """
    operands = (query, key, value, spec)
    head_of = _heads_of(operands, D, residual, out_gradient)
    dq, dk, dv, added = _operand_gradients(plan, head_of, operands)
    if spec.logits.bias is not None:
        added["bias"] = _bias_gradient(plan, head_of, operands)
    return dq, dk, dv, added


def _heads_of(
    operands: tuple[Any, ...], D: Array, residual: Residual, out_gradient: Array
) -> Callable[..., GradientHead]:
    rows = tuple(x[..., None] for x in (D, residual.top, 1 / residual.divisor))
    return partial(GradientHead.of, operands=operands, out_gradient=out_gradient, rows=rows)


def _weighted_sums(
    plan: Plan, head_of: Callable[..., GradientHead], operands: tuple[Any, ...]
) -> Array:
    """D `[B, T, N]` of 16-bit operands, as the sum over keys of weight times its gradient.

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

            zeros = full_varying((queries.size, 1), 0, dtype, operands)
            return write_rows(
                sums, one.head.for_keys(queries, plan.keys, add, zeros), b, queries, n
            )

        return for_blocks(T, plan.queries, (0, T), rows, sums)

    zeros = full_varying((B, T, N, 1), 0, dtype, operands)
    return jax.lax.fori_loop(0, B * N, query_head, zeros)[..., 0]


def _operand_gradients(
    plan: Plan, head_of: Callable[..., GradientHead], operands: tuple[Any, ...]
) -> tuple[Array, Array, Array, dict[str, Array]]:
    """Gradients of query, key and value, and by name of ALiBi slopes and sinks.

    Every matrix product contracts the last axis of its left factor with the first of its right, or
    the last axes of both: on a CPU other contractions take twice the time. So dk, dv and their left
    factors are columns here.
    """
    query, key, value, spec = operands
    (B, T, N, H), (_, S, K, V) = query.shape, value.shape
    G, dtype = N // K, accumulated(query.dtype)
    dq, dk, dv = (
        full_varying(x.shape, 0, plan.result_dtype(x), operands) for x in (query, key, value)
    )
    per_head = spec.arrays.keys() & {"alibi_slopes", "sinks"}
    start = (dq, dk, dv, {name: full_varying((N,), 0, dtype, operands) for name in per_head})

    def kv_head(index: Array, carry: Any) -> Any:
        """One KV head of one sequence."""
        b, kv = index // K, index % K

        def query_head(g: Array, carry: Any) -> Any:
            """One of the G query heads that read this KV head."""
            n = kv * G + g
            one = head_of(b, n)
            head = one.head
            # Kept apart: XLA:CPU lacks 16-bit products of transposed factors.
            q_columns, do_columns = jax.lax.optimization_barrier((head.q.T, one.do.T))

            def rows(queries: Tokens, fresh_queries: Array | None, carry: Any) -> Any:
                """One block of queries: dq is complete at its end, dk and dv grow."""
                dqs, dk, dv, added = carry

                def add(keys: Tokens, fresh_keys: Array | None, carry: Any) -> Any:
                    """One block of keys for one block of queries: p and dz are `[t, s]`."""
                    dq, dk, dv, added = carry
                    p, dz, pull = one.weights(queries, keys, (fresh_queries, fresh_keys))
                    ddots, _, dslope = pull(dz)
                    ddots, rest = split(ddots, query.dtype)
                    dq = dq + head.dot_of_two("ts,sh->th", (ddots, rest), keys.slice(head.k, 0))
                    part = head.dot("ht,ts->hs", queries.slice(q_columns, 1), ddots)
                    dk = add_slice(dk, part, (0, keys.start))
                    p = head.kept(p, queries, keys).astype(query.dtype)
                    part = head.dot("vt,ts->vs", queries.slice(do_columns, 1), p)
                    dv = add_slice(dv, part, (0, keys.start))
                    if dslope is not None:
                        slopes = added["alibi_slopes"].at[n].add(dslope[0, 0, 0, 0])
                        added = added | {"alibi_slopes": slopes}
                    return dq, dk, dv, added

                zeros = full_varying((queries.size, H), 0, dtype, operands)
                dq, dk, dv, added = head.for_keys(queries, plan.keys, add, (zeros, dk, dv, added))
                dq = dq.astype(dqs.dtype)
                if fresh_queries is not None:
                    dq = jnp.where(fresh_queries[:, None], dq, read_rows(dqs, b, queries, n))
                return write_rows(dqs, dq, b, queries, n), dk, dv, added

            dqs, dk, dv, added = for_blocks(T, plan.queries, (0, T), rows, carry)
            if head.sink is not None:
                part = -jnp.sum(jnp.exp(head.sink - one.top) * one.share * one.D)
                added = added | {"sinks": added["sinks"].at[n].add(part)}
            return dqs, dk, dv, added

        dqs, dks, dvs, added = carry
        zeros = [full_varying((size, S), 0, dtype, operands) for size in (H, V)]
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
    """Gradient of the bias, in a separate pass that XLA drops where the gradient is not used."""
    query, *_, spec = operands
    B, T, N, _ = query.shape
    bias: Any = spec.logits.bias

    def query_head(index: Array, sums: Array) -> Array:
        b, n = index // N, index % N
        one = head_of(b, n)

        def rows(queries: Tokens, fresh_queries: Array | None, sums: Array) -> Array:
            def add(keys: Tokens, fresh_keys: Array | None, sums: Array) -> Array:
                _, dz, pull = one.weights(queries, keys, (fresh_queries, fresh_keys))
                return _add_to_bias(sums, pull(dz)[1], b, n, *spec.in_sequence(queries, keys))

            return one.head.for_keys(queries, plan.keys, add, sums)

        return for_blocks(T, plan.queries, (0, T), rows, sums)

    start = full_varying(bias.shape, 0, accumulated(query.dtype), operands)
    return jax.lax.fori_loop(0, B * N, query_head, start)


def _add_to_bias(
    sums: Array, part: Array, b: Any, n: Any, queries: AnyTokens, keys: AnyTokens
) -> Array:
    """The sums `[B, N, T, S]` with those of a block added; an axis of size 1 is added up over."""
    if isinstance(queries, Tokens) and isinstance(keys, Tokens):
        at = zip(sums.shape, (b, n, queries.start, keys.start), strict=True)
        return add_slice(sums, part, tuple(0 if size == 1 else i for size, i in at))
    at = zip(sums.shape, (b, n, queries.numbers[:, None], keys.numbers[None]), strict=True)
    nothing = jnp.zeros((1, 1), jnp.int32)
    return sums.at[tuple(nothing if size == 1 else i for size, i in at)].add(part[0, 0])
