"""Padding of sequences to a multiple of the devices, by tokens that nothing attends to."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Shaped

from .array_fields import Axes
from .keywords import canonical, from_keywords
from .logits import Logits
from .mask import Mask
from .unused_segment import unused_id


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["query", "key", "value", "keywords"],
    meta_fields=["tokens"],
)
@dataclass(frozen=True)
class Padded:
    """Operands of an attention with tokens added at the end.

    Attributes:
      query, key, value: as given, then zeros.
      keywords: of the attention: the mask, in whose segments the added queries have one of their
        own and the added keys another, and the logits.
      tokens: T, the queries that were given.
    """

    query: Float[Array, "B T2 N H"]
    key: Float[Array, "B S2 K H"]
    value: Float[Array, "B S2 K V"]
    keywords: dict[str, Any]
    tokens: int

    def unpad(self, out: Shaped[Array, "B T2 N V"]) -> Shaped[Array, "B T N V"]:
        """The output of the queries that were given; the gradient of the others is 0."""
        if out.shape[1] == self.tokens:
            return out
        sharding = jax.typeof(out).sharding
        if sharding.spec[1] is not None:
            # The devices do not divide the remaining tokens, so these cannot stay sharded by type.
            spec = (n if axis != 1 else None for axis, n in enumerate(sharding.spec))
            out = jax.sharding.reshard(out, NamedSharding(sharding.mesh, PartitionSpec(*spec)))
        return out[:, : self.tokens]


def pad_to_degree(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    *,
    degree: int,
    bias: Float[Array, "..."] | None = None,
    mask: Bool[Array, "..."] | Mask | None = None,
    logits: Logits | None = None,
) -> Padded:
    """Adds tokens at the end, in separate segments, until the degree divides T and S.

    No other token sees the added tokens, so output and gradients are unchanged. Arrays without a
    token axis stay as they are, lengths and `query_offset` included.

    Args:
      query, key, value: as for `dot_product_attention`.
      degree: P, the devices that share the tokens.
      bias, mask, logits: as for `dot_product_attention`; they come back in `keywords`.

    Raises:
      ValueError: for arrays that do not fit together.

    Example:
      padded = pad_to_degree(q, k, v, degree=8)
      out = dot_product_attention(padded.query, padded.key, padded.value, **padded.keywords)
      out = padded.unpad(out)
    """
    _check_degree(degree)
    spec = canonical(from_keywords(bias=bias, mask=mask, logits=logits), query, key, value)
    T, S = query.shape[1], key.shape[1]
    more = (-T % degree, -S % degree)
    if more == (0, 0):
        return Padded(query, key, value, {"mask": spec.mask, "logits": spec.logits}, T)

    def longer(x: Array, axes: Axes) -> Array:
        for axis, name in enumerate(axes):
            if name in ("queries", "keys"):
                x = _pad(x, axis, more[name == "keys"])
        return x

    wider = spec.map(longer)
    segments = _segments(spec.mask.segment_ids, (query, key), more)
    keywords = {"mask": replace(wider.mask, segment_ids=segments), "logits": wider.logits}
    key, value = (_pad(x, 1, more[1]) for x in (key, value))
    return Padded(_pad(query, 1, more[0]), key, value, keywords, T)


def _segments(
    segment_ids: tuple[Array, Array] | None, operands: tuple[Array, Array], more: tuple[int, int]
) -> tuple[Array, Array]:
    if segment_ids is None:
        queries, keys = (jnp.zeros(x.shape[:2], jnp.int32) for x in operands)
    else:
        # Wide enough for two segments more, and signed as the kernels have them: equal ids stay
        # equal. Of one width, as a number that is unused in 64 bits may be used in 32.
        width = 8 * max(4, *(x.itemsize for x in segment_ids))
        queries, keys = (x.astype(f"int{width}") for x in segment_ids)
    # Two new segments: an added query attends to nothing, and nothing to an added key.
    queries = _pad(queries, 1, more[0], unused_id((queries, keys)))
    return queries, _pad(keys, 1, more[1], unused_id((queries, keys)))


def _pad(x: Array, axis: int, more: int, value: Any = 0) -> Array:
    """x with `more` entries along an axis; an axis of size 1 that broadcasts stays."""
    if more == 0 or (axis > 1 and x.shape[axis] == 1):
        return x
    widths = [(0, more if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=value)


def _check_degree(degree: Any) -> None:
    """Raises ValueError unless the degree is a positive Python integer."""
    if type(degree) is not int or degree < 1:
        raise ValueError(
            f"degree must be a positive Python integer, got {degree!r}. It is the size of the "
            f'mesh axis of the tokens: write mesh.shape["seq"].'
        )
