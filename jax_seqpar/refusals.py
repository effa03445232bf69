"""Every refusal, made at the door: what does not fit, its sizes, and what to write instead."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .layout import MeshLayout, axes_size

Shape = tuple[int, ...]

_AXES = {"query": "[B, T, N, H]", "key": "[B, S, K, H]", "value": "[B, S, K, H]"}


def check_arrays(query: Any, key: Any, value: Any) -> None:
    """Refuses arrays that are not one attention's query, key and value, whatever the mesh."""
    arrays = {"query": query, "key": key, "value": value}
    for name, x in arrays.items():
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
    got = _got(query.shape, key.shape, value.shape)
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"query, key and value must have one dtype, got {query.dtype}, {key.dtype} and "
            f"{value.dtype}. Cast them, for example key.astype(query.dtype)."
        )
    if key.shape != value.shape:
        raise ValueError(f"key and value must have the same shape [B, S, K, H]. {got}")
    for axis, size_name in ((0, "batch size B"), (3, "head dimension H")):
        if query.shape[axis] != key.shape[axis]:
            raise ValueError(
                f"query and key must agree in the {size_name}, "
                f"got {query.shape[axis]} and {key.shape[axis]}. {got}"
            )
    N, K = query.shape[2], key.shape[2]
    if K == 0 or N % K:
        raise ValueError(
            f"query heads N = {N} must be a multiple of the KV heads K = {K}. {got} "
            f"Query head n reads KV head n // (N / K)."
        )


def axis_size(axis_name: Any) -> int:
    """The size of a manual mesh axis; refuses one that is not, as outside `jax.shard_map`."""
    try:
        return jax.lax.axis_size(axis_name)
    except NameError:
        raise ValueError(
            f"mesh axis {axis_name!r} is not manual here. Call this inside a jax.shard_map over a "
            f"mesh that has it, or jax_seqpar.dot_product_attention outside."
        ) from None


def check_reshard(shape: Shape, split_axis: int, axis_name: Any) -> None:
    """Refuses a reshard of anything but `[B, S, N, H]`, or along an axis that does not divide."""
    degree = axis_size(axis_name)
    if len(shape) != 4:
        raise ValueError(f"a reshard takes 4 axes [B, S, N, H], got shape {shape}.")
    if shape[split_axis] % degree:
        what = {1: "tokens S", 2: "heads N"}[split_axis]
        raise ValueError(
            f"{what} = {shape[split_axis]} is not divisible by the {degree} devices of mesh axis "
            f"{axis_name!r}. Got shape {shape}. Use one of {_divisors(shape[split_axis])} devices."
        )


def check_heads(query: Shape, key: Shape, axis_name: Any, degree: int) -> None:
    """Refuses heads that the devices of the token axis cannot share evenly.

    Args:
      query, key: shapes whose axis 2 counts the heads of one tensor-parallel shard.
      axis_name: the mesh axis (or axes) of the tokens.
      degree: its size.
    """
    N, K = query[2], key[2]
    devices = f"the {degree} devices of mesh axis {axis_name!r}"
    got = f"Got query {query}, key {key}."
    if N % degree:
        raise ValueError(
            f"query heads N = {N} is not divisible by {devices}. {got} "
            f"Use a degree that divides N: {_divisors(N)}."
        )
    if K % degree and degree % K:
        fits = [d for d in _divisors(N) if K % d == 0 or d % K == 0]
        raise ValueError(
            f"KV heads K = {K} neither is divisible by nor divides {devices}. {got} "
            f"Use a degree that does: {fits}; or repeat the KV heads: "
            f"jnp.repeat(key, {N // K}, axis=2), and value alike."
        )


def check_local_output(out: Shape, query: Shape) -> None:
    """Refuses a local attention's output of another shape, which a reshard would scramble."""
    if out != query:
        raise ValueError(
            f"attention returned shape {out}, expected {query} = [B, T, N, H], the shape of the "
            f"query it was given. Transpose the output of a kernel that puts heads before tokens."
        )


def check_mesh(layout: MeshLayout, mesh_shape: Mapping[str, int], manual: Sequence[str]) -> None:
    """Refuses a layout that names what the mesh does not have, or has already given away."""
    for axis in layout.axis_names:
        if axis not in mesh_shape:
            raise ValueError(
                f"{layout!r} names axis {axis!r}, which the mesh does not have: its axes are "
                f"{dict(mesh_shape)}. Name its axes in MeshLayout(tokens=, batch=, heads=)."
            )
        if axis in manual:
            raise ValueError(
                f"mesh axis {axis!r} is already manual: this is inside a jax.shard_map, where "
                f"arrays are per-device. Call jax_seqpar.ulysses_attention(query, key, value, "
                f"axis_name={axis!r}, attention=...) here instead."
            )
    twice = [a for a in layout.axis_names if layout.axis_names.count(a) > 1]
    if twice:
        raise ValueError(
            f"{layout!r} uses mesh axis {twice[0]!r} for more than one array axis. "
            f"A mesh axis shards one of batch, tokens and heads."
        )


def check_division(
    query: Shape, key: Shape, layout: MeshLayout, mesh_shape: Mapping[str, int]
) -> None:
    """Refuses sizes that the mesh does not divide."""
    got = f"Got query {query}, key {key}."

    def divide(tensor: str, size_name: str, size: int, field: str, mesh_axes: Any) -> int:
        parts = axes_size(mesh_axes, mesh_shape)
        if size % parts:
            raise ValueError(
                f"{tensor} {size_name} = {size} is not divisible by the {parts} devices of mesh "
                f"axis {mesh_axes!r}. {got} Pad it to {-(-size // parts) * parts}, or use "
                f"MeshLayout({field}=None) to leave it whole."
            )
        return size // parts

    B, T, N, H = query
    S, K = key[1:3]
    divide("query", "batch B", B, "batch", layout.batch)
    divide("query", "tokens T", T, "tokens", layout.tokens)
    divide("key", "tokens S", S, "tokens", layout.tokens)
    local_N = divide("query", "heads N", N, "heads", layout.heads)
    tensor_parallel = axes_size(layout.heads, mesh_shape)
    if K % tensor_parallel and tensor_parallel % K:
        raise ValueError(
            f"KV heads K = {K} neither is divisible by nor divides the {tensor_parallel} devices "
            f"of mesh axis {layout.heads!r}. {got} Use jnp.repeat(key, {N // K}, axis=2), and "
            f"value alike, or MeshLayout(heads=None)."
        )
    local_K = max(K // tensor_parallel, 1)
    check_heads(
        (B, T, local_N, H), (B, S, local_K, H), layout.tokens, axes_size(layout.tokens, mesh_shape)
    )


def check_masks(
    query: Shape, key: Shape, *, bias: Any, mask: Any, lengths: Mapping[str, Any]
) -> None:
    """Refuses a bias, mask or lengths that do not fit `[B, N, T, S]`."""
    (B, T, N, _), S = query, key[1]
    full = (B, N, T, S)
    for name, x, kind, kind_name in (
        ("bias", bias, jnp.floating, "floating"),
        ("mask", mask, jnp.bool_, "boolean"),
    ):
        if x is None:
            continue
        if not jnp.issubdtype(x.dtype, kind):
            other = (
                "mask= takes a boolean array, True attends"
                if name == "bias"
                else ("bias= takes numbers added to the logits")
            )
            raise ValueError(f"{name} must be {kind_name}, got dtype {x.dtype}; {other}.")
        fits = len(x.shape) == 4 and all(n in (1, m) for n, m in zip(x.shape, full, strict=True))
        if not fits:
            raise ValueError(
                f"{name} must have 4 axes, each 1 or that of [B, N, T, S] = {full}, "
                f"got shape {x.shape}. Add missing axes, for example {name}[None, None]."
            )
    for name, x in lengths.items():
        if x is None:
            continue
        if x.shape != (B,) or not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(
                f"{name} must be integers of shape (B,) = ({B},), got {x.dtype}{list(x.shape)}."
            )


def check_scalars(*, scale: Any, is_causal: Any, local_window_size: Any) -> None:
    """Refuses options that are not plain Python values."""
    if not (scale is None or isinstance(scale, int | float)):
        raise ValueError(
            f"scale must be a Python number, got {type(scale).__name__}. "
            f"Multiply the query by a scale that is an array."
        )
    if not isinstance(is_causal, bool):
        raise ValueError(
            f"is_causal must be True or False, got {type(is_causal).__name__}. "
            f"Choose between two calls with jax.lax.cond if it is an array."
        )
    if local_window_size is None:
        return
    sizes = local_window_size if isinstance(local_window_size, tuple) else (local_window_size,) * 2
    if len(sizes) != 2 or not all(isinstance(n, int) and n >= 0 for n in sizes):
        raise ValueError(
            f"local_window_size must be one integer or (left, right), none negative, "
            f"got {local_window_size!r}."
        )


def check_keywords(attention: Callable[..., Any], keywords: Sequence[str]) -> None:
    """Refuses options that a local attention does not name, and so would drop or choke on."""
    try:
        parameters = inspect.signature(attention).parameters
    except (TypeError, ValueError):  # builtins have no signature; calling them will tell
        return
    missing = [name for name in keywords if name not in parameters]
    if missing:
        raise ValueError(
            f"attention={_name(attention)} does not name the parameter {missing[0]!r}, so "
            f"it cannot be asked for it. Its parameters are {list(parameters)}. Use an attention "
            f"that supports it, for example jax_seqpar.dense_attention."
        )


def no_mesh() -> ValueError:
    """The refusal of a call for which no mesh is known."""
    return ValueError(
        "no mesh: query is not sharded over one, and no jax.set_mesh is active. Pass mesh=, "
        "or write `with jax.set_mesh(mesh):` around the call."
    )


def _got(query: Shape, key: Shape, value: Shape) -> str:
    return f"Got query {query}, key {key}, value {value}."


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _name(f: Any) -> str:
    return getattr(f, "__name__", repr(f))
