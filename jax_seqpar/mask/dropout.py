"""Dropout: which weights are dropped, by a key and by positions in the whole attention."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool

from . import threefry
from .array_fields import array_field, is_number, python_number, register, written
from .token_numbers import AnyTokens


@register
@dataclass(frozen=True, repr=False)
class Dropout:
    """Weights dropped at a rate, the others scaled up so that their mean stays.

    Which weights are dropped is a function of the key and of (batch, head, query, key), counted
    from 0 in the whole attention: the same at every degree, in every kernel, in both frameworks.

    Args:
      rate: the part of the weights that is dropped.
      rng: a threefry key of `jax.random.key`, or `[B, N, 2]` of `jax_seqpar.head_keys`.
    """

    rate: float = 0.0
    rng: Any = array_field("batch", "heads", None)

    def __repr__(self) -> str:
        return written(self)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rate", python_number(self.rate))
        if not (is_number(self.rate) and 0 <= self.rate < 1 - 2**-32):
            raise ValueError(
                f"rate must be a Python number, at least 0 and below 1, got {self.rate!r}. "
                f"It is the part of the weights that is dropped: write 0.1 for a tenth."
            )

    @property
    def inverse_keep_probability(self) -> float:
        """Factor of the weights that dropout keeps."""
        return threefry.inverse_keep_probability(self.rate)

    def keep(self, queries: AnyTokens, keys: AnyTokens) -> Bool[Array, "B N t s"] | None:
        """True for the weights that stay; None where all do."""
        if self.rate == 0:
            return None
        return threefry.keep(self.rng, self.rate, queries.numbers, keys.numbers)

    def apply(self, weights: Array, keep: Array | None) -> Array:
        """Weights, or anything that they multiply, after dropout.

        Args:
          keep: of `keep`, or a part of it.
        """
        if keep is None:
            return weights
        return jnp.where(keep, weights * self.inverse_keep_probability, 0)
