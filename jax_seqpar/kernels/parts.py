"""Attention to disjoint sets of keys, and the merge to that of all keys (an online softmax).

The output of a part is divided by its own sum of weights. All is float32 (float64 of float64):
parts rounded to 16 bits at each merge give a result with 1.2 times the error and more.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..mask import accumulated
from .softmax_residual import Residual


class Part(NamedTuple):
    """Attention of some queries to some of their keys.

    Attributes:
      out: `[B, T, N, V]`, 0 in a row without a key.
      residual: `[B, T, N]`.
    """

    out: Array
    residual: Residual


def merge(a: Part, b: Part) -> Part:
    """The attention to the keys of both parts; a row may have no key in either part."""
    top = jnp.maximum(_top(a), _top(b))
    top = jnp.where(top == -jnp.inf, 0, top)
    of_a, of_b = (x.residual.total * jnp.exp(_top(x) - top) for x in (a, b))
    merged = Residual(top, of_a + of_b)
    share_a, share_b = (x / merged.divisor for x in (of_a, of_b))
    return Part(a.out * share_a[..., None] + b.out * share_b[..., None], merged)


def with_sinks(part: Part, sinks: Float[Array, "N"] | None) -> Part:
    """The part with the sink of each head added to each row, rows without a key included."""
    if sinks is None:
        return part
    top = jnp.broadcast_to(sinks.astype(part.out.dtype)[None, None], part.residual.top.shape)
    total = jnp.where(top == -jnp.inf, 0, jnp.ones_like(top))
    return merge(
        part, Part(jnp.zeros_like(part.out), Residual(jnp.where(total == 0, 0, top), total))
    )


def sinks_gradient(sinks: Float[Array, "N"], D: Array, residual: Residual) -> Float[Array, "N"]:
    """The gradient of the sinks, whose weight is exp(sink - top) / total of the whole row.

    Args:
      D: `[B, T, N]`, the sum of each row's weights times their gradients.
      residual: of the whole rows, sinks included.
    """
    weights = jnp.exp(sinks.astype(D.dtype)[None, None] - residual.top) / residual.divisor
    return -jnp.sum(weights * D, axis=(0, 1))


def output_products(out: Array, out_gradient: Array) -> Array:
    """Sum over channels of output times gradient, `[B, T, N]`."""
    dtype = accumulated(out.dtype)
    return _total(_rounded(out_gradient.astype(dtype) * out.astype(dtype), out[..., :1]))[..., 0]


def residual_products(residual: Residual, gradient: Residual) -> Array:
    """Term that the gradient of the residual subtracts from `output_products`, `[B, T, N]`.

    The derivative of the total by a logit is its weight times the total.
    """
    return gradient.total * residual.total


def _top(part: Part) -> Array:
    """The largest logit of each row, -inf where the row has no key."""
    return jnp.where(part.residual.total == 0, -jnp.inf, part.residual.top)


def _rounded(products: Array, other: Array) -> Array:
    """Products that are rounded before they are added up.

    XLA merges a product and a sum into one rounding, or not, by the strides of the array, and so by
    how many heads there are. XLA cannot see through a sum of integers.

    Args:
      other: numbers; where one is NaN the products are void.
    """
    bits = jax.lax.bitcast_convert_type(products, f"int{8 * products.dtype.itemsize}")
    nothing = (other != other).astype(bits.dtype)
    return jax.lax.bitcast_convert_type(bits + nothing, products.dtype)


def _total(x: Array) -> Array:
    """The sum over the last axis, kept, in a fixed order: the order of XLA depends on the shape."""
    while (size := x.shape[-1]) > 1:
        half = (size + 1) // 2
        rest = [(0, 0)] * (x.ndim - 1) + [(0, size % 2)]
        x = x[..., :half] + jnp.pad(x[..., half:], rest)
    return x
