"""Digests of arrays, which tell a damaged checkpoint from a whole one at any degree."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped, UInt32

SEEDS = (0x9E3779B9, 0x7F4A7C15)


def digest_arrays(tree: Any) -> dict[str, str]:
    """Digest of every array of a tree, which does not depend on how the arrays are sharded.

    A flipped bit always changes the digest of its array, any other damage does so but for one in
    2^64. The digest is not cryptographic: it finds accidents, not forgeries. Store it beside a
    checkpoint, and compare it with that of the restored arrays, on whatever mesh they are.

    Args:
      tree: a pytree of JAX arrays of any dtype, NumPy arrays and Python scalars. On several
        processes every process calls with the same global arrays.

    Raises:
      ValueError: for a leaf that is not an array of numbers.

    Returns:
      by path, like "['layers'][0]['kernel']": dtype, shape and 16 hexadecimal digits, like
      "float32[64, 128] 0f3a5b7c9d1e2f40".

    Example:
      restored = digest_arrays(state)
      # A leaf that became None has no digest: ask for every path that was saved.
      damaged = [path for path, digest in saved.items() if restored.get(path) != digest]
    """
    leaves = [
        (path, x if isinstance(x, jax.Array) else _numbers(path, x))
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    ]
    sums = _sums([_narrow(x) for _, x in leaves])
    return {
        jax.tree_util.keystr(path): f"{x.dtype}{list(x.shape)} "
        + "".join(f"{int(part):08x}" for part in parts)
        for (path, x), parts in zip(leaves, sums, strict=True)
    }


def _numbers(path: Any, x: Any) -> np.ndarray:
    kinds = (np.ndarray, np.generic, bool, int, float, complex)
    array = np.asarray(x) if isinstance(x, kinds) else None
    is_number = array is not None and (
        array.dtype.kind in "biufc" or jnp.issubdtype(array.dtype, jnp.number)
    )
    # NumPy's masked arrays would lose their mask, and the long double of x86 has bits that no
    # number writes.
    wide = is_number and array is not None and array.dtype.char in "gG"
    if array is None or not is_number or wide or isinstance(x, np.ma.MaskedArray):
        raise ValueError(
            f"{jax.tree_util.keystr(path)} is no array of numbers, but {type(x).__name__}"
            f"{f' of {array.dtype}' if array is not None else ''}. Leave it out of the tree, or "
            f"write np.float64(x) of a longdouble."
        )
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _narrow(x: Any) -> Any:
    """Numbers of 64 bits as pairs of 32, which JAX takes whether it has 64 bits switched on or not.

    Words are as in `_words`, so an array has one digest in NumPy and in JAX.
    """
    if isinstance(x, jax.Array) or x.dtype.itemsize < 8:
        return x
    if x.dtype.kind == "c":  # real and imaginary part on an axis of their own
        x = np.asarray(x, order="C")[..., None].view(f"f{x.dtype.itemsize // 2}")
    words = x.dtype.itemsize // 4
    if words < 2:
        return x
    return np.ascontiguousarray(x)[..., None].view(np.uint32).reshape(*x.shape, words)


@jax.jit
def _sums(arrays: list[Array]) -> list[list[Array]]:
    return [[_sum(_words(x), seed) for seed in SEEDS] for x in arrays]


def _words(x: Shaped[Array, "..."]) -> UInt32[Array, "..."]:
    """The bits of every element, as one word of 32 bits or, on a new last axis, as several."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack((x.real, x.imag), axis=-1)
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    info = jnp.finfo if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo
    words = jax.lax.bitcast_convert_type(x, f"uint{min(info(x.dtype).bits, 32)}")
    return words.astype(jnp.uint32)


def _sum(words: UInt32[Array, "..."], seed: int) -> UInt32[Array, ""]:
    """Sum modulo 2^32, which has no order, of each word mixed with its place in the array."""
    place = jnp.full_like(words, seed)
    for axis in range(words.ndim):
        place = _mix(place ^ jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis))
    # For one place the mix is a bijection of words: a sum of which one term changes is another.
    return _mix(words ^ place).sum(dtype=jnp.uint32)


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """The last step of MurmurHash3, a bijection of 32-bit words (Appleby 2011)."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))
