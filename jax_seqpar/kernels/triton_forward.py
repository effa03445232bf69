"""The forward pass on an NVIDIA GPU: FlashAttention's running softmax, one program for each block.

Dao et al. 2022, https://arxiv.org/abs/2205.14135. A program has a block of queries of one head, and
meets one after another the blocks of keys that some of these may attend to.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from ..mask import Spec
from .softmax_residual import Residual, finite
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


def forward(
    plan: Plan, dtype: Any, query: Array, key: Array, value: Array, spec: Spec
) -> tuple[Array, Residual]:
    """The output `[B, T, N, V]`, of a dtype, and the residual `[B, T, N]`, of padded operands."""
    rows, V = query.shape[:3], value.shape[3]
    out = jax.ShapeDtypeStruct((*rows, V), dtype)
    number = jax.ShapeDtypeStruct(rows, jnp.float32)
    out, *residual = Grid("queries", plan.forward, query.shape, key.shape).run(
        partial(forward_kernel, plan.forward, plan.interpret),
        spec,
        [(query, QUERY_ROWS), (key, KEY_ROWS), (value, KEY_ROWS)],
        [(out, QUERY_ROWS), *[(number, QUERY_ROWS[:3])] * 2],
        products=2,
        interpret=plan.interpret,
    )
    return out, Residual(*residual)


def forward_kernel(
    blocks: Blocks,
    interpret: bool,
    held: Any,
    meets: Any,
    spec: Spec,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    out_ref: Any,
    *residual_refs: Any,
) -> None:
    """One block of queries of one head; the arguments are references, as `Grid.run` says."""
    queries = Block.load(held[0], own_start("queries", blocks.queries), blocks.queries)
    own = load_tokens(load_head(spec, 0), "queries", queries)
    q = q_ref[0, :, 0]

    def add(own: Spec, j: Array, carry: Any) -> Any:
        top, total, weighted = carry
        here = pl.ds(j * blocks.keys, blocks.keys)
        keys = Block.load(held[1], j * blocks.keys, blocks.keys)
        pair = Pair(load_tokens(own, "keys", keys), queries, keys)
        z, _ = pair.logits_and_pull(pair.products(q, k_ref[0, here, 0]))
        higher = jnp.maximum(top, z.max(1))
        p = exp(z - finite(higher)[:, None], interpret)
        rescale = exp(top - finite(higher), interpret)
        part = dot(pair.drop(p), v_ref[0, here, 0], 0)
        return higher, total * rescale + p.sum(1), weighted * rescale[:, None] + part

    top = jnp.full((blocks.queries,), -jnp.inf, jnp.float32)
    total = jnp.zeros_like(top)
    if own.logits.sinks is not None:
        top = jnp.maximum(top, own.logits.sinks.astype(jnp.float32))
        total = jnp.where(top == -jnp.inf, total, 1)
    before = (top, total, jnp.zeros((blocks.queries, v_ref.shape[3]), jnp.float32))
    top, total, weighted = for_meetings(own, meets, add, before)
    residual = Residual(finite(top), total)
    out_ref[0, :, 0] = (weighted / residual.divisor[:, None]).astype(out_ref.dtype)
    for ref, x in zip(residual_refs, residual, strict=True):
        ref[0, :, 0] = x
