"""The two passes of FlashAttention over blocks of logits.

Forward: Dao et al. 2022, https://arxiv.org/abs/2205.14135; backward: Dao 2023,
https://arxiv.org/abs/2307.08691. One query head of one sequence after another, so a head has the
same bits whatever others are beside it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ..mask import Spec, Terms, Tokens, accumulated
from ..mask.tokens import for_blocks, full
from .normaliser import Normaliser, finite


@dataclass(frozen=True)
class Plan:
    """What is static besides the rules.

    Attributes:
      queries, keys: tokens of a block.
      precision: that of matrix products where the attention is called. JAX traces the rules of
        derivatives later, where another may be in force.
    """

    queries: int
    keys: int
    precision: str | None


class Head(NamedTuple):
    """One query head of one sequence: `[T, H]`, `[S, H]`, `[S, V]`, and its part of the rest."""

    q: Array
    k: Array
    v: Array
    spec: Spec
    dtype: Any  # of logits and sums

    @classmethod
    def of(cls, b: Any, n: Any, query: Array, key: Array, value: Array, spec: Spec) -> "Head":
        kv = n // (query.shape[2] // key.shape[2])
        own, dtype = spec.take_heads(b, n, 1), accumulated(query.dtype)
        return cls(_head(query, b, n), _head(key, b, kv), _head(value, b, kv), own, dtype)

    @property
    def sink(self) -> Array | None:
        sinks = self.spec.logits.sinks
        return None if sinks is None else sinks.astype(self.dtype)[0]

    def dot(self, spec: str, x: Array, y: Array) -> Array:
        return jnp.einsum(spec, x.astype(self.q.dtype), y, preferred_element_type=self.dtype)

    def logits_and_pull(self, queries: Tokens, keys: Tokens) -> tuple[Array, Callable[..., Any]]:
        """`[t, s]`, and its derivative by the dot products, by bias and by slopes."""
        dots = self.dot("th,sh->ts", queries.slice(self.q, 0), keys.slice(self.k, 0))
        terms = self.spec.terms(queries, keys)

        def of(dots: Array, bias: Any, slopes: Any) -> Array:
            own = Terms(bias, slopes, terms.distance, terms.allowed)
            return self.spec.to_logits(dots[None, None], own, self.q.shape[1])[0, 0]

        # In float32, so that sums of their gradients are, too.
        added = (x if x is None else x.astype(self.dtype) for x in terms[:2])
        return jax.vjp(of, dots, *added)

    def kept(self, weights: Array, queries: Tokens, keys: Tokens) -> Array:
        keep = self.spec.keep(queries, keys)
        return self.spec.dropout.apply(weights, None if keep is None else keep[0, 0])

    def for_keys(self, queries: Tokens, size: int, body: Callable[..., Any], carry: Any) -> Any:
        S = self.k.shape[0]
        return for_blocks(S, size, self.spec.keys_of(queries, S), body, carry)


# Compiled in an eager call, too: a loop that is traced anew each time would compile each time.
@partial(jax.jit, static_argnums=0)
def forward(
    plan: Plan, query: Array, key: Array, value: Array, spec: Spec
) -> tuple[Array, Normaliser]:
    """The output `[B, T, N, V]`, and the normaliser `[B, T, N]`."""
    (B, T, N, _), V = query.shape, value.shape[3]
    dtype = accumulated(query.dtype)
    like = (query, key, value, spec)
    none = full((B, T, N, 1), 0, dtype, like)
    start = (full((B, T, N, V), 0, query.dtype, like), Normaliser(none, none))

    def attend(index: Array, carry: Any) -> Any:
        b, n = index // N, index % N
        head = Head.of(b, n, query, key, value, spec)

        def rows(queries: Tokens, _: Any, carry: Any) -> Any:
            def add(keys: Tokens, fresh: Array | None, carry: Any) -> Any:
                top, total, weighted = carry
                z, _ = head.logits_and_pull(queries, keys)
                if fresh is not None:
                    z = jnp.where(fresh[None], z, -jnp.inf)
                higher = jnp.maximum(top, z.max(-1, keepdims=True))
                p = jnp.exp(z - finite(higher))
                rescale = jnp.exp(top - finite(higher))
                total = total * rescale + p.sum(-1, keepdims=True)
                p = head.kept(p, queries, keys)
                part = head.dot("ts,sv->tv", p, keys.slice(head.v, 0))
                return higher, total, weighted * rescale + part

            t = queries.size
            top, total = (full((t, 1), x, dtype, like) for x in (-jnp.inf, 0))
            if head.sink is not None:
                top = jnp.maximum(top, head.sink)
                total = jnp.where(top == -jnp.inf, total, 1)
            none = (top, total, full((t, V), 0, dtype, like))
            top, total, weighted = head.for_keys(queries, plan.keys, add, none)
            normaliser = Normaliser(finite(top), total)
            return jax.tree.map(
                lambda x, part: _put(x, part, b, queries, n),
                carry,
                (weighted / normaliser.divisor, normaliser),
            )

        return for_blocks(T, plan.queries, (0, T), rows, carry)

    out, normaliser = jax.lax.fori_loop(0, B * N, attend, start)
    return out, Normaliser(*(x[..., 0] for x in normaliser))


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
        own = (_head(x, b, n) for x in (out_gradient, *rows))
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
    normaliser: Normaliser,
    out_gradient: Array,
    normaliser_gradient: Normaliser,
) -> tuple[Array, Array, Array, dict[str, Array]]:
    """The gradients of query, key and value, and of bias, slopes and sinks where they are given."""
    operands = (query, key, value, spec)
    logits = spec.logits
    dtype = accumulated(query.dtype)
    top, total, share = (x[..., None] for x in (*normaliser, 1 / normaliser.divisor))

    def head_with(D: Array) -> Callable[..., GradientHead]:
        rows = (D, top, share)
        return partial(GradientHead.of, operands=operands, out_gradient=out_gradient, rows=rows)

    if query.dtype.itemsize == 2:
        D = _weighted_sums(plan, head_with(jnp.zeros_like(total)), operands)
    else:
        D = _total(_rounded(out_gradient.astype(dtype) * out.astype(dtype), total))
    # The derivative of the lse by a logit is its weight, that of the total as much times the total.
    head_of = head_with(D - normaliser_gradient.total[..., None] * total)
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

            none = full((queries.size, 1), 0, dtype, operands)
            return _put(sums, one.head.for_keys(queries, plan.keys, add, none), b, queries, n)

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
                    dk = _add(dk, part, (0, keys.start))
                    p = head.kept(p, queries, keys).astype(query.dtype)
                    part = head.dot("vt,ts->vs", queries.slice(do_columns, 1), p)
                    dv = _add(dv, part, (0, keys.start))
                    if dslope is not None:
                        slopes = added["alibi_slopes"].at[n].add(dslope[0, 0, 0, 0])
                        added = added | {"alibi_slopes": slopes}
                    return dq, dk, dv, added

                none = full((queries.size, H), 0, dtype, operands)
                dq, dk, dv, added = head.for_keys(queries, plan.keys, add, (none, dk, dv, added))
                dq = dq.astype(query.dtype)
                if fresh_queries is not None:
                    dq = jnp.where(fresh_queries[:, None], dq, _get(dqs, b, queries, n))
                return _put(dqs, dq, b, queries, n), dk, dv, added

            dqs, dk, dv, added = for_blocks(T, plan.queries, (0, T), rows, carry)
            if head.sink is not None:
                part = -jnp.sum(jnp.exp(head.sink - one.top) * one.share * one.D)
                added = added | {"sinks": added["sinks"].at[n].add(part)}
            return dqs, dk, dv, added

        dqs, dks, dvs, added = carry
        none = [full((size, S), 0, dtype, operands) for size in (H, V)]
        dqs, dk, dv, added = jax.lax.fori_loop(0, G, query_head, (dqs, *none, added))
        all_keys = Tokens(0, S)
        return dqs, _put(dks, dk.T, b, all_keys, kv), _put(dvs, dv.T, b, all_keys, kv), added

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
                return _add(sums, pull(dz)[1], tuple(0 if size == 1 else i for size, i in at))

            return one.head.for_keys(queries, plan.keys, add, sums)

        return for_blocks(T, plan.queries, (0, T), rows, sums)

    start = full(bias.shape, 0, accumulated(query.dtype), operands)
    return jax.lax.fori_loop(0, B * N, query_head, start)


def _at(*indices: Any) -> tuple[Array, ...]:
    """Where a slice starts, in one dtype.

    With 64 bits on, loops count in int64 while bounds that segments, positions or lengths set are
    int32, and JAX raises TypeError for a slice at both.
    """
    return tuple(jnp.asarray(i, jnp.int32) for i in indices)


def _head(x: Array, b: Any, n: Any) -> Array:
    part = jax.lax.dynamic_slice(x, _at(b, 0, n, 0), (1, x.shape[1], 1, x.shape[3]))
    return part.reshape(x.shape[1], x.shape[3])


def _get(x: Array, b: Any, tokens: Tokens, n: Any) -> Array:
    size = (1, tokens.size, 1, x.shape[3])
    return jax.lax.dynamic_slice(x, _at(b, tokens.start, n, 0), size)[0, :, 0]


def _put(x: Array, part: Array, b: Any, tokens: Tokens, n: Any) -> Array:
    part = part.astype(x.dtype)[None, :, None]
    return jax.lax.dynamic_update_slice(x, part, _at(b, tokens.start, n, 0))


def _add(x: Array, part: Array, start: tuple[Any, ...]) -> Array:
    old = jax.lax.dynamic_slice(x, _at(*start), part.shape)
    return jax.lax.dynamic_update_slice(x, old + part, _at(*start))


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
