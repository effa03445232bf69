"""Exact attention of one device: the specification in `SPEC.md`, as a JAX function."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float

from .._checks import check_chunk_sizes
from ..kernels.kernel import Kernel
from ..layout import AxisName
from ..mask import Logits, Spec
from ..mask.nouns import arrays_of
from . import arithmetic
from .backward import key_value_gradients, query_gradient
from .forward import output
from .kv_replicas import SharedHeads
from .problem import INNER, Options, Problem, without_unread_keys


@dataclass(frozen=True)
class Exact(Kernel):
    """`softmax(query . key * scale + bias) . value` with the same bits however it is computed.

    Output and gradients are the function that `jax_seqpar/exact/SPEC.md` specifies: equal in every
    bit to `torch_ref.exact.exact_attention`, compiled or not, on any number of devices, on every
    backend that `jax_seqpar.exact.certify` passes. Not equal to a stock kernel, and nearer to
    float64 than float32 kernels are, but for a row whose heavy keys have no value. Memory grows
    linearly with the tokens. Float64 inside, whatever `jax_enable_x64` says. Reverse-mode
    derivatives, once; of query, key and value alone. JAX raises TypeError for one in forward mode.

    Operands, bias, slopes and sinks are float32, bfloat16 or float16; scale and soft cap are
    rounded to float32. Other dtypes, and sequences of 2^21 tokens and more, are refused.

    Args:
      query_chunk, key_chunk: queries, and keys, whose whole rows, and columns, are held at a time;
        None chooses. No bit depends on them.
      shared_heads: other devices with the same KV heads and query heads of their own. Their parts
        of the gradients of key and value are added without rounding, and one of the devices returns
        the sum, the others -0. A strategy sets it where it is needed.
    """

    query_chunk: int | None = None
    key_chunk: int | None = None
    shared_heads: SharedHeads | None = None

    sums_exactly = True

    def __post_init__(self) -> None:
        check_chunk_sizes(query_chunk=self.query_chunk, key_chunk=self.key_chunk)

    def sharing(self, axes: tuple[tuple[AxisName, int], ...]) -> "Exact":
        axes = tuple((axis_name, count) for axis_name, count in axes if count > 1)
        if self.shared_heads is not None or not axes:
            return self
        return replace(self, shared_heads=SharedHeads(axes))

    def attend(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B S K H"],
        value: Float[Array, "B S K V"],
        spec: Spec,
    ) -> tuple[Array, None]:
        devices = 1 if self.shared_heads is None else self.shared_heads.devices
        added = dict(arrays_of(spec.logits))
        _check(query, key, added, devices)
        once = {
            name: _undifferentiated(partial(_no_gradient, name), x) for name, x in added.items()
        }
        (_, T, N, H), (_, S, K, _) = query.shape, key.shape
        if 0 in (*query.shape, *value.shape):
            return jnp.zeros((*query.shape[:3], value.shape[3]), query.dtype), None
        limit = arithmetic.CONTRACT_TOKENS
        rows = self.query_chunk or max(256 * K // N, 16)
        options = Options(
            shared_heads=self.shared_heads,
            query_chunk=min(T, rows, max(limit * K // N // INNER, 1)),
            key_chunk=min(S, self.key_chunk or 256, max(limit // INNER, 1)),
            sum_limit=limit,
        )
        scale, cap = spec.logits.scale, spec.logits.soft_cap
        cap = None if cap is None else _float32(cap)
        rounded = Logits(_float32(H**-0.5 if scale is None else scale), cap, **once)
        return _attention(options, query, key, value, replace(spec, logits=rounded)), None


exact_attention = Exact()


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


def _check(
    query: Any,
    key: Any,
    added: Mapping[str, Any],
    devices: int,
) -> None:
    """Raises ValueError for dtypes and sizes that exact attention is not defined for.

    Args:
      added: bias, slopes and sinks by name, where there are any.
    """
    for name, x in added.items():
        if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
            raise ValueError(
                f"{name} of exact attention is float32, bfloat16 or float16, got {x.dtype}. "
                f"Write {name}.astype(jnp.float32)."
            )
    if query.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ValueError(
            f"exact attention takes float32, bfloat16 and float16, got {query.dtype}. "
            f"Write query.astype(jnp.float32), and key and value alike."
        )
    S, rows = key.shape[1], query.shape[1] * (query.shape[2] // key.shape[2]) * devices
    if max(S, rows) >= 1 << 21:
        raise ValueError(
            f"exact attention has room for fewer than 2^21 keys, and queries of one KV head, got "
            f"{S} and {rows}. Got query {query.shape}, key {key.shape}. Split the sequence."
        )


def _no_gradient(name: str) -> ValueError:
    """Error for a derivative that exact attention does not define."""
    return ValueError(
        f"exact attention has no gradient for {name}. Write jax.lax.stop_gradient({name}), or use "
        f"another attention."
    )


def _no_second_derivative() -> ValueError:
    """Error for the derivative of a gradient of exact attention."""
    return ValueError(
        "exact attention can be differentiated once, not twice, as its gradients are rounded like "
        "its output. Use jax_seqpar.dense_attention for second derivatives."
    )


# Second derivatives are undefined: the rule of the first one raises if its operands are
# differentiated again.
_once = partial(_undifferentiated, _no_second_derivative)
