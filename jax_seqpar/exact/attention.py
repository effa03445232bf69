"""Exact attention of one device: the specification in `jax_seqpar.exact`, as a JAX function."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float

from .. import refusals
from ..mask import Logits, Spec, keyword_form
from ..mask.nouns import arrays_of
from . import arithmetic
from .backward import key_value_gradients, query_gradient
from .forward import output
from .kv_replicas import SharedHeads
from .problem import INNER, Options, Problem, without_unread_keys


@keyword_form
def exact_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    spec: Spec,
    *,
    shared_heads: SharedHeads | None = None,
    query_chunk: int | None = None,
    key_chunk: int | None = None,
) -> Float[Array, "B T N V"]:
    """`softmax(query . key * scale + bias) . value` with the same bits however it is computed.

    Output and gradients are the function that `jax_seqpar.exact` specifies: equal in every bit to
    `torch_ref.exact.exact_attention`, compiled or not, on any number of devices, on every backend
    that `jax_seqpar.exact.certify` passes. Not equal to a stock kernel, and nearer to float64 than
    float32 kernels are, but for a row whose heavy keys have no value. Memory grows linearly with
    the tokens. Float64 inside, whatever `jax_enable_x64` says. Reverse-mode derivatives, once.

    Args:
      query, key, value: float32, bfloat16 or float16, all the same; K divides N.
      bias, mask, ...: as in `jax_seqpar.mask.Attention`. Bias, slopes and sinks are of the same
        three dtypes and have no gradient; scale and soft cap are rounded to float32.
      shared_heads: other devices with the same KV heads and query heads of their own. Their parts
        of the gradients of key and value are added without rounding, and one of the devices returns
        the sum, the others 0. `ulysses_attention` passes it where it is needed.
      query_chunk, key_chunk: queries, and keys, whose whole rows, and columns, are held at a time;
        None chooses. No bit depends on them.

    Returns:
      The attention output, of the query's dtype; 0 for a query that may attend to no key.

    Raises:
      ValueError: another dtype, sizes that do not fit, a derivative with respect to bias, slopes or
        sinks, or a second derivative.
      TypeError: of JAX, for a forward-mode derivative.
    """
    devices = 1 if shared_heads is None else shared_heads.devices
    added = dict(arrays_of(spec.logits))
    refusals.check_exact(query, key, added, devices, query_chunk=query_chunk, key_chunk=key_chunk)

    once = {
        name: _undifferentiated(partial(refusals.no_exact_gradient, name), x)
        for name, x in added.items()
    }
    (_, T, N, H), (_, S, K, _) = query.shape, key.shape
    if 0 in (*query.shape, *value.shape):
        return jnp.zeros((*query.shape[:3], value.shape[3]), query.dtype)
    limit = arithmetic.CONTRACT_TOKENS
    options = Options(
        shared_heads=shared_heads,
        query_chunk=min(T, query_chunk or max(256 * K // N, 16), max(limit * K // N // INNER, 1)),
        key_chunk=min(S, key_chunk or 256, max(limit // INNER, 1)),
        sum_limit=limit,
    )
    scale, cap = spec.logits.scale, spec.logits.soft_cap
    cap = None if cap is None else _float32(cap)
    rounded = Logits(_float32(H**-0.5 if scale is None else scale), cap, **once)
    return _attention(options, query, key, value, replace(spec, logits=rounded))


def _float32(x: float) -> float:
    return float(np.float32(x))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(options: Options, query: Any, key: Any, value: Any, spec: Any) -> Any:
    return _attention_fwd(options, query, key, value, spec)[0]


def _attention_fwd(options: Options, query: Any, key: Any, value: Any, spec: Any):
    query, key, value = map(_once, (query, key, value))
    operands = (query, key, value, spec)
    out = _looped_by_vmap(partial(_forward, options))(*operands)
    return arithmetic.narrowed(out, query.dtype), (operands, out)


def _attention_bwd(options: Options, residuals: Any, grad: Any):
    (query, key, value, spec), out = residuals
    query, key, value, out, grad = map(_once, (query, key, value, out, grad))
    gradient = _looped_by_vmap(partial(_backward, options))
    return (*gradient(query, key, value, spec, out, grad), None)


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
def _forward(options: Options, query: Any, key: Any, value: Any, spec: Any) -> Array:
    """The output in float32."""
    query, key, value, spec = _as_given((query, key, value, spec))
    key, value = without_unread_keys(spec.mask, query, key, value)
    B, T, N, _ = query.shape
    K, V = value.shape[2:]

    def one(index: Array, q: Array, k: Array, v: Array) -> Array:
        own = spec.take_heads(*_first_head(index, K, N // K), N // K)
        return output(Problem.of(options, own, q, k, v))

    with jax.enable_x64(True):
        out = _map_heads(one, _grouped(query, K), _heads_first(key), _heads_first(value))
        return out.reshape(B, N, T, V).transpose(0, 2, 1, 3)


@partial(jax.jit, static_argnums=0)
def _backward(
    options: Options, query: Any, key: Any, value: Any, spec: Any, out: Any, grad: Any
) -> tuple[Array, ...]:
    """The gradients, of the dtype of the operands."""
    query, key, value, spec, out, grad = _as_given((query, key, value, spec, out, grad))
    key, value = without_unread_keys(spec.mask, query, key, value)
    N, K = query.shape[2], key.shape[2]

    def one(index: Array, q: Array, k: Array, v: Array, out: Array, grad: Array):
        own = spec.take_heads(*_first_head(index, K, N // K), N // K)
        problem = Problem.of(options, own, q, k, v)
        dq, rows = query_gradient(problem, out, grad)
        return (dq, *key_value_gradients(problem, rows, grad))

    with jax.enable_x64(True):
        operands = (_grouped(query, K), _heads_first(key), _heads_first(value))
        gradients = _map_heads(one, *operands, _grouped(out, K), _grouped(grad, K))
        shaped = (
            x.reshape(like.shape[0], like.shape[2], like.shape[1], like.shape[3])
            for x, like in zip(gradients, (query, key, value), strict=True)
        )
        return tuple(arithmetic.narrowed(x.transpose(0, 2, 1, 3), query.dtype) for x in shaped)


def _as_given(operands: Any) -> Any:
    """`optimization_barrier`, which keeps XLA:GPU from eliding the caller's cast to 16 bits.

    The operands are widened here, and XLA:GPU leaves out a pair of conversions such as
    f32->bf16->f32 (`xla_allow_excess_precision`); see `arithmetic.round32`.
    """
    return jax.lax.optimization_barrier(operands)


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


def _first_head(index: Array, kv_heads: int, group: int) -> tuple[Array, Array]:
    """The sequence of a KV head, and the first of its query heads."""
    return index // kv_heads, index % kv_heads * group


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _undifferentiated(refusal: Callable[[], ValueError], x: Any) -> Any:
    """x, through which no derivative goes."""
    return x


@_undifferentiated.defjvp
def _refuse(refusal: Callable[[], ValueError], primals: Any, tangents: Any):
    raise refusal()


# Second derivatives are undefined: the rule of the first one raises if its operands are
# differentiated again.
_once = partial(_undifferentiated, refusals.no_second_derivative)
