"""Checks that several folders share: arrays, axes, flags.

An error names the array, the size, the axis, and what to write instead.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

Shape = tuple[int, ...]

_AXES = {"query": "[B, T, N, H]", "key": "[B, S, K, H]", "value": "[B, S, K, V]"}


def check_arrays(query: Any, key: Any, value: Any) -> None:
    """Raises ValueError unless the arrays are one attention's query, key and value."""
    arrays = {"query": query, "key": key, "value": value}
    for name, x in arrays.items():
        check_is_array(name, x)
        if len(x.shape) != 4:
            raise ValueError(
                f"{name} must have 4 axes {_AXES[name]}, got shape {x.shape}. "
                f"For one sequence without a batch axis write {name}[None]."
            )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"{name} must have a floating dtype, got {x.dtype}. "
                f"Write {name}.astype(jnp.float32)."
            )
    sizes = got(query.shape, key.shape, value.shape)
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"query, key and value must have one dtype, got {query.dtype}, {key.dtype} and "
            f"{value.dtype}. Cast them, for example key.astype(query.dtype)."
        )
    if key.shape[:3] != value.shape[:3]:
        raise ValueError(
            f"key [B, S, K, H] and value [B, S, K, V] must agree in B, S and K. {sizes} "
            f"Repeat or project the smaller one."
        )
    for axis, size_name in ((0, "batch size B"), (3, "head dimension H")):
        if query.shape[axis] != key.shape[axis]:
            raise ValueError(
                f"query and key must agree in the {size_name}, "
                f"got {query.shape[axis]} and {key.shape[axis]}. {sizes} "
                f"Project or slice one of them."
            )
    N, K = query.shape[2], key.shape[2]
    if 0 in (N, query.shape[3]):
        raise ValueError(
            f"query must have at least one head and one channel, got N = {N} and "
            f"H = {query.shape[3]}. {sizes} Leave the call out where there is nothing to attend "
            f"with."
        )
    if K == 0 or N % K:
        raise ValueError(
            f"query heads N = {N} must be a multiple of the KV heads K = {K}. {sizes} "
            f"Query head n reads KV head n // (N / K): give a number of KV heads that divides {N}."
        )


def check_is_array(name: str, x: Any) -> None:
    """Raises ValueError unless x is an array of JAX or NumPy, or the shape of one."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return
    if not isinstance(x, jax.Array | np.ndarray | np.generic):
        raise ValueError(
            f"{name} must be an array of JAX or NumPy, got {type(x).__name__}. Write "
            f"{_as_array(name, x)}."
        )
    if isinstance(x, np.ma.MaskedArray):
        raise ValueError(
            f"{name} is a masked array, and its mask would be lost. Write {name}.filled(0)."
        )
    if isinstance(x, jax.Array) and not isinstance(x, Tracer) and x.is_deleted():
        raise ValueError(
            f"{name} is deleted, as an array donated to a jitted function is. Copy it before: "
            f"{name} + 0."
        )
    try:
        jax.typeof(x)
    except TypeError:
        swapped = isinstance(x.dtype, np.dtype) and not x.dtype.isnative
        dtype = f'{name}.dtype.newbyteorder("=")' if swapped else "np.float32"
        raise ValueError(
            f"{name} has dtype {x.dtype}, which JAX does not have. Write {name}.astype({dtype})."
        ) from None


def _as_array(name: str, x: Any) -> str:
    if type(x).__module__.partition(".")[0] == "torch":
        return f"jax_seqpar.bridge.to_jax({name})"
    if hasattr(x, "todense"):
        return f"{name}.todense()"
    if hasattr(x, "__jax_array__"):
        return f"{name}[...], the value of a Flax variable"
    return f"jnp.asarray({name})"


def as_boolean(name: str, dtype: Any) -> str:
    """Expression that makes a mask boolean, for a message: `write {as_boolean("mask", dtype)}`.

    A floating mask may hide by large negative numbers, which `astype(bool)` would let attend.
    """
    if jnp.issubdtype(dtype, jnp.floating):
        return (
            f"{name} == 0 if 0 attends and large negative numbers hide (bias={name} adds them to "
            f"the logits), {name} != 0 if 1 attends and 0 hides"
        )
    return f"{name}.astype(bool), or bias= for numbers added to the logits"


def check_has_numbers(tree: Mapping[str, Any]) -> None:
    """Raises ValueError if an array is a `jax.ShapeDtypeStruct`."""
    for name, x in tree.items():
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(x)):
            raise ValueError(
                f"{name} has a shape and no numbers. Write jax.eval_shape(function, ...), which "
                f"traces a function with the shapes of its arguments."
            )


def axis_size(axis_name: Any) -> int:
    """Size of a manual mesh axis; raises ValueError outside of a `jax.shard_map` over that axis."""
    try:
        return jax.lax.axis_size(axis_name)
    except NameError:
        raise ValueError(
            f"mesh axis {axis_name!r} is not manual here. Call this inside a jax.shard_map over a "
            f"mesh that has it, or jax_seqpar.dot_product_attention outside."
        ) from None


def check_platform(platform: Any, known: Sequence[str]) -> None:
    """Raises ValueError for an unknown platform."""
    if platform not in known:
        raise ValueError(
            f"platform must be one of {list(known)}, got {platform!r}. Write jax.default_backend()."
        )


def check_flag(name: str, value: Any, choices: Sequence[Any] = (True, False)) -> None:
    """Raises ValueError unless the value is one of the choices."""
    if not any(value is choice for choice in choices):
        write = " or ".join(f"{name}={choice!r}" for choice in choices)
        raise ValueError(f"{name} must be one of {list(choices)}, got {value!r}. Write {write}.")


def check_chunk_sizes(**chunks: Any) -> None:
    """Raises ValueError unless every chunk size is None or a positive integer."""
    for name, chunk in chunks.items():
        if chunk is not None and (type(chunk) is not int or chunk < 1):
            raise ValueError(
                f"{name} must be a positive integer or None, got {chunk!r}. Write {name}=512, or "
                f"leave it out."
            )


def got(query: Shape, key: Shape, value: Shape) -> str:
    """The shapes, as a message ends with them."""
    return f"Got query {query}, key {key}, value {value}."


def divisors(n: int) -> list[int]:
    """Every number that divides n."""
    return [d for d in range(1, n + 1) if n % d == 0]


def check_loss_options(label_smoothing: Any, z_loss: Any) -> None:
    """Raises ValueError unless the numbers of a cross entropy are finite and in range."""
    if not 0 <= float(label_smoothing) <= 1:
        raise ValueError(
            f"label_smoothing must be from 0 to 1, got {label_smoothing!r}. Write 0 for none."
        )
    # The gradient multiplies by twice the z-loss, which has to be a float32, too.
    if not 0 <= float(z_loss) <= 2.0**126:
        raise ValueError(f"z_loss must be from 0 to 2^126, got {z_loss!r}. Write 0 for none.")


def check_finite(name: str, x: Any, usual: float, least: float = 0.0) -> None:
    """Raises ValueError unless a number is finite in float32, and at least `least`.

    A tracer passes: its number is not known.
    """
    if not isinstance(x, Tracer) and not least <= float(x) < 2.0**128 * (1 - 2.0**-25):
        raise ValueError(
            f"{name} must be finite in float32 and at least {least}, got {x!r}. Write {usual}."
        )


def check_decay_rate(name: str, x: Any, usual: float) -> None:
    """Raises ValueError unless the decay rate of a moment is from 0 to below 1, in float32.

    At 1 the correction of the moment, `1 / (1 - rate^t)`, is infinite.
    """
    if not 0 <= float(x) < 1 - 2.0**-25:
        raise ValueError(f"{name} must be from 0 to below 1 in float32, got {x!r}. Write {usual}.")


def check_count(name: str, n: Any) -> None:
    """Raises ValueError unless the number is a positive integer."""
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise ValueError(f"{name} must be a positive integer, got {n!r}. Write {name}=1 or more.")


def check_int32(name: str, x: np.ndarray) -> None:
    """Raises ValueError unless every number fits into 32 bits."""
    if x.size and (x.max() > 2**31 - 1 or x.min() < -(2**31)):
        raise ValueError(
            f"{name} must be integers of 32 bits, got {x.min()} to {x.max()}. Number them "
            f"anew, for example by np.unique(..., return_inverse=True)."
        )


def check_not_masked(name: str, x: Any) -> None:
    """Raises ValueError for a masked array, whose mask would be lost."""
    if isinstance(x, np.ma.MaskedArray):
        raise ValueError(
            f"{name} is a masked array, and its mask would be lost. Write {name}.filled(0), and "
            f"give what is masked as segment 0."
        )


def as_numbers(name: str, x: Any) -> np.ndarray:
    """NumPy's array of x.

    Raises:
      ValueError: for a masked array, whose mask would be lost, and rows of different lengths.
    """
    check_not_masked(name, x)
    try:
        return np.asarray(x)
    except ValueError as error:
        raise ValueError(
            f"{name} is no array: {error}. Give rows of one length, such as those that "
            f"jax_seqpar.training.pack_documents makes."
        ) from None
