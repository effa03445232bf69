"""Exact attention of one device: the specification in `jax_seqpar.exact`, as a JAX function."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from .. import refusals
from ..masks import SegmentIds, Window
from ..shared_heads import SharedHeads
from . import arithmetic
from .backward import key_value_gradients, query_gradient
from .forward import output
from .problem import Options, Problem


def exact_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    *,
    bias: Float[Array, "..."] | None = None,
    mask: Bool[Array, "..."] | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Int[Array, "B"] | None = None,
    key_value_seq_lengths: Int[Array, "B"] | None = None,
    local_window_size: Window | None = None,
    segment_ids: SegmentIds | None = None,
    logits_soft_cap: float | None = None,
    shared_heads: SharedHeads | None = None,
    query_chunk: int | None = None,
    key_chunk: int | None = None,
) -> Float[Array, "B T N H"]:
    """`softmax(query . key * scale + bias) . value` with the same bits however it is computed.

    Output and gradients are the function that `jax_seqpar.exact` specifies: equal in every bit to
    `torch_ref.exact.exact_attention`, compiled or not, on any number of devices, on every backend
    that `jax_seqpar.exact.certify` passes. As accurate as float32 attention, and not equal to a
    stock kernel. Memory grows linearly with the tokens. Float64 inside, whatever `jax_enable_x64`
    says. Reverse-mode derivatives, once.

    Args:
      query, key, value: float32, bfloat16 or float16, all the same; K divides N.
      bias: added to the logits, broadcastable to `[B, N, T, S]`. It has no gradient.
      mask: True attends, broadcastable to `[B, N, T, S]`.
      scale: of the logits, rounded to float32; `1 / sqrt(H)` if None.
      is_causal, query_seq_lengths, key_value_seq_lengths, local_window_size, segment_ids: as in
        `jax_seqpar.masks.Masks`.
      logits_soft_cap: logits become `cap * tanh(logits / cap)` before the bias is added; rounded to
        float32.
      shared_heads: other devices with the same KV heads and query heads of their own. Their parts
        of the gradients of key and value are added without rounding, and one of the devices returns
        the sum, the others 0. `ulysses_attention` passes it where it is needed.
      query_chunk, key_chunk: queries and keys that are worked on at a time; None chooses. No bit
        depends on them.

    Returns:
      The attention output, of the query's dtype; 0 for a query that may attend to no key.

    Raises:
      ValueError: another dtype, sizes that do not fit, or a derivative with respect to bias.
    """
    refusals.check_arrays(query, key, value)
    devices = 1 if shared_heads is None else shared_heads.devices
    refusals.check_exact(query, key, devices, query_chunk=query_chunk, key_chunk=key_chunk)
    arrays = {
        "mask": mask,
        "query_seq_lengths": query_seq_lengths,
        "key_value_seq_lengths": key_value_seq_lengths,
        "segment_ids": segment_ids,
    }
    refusals.check_masks(query.shape, key.shape, bias=bias, **arrays)
    static = {"is_causal": is_causal, "local_window_size": local_window_size}
    refusals.check_scalars(scale=scale, logits_soft_cap=logits_soft_cap, **static)

    B, T, N, H = query.shape
    S, K = key.shape[1:3]
    if 0 in (*query.shape, S):
        return jnp.zeros_like(query)
    limit = arithmetic.CONTRACT_TOKENS
    options = Options(
        scale=_float32(H**-0.5 if scale is None else scale),
        logits_soft_cap=None if logits_soft_cap is None else _float32(logits_soft_cap),
        **static,
        shared_heads=shared_heads,
        query_chunk=min(T, query_chunk or max(32, 1024 // (B * N)), max(limit * K // N, 1)),
        key_chunk=min(S, key_chunk or 512, limit),
        sum_limit=limit,
    )
    bias = None if bias is None else _without_gradient(bias)
    return _attention(options, query, key, value, bias, arrays)


def _float32(x: float) -> float:
    return float(np.float32(x))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(options: Options, query: Any, key: Any, value: Any, bias: Any, arrays: Any) -> Any:
    return _forward(options, query, key, value, bias, arrays).astype(query.dtype)


def _attention_fwd(options: Options, *operands: Any):
    out = _forward(options, *operands)
    return out.astype(operands[0].dtype), (operands, out)


def _attention_bwd(options: Options, residuals: Any, grad: Any):
    operands, out = residuals
    return (*_backward(options, *operands, out, grad), None, None)


_attention.defvjp(_attention_fwd, _attention_bwd)


# Compiled in an eager call, too: a loop that is traced anew each time would compile each time.
@partial(jax.jit, static_argnums=0)
def _forward(options: Options, query: Any, key: Any, value: Any, bias: Any, arrays: Any) -> Array:
    """The output in float32."""
    with jax.enable_x64(True):
        return output(Problem.of(options, query, key, value, bias, arrays))


@partial(jax.jit, static_argnums=0)
def _backward(
    options: Options, query: Any, key: Any, value: Any, bias: Any, arrays: Any, out: Any, grad: Any
) -> tuple[Array, Array, Array]:
    """The gradients, of the dtype of the operands."""
    with jax.enable_x64(True):
        problem = Problem.of(options, query, key, value, bias, arrays)
        dq, rows = query_gradient(problem, out, grad)
        dk, dv = key_value_gradients(problem, rows, grad)
    return dq.astype(query.dtype), dk.astype(key.dtype), dv.astype(value.dtype)


@jax.custom_jvp
def _without_gradient(bias: Array) -> Array:
    return bias


@_without_gradient.defjvp
def _refuse_gradient(primals: Any, tangents: Any):
    raise refusals.no_gradient("bias")
