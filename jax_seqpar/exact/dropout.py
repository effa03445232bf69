"""Dropout of activations: which are dropped is a function of a key and of global coordinates."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Integer

from ..mask import Dropout, threefry
from .rounding import multiply


def dropout(
    x: Float32[Array, "B S D"], rate: float, rng: Any, numbers: Integer[Array, " S"]
) -> Float32[Array, "B S D"]:
    """`x (*) c`, or 0 where the word of an activation is below `rint(rate 2^32)`.

    The word is the first of `threefry(threefry(rng, (b, 0)), (s, d))`, that of the attention's
    head 0; `c = 2^32 / (2^32 - rint(rate 2^32))`, rounded to float32. The gradient likewise.

    Args:
      rate: the part that is dropped, at least 0 and below 1 - 2^-32.
      rng: a threefry key of `jax.random.key`; every use needs another one.
      numbers: s of the tokens of x, in the whole sequence.
    """
    return _dropped(rate, x, kept_activations(x.shape, rate, rng, numbers))


def kept_activations(
    shape: tuple[int, ...], rate: float, rng: Any, numbers: Integer[Array, " S"]
) -> Array:
    """True for the activations `[B, S, D]` that stay.

    Raises:
      ValueError: for a rate below 0, or one that leaves nothing.
    """
    Dropout(rate, rng)  # which checks the rate
    B, _, D = shape
    # Dropout of one head, whose queries are the tokens and whose keys are the channels.
    keys = threefry.head_keys(rng, B, 1)
    return threefry.keep(keys, rate, numbers, jnp.arange(D, dtype=jnp.int32))[:, 0]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dropped(rate: float, x: Array, kept: Array) -> Array:
    with jax.enable_x64(True):
        c = jnp.full_like(x, threefry.inverse_keep_probability(rate), jnp.float32)
        return jnp.where(kept, multiply(x, c), jnp.float32(0))


_dropped.defvjp(
    lambda rate, x, kept: (_dropped(rate, x, kept), kept),
    lambda rate, kept, dy: (_dropped(rate, dy, kept), None),
)
