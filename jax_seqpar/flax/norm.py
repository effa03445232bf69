"""The norm of query and key, over the channels of each head."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ..mask import accumulated
from ..mask.array_fields import is_number


def rms_norm(x: Array, scale: Array, epsilon: float) -> Array:
    """`scale x / sqrt(mean(x^2) + epsilon)`, in the dtype of logits, rounded to that of x."""
    wide = x.astype(accumulated(x.dtype))
    mean = jnp.mean(wide**2, axis=-1, keepdims=True)
    normal = wide * jax.lax.rsqrt(mean + epsilon)
    return (normal * scale.astype(normal.dtype)[None, None, None]).astype(x.dtype)


def check_qk_norm(epsilon: Any) -> None:
    """Raises ValueError unless it is None or a positive number."""
    if epsilon is not None and not (is_number(epsilon) and 0 < epsilon < 1):
        raise ValueError(
            f"qk_norm must be the epsilon of the norm, between 0 and 1, or None, got {epsilon!r}. "
            f"Write qk_norm=1e-6."
        )
