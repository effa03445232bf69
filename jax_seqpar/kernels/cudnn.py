"""cuDNN's flash attention on NVIDIA GPUs, as `jax.nn.dot_product_attention` calls it."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..mask import Mask, Spec
from ..mask.keywords import to_flat

_WITHOUT = {
    "bias": "it holds one as a whole T x S array of 16 bits",
    "mask": "jax.nn makes it a T x S bias of large negative numbers, with which a query without a "
    "key gets the mean of the values",
    "positions": "it counts queries and keys from 0",
    "segment_ids": "jax.nn gives it none",
    "alibi_slopes": "jax.nn gives it none",
    "logits_soft_cap": "it caps nothing",
    "sinks": "jax.nn gives it none",
    "query_offset": "its causal diagonal starts in the top left corner",
    "dropout_rate": "it would drop other weights than all the other kernels",
}

# Compute capability of an absent GPU that a program is compiled for.
_ASSUMED: ContextVar[tuple[int, ...] | None] = ContextVar("compute capability", default=None)


def why_not(query: Any, key: Any, value: Any, spec: Spec) -> str | None:
    """Why the kernel cannot do what is asked, None if it can.

    Args:
      query, key, value: anything with a shape and a dtype.
      spec: of such arrays, too.
    """
    if spec.held_keys is not None:
        return "a part of the keys is not supported by cuDNN: its output of 16 bits would be merged"
    if spec.held_queries is not None:
        return "a part of the tokens is not supported by cuDNN: it counts them from 0"
    asked = to_flat(spec).keys()
    for name, reason in _WITHOUT.items():
        if name in asked:
            return f"{name} is not supported by cuDNN: {reason}"
    return (
        _why_not_arrays(query, value)
        or _why_not_window(query.shape[1], key.shape[1], spec.mask, asked)
        or _why_not_device(query.shape[3])
    )


def _why_not_arrays(query: Any, value: Any) -> str | None:
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"dtype {query.dtype} is not supported by cuDNN, which has bfloat16 and float16"
    H, V = query.shape[3], value.shape[3]
    if H != V:
        return f"head dimensions H = {H} and V = {V} are not supported by cuDNN, which has H = V"
    if H % 8:
        return f"head dimension H = {H} is not supported by cuDNN, which has multiples of 8"
    return None


def _why_not_window(queries: int, keys: int, mask: Mask, asked: Collection[str]) -> str | None:
    if mask.window is None:
        return None
    start = f"local_window_size = {mask.local_window_size} is not supported by cuDNN"
    if not (mask.is_causal or mask.window[1] == 0):
        return f"{start}, which has windows of keys up to the query only: (left, 0)"
    if queries != keys:
        return f"{start} with T = {queries} queries of S = {keys} keys, which must be as many"
    if "key_value_seq_lengths" in asked:
        return f"{start} together with key_value_seq_lengths: a query could be without a key"
    return None


def _why_not_device(head_dim: int) -> str | None:
    capability = compute_capability()
    if capability is None:
        return "cuDNN needs an NVIDIA GPU, and JAX sees none, whose limits it would ask for"
    most = 256 if capability >= (9, 0) else 128
    if head_dim > most:
        return f"head dimension H = {head_dim} is not supported by cuDNN, which has {most} here"
    return None


def compute_capability() -> tuple[int, ...] | None:
    """Compute capability of the first NVIDIA GPU that JAX sees; None if JAX sees no GPU."""
    if (assumed := _ASSUMED.get()) is not None:
        return assumed
    try:
        device, *_ = jax.local_devices(backend="cuda")
    except RuntimeError:
        return None
    return tuple(map(int, device.compute_capability.split(".")))


@contextmanager
def assume_compute_capability(capability: tuple[int, ...]) -> Iterator[None]:
    """Pretends that JAX sees a GPU of this compute capability, to trace for an absent GPU.

    The choice of kernels depends on the capability, which only a present GPU can tell.
    """
    token = _ASSUMED.set(capability)
    try:
        yield
    finally:
        _ASSUMED.reset(token)


def cudnn_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    spec: Spec,
) -> Float[Array, "B T N H"]:
    """Attention by cuDNN, for calls that `why_not` returns None for."""
    (B, T, _, _), S = query.shape, key.shape[1]
    if query.size == 0 or S == 0:
        return jnp.zeros_like(query)
    mask = spec.mask
    left = None if mask.window is None else mask.window[0]
    lengths = mask.key_value_seq_lengths
    out = jax.nn.dot_product_attention(
        query,
        key,
        value,
        scale=spec.logits.scale,
        # A window that ends with the query is causal, and cuDNN has windows where it is told so.
        is_causal=mask.is_causal or left is not None,
        # cuDNN's result for length 0 is undocumented: clip to 1, zero the rows afterwards.
        key_value_seq_lengths=None if lengths is None else _clip(lengths, 1, S),
        local_window_size=None if left is None else (min(left, S), 0),
        implementation="cudnn",
    )
    # It computes the queries beyond their lengths, too, for nothing: what it would give for them is
    # not said either, and where() leaves neither them nor their gradient.
    some = jnp.ones((B, T), bool)
    if lengths is not None:
        some &= (lengths > 0)[:, None]
    if mask.query_seq_lengths is not None:
        of_query = _clip(mask.query_seq_lengths, 0, T)
        some &= jnp.arange(T, dtype=jnp.int32)[None] < of_query[:, None]
    return jnp.where(some[:, :, None, None], out, jnp.zeros_like(out))


def _clip(lengths: Array, low: int, high: int) -> Array:
    return jnp.clip(lengths.astype(jnp.int32), low, high)
