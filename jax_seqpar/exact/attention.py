"""Exact attention of one device: the specification in `jax_seqpar.exact`, as a JAX function."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, Float, Int

from .. import refusals
from ..masks import SegmentIds, Window
from ..shared_heads import SharedHeads
from . import arithmetic
from .backward import key_value_gradients, query_gradient
from .forward import output
from .problem import INNER, Options, Problem


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
    that `jax_seqpar.exact.certify` passes. Not equal to a stock kernel, and nearer to float64 than
    float32 kernels are, but for a row whose heavy keys have no value. Memory grows linearly with
    the tokens. Float64 inside, whatever `jax_enable_x64` says. Reverse-mode derivatives, once.

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
      query_chunk, key_chunk: queries, and keys, whose whole rows, and columns, are held at a time;
        None chooses. No bit depends on them.

    Returns:
      The attention output, of the query's dtype; 0 for a query that may attend to no key.

    Raises:
      ValueError: another dtype, sizes that do not fit, a derivative with respect to bias, or a
        second derivative.
      TypeError: of JAX, for a forward-mode derivative.
    """
    refusals.check_arrays(query, key, value)
    arrays = {
        "mask": mask,
        "query_seq_lengths": query_seq_lengths,
        "key_value_seq_lengths": key_value_seq_lengths,
        "segment_ids": segment_ids,
    }
    refusals.check_masks(query.shape, key.shape, bias=bias, **arrays)
    devices = 1 if shared_heads is None else shared_heads.devices
    refusals.check_exact(query, key, bias, devices, query_chunk=query_chunk, key_chunk=key_chunk)
    static = {"is_causal": is_causal, "local_window_size": local_window_size}
    refusals.check_scalars(scale=scale, logits_soft_cap=logits_soft_cap, **static)

    bias = None if bias is None else _undifferentiated(refusals.no_gradient_for_bias, bias)
    (_, T, N, H), (_, S, K, _) = query.shape, key.shape
    if 0 in (*query.shape, S):
        return jnp.zeros_like(query)
    limit = arithmetic.CONTRACT_TOKENS
    options = Options(
        scale=_float32(H**-0.5 if scale is None else scale),
        logits_soft_cap=None if logits_soft_cap is None else _float32(logits_soft_cap),
        **static,
        shared_heads=shared_heads,
        query_chunk=min(T, query_chunk or max(256 * K // N, 16), max(limit * K // N // INNER, 1)),
        key_chunk=min(S, key_chunk or 256, max(limit // INNER, 1)),
        sum_limit=limit,
    )
    return _attention(options, query, key, value, bias, arrays)


def _float32(x: float) -> float:
    return float(np.float32(x))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(options: Options, query: Any, key: Any, value: Any, bias: Any, arrays: Any) -> Any:
    return _attention_fwd(options, query, key, value, bias, arrays)[0]


def _attention_fwd(options: Options, query: Any, key: Any, value: Any, bias: Any, arrays: Any):
    query, key, value = map(_once, (query, key, value))
    operands = (query, key, value, bias, arrays)
    out = _looped_by_vmap(partial(_forward, options))(*operands)
    return out.astype(query.dtype), (operands, out)


def _attention_bwd(options: Options, residuals: Any, grad: Any):
    (query, key, value, bias, arrays), out = residuals
    query, key, value, out, grad = map(_once, (query, key, value, out, grad))
    gradient = _looped_by_vmap(partial(_backward, options))
    return (*gradient(query, key, value, bias, arrays, out, grad), None, None)


_attention.defvjp(_attention_fwd, _attention_bwd)


def _looped_by_vmap(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which `jax.vmap` turns into a loop instead of rewriting its operations.

    Rewritten, outside the scope that switches float64 on, they would be rounded to float32.
    """
    function = custom_vmap(function)

    @function.def_vmap
    def loop(axis_size: int, batched: Any, *operands: Any):
        leaves, tree = jax.tree.flatten(operands)
        varies = jax.tree.leaves(batched)

        def one(rows: list[Array]) -> Any:
            rest = iter(rows)
            own = [next(rest) if vary else x for x, vary in zip(leaves, varies, strict=True)]
            return function(*jax.tree.unflatten(tree, own))

        out = jax.lax.map(one, [x for x, vary in zip(leaves, varies, strict=True) if vary])
        return out, jax.tree.map(lambda _: True, out)

    return function


# Compiled in an eager call, too: a loop that is traced anew each time would compile each time.
@partial(jax.jit, static_argnums=0)
def _forward(options: Options, query: Any, key: Any, value: Any, bias: Any, arrays: Any) -> Array:
    """The output in float32."""
    B, T, N, H = query.shape
    K = key.shape[2]

    def one(index: Array, q: Array, k: Array, v: Array) -> Array:
        return output(Problem.of(options, q, k, v, *_of_head(index, B, K, bias, arrays)))

    with jax.enable_x64(True):
        out = _map_heads(one, _grouped(query, K), _heads_first(key), _heads_first(value))
        return out.reshape(B, N, T, H).transpose(0, 2, 1, 3)


@partial(jax.jit, static_argnums=0)
def _backward(
    options: Options, query: Any, key: Any, value: Any, bias: Any, arrays: Any, out: Any, grad: Any
) -> tuple[Array, ...]:
    """The gradients, of the dtype of the operands."""
    B, T, N, H = query.shape
    S, K = key.shape[1:3]

    def one(index: Array, q: Array, k: Array, v: Array, out: Array, grad: Array):
        problem = Problem.of(options, q, k, v, *_of_head(index, B, K, bias, arrays))
        dq, rows = query_gradient(problem, out, grad)
        return (dq, *key_value_gradients(problem, rows, grad))

    with jax.enable_x64(True):
        operands = (_grouped(query, K), _heads_first(key), _heads_first(value))
        gradients = _map_heads(one, *operands, _grouped(out, K), _grouped(grad, K))
        shapes = ((B, N, T, H), (B, K, S, H), (B, K, S, H))
        return tuple(
            x.reshape(shape).transpose(0, 2, 1, 3).astype(query.dtype)
            for x, shape in zip(gradients, shapes, strict=True)
        )


def _map_heads(one: Callable[..., Any], *operands: Array) -> Any:
    """One KV head of one sequence after another: large matrices, and the memory of one."""
    indices = jnp.arange(operands[0].shape[0])
    return jax.lax.map(lambda xs: one(*xs), (indices, *operands))


def _heads_first(x: Array) -> Array:
    """`[B, S, K, H]` as `[B K, S, H]`."""
    B, S, K, H = x.shape
    return x.transpose(0, 2, 1, 3).reshape(B * K, S, H)


def _grouped(x: Array, kv_heads: int) -> Array:
    """`[B, T, N, H]` as `[B K, G, T, H]`."""
    B, T, N, H = x.shape
    return x.transpose(0, 2, 1, 3).reshape(B * kv_heads, N // kv_heads, T, H)


def _of_head(index: Array, batch: int, kv_heads: int, bias: Any, arrays: Any) -> tuple[Any, Any]:
    """The bias and the masks of one KV head's query heads, in a batch of one."""
    b, k = index // kv_heads, index % kv_heads

    def of_sequence(x: Array) -> Array:
        return x if x.shape[0] == 1 else jax.lax.dynamic_slice_in_dim(x, b, 1)

    def of_heads(x: Array | None) -> Array | None:
        if x is None:
            return None
        x, N = of_sequence(x), x.shape[1]
        G = N // kv_heads
        return x if N == 1 else jax.lax.dynamic_slice_in_dim(x, k * G, G, axis=1)

    own = {name: jax.tree.map(of_sequence, x) for name, x in arrays.items() if name != "mask"}
    return of_heads(bias), {**own, "mask": of_heads(arrays["mask"])}


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _undifferentiated(refusal: Callable[[], ValueError], x: Any) -> Any:
    """x, through which no derivative goes."""
    return x


@_undifferentiated.defjvp
def _refuse(refusal: Callable[[], ValueError], primals: Any, tangents: Any):
    raise refusal()


# What is seen here is differentiated already, if at all.
_once = partial(_undifferentiated, refusals.no_second_derivative)
