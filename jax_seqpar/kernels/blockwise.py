"""Attention block by block, in plain XLA: memory linear in the tokens, nothing done where nobody
attends."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._checks import check_chunk_sizes, check_flag
from ..mask import Spec, Tokens, accumulated
from ..mask.array_fields import arrays_of
from ..varying_axes import match_varying_axes
from .blockwise_backward import backward, part_gradients
from .blockwise_forward import forward
from .blockwise_head import Plan
from .dense import dense_rows
from .kernel import Kernel
from .parts import Part
from .softmax_residual import Residual

# Tokens. On two CPU cores blocks of 1024 take 1.4 times as long forward and 1.5 with gradients at
# 1K tokens, where half of the one block is masked, and 1.02 to 1.14 times at 2K and 4K.
LARGEST_BLOCK = 512


@dataclass(frozen=True)
class Blockwise(Kernel):
    """`softmax(query . key * scale + bias) . value`, in memory linear in the tokens.

    Logits and sums are float32 for 16-bit inputs, the weights are rounded to the values' dtype; all
    is float64 for float64 inputs. Blocks that causality, window, segments, positions or lengths
    rule out are not computed; those of a mask array and of `bias` are. Reverse-mode derivatives of
    any order, with respect to query, key, value, bias, slopes and sinks; the first recomputes the
    weights, later ones are slower.

    The residual that `return_residual` gives is one float32 number, which does not hold the sum
    beside a large logit: near a maximum of 1e5 it is a multiple of 1/128, near -1e9 (a row of
    padding by a large negative bias) one of 64, and so are the shares of the parts merged by it.
    Output and gradients go by the maximum and the sum, kept apart.

    Args:
      query_chunk, key_chunk: queries and keys of a block; up to 512 if None, as is best for the
        caches of a CPU. On a GPU `choose_kernel` takes 1024 where blocks are not left out.
      forward_mode: derivatives of any order in either mode, with a slower first one. Without, JAX
        raises TypeError for a derivative in forward mode.
    """

    query_chunk: int | None = None
    key_chunk: int | None = None
    forward_mode: bool = False

    gives_residual = True
    gives_parts = True

    def __post_init__(self) -> None:
        check_chunk_sizes(query_chunk=self.query_chunk, key_chunk=self.key_chunk)
        check_flag("forward_mode", self.forward_mode)

    def attend(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B S K H"],
        value: Float[Array, "B S K V"],
        spec: Spec,
    ) -> tuple[Array, Residual]:
        query, key, value, spec = match_varying_axes((query, key, value, spec))
        return _attend(self.forward_mode, self._plan(query, key), query, key, value, spec)

    def attend_part(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B S K H"],
        value: Float[Array, "B S K V"],
        spec: Spec,
    ) -> Part:
        return Part(*forward(self._plan(query, key, parts=True), query, key, value, spec))

    def part_gradients(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B S K H"],
        value: Float[Array, "B S K V"],
        spec: Spec,
        D: Float[Array, "B T N"],
        residual: Residual,
        out_gradient: Float[Array, "B T N V"],
    ) -> tuple[Array, Array, Array, dict[str, Array]]:
        plan = self._plan(query, key, parts=True)
        return part_gradients(plan, query, key, value, spec, D, residual, out_gradient)

    def workspace(
        self,
        query: tuple[int, ...],
        key: tuple[int, ...],
        value: tuple[int, ...],
        *,
        itemsize: int,
        gradients: bool,
    ) -> int:
        """One head of query, key and value, and blocks of its logits.

        With gradients of the output's gradient as well, transposes of this one and the query, and
        the sums of the gradients of key and value.
        """
        (_, T, _, H), (_, S, _, V), wide = query, value, max(itemsize, 4)
        block = wide * _block_size(T, self.query_chunk) * _block_size(S, self.key_chunk)
        if not gradients:
            return itemsize * (T * H + S * (H + V)) + 2 * block
        return (2 * itemsize * T + (itemsize + wide) * S) * (H + V) + 3 * block

    def _plan(self, query: Array, key: Array, *, parts: bool = False) -> Plan:
        precision = jax.config.jax_default_matmul_precision  # pyright: ignore
        return Plan(
            _block_size(query.shape[1], self.query_chunk),
            _block_size(key.shape[1], self.key_chunk),
            precision,
            parts,
        )


blockwise_attention = Blockwise()


def _block_size(tokens: int, chunk: int | None) -> int:
    """Tokens of a block: those asked for, else blocks of one size.

    So the last block does not repeat most of the one before.
    """
    even = -(-tokens // max(-(-tokens // LARGEST_BLOCK), 1))
    return max(min(tokens, chunk or -(-even // 16) * 16), 1)


# Compiled in an eager call, too: the loops of a derivative would else be compiled at each call.
@partial(jax.jit, static_argnums=(0, 1))
def _attend(forward_mode: bool, plan: Plan, query: Any, key: Any, value: Any, spec: Any):
    if 0 in (*query.shape[:3], *value.shape[1:]):
        attend: Any = _row_after_row  # of nothing, a loop can cut no block
    else:
        attend = _forward if forward_mode else _attention
    return attend(plan, query, key, value, spec)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(plan: Plan, query: Any, key: Any, value: Any, spec: Any) -> Any:
    return _forward(plan, query, key, value, spec)


def _attention_fwd(plan: Plan, *operands: Any) -> Any:
    results = _forward(plan, *operands)
    return results, (*operands, *results)


def _attention_bwd(plan: Plan, saved: Any, gradients: Any) -> Any:
    spec = saved[3]
    dq, dk, dv, added = _backward(plan, *saved, *gradients)
    absent = spec.map(lambda x, axes: None)
    return dq, dk, dv, absent.with_logits(**added)


_attention.defvjp(_attention_fwd, _attention_bwd)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _forward(plan: Plan, *operands: Any) -> Any:
    # JAX may trace it for a derivative after the caller's context has ended.
    with jax.default_matmul_precision(plan.precision):
        return forward(plan, *operands)


@_forward.defjvp
def _forward_jvp(plan: Plan, operands: Any, tangents: Any) -> Any:
    return jax.jvp(partial(_row_after_row, plan), operands, tangents)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _backward(plan: Plan, *operands: Any) -> Any:
    with jax.default_matmul_precision(plan.precision):
        return backward(plan, *operands)


@_backward.defjvp
def _backward_jvp(plan: Plan, operands: Any, tangents: Any) -> Any:
    def gradient(query: Any, key: Any, value: Any, spec: Any, *rest: Any) -> Any:
        _, _, *gradients = rest  # output and residual are functions of the others

        def attend(query: Any, key: Any, value: Any, added: Any) -> Any:
            return _row_after_row(plan, query, key, value, spec.with_logits(**added))

        added = dict(arrays_of(spec.logits))
        return jax.vjp(attend, query, key, value, added)[1](tuple(gradients))

    return jax.jvp(gradient, operands, tangents)


def _row_after_row(
    plan: Plan, query: Array, key: Array, value: Array, spec: Spec
) -> tuple[Array, Residual]:
    """Attention in operations that JAX differentiates, whole rows of some queries at a time."""
    (B, T, N, _), K = query.shape, key.shape[2]
    if 0 in (B, T, N, *value.shape[1:]):
        return dense_rows(query, key, value, spec, Tokens(0, T))
    blocks = -(-T // plan.queries)
    # JAX adds up the gradients of what rows share in the dtype it has here: 16 bits would round at
    # each row.
    dtype, wide = query.dtype, accumulated(query.dtype)
    key, value = key.astype(wide), value.astype(wide)
    added = {name: x.astype(wide) for name, x in arrays_of(spec.logits)}
    spec = spec.with_logits(**added)

    @jax.checkpoint
    @jax.default_matmul_precision(plan.precision)
    def rows(index: Array) -> tuple[Array, Residual]:
        head, i = index // blocks, index % blocks
        b, n = head // N, head % N
        queries = Tokens(jnp.minimum(i * plan.queries, T - plan.queries), plan.queries)
        q, k, v = (
            jax.lax.dynamic_slice(x, (b, 0, n, 0), (1, x.shape[1], 1, x.shape[3]))
            for x, n in ((query, n), (key, n // (N // K)), (value, n // (N // K)))
        )
        k, v = k.astype(dtype), v.astype(dtype)
        own = spec.take_heads(b, n, 1)
        return jax.tree.map(
            lambda x: x[0, :, 0], dense_rows(queries.slice(q, 1), k, v, own, queries)
        )

    def together(x: Array) -> Array:
        """`[B N blocks, t, ...]`; the last block of a head ends with the last query."""
        x = x.reshape(B, N, blocks, *x.shape[1:])
        first = x[:, :, :-1].reshape(B, N, -1, *x.shape[4:])
        last = x[:, :, -1, blocks * plan.queries - T :]
        return jnp.concatenate([first, last], axis=2).swapaxes(1, 2)

    return jax.tree.map(together, jax.lax.map(rows, jnp.arange(B * N * blocks)))
