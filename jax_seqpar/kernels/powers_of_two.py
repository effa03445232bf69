"""Exponentials by the one instruction that GPUs have, for powers of two.

A weight `exp(z - top)` is `2^(z * L - reference)`, `L = log2(e)`: one multiplication and addition
with one rounding, and the instruction. The reference is about `top * L`, in float32. What it
differs by is made up for in the sum of a row, so weights stay right beside large logits: at
z = 1e5 the rounding of `z * L` alone would put a weight off by 1 %.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

from .softmax_residual import Residual, finite

LOG2_E = 1.44269502162933349609375  # as float32 has it
# Its upper 12 bits; with the upper 12 bits of a logit their product is exact.
UPPER = 1.44189453125
POWER = """{
    .reg .f32 exponent;
    fma.rn.f32 exponent, $1, 0f3FB8AA3B, $2;
    ex2.approx.ftz.f32 $0, exponent;
}"""


def power(z: Array, reference: Array, interpret: bool) -> Array:
    """`2^(z * L - reference)`, as a Triton kernel computes it; 0 for 2^-126 and less.

    Args:
      reference: finite, and not below z * L, but for a unit in its last place.
      interpret: whether the kernel runs as plain JAX, which has no instructions of GPUs.
    """
    z, reference = jnp.broadcast_arrays(z, reference)
    if interpret:
        return jnp.exp2(_exponent(z, reference))
    [result] = triton.elementwise_inline_asm(
        POWER,
        args=[z, -reference],
        constraints="=f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(z.shape, z.dtype)],
    )
    return result


def to_residual(reference: Float[Array, "..."], total: Float[Array, "..."]) -> Residual:
    """The residual of rows whose powers beside a reference add up to `total`.

    Args:
      reference: -inf in a row without a logit.
    """
    reference = finite(reference)
    top = _computed(reference / LOG2_E)
    return Residual(top, total * jnp.exp2(-_exponent(top, reference)))


def from_residual(residual: Residual) -> tuple[Array, Array]:
    """The reference of each row, and the factor that makes a power beside it a weight."""
    reference = _computed(residual.top * LOG2_E)
    # A query that is padding has top = inf: its powers are 0, and inf - inf would make them NaN.
    factor = jnp.where(jnp.isfinite(residual.top), jnp.exp2(-_exponent(residual.top, reference)), 1)
    return reference, factor / residual.divisor


def _exponent(z: Array, reference: Array) -> Array:
    """`z * L - reference` with an error of 2^-36 z at most, where the two are near each other."""
    bits = jax.lax.bitcast_convert_type(z, jnp.int32)
    upper = jax.lax.bitcast_convert_type(bits & ~0xFFF, jnp.float32)
    lower = z - upper
    exponent = ((upper * UPPER - reference) + lower * UPPER) + z * (LOG2_E - UPPER)
    return jnp.where(jnp.isfinite(z) & jnp.isfinite(reference), exponent, z - reference)


def _computed(x: Array) -> Array:
    """A product as float32 holds it, without its last bit.

    Compilers merge a product and a sum into one operation, and compute with a number that has more
    bits than the one that is stored. They cannot see through an operation on the bits.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jax.lax.bitcast_convert_type(bits & ~1, jnp.float32)
