"""Spec: mask, logits and dropout of one attention, the one value that travels to a kernel."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from . import block_ranges
from .array_fields import Axes, arrays_of, map_arrays
from .dropout import Dropout
from .logits import Logits
from .mask import Mask
from .token_numbers import AnyTokens, Tokens

# Axes of a bias [B, N, T, S].
QUERY_AXIS, KEY_AXIS = 2, 3


class Terms(NamedTuple):
    """Logit modifiers and mask of a block of dot products; each broadcasts to `[B, N, t, s]`."""

    bias: Float[Array, "..."] | None
    alibi_slopes: Float[Array, "1 N 1 1"] | None
    distance: Int[Array, "..."] | None
    allowed: Bool[Array, "..."] | None


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["mask", "logits", "dropout", "held_queries", "held_keys"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Spec:
    """Mask, logits and dropout of one attention, in coordinates of the whole sequence.

    Under Ulysses a device holds every token, and of arrays with a head axis the part of its heads.
    Other strategies give a kernel a part of the queries or keys. The Spec says which: the kernel
    counts its own tokens from 0, and the methods here place them in the sequence.

    Attributes:
      held_queries, held_keys: the tokens of the whole sequence that the kernel's arrays hold; None
        for all.
    """

    mask: Mask = field(default_factory=Mask)
    logits: Logits = field(default_factory=Logits)
    dropout: Dropout = field(default_factory=Dropout)
    held_queries: AnyTokens | None = None
    held_keys: AnyTokens | None = None

    @property
    def arrays(self) -> dict[str, Any]:
        """Every array, and pair of them, by the name of its field."""
        return {
            name: x
            for part in (self.mask, self.logits, self.dropout)
            for name, x in arrays_of(part)
        }

    @property
    def keywords(self) -> dict[str, Any]:
        """Mask, logits and dropout as the keywords of an attention."""
        return {"mask": self.mask, "logits": self.logits, "dropout": self.dropout}

    def map(self, function: Callable[[Any, Axes], Any]) -> "Spec":
        """A Spec with `function(array, axes)` in place of each array."""
        return Spec(
            map_arrays(function, self.mask),
            map_arrays(function, self.logits),
            map_arrays(function, self.dropout),
            self.held_queries,
            self.held_keys,
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
        """Terms of a block, the argument of `to_logits`."""
        t, s = self.in_sequence(queries, keys)
        bias, slopes = self.logits.bias, self.logits.alibi_slopes
        return Terms(
            None if bias is None else s.slice(t.slice(bias, QUERY_AXIS), KEY_AXIS),
            None if slopes is None else slopes[None, :, None, None],
            None if slopes is None else self.mask.distance(t, s),
            self.mask.attends(t, s),
        )

    def in_sequence(self, queries: Tokens, keys: Tokens) -> tuple[AnyTokens, AnyTokens]:
        """Tokens of the kernel's arrays, as tokens of the whole sequence."""
        return _in_sequence(queries, self.held_queries), _in_sequence(keys, self.held_keys)

    def keep(self, queries: Tokens, keys: Tokens) -> Array | None:
        """True for the weights of a block that dropout leaves; None where it leaves all."""
        return self.dropout.keep(*self.in_sequence(queries, keys))

    def keys_of(self, queries: Tokens, key_tokens: int) -> tuple[Array, Array]:
        """Half-open range of the kernel's keys that some of the queries may attend to."""
        keys = self.held_keys or Tokens(0, key_tokens)
        return block_ranges.keys_of(self.mask, _in_sequence(queries, self.held_queries), keys)

    def queries_of(self, keys: Tokens, query_tokens: int) -> tuple[Array, Array]:
        """Half-open range of the kernel's queries that may attend to some of the keys."""
        queries = self.held_queries or Tokens(0, query_tokens)
        return block_ranges.queries_of(self.mask, _in_sequence(keys, self.held_keys), queries)

    def common_keys(self, queries: Tokens, key_tokens: int) -> tuple[Array, Array]:
        """Half-open range of the kernel's keys that every one of the queries attends to."""
        keys = self.held_keys or Tokens(0, key_tokens)
        return block_ranges.common_keys(self.mask, _in_sequence(queries, self.held_queries), keys)

    def common_queries(self, keys: Tokens, query_tokens: int) -> tuple[Array, Array]:
        """Half-open range of the kernel's queries that attend to every one of the keys."""
        queries = self.held_queries or Tokens(0, query_tokens)
        return block_ranges.common_queries(self.mask, _in_sequence(keys, self.held_keys), queries)

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
        if terms.alibi_slopes is not None and terms.distance is not None:
            z = z - terms.alibi_slopes.astype(z.dtype) * terms.distance.astype(z.dtype)
        return z if terms.allowed is None else jnp.where(terms.allowed, z, -jnp.inf)


def _in_sequence(tokens: Tokens, held: AnyTokens | None) -> AnyTokens:
    return tokens if held is None else held.block(tokens.start, tokens.size)
