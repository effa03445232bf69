"""The backward pass on an NVIDIA GPU, which computes the weights again, block by block.

FlashAttention-2, Dao 2023, https://arxiv.org/abs/2307.08691, but in two kernels: one adds up dq
over the keys of a block of queries, the other dk and dv over the queries of a block of keys, those
of all the query heads that read them. So each sum is in one program, in float32, in one order.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from ..mask import Spec
from .parts import residual_products, sinks_gradient
from .softmax_residual import Residual
from .triton_blocks import (
    KEY_ROWS,
    QUERY_ROWS,
    Block,
    Grid,
    Pair,
    dot,
    for_meetings,
    load_head,
    load_tokens,
    own_start,
)
from .triton_exp import exp
from .triton_plan import Blocks, Plan


class Rows(NamedTuple):
    """Per-query inputs of the gradients: arrays, references, or the numbers of a block."""

    q: Any
    do: Any
    D: Any  # the sum of gradient times output, less that of the residual
    top: Any
    share: Any  # 1 / divisor

    def load(self, tokens: Any, head: Any) -> "Rows":
        return Rows(*(ref[0, tokens, head] for ref in self))

    def weights(self, pair: Pair, k: Array, v: Array, interpret: bool) -> Any:
        """The weights, the gradient of the logits, and the derivative of the latter."""
        D, top, share = (pair.for_queries(x) for x in self[2:])
        z, pull = pair.logits_and_pull(pair.products(self.q, k))
        p = exp(z - top, interpret) * share
        return p, p * (pair.drop(pair.products(self.do, v)) - D), pull


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
    """The gradients of query, key and value, and of slopes and sinks where they are given.

    Args:
      out: in float32. The sum of gradient times an output in 16 bits would be off by a rounding
        that grows with an offset that the values have in common.
    """
    D = jnp.sum(out_gradient.astype(jnp.float32) * out, axis=-1)
    D = D - residual_products(residual, residual_gradient)
    operands = (query, key, value, spec)
    dq, dk, dv, added = part_gradients(plan, query.dtype, *operands, D, residual, out_gradient)
    if spec.logits.sinks is not None:
        added["sinks"] = sinks_gradient(spec.logits.sinks, D, residual)
    added = {name: x.astype(getattr(spec.logits, name).dtype) for name, x in added.items()}
    return dq, dk, dv, added


def part_gradients(
    plan: Plan,
    dtype: Any,
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
      dtype: of the gradients of query, key and value.
      D: `[B, T, N]`, the sum of output times gradient, less `residual_products`.
      residual: of whole rows.
    """
    rows = Rows(query, out_gradient, D, residual.top, 1 / residual.divisor)
    dq, dslopes = query_gradients(plan, dtype, rows, key, value, spec)
    dk, dv = key_gradients(plan, dtype, rows, key, value, spec)
    added = {} if dslopes is None else {"alibi_slopes": dslopes.sum((0, 1))}
    return dq, dk, dv, added


def query_gradients(
    plan: Plan, dtype: Any, rows: Rows, key: Array, value: Array, spec: Spec
) -> tuple[Array, Array | None]:
    """dq, and what each query adds to the gradient of its head's slope, if there are slopes."""
    query = rows.q
    results = [(jax.ShapeDtypeStruct(query.shape, dtype), QUERY_ROWS)]
    if spec.logits.alibi_slopes is not None:
        results.append((jax.ShapeDtypeStruct(rows.top.shape, jnp.float32), QUERY_ROWS[:3]))
    dq, *dslopes = Grid("queries", plan.dq, query.shape, key.shape).run(
        partial(dq_kernel, plan.dq, plan.interpret),
        spec,
        [*((x, QUERY_ROWS[: x.ndim]) for x in rows), (key, KEY_ROWS), (value, KEY_ROWS)],
        results,
        products=3,
        interpret=plan.interpret,
    )
    return dq, dslopes[0] if dslopes else None


def dq_kernel(
    blocks: Blocks, interpret: bool, held: Any, meets: Any, spec: Spec, *refs: Any
) -> None:
    """One block of queries of one head; the arguments are references, as `Grid.run` says."""
    *row_refs, k_ref, v_ref = refs[:7]
    dq_ref, *dslope_refs = refs[7:]
    queries = Block.load(held[0], own_start("queries", blocks.queries), blocks.queries)
    own = load_tokens(load_head(spec, 0), "queries", queries)
    rows = Rows(*row_refs).load(slice(None), 0)

    def add(own: Spec, j: Array, carry: Any) -> Any:
        dq, dslope = carry
        here = pl.ds(j * blocks.keys, blocks.keys)
        keys = Block.load(held[1], j * blocks.keys, blocks.keys)
        pair = Pair(load_tokens(own, "keys", keys), queries, keys)
        k, v = k_ref[0, here, 0], v_ref[0, here, 0]
        _, dz, pull = rows.weights(pair, k, v, interpret)
        ddots, part = pull(dz)
        dslope = dslope if part is None else dslope + part.sum(1)
        return dq + dot(ddots, k, 0), dslope

    before = (jnp.zeros(rows.q.shape, jnp.float32), jnp.zeros((blocks.queries,), jnp.float32))
    dq, dslope = for_meetings(own, meets, add, before)
    dq_ref[0, :, 0] = dq.astype(dq_ref.dtype)
    for ref in dslope_refs:
        ref[0, :, 0] = dslope


def key_gradients(
    plan: Plan, dtype: Any, rows: Rows, key: Array, value: Array, spec: Spec
) -> tuple[Array, Array]:
    """dk and dv."""
    return Grid("keys", plan.dkv, rows.q.shape, key.shape).run(
        partial(dkv_kernel, plan.dkv, plan.interpret),
        spec,
        [*((x, QUERY_ROWS[: x.ndim]) for x in rows), (key, KEY_ROWS), (value, KEY_ROWS)],
        [(jax.ShapeDtypeStruct(x.shape, dtype), KEY_ROWS) for x in (key, value)],
        products=4,
        interpret=plan.interpret,
    )


def dkv_kernel(
    blocks: Blocks, interpret: bool, held: Any, meets: Any, spec: Spec, *refs: Any
) -> None:
    """One block of keys of one KV head; the arguments are references, as `Grid.run` says.

    Keys are the first axis of the logits, as they are of dk and dv. With queries first, Triton
    turns weights and gradients by way of shared memory, at 5 barriers for a pair of blocks in place
    of 2, and needs more than 120 s in place of 4 to compile dropout (JAX 0.10.2, for an H100).
    """
    *row_refs, k_ref, v_ref, dk_ref, dv_ref = refs
    keys = Block.load(held[1], own_start("keys", blocks.keys), blocks.keys)
    k, v = k_ref[0, :, 0], v_ref[0, :, 0]

    def add_head(head: Array, carry: Any) -> Any:
        own = load_tokens(load_head(spec, head), "keys", keys)

        def add(own: Spec, i: Array, carry: Any) -> Any:
            dk, dv = carry
            here = pl.ds(i * blocks.queries, blocks.queries)
            queries = Block.load(held[0], i * blocks.queries, blocks.queries)
            pair = Pair(load_tokens(own, "queries", queries), queries, keys, keys_first=True)
            rows = Rows(*row_refs).load(here, head)
            p, dz, pull = rows.weights(pair, k, v, interpret)
            return dk + dot(pull(dz)[0], rows.q, 0), dv + dot(pair.drop(p), rows.do, 0)

        return for_meetings(own, meets, add, carry)

    before = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
    dk, dv = jax.lax.fori_loop(0, row_refs[0].shape[2], add_head, before)
    dk_ref[0, :, 0] = dk.astype(dk_ref.dtype)
    dv_ref[0, :, 0] = dv.astype(dv_ref.dtype)
