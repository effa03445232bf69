"""RMSNorm and LayerNorm with one rounding in each operation."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from .._checks import check_finite
from .rounding import add, divide, flush, multiply, nearest, subtract, total
from .sharding import PrimalSharding


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(
    x: Float32[Array, "*tokens D"], scale: Float32[Array, " D"], epsilon: float
) -> Float32[Array, "*tokens D"]:
    """`x rsqrt(mean(x^2) + epsilon) scale`, over the last axis.

    `s = total(x (*) x)`, `u = (s (/) D) (+) epsilon`, `r = rsqrt(u)`, `n = x (*) r`,
    `y = n (*) scale`. Raises ValueError for an epsilon below 0, or infinite in float32.
    """
    with jax.enable_x64(True):
        return multiply(_normal(x, epsilon)[0], _beside_tokens(scale, x))


def _normal(x: Array, epsilon: float) -> tuple[Array, Array]:
    """n and r."""
    check_finite("epsilon", epsilon, 1e-6)
    r = reciprocal_root(add(_mean(multiply(x, x)), jnp.float32(epsilon)))
    return multiply(x, r), r


def reciprocal_root(x: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """The float32 nearest to `x^(-1/2)`.

    Of all mantissas the one that comes nearest to a tie is 1.41 float64 units away from it
    (403a18e3 -> 3f16209e), the next 11: two roundings of float64, of the root and of the quotient,
    err by less.
    """
    return nearest(1.0 / jnp.sqrt(flush(x)))


def _forward(x: Array, scale: Array, epsilon: float) -> tuple[Array, Any]:
    return rms_norm(x, scale, epsilon), (x, scale)


def _backward(epsilon: float, saved: Any, dy: Array) -> tuple[Array, Array]:
    x, scale = saved
    with jax.enable_x64(True):
        normal, r = _normal(x, epsilon)
        tokens = tuple(range(x.ndim - 1))
        dscale = total(multiply(dy, normal), tokens).reshape(scale.shape)
        dnormal = multiply(dy, _beside_tokens(scale, x))
        c = _mean(multiply(dnormal, normal))
        # Both products are exact in float64: one rounding in the subtraction.
        dx = multiply(nearest(flush(dnormal) - flush(normal) * flush(c)), r)
    return PrimalSharding.of(x).reshard(dx), PrimalSharding.of(scale).reshard(dscale)


rms_norm.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(
    x: Float32[Array, "*tokens D"],
    scale: Float32[Array, " D"],
    bias: Float32[Array, " D"],
    epsilon: float,
) -> Float32[Array, "*tokens D"]:
    """`(x - mean(x)) rsqrt(var(x) + epsilon) scale + bias`, over the last axis.

    `d = x (-) (total(x) (/) D)`, `u = (total(d (*) d) (/) D) (+) epsilon`, `r = rsqrt(u)`,
    `n = d (*) r`, `y = R(n scale + bias)`. Raises ValueError as `rms_norm`.
    """
    with jax.enable_x64(True):
        normal, _ = _centred_normal(x, epsilon)
        scale, bias = _beside_tokens(scale, x), _beside_tokens(bias, x)
        return nearest(flush(normal) * flush(scale) + flush(bias))


def _centred_normal(x: Array, epsilon: float) -> tuple[Array, Array]:
    """n and r of `layer_norm`."""
    return _normal(subtract(x, _mean(x)), epsilon)


def _layer_forward(x: Array, scale: Array, bias: Array, epsilon: float) -> tuple[Array, Any]:
    return layer_norm(x, scale, bias, epsilon), (x, scale, bias)


def _layer_backward(epsilon: float, saved: Any, dy: Array) -> tuple[Array, Array, Array]:
    x, scale, bias = saved
    with jax.enable_x64(True):
        normal, r = _centred_normal(x, epsilon)
        tokens = tuple(range(x.ndim - 1))
        dscale = total(multiply(dy, normal), tokens).reshape(scale.shape)
        dbias = total(dy, tokens).reshape(bias.shape)
        dnormal = multiply(dy, _beside_tokens(scale, x))
        centred, c = subtract(dnormal, _mean(dnormal)), _mean(multiply(dnormal, normal))
        dx = multiply(nearest(flush(centred) - flush(normal) * flush(c)), r)
    given = PrimalSharding.of(x), PrimalSharding.of(scale), PrimalSharding.of(bias)
    dx, dscale, dbias = (of.reshard(d) for of, d in zip(given, (dx, dscale, dbias), strict=True))
    return dx, dscale, dbias


layer_norm.defvjp(_layer_forward, _layer_backward)


def _mean(x: Array) -> Array:
    """`total(x) (/) D` over the last axis, which stays."""
    return divide(total(x, -1), jnp.float32(x.shape[-1]))


def _beside_tokens(scale: Array, x: Array) -> Array:
    return scale.reshape((1,) * (x.ndim - 1) + scale.shape)
