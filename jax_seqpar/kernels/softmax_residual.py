"""The sum by which softmax divides, in two numbers that no large logit makes inexact."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array


class Residual(NamedTuple):
    """Sum of exp of the logits of each row, `total * exp(top)`.

    Both numbers are kept, as the weight `exp(z - top) / total` cannot be had from the log of the
    sum: at top = 1e5 float32 rounds `top + log(total)` to a multiple of 1/128, at -1e9 to one of
    64, and `exp(z - lse)` is off by a factor.

    Attributes:
      top: the largest logit, 0 in a row without a key. A constant to every derivative.
      total: sum of `exp(z - top)`, 0 in a row without a key.
    """

    top: Array
    total: Array

    @property
    def divisor(self) -> Array:
        """`total`, but 1 in a row without a key, whose weights are 0."""
        return jnp.where(self.total == 0, 1, self.total)

    @property
    def lse(self) -> Array:
        """Log of the sum, -inf in a row without a key."""
        return jnp.where(self.total == 0, -jnp.inf, self.top + jnp.log(self.divisor))


def finite(top: Array) -> Array:
    """A maximum to subtract: 0 for that of a row of -inf, so that inf - inf is nowhere."""
    return jnp.where(top == -jnp.inf, 0, top)
