"""Random words of dropout: threefry2x32 of a key and of a position in the whole attention."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, UInt32

from .._checks import check_has_numbers, check_is_array

# As in Random123: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def head_keys(rng: Any, batch: int, heads: int) -> UInt32[Array, "B N 2"]:
    """A key for each sequence and query head, made of their numbers in the whole attention.

    Args:
      rng: a threefry key of `jax.random.key`, or its two words; or such head keys, as they are.
      batch, heads: B and N of the whole attention, on all devices together.

    Raises:
      ValueError: another kind of key, or head keys of another shape.
    """
    check_has_numbers({"rng": rng})
    check_key(rng, batch, heads)
    words = key_words(rng)
    if words.ndim == 3:
        return words
    b = jnp.arange(batch, dtype=jnp.uint32)[:, None]
    n = jnp.arange(heads, dtype=jnp.uint32)[None, :]
    return jnp.stack(threefry(words, jnp.broadcast_to(b, (batch, heads)), n), axis=-1)


def key_words(rng: Any) -> UInt32[Array, "..."]:
    """The words of a key, typed or not."""
    return jax.random.key_data(rng) if jnp.issubdtype(rng.dtype, jax.dtypes.prng_key) else rng


def threshold(rate: float) -> int:
    """A weight is dropped where its random word is below this number."""
    return round(rate * 2**32)


def inverse_keep_probability(rate: float) -> float:
    """Factor of the weights that dropout keeps, so that the mean of all weights stays."""
    return 2.0**32 / (2**32 - threshold(rate))


def keep(
    head_keys: UInt32[Array, "B N 2"], rate: float, queries: Array, keys: Array
) -> Bool[Array, "B N t s"]:
    """True for the weights that stay.

    Args:
      head_keys: of `head_keys`.
      queries, keys: `[t]` and `[s]`, the numbers of the queries and keys, from 0.
    """
    t = queries.astype(jnp.uint32)[None, None, :, None]
    s = keys.astype(jnp.uint32)[None, None, None, :]
    keys_of_heads = head_keys[:, :, None, None]
    return keep_counters((keys_of_heads[..., 0], keys_of_heads[..., 1]), rate, t, s)


def keep_counters(key: tuple[Array, Array], rate: float, t: Array, s: Array) -> Array:
    """True for the weights that stay, of counters that broadcast to one another.

    Args:
      key: the two words of the key of a head.
      t, s: the numbers of queries and keys, uint32.
    """
    word, _ = _rounds(*key, t, s)
    return word >= jnp.uint32(threshold(rate))


def threefry(key: UInt32[Array, "... 2"], x0: Array, x1: Array) -> tuple[Array, Array]:
    """threefry2x32 of 20 rounds: two words from the two of a key and the two of a counter."""
    return _rounds(key[..., 0], key[..., 1], x0, x1)


def _rounds(k0: Array, k1: Array, x0: Array, x1: Array) -> tuple[Array, Array]:
    shape = jnp.broadcast_shapes(k0.shape, x0.shape, x1.shape)
    k0, k1, x0, x1 = (jnp.broadcast_to(x, shape) for x in (k0, k1, x0, x1))
    words = (k0, k1, k0 ^ k1 ^ jnp.uint32(_PARITY))
    x0, x1 = x0 + words[0], x1 + words[1]
    for group in range(1, 6):
        for bits in _ROTATIONS[(group - 1) % 2]:
            x0 = x0 + x1
            x1 = (x1 << jnp.uint32(bits) | x1 >> jnp.uint32(32 - bits)) ^ x0
        x0 = x0 + words[group % 3]
        x1 = x1 + words[(group + 1) % 3] + jnp.uint32(group)
    return x0, x1


def check_key(rng: Any, batch: Any, heads: Any) -> None:
    """Raises ValueError unless `rng` is one threefry key, or the keys of a batch's heads."""
    for name, size in (("batch", batch), ("heads", heads)):
        if not isinstance(size, int) or size < 0:
            raise ValueError(
                f"{name} must be a Python integer, not negative, got {size!r}. Take it from "
                f"query.shape."
            )
    a_key = 'jax.random.key(seed, impl="threefry2x32")'
    if not hasattr(rng, "dtype"):
        raise ValueError(f"rng must be a key, got {rng!r}. Write {a_key}.")
    check_is_array("rng", rng)
    if jnp.issubdtype(rng.dtype, jax.dtypes.prng_key):
        implementation = str(jax.random.key_impl(rng))
        if implementation != "threefry2x32":
            raise ValueError(
                f"rng must be a threefry key, got one of {implementation}. Write {a_key}."
            )
        fits = rng.shape == ()
    else:
        fits = rng.dtype == jnp.uint32 and rng.shape in ((2,), (batch, heads, 2))
    if not fits:
        raise ValueError(
            f"rng must be one key, or keys of heads [B, N, 2] = {[batch, heads, 2]}, got "
            f"{rng.dtype}{list(rng.shape)}. Write {a_key}."
        )
