"""Tensors as NumPy arrays and back, bit for bit, for other processes and for files.

NumPy has bfloat16 and float8 by way of `ml_dtypes`, which PyTorch does not know: bits cross as
unsigned integers of the same width, and the dtype by its name.
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .._extras import require_torch


def check_leaf(x: Any, what: str) -> None:
    """Checks that an array holds its numbers densely in memory, and nothing beside them.

    Args:
      x: an array of any framework. Anything else passes.
      what: how a message calls it, like "float32 tensor at ['x']".

    Raises:
      TypeError: a tensor that is nested, quantised, sparse or without a storage (like a DTensor),
        an array that is deleted, a random key or masked.
    """
    # Whoever passes a tensor has imported PyTorch, so this module need not.
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.Tensor):
        _check_tensor(x, what, torch)
    elif isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        raise TypeError(f"{what} is a random key. Write jax.random.key_data(x).")
    elif isinstance(x, jax.Array) and not isinstance(x, Tracer) and x.is_deleted():
        raise TypeError(
            f"{what} is deleted, as an array donated to a jitted function is. Copy it before: "
            f"x + 0."
        )
    elif isinstance(x, np.ma.MaskedArray):
        raise TypeError(
            f"{what} is masked, and its mask would be lost. Write x.filled(0), or x.data for all."
        )


def _check_tensor(x: Any, what: str, torch: Any) -> None:
    if x.is_nested:
        raise TypeError(
            f"{what} is nested. Write x.unbind(), or torch.nested.to_padded_tensor(x, 0.0)."
        )
    if x.is_quantized:
        raise TypeError(
            f"{what} is quantised. Write x.dequantize() for its values, x.int_repr() for its "
            f"integers."
        )
    if x.is_meta:
        raise TypeError(f"{what} is on the meta device, without data. Load the numbers first.")
    if x.layout != torch.strided:
        raise TypeError(f"{what} has layout {x.layout}, is not dense. Write x.to_dense().")
    if not _holds_numbers(x):
        write = "x.full_tensor()" if hasattr(x, "full_tensor") else "x.clone() while they are there"
        raise TypeError(
            f"{what} is a {type(x).__name__} without its numbers in memory of its own, as a "
            f"DTensor, a wrapper or a freed storage is. Write {write}."
        )


def _holds_numbers(x: Any) -> bool:
    """Whether all elements of a strided tensor lie in the tensor's storage.

    A subclass that wraps another tensor reports the wrapped tensor's shape, and FSDP frees the
    storage of parameters that keep their shape: reading either reads memory of other tensors.
    """
    if x.numel() == 0:
        return True
    try:
        start, storage = x.data_ptr(), x.untyped_storage()
        last = x.storage_offset() + sum(
            (n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)
        )
        return (
            start != 0 and storage.data_ptr() != 0 and (last + 1) * x.itemsize <= storage.nbytes()
        )
    except (RuntimeError, NotImplementedError):  # PyTorch's words for a tensor without a storage
        return False


def numpy_to_torch(x: np.ndarray) -> Any:
    """PyTorch tensor of the same dtype and bits, as a copy."""
    torch = require_torch()
    carrier = _carrier(x.dtype.itemsize)
    flat = torch.from_numpy(np.array(x, order="C").reshape(-1).view(carrier))
    return flat.view(getattr(torch, x.dtype.name)).reshape(x.shape)


def torch_to_numpy(x: Any) -> np.ndarray:
    """NumPy array of the same dtype and bits, as a copy."""
    torch = require_torch()
    name = str(x.dtype).removeprefix("torch.")
    carrier = getattr(torch, _carrier(x.dtype.itemsize))
    plain = x.detach().cpu().resolve_conj().resolve_neg()
    flat = plain.contiguous().reshape(-1).view(carrier)
    return flat.numpy().copy().view(jnp.dtype(name)).reshape(tuple(x.shape))


def _carrier(itemsize: int) -> str:
    return "complex128" if itemsize == 16 else f"uint{8 * itemsize}"
