"""Distribution function and density of the normal distribution, each the nearest float32.

Call inside `with jax.enable_x64(True):`.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from .arithmetic import flush, round32

# Of `e^(a^2 / 2) Phi(-a) (1 + 5/4 a)` for a from 0 to 13.3, powers of `t = (a - 4) / (a + 4)`: the
# polynomial through the values at the 21 Chebyshev nodes of t, found in 120 bits by mpmath and
# rounded to float64. It is within 2.1e-17. `parity_tests/test_exact_normal_enumeration.py` makes
# these numbers anew, and looks for the hard cases below.
COEFFICIENTS = (
    0.5664638478118136,
    -0.07827991627104353,
    -0.013595270429285105,
    0.05367730690139117,
    -0.04796349781159765,
    0.024543145719343337,
    -0.006379863760826061,
    -0.0005167323217161147,
    0.0009154175088566387,
    -0.00010664920171662691,
    -0.00011697919157938916,
    2.5404908015092867e-05,
    1.8113099977024497e-05,
    -4.0809695844805686e-06,
    -3.442625112166915e-06,
    4.397007330015048e-07,
    7.267185292039736e-07,
    5.0931194914006205e-08,
    -1.305856974564748e-07,
    -5.662784518450979e-08,
    -7.966307071195398e-09,
)
# float32 bits of x and of the result: those of all float32 whose Phi comes nearest to a tie, 0.03,
# 0.03, 1.37 and 2.58 units of float64 from it, and whose phi does, 1.12 units. The next are 3.99
# and 2.98 units away. At the first two float64 `erf` and `erfc` of XLA and of PyTorch give 0.5.
HARD_CDF = {
    0x33A06C99: 0x3F000001,
    0xB3206C99: 0x3EFFFFFF,
    0xBE7CD341: 0x3ECE138E,
    0xBB7FD5FA: 0x3EFF33E0,
}
HARD_PDF = {0x3E48A98A: 0x3EC85FC4}
# Phi(-a) is below 2^-126, and 1 - Phi(-a) is 1, from 13 on; t of infinity would be NaN.
LARGEST = 16.0


def normal_cdf(x: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """Phi(x), the float32 nearest to the probability of a normal variable below x."""
    wide = flush(x)
    tail = _tail(jnp.minimum(jnp.abs(wide), LARGEST))
    return _with(HARD_CDF, x, round32(jnp.where(wide < 0, tail, 1.0 - tail)))


def normal_pdf(x: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """phi(x), the float32 nearest to `e^(-x^2 / 2) / sqrt(2 pi)`."""
    y = round32(_gaussian(flush(x)) * (1 / math.sqrt(2 * math.pi)))
    return _with(HARD_PDF, jnp.abs(x), y)


def _with(cases: dict[int, int], x: Array, y: Array) -> Array:
    """y, with the results that are known in their places."""
    for bits in cases.items():
        argument, result = (np.uint32(n).view(np.float32) for n in bits)
        y = jnp.where(x == argument, result, y)
    return y


def _tail(a: Float[Array, "..."]) -> Float[Array, "..."]:
    """Phi(-a) in float64, for a >= 0: the Gaussian, which falls fast, times what does not."""
    t = (a - 4.0) / (a + 4.0)
    slow = jnp.full_like(a, COEFFICIENTS[-1])
    for coefficient in COEFFICIENTS[-2::-1]:
        slow = slow * t + coefficient
    return _gaussian(a) * (slow / (1.0 + 1.25 * a))


def _gaussian(a: Float[Array, "..."]) -> Float[Array, "..."]:
    # The square of a float32 is exact in float64: the error is that of the exponential.
    return jnp.exp(-0.5 * (a * a))
