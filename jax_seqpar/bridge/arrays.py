"""Tensors as NumPy arrays and back, bit for bit: what crosses to another process or to a file.

NumPy has bfloat16 and float8 by way of `ml_dtypes`, which PyTorch does not know: bits cross as
unsigned integers of the same width, and the dtype by its name.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from .extras import require_torch


def numpy_to_torch(x: np.ndarray) -> Any:
    """A tensor of the same dtype and bits, in memory of its own."""
    torch = require_torch()
    carrier = _carrier(x.dtype.itemsize)
    flat = torch.from_numpy(np.array(x, order="C").reshape(-1).view(carrier))
    return flat.view(getattr(torch, x.dtype.name)).reshape(x.shape)


def torch_to_numpy(x: Any) -> np.ndarray:
    """An array of the same dtype and bits, in memory of its own."""
    torch = require_torch()
    name = str(x.dtype).removeprefix("torch.")
    carrier = getattr(torch, _carrier(x.dtype.itemsize))
    plain = x.detach().cpu().resolve_conj().resolve_neg()
    flat = plain.contiguous().reshape(-1).view(carrier)
    return flat.numpy().copy().view(jnp.dtype(name)).reshape(tuple(x.shape))


def _carrier(itemsize: int) -> str:
    return "complex128" if itemsize == 16 else f"uint{8 * itemsize}"
