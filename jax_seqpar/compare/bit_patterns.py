"""The bits of NumPy arrays as unsigned integers, and the distance of floats along them."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from .numpy_conversion import check_leaf, torch_to_numpy


def to_numpy(x: Any, path: str) -> np.ndarray:
    """An array of any framework as NumPy's, in the byte order of this machine.

    Raises:
      TypeError: for anything but a dense array of numbers of at most 64 bits; `path` names it.
    """
    check_leaf(x, path or "the leaf")
    # Only tensors have it, and PyTorch need not be there.
    array = torch_to_numpy(x) if hasattr(x, "detach") else np.asarray(x)
    numbers = (jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating)
    size = array.dtype.itemsize // (2 if is_of(array, jnp.complexfloating) else 1)
    if size > 8 or not any(is_of(array, kind) for kind in numbers):
        raise TypeError(
            f"{path or 'the leaf'} must be an array of numbers of at most 64 bits, got "
            f"{type(x).__name__} of dtype {array.dtype}. Leave it out of both trees."
        )
    if not array.dtype.isnative:
        array = array.byteswap().view(array.dtype.newbyteorder("="))
    return array


def real_parts(x: np.ndarray) -> np.ndarray:
    """`[elements, 1]`, or `[elements, 2]` real numbers of a complex array."""
    flat = np.ravel(x)
    if is_of(x, jnp.complexfloating):
        return flat.view(f"f{x.dtype.itemsize // 2}").reshape(-1, 2)
    return flat.reshape(-1, 1)


def unsigned(x: np.ndarray) -> np.ndarray:
    """The bits of real numbers as unsigned integers of the same size."""
    bits = x.view(f"u{x.dtype.itemsize}")
    unused = 8 * x.dtype.itemsize - width(x.dtype)  # an int4 lies in the low half of a byte
    return bits & ((1 << width(x.dtype)) - 1) if unused else bits


def width(dtype: np.dtype) -> int:
    """Bits of a real number, of which an int4 leaves half of its byte unused."""
    if dtype == np.bool_:
        return 8
    return (jnp.finfo if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo)(dtype).bits


def is_of(x: Any, kind: Any) -> bool:
    """Whether an array has a dtype of a kind, like `jnp.floating`."""
    return jnp.issubdtype(x.dtype, kind)


def ulp_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Distance of finite floats along the line on which a float's bits are sign and magnitude."""
    sign = 1 << (width(a.dtype) - 1)
    if float(jnp.finfo(a.dtype).min) > 0:  # float8_e8m0fnu is an exponent without a sign
        sign <<= 1
    x, y = unsigned(a).astype(np.uint64), unsigned(b).astype(np.uint64)
    magnitude_x, magnitude_y = x & (sign - 1), y & (sign - 1)
    same_side = np.maximum(magnitude_x, magnitude_y) - np.minimum(magnitude_x, magnitude_y)
    # Two magnitudes below 2**63 add up without overflow.
    return np.where((x ^ y) & sign, magnitude_x + magnitude_y, same_side)
