"""The exponential inside a Triton kernel, by the instruction that GPUs have for powers of two."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton
from jaxtyping import Array, Float32

LOG2_E = 1.4426950408889634
EXP = """{
    .reg .f32 exponent;
    mul.f32 exponent, $1, 0f3FB8AA3B;
    ex2.approx.ftz.f32 $0, exponent;
}"""


def exp(x: Float32[Array, "..."], interpret: bool) -> Float32[Array, "..."]:
    """`2^(x log2(e))`, two instructions; 0 where it is 2^-126 or less.

    `jnp.exp2` inside a kernel is CUDA's, with a comparison and two products beside the instruction
    for what is smaller. The maximum of a row is subtracted from its logits before, and not in one
    operation with the product: that would subtract it from a product of 48 bits, and the rounding
    of `top log2(e)`, 64 at 1e9, would be a factor of 2^64.

    Args:
      interpret: whether the kernel runs as plain JAX, which has no instructions of GPUs.
    """
    if interpret:
        return jnp.exp2(x * LOG2_E)
    [result] = triton.elementwise_inline_asm(
        EXP,
        args=[x],
        constraints="=f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
    )
    return result
