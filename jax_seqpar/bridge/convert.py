"""Trees of arrays from one framework to the other by DLPack: the same bits, without a copy.

The two arrays are one memory. JAX takes its arrays to be immutable, and nothing enforces it here:
an in-place write to the tensor, `to_torch(x).add_(1)` or `t.add_(1)` after `to_jax(t)`, changes the
JAX array too, and what JAX has yet to compute from it. Write `.clone()` first.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Sharding

from .._extras import require_torch
from ..compare.numpy_conversion import check_leaf

# Exactly these: np.float64 is a float by inheritance, but an array to compare and convert.
_SCALARS = (bool, int, float, complex)


def to_torch(tree: Any) -> Any:
    """Converts every JAX array of a tree to a PyTorch tensor.

    The tensor shares the array's memory, so it must not be written in place: clone it first.

    Args:
      tree: a pytree of JAX arrays, each on one device; Python scalars and None pass unchanged.

    Returns:
      the same tree with tensors of the same shape, dtype and bits.

    Raises:
      ValueError: for an array inside `jax.jit` or another transformation, or on several devices.
      TypeError: for another kind of leaf, a deleted array, or a dtype that DLPack or PyTorch does
        not have.
    """
    torch = require_torch()
    return jax.tree_util.tree_map_with_path(lambda path, x: _leaf_to_torch(path, x, torch), tree)


def to_jax(tree: Any, *, sharding: Sharding | None = None) -> Any:
    """Converts every PyTorch tensor of a tree to a JAX array.

    The array shares the tensor's memory, so the tensor must not be written in place afterwards. A
    copy is made of a tensor that is not contiguous, or, on CPU, does not start at a multiple of 64
    bytes, as a slice may not; and wherever a sharding is given.

    Args:
      tree: a pytree of dense tensors; Python scalars and None pass unchanged.
      sharding: of every array, as `jax.device_put` takes it; each device gets a copy of its part.
        If None, arrays are committed to the tensor's device, and JAX does not compute with them
        beside arrays that are sharded over a mesh.

    Returns:
      the same tree with JAX arrays of the same shape, dtype and bits.

    Raises:
      ValueError: for a tensor that requires a gradient, a sharding that does not fit, or a 64-bit
        dtype while JAX's x64 mode is off.
      TypeError: for another kind of leaf, a tensor that is nested, quantised, sparse or without
        data, or a dtype that DLPack or JAX does not have.
    """
    torch = require_torch()
    return jax.tree_util.tree_map_with_path(
        lambda path, x: _sharded(path, _leaf_to_jax(path, x, torch), sharding), tree
    )


def _leaf_to_torch(path: Any, x: Any, torch: Any) -> Any:
    if type(x) in _SCALARS:
        return x
    if not isinstance(x, jax.Array):
        raise TypeError(
            f"to_torch takes JAX arrays, Python scalars and None, got {type(x).__name__} at "
            f"{_place(path)}. Write jnp.asarray(x) if it is an array, or leave it out of the tree."
        )
    what = f"{x.dtype} array of shape {x.shape} at {_place(path)}"
    if isinstance(x, Tracer):
        raise ValueError(
            f"{what} is a tracer, which has no memory to share. Cross outside jit, grad, vmap and "
            f"shard_map: return the array from the transformed function, then write to_torch(x)."
        )
    check_leaf(x, what)
    if len(x.devices()) > 1:
        raise ValueError(
            f"{what} is on {len(x.devices())} devices, DLPack carries one. Write "
            f"[shard.data for shard in x.addressable_shards] for its pieces, or "
            f"jax.device_put(x, jax.devices()[0]) for the whole."
        )
    try:
        return torch.from_dlpack(x)
    except (BufferError, jax.errors.JaxRuntimeError) as error:
        raise TypeError(
            f"{what} does not cross by DLPack: {error}. Write {_instead(x)}."
        ) from error


def _instead(x: Any) -> str:
    (device,) = x.devices()
    if device.platform == "tpu":
        return 'jax.device_put(x, jax.devices("cpu")[0])'
    if jnp.issubdtype(x.dtype, jnp.integer):
        return "x.astype(jnp.int8), which keeps the values"
    if jnp.finfo(x.dtype).bits == 8:
        return "jax.lax.bitcast_convert_type(x, jnp.uint8), which keeps the bits"
    return "x.astype(jnp.float32), which keeps the values"


def _leaf_to_jax(path: Any, x: Any, torch: Any) -> Any:
    if type(x) in _SCALARS:
        return x
    if not isinstance(x, torch.Tensor):
        raise TypeError(
            f"to_jax takes PyTorch tensors, Python scalars and None, got {type(x).__name__} at "
            f"{_place(path)}. Write torch.as_tensor(x) if it is an array, or leave it out of the "
            f"tree."
        )
    # A nested tensor has no shape to name.
    shape = "" if x.is_nested else f" of shape {tuple(x.shape)}"
    what = f"{x.dtype} tensor{shape} at {_place(path)}"
    check_leaf(x, what)
    if x.requires_grad:
        raise ValueError(
            f"{what} requires a gradient, which ends at the bridge. Write x.detach() if it may."
        )
    wide = (torch.float64, torch.int64, torch.uint64, torch.complex128)
    # jax.dlpack narrows without a word. The x64 mode, not the flag, decides, so JAX is asked.
    if x.dtype in wide and jax.dtypes.canonicalize_dtype(np.float64) != np.float64:
        raise ValueError(
            f"{what} would be narrowed to 32 bits, as JAX's x64 mode is off. "
            f"Write `with jax.enable_x64(True):` around to_jax and the use of its result."
        )
    try:
        return jax.dlpack.from_dlpack(x.resolve_conj().resolve_neg().contiguous())
    except (BufferError, jax.errors.JaxRuntimeError) as error:
        raise TypeError(
            f"{what} does not cross by DLPack: {error}. "
            f"Write x.view(torch.uint8) for the bits, or x.to(torch.complex64) or "
            f"x.to(torch.float32) for the values."
        ) from error


def _sharded(path: Any, x: Any, sharding: Sharding | None) -> Any:
    if sharding is None or type(x) in _SCALARS:
        return x
    try:
        # A copy first: jax.device_put leaves the first device the tensor's memory, and where
        # PyTorch writes to it the replicas of one array differ. PyTorch does not wait for it.
        return jax.device_put(jnp.array(x, copy=True).block_until_ready(), sharding)
    except (ValueError, AssertionError) as error:  # the latter for more axes than the array has
        raise ValueError(
            f"{x.dtype} array of shape {x.shape} at {_place(path)} cannot have the sharding "
            f"{sharding}: {str(error).rstrip('.')}. Write a PartitionSpec whose axes divide its "
            f"own."
        ) from error


def _place(path: Any) -> str:
    return jax.tree_util.keystr(path) or "the root"
