"""Numbers of 16 bits around operations of float32, rounded on their bits."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from .arithmetic import narrowed


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def narrow(x: Float32[Array, "..."], dtype: Any) -> Float[Array, "..."]:
    """x rounded to bfloat16, half to even; x itself if the dtype is float32.

    On the bits of x, as a compiler may leave out a conversion that the next operation takes back
    (XLA's `xla_allow_excess_precision`).
    """
    if dtype == x.dtype:
        return x
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & ~jnp.uint32(0xFFFF)
    # The rounded number fits 16 bits, so the conversion is exact.
    exact = jax.lax.bitcast_convert_type(rounded, jnp.float32)
    return narrowed(jnp.where(jnp.isfinite(x), exact, x), jnp.dtype(dtype))


narrow.defvjp(
    lambda x, dtype: (narrow(x, dtype), None), lambda dtype, _, g: (g.astype(jnp.float32),)
)


def widen(x: Float[Array, "..."]) -> Float32[Array, "..."]:
    """x in float32; its gradient is rounded as `narrow` does."""
    return x if x.dtype == jnp.float32 else _widen(x.dtype, x)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _widen(dtype: Any, x: Array) -> Array:
    return x.astype(jnp.float32)


_widen.defvjp(lambda dtype, x: (_widen(dtype, x), None), lambda dtype, _, g: (narrow(g, dtype),))
