"""The forward pass of blockwise attention: FlashAttention's running softmax over blocks of keys.

Dao et al. 2022, https://arxiv.org/abs/2205.14135. One query head of one sequence after another, so
a head has the same bits whatever others are beside it.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ..mask import Spec, Tokens, accumulated
from ..mask.token_numbers import for_blocks
from ..varying_axes import full_varying
from .blockwise_head import Head, Plan, split, write_rows
from .softmax_residual import Residual, finite


# Compiled in an eager call, too: a loop that is traced anew each time would compile each time.
@partial(jax.jit, static_argnums=0)
def forward(
    plan: Plan, query: Array, key: Array, value: Array, spec: Spec
) -> tuple[Array, Residual]:
    """The output `[B, T, N, V]`, and the residual `[B, T, N]`."""
    (B, T, N, _), V = query.shape, value.shape[3]
    dtype = accumulated(query.dtype)
    like = (query, key, value, spec)
    zeros = full_varying((B, T, N, 1), 0, dtype, like)
    start = (full_varying((B, T, N, V), 0, plan.result_dtype(query), like), Residual(zeros, zeros))

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
                both = split(p, head.q.dtype) if plan.parts else (p, None)
                part = head.dot_of_two("ts,sv->tv", both, keys.slice(head.v, 0))
                return higher, total, weighted * rescale + part

            t = queries.size
            top, total = (full_varying((t, 1), x, dtype, like) for x in (-jnp.inf, 0))
            if head.sink is not None:
                top = jnp.maximum(top, head.sink)
                total = jnp.where(top == -jnp.inf, total, 1)
            before = (top, total, full_varying((t, V), 0, dtype, like))
            top, total, weighted = head.for_keys(queries, plan.keys, add, before)
            residual = Residual(finite(top), total)
            return jax.tree.map(
                lambda x, part: write_rows(x, part, b, queries, n),
                carry,
                (weighted / residual.divisor, residual),
            )

        return for_blocks(T, plan.queries, (0, T), rows, carry)

    out, residual = jax.lax.fori_loop(0, B * N, attend, start)
    return out, Residual(*(x[..., 0] for x in residual))
