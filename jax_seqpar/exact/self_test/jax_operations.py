"""The operations of `jax_seqpar.exact` that the self-test asks, compiled for the default device."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ...mask import threefry
from .. import arithmetic, elementary, engines, matmul, norm, normal, rotary, rounding
from ..attention import exact_attention
from .operations import Operations
from .questions import DROPOUT_RATE, DROPOUT_SHAPE, SOFT_CAP
from .training_questions import ANGLE_BITS


def jax_operations() -> Operations:
    """Operations of `jax_seqpar.exact`, each compiled, from and to arrays of NumPy."""
    return Operations(
        exp=_on_arrays(elementary.exp),
        dot=_on_arrays(arithmetic.exact_dot),
        weighted_sum=_on_arrays(arithmetic.weighted_sum),
        gradient_sum=_on_arrays(arithmetic.gradient_sum),
        matmul=_on_arrays(_plain_product),
        flush=_on_arrays(arithmetic.flush),
        round32=_on_arrays(arithmetic.round32),
        widened=_on_arrays(lambda x: arithmetic.round32(x).astype(jnp.float64)),
        out=_on_arrays(arithmetic.out),
        narrowed=_on_arrays(_narrowed_to_both),
        reciprocal=_on_arrays(lambda x: 1.0 / x),
        soft_cap=_on_arrays(_soft_cap),
        dropout=_on_arrays(_kept_by_dropout),
        attention=_on_arrays(_attention),
        rounded=_on_arrays(rounding.nearest),
        chained=_on_arrays(lambda a, b, c: rounding.add(rounding.multiply(a, b), c)),
        log=_on_arrays(elementary.log),
        reciprocal_root=_on_arrays(norm.reciprocal_root),
        normal=_on_arrays(lambda x: (normal.normal_cdf(x), normal.normal_pdf(x))),
        sines=_on_arrays(_sines),
        sums=_on_arrays(lambda x: x.sum(axis=1)),
        products=_on_arrays(_products),
    )


def _on_arrays(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, compiled, of arrays of NumPy."""
    compiled = jax.jit(function)

    def call(*arrays: np.ndarray) -> Any:
        with jax.enable_x64(True):
            return jax.tree.map(np.asarray, compiled(*map(jnp.asarray, arrays)))

    return call


def _attention(query: Array, key: Array, value: Array, grad: Array) -> tuple[Array, ...]:
    def attend(*operands: Array) -> Array:
        return exact_attention(*operands, is_causal=True)

    out, pull = jax.vjp(attend, query, key, value)
    return (out, *pull(grad))


def _plain_product(a: Array, b: Array) -> Array:
    accumulated = jnp.int32 if a.dtype == jnp.int8 else a.dtype
    return jnp.matmul(a, b, preferred_element_type=accumulated)


def _narrowed_to_both(x: Array) -> tuple[Array, ...]:
    return tuple(
        arithmetic.narrowed(arithmetic.out(x), jnp.dtype(dtype))
        for dtype in (jnp.bfloat16, jnp.float16)
    )


def _soft_cap(z: Array) -> tuple[Array, Array]:
    return elementary.soft_cap(z, SOFT_CAP), elementary.soft_cap_slope(z, SOFT_CAP)


def _kept_by_dropout(key: Array) -> Array:
    B, N, T, S = DROPOUT_SHAPE
    heads = threefry.head_keys(key, B, N)
    return threefry.keep(heads, DROPOUT_RATE, jnp.arange(T), jnp.arange(S))


def _sines(angles: Array) -> tuple[Array, ...]:
    # Positions, of which one is one unit of an angle.
    one = (1 << rotary.TURN_BITS - ANGLE_BITS,)
    return tuple(x[0, :, 0] for x in rotary.sines(angles[None], one))


def _products(a: Array, b: Array) -> tuple[Array, ...]:
    found = (engines.float64_products, engines.int8_products)
    return tuple(matmul.matmul("MK,KN->MN", a, b, engine=engine) for engine in found)
