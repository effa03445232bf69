"""Powers of two for the channels of a layer, where some are far larger than the others."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class ChannelScales(NamedTuple):
    """Powers of two, float32: constants of a layer, whose products with float32 are exact.

    `kernel(query * s.query, key * s.key, value * s.value) * s.out` is the same attention.

    Attributes:
      query, key: of the N query heads and the K KV heads; the products of both are 1.
      value, out: likewise.
    """

    query: Float[Array, "1 1 N H"]
    key: Float[Array, "1 1 K H"]
    value: Float[Array, "1 1 K V"]
    out: Float[Array, "1 1 N V"]


def channel_scales(
    query: Float[Array, "B T N H"], key: Float[Array, "B S K H"], value: Float[Array, "B S K V"]
) -> ChannelScales:
    """Scales after which a channel is as large in query as in key, and value half as uneven.

    Exact attention keeps a number of bits below the largest channel of a token, of the gradient of
    the output, too, whose channels are multiplied by `out`: so those of value are scaled by the
    root of what would make them equal. Compute the scales once, of some activations of the layer,
    and keep them: scales of each batch would let later tokens change the bits of earlier ones.

    Args:
      query, key, value: activations of the layer, floating point.
    """
    group, kv_heads = query.shape[2] // key.shape[2], key.shape[2]
    squares = (
        jnp.square(x.astype(jnp.float32)).reshape(-1, kv_heads, x.shape[2] // kv_heads, x.shape[3])
        for x in (query, key, value)
    )
    of_query, of_key, of_value = (x.mean((0, 2))[None, None] for x in squares)
    of_query, of_out = _power_of_two(of_key / of_query, 4), _power_of_two(of_value, 4)
    return ChannelScales(
        jnp.repeat(of_query, group, 2), 1 / of_query, 1 / of_out, jnp.repeat(of_out, group, 2)
    )


def _power_of_two(x: Array, root: int) -> Array:
    """The power of two near a root of x; 1 where x is 0 or no number."""
    e = jnp.round(jnp.log2(x) / root)
    return jnp.ldexp(jnp.float32(1), jnp.where(jnp.isfinite(e), e, 0).astype(jnp.int32))
