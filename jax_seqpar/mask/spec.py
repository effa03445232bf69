"""Spec: mask, logits and dropout of one attention, the one value that travels to a kernel."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .dropout import Dropout
from .logits import Logits
from .mask import Mask
from .nouns import Axes, arrays_of, map_arrays
from .tokens import Tokens


class Terms(NamedTuple):
    """What turns the dot products of a block into logits; each of four axes, or None."""

    bias: Any
    alibi_slopes: Any
    distance: Any
    allowed: Any


@partial(
    jax.tree_util.register_dataclass, data_fields=["mask", "logits", "dropout"], meta_fields=[]
)
@dataclass(frozen=True)
class Spec:
    """Mask, logits and dropout of one attention, in coordinates of the whole sequence.

    Under Ulysses a device holds every token, and of arrays with a head axis the part of its heads.
    """

    mask: Mask = field(default_factory=Mask)
    logits: Logits = field(default_factory=Logits)
    dropout: Dropout = field(default_factory=Dropout)

    @property
    def arrays(self) -> dict[str, Any]:
        """Every array, and pair of them, by the name of its field."""
        return {
            name: x
            for noun in (self.mask, self.logits, self.dropout)
            for name, x in arrays_of(noun)
        }

    def map(self, function: Callable[[Any, Axes], Any]) -> "Spec":
        """A Spec with `function(array, axes)` in place of each array."""
        return Spec(
            map_arrays(function, self.mask),
            map_arrays(function, self.logits),
            map_arrays(function, self.dropout),
        )

    def with_logits(self, **arrays: Array) -> "Spec":
        """A Spec with these arrays in place of those of its logits."""
        return replace(self, logits=replace(self.logits, **arrays))

    def take_heads(self, b: Any, first: Any, count: int) -> "Spec":
        """The Spec of sequence b alone and of `count` of its query heads."""

        def part(x: Array, axes: Axes) -> Array:
            for axis, name in enumerate(axes):
                if x.shape[axis] > 1 and name in ("batch", "heads"):
                    start, size = (b, 1) if name == "batch" else (first, count)
                    x = jax.lax.dynamic_slice_in_dim(x, start, size, axis)
            return x

        return self.map(part)

    def terms(self, queries: Tokens, keys: Tokens) -> Terms:
        """What `to_logits` needs for a block."""
        bias, slopes = self.logits.bias, self.logits.alibi_slopes
        return Terms(
            None if bias is None else keys.slice(queries.slice(bias, 2), 3),
            None if slopes is None else slopes[None, :, None, None],
            None if slopes is None else self.mask.distance(queries, keys),
            self.mask.attends(queries, keys),
        )

    def to_logits(self, dots: Array, terms: Terms, head_dim: int) -> Array:
        """The logits `[B, N, t, s]` in floating point, -inf where nothing attends.

        Args:
          dots: query . key, of the dtype to compute in.
        """
        scale, cap = self.logits.scale, self.logits.soft_cap
        z = dots * (head_dim**-0.5 if scale is None else scale)
        if cap is not None:
            z = cap * jnp.tanh(z / cap)
        if terms.bias is not None:
            z = z + terms.bias.astype(z.dtype)
        if terms.alibi_slopes is not None:
            z = z - terms.alibi_slopes.astype(z.dtype) * terms.distance.astype(z.dtype)
        return z if terms.allowed is None else jnp.where(terms.allowed, z, -jnp.inf)
