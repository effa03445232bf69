"""Logits: modifiers that turn dot products of queries and keys into logits."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Float

from .array_fields import AnyArray, array_field, is_number, python_number, register, written


@register
@dataclass(frozen=True, repr=False)
class Logits:
    """`logits = cap(query . key * scale) + bias - slope * distance`, and the sinks beside them.

    Args:
      scale: of the dot products; `1 / sqrt(H)` if None.
      soft_cap: `cap(x) = soft_cap * tanh(x / soft_cap)`, before bias and slopes.
      bias: added to the logits; each axis that of `[B, N, T, S]` or 1.
      alibi_slopes: `[N]`; logits lose slope times the distance of the positions, which counts as
        2^29 beyond that.
      sinks: `[N]`, one more logit of each query head, without a value.
    """

    scale: float | None = None
    soft_cap: float | None = None
    bias: Float[AnyArray, "..."] | None = array_field("batch", "heads", "queries", "keys")
    alibi_slopes: Float[AnyArray, "N"] | None = array_field("heads")
    sinks: Float[AnyArray, "N"] | None = array_field("heads")

    def __repr__(self) -> str:
        return written(self)

    def __post_init__(self) -> None:
        for name in ("scale", "soft_cap"):
            object.__setattr__(self, name, python_number(getattr(self, name)))
        check_soft_cap("soft_cap", self.soft_cap)
        if not (self.scale is None or is_number(self.scale)):
            raise ValueError(
                f"scale must be a Python number, got {type(self.scale).__name__}. "
                f"Multiply the query by a scale that is an array."
            )
        if self.scale is not None and not abs(self.scale) < 1e30:
            raise ValueError(
                f"scale must be finite and below 1e30, got {self.scale!r}. Write None for "
                f"1 / sqrt(H)."
            )


def check_soft_cap(name: str, cap: Any) -> None:
    """Raises ValueError unless the cap is None or a Python number that float32 holds."""
    if cap is not None and not (is_number(cap) and 1e-30 < cap < 1e30):
        raise ValueError(
            f"{name} must be a Python number between 1e-30 and 1e30, got {cap!r}. "
            f"None, and not 0, leaves the logits as they are: write {name}=None."
        )


def accumulated(dtype: Any) -> Any:
    """The dtype of logits and sums in floating point."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32
