"""Every refusal, made at the door: what does not fit, its sizes, and what to write instead."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .layout import MeshLayout, axes_size, names

Shape = tuple[int, ...]

_AXES = {"query": "[B, T, N, H]", "key": "[B, S, K, H]", "value": "[B, S, K, H]"}


def check_arrays(query: Any, key: Any, value: Any) -> None:
    """Refuses arrays that are not one attention's query, key and value, whatever the mesh."""
    arrays = {"query": query, "key": key, "value": value}
    for name, x in arrays.items():
        _check_is_array(name, x)
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
        raise ValueError(
            f"key and value must have the same shape [B, S, K, H]. {got} "
            f"Repeat or project the smaller one."
        )
    for axis, size_name in ((0, "batch size B"), (3, "head dimension H")):
        if query.shape[axis] != key.shape[axis]:
            raise ValueError(
                f"query and key must agree in the {size_name}, "
                f"got {query.shape[axis]} and {key.shape[axis]}. {got} "
                f"Project or slice one of them."
            )
    N, K = query.shape[2], key.shape[2]
    if K == 0 or N % K:
        raise ValueError(
            f"query heads N = {N} must be a multiple of the KV heads K = {K}. {got} "
            f"Query head n reads KV head n // (N / K)."
        )


def _check_is_array(name: str, x: Any) -> None:
    if not (hasattr(x, "shape") and hasattr(x, "dtype")):
        raise ValueError(
            f"{name} must be an array, got {type(x).__name__}. Write jnp.asarray({name})."
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


def check_reshard(shape: Shape, dtype: Any, split_axis: int, axis_name: Any) -> None:
    """Refuses a reshard of anything but `[B, S, N, H]`, or along an axis that does not divide."""
    degree = axis_size(axis_name)
    if len(shape) != 4:
        raise ValueError(
            f"a reshard takes 4 axes [B, S, N, H], got shape {shape}. Write x[None] or reshape."
        )
    if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 8:
        raise ValueError(f"a reshard cannot carry {dtype}. Write x.astype(jnp.float8_e4m3fn).")
    if shape[split_axis] % degree:
        what = {1: "tokens S", 2: "heads N"}[split_axis]
        raise ValueError(
            f"{what} = {shape[split_axis]} is not divisible by the {degree} devices of mesh axis "
            f"{axis_name!r}. Got shape {shape}. Use one of {_divisors(shape[split_axis])} devices."
        )


def check_heads(query: Shape, key: Shape, axis_name: Any, degree: int, shards: int = 1) -> None:
    """Refuses heads that the devices of the token axis cannot share evenly.

    Args:
      query, key: the shapes.
      axis_name: the mesh axis (or axes) of the tokens.
      degree: its size.
      shards: tensor-parallel devices that the heads are sharded over already.
    """
    N, K = query[2] // shards, max(key[2] // shards, 1)
    per_shard = f" in each of {shards} tensor-parallel shards" if shards > 1 else ""
    devices = f"the {degree} devices of mesh axis {axis_name!r}"
    got = f"Got query {query}, key {key}."
    if N % degree:
        raise ValueError(
            f"query heads N = {N}{per_shard} is not divisible by {devices}. {got} "
            f"Use a degree that divides N: {_divisors(N)}."
        )
    if K % degree and degree % K:
        fits = [d for d in _divisors(N) if K % d == 0 or d % K == 0]
        raise ValueError(
            f"KV heads K = {K}{per_shard} neither is divisible by nor divides {devices}. {got} "
            f"Use a degree that does: {fits}; or repeat the KV heads: "
            f"jnp.repeat(key, {N // K}, axis=2), and value alike."
        )


def check_local_output(out: Any, query: Any) -> None:
    """Refuses a local attention's output of another shape, which a reshard would scramble."""
    if out.shape != query.shape:
        raise ValueError(
            f"attention returned shape {out.shape}, expected {query.shape} = [B, T, N, H], that of "
            f"the query it was given. Transpose the output of a kernel that puts heads first."
        )
    if out.dtype != query.dtype:
        raise ValueError(
            f"attention returned dtype {out.dtype}, expected the query's {query.dtype}. "
            f"Write .astype(query.dtype) at its end."
        )


def check_mesh(layout: MeshLayout, mesh_shape: Mapping[str, int], manual: Sequence[str]) -> None:
    """Refuses a layout that names what the mesh does not have, or has already given away."""
    if not isinstance(layout, MeshLayout):
        raise ValueError(f"layout must be a MeshLayout, got {layout!r}. Write MeshLayout(tokens=).")
    for axis in layout.axis_names:
        if axis not in mesh_shape:
            raise ValueError(
                f"{layout!r} names axis {axis!r}, which the mesh does not have: its axes are "
                f"{dict(mesh_shape)}. Name its axes in MeshLayout(tokens=, batch=, heads=)."
            )
        if axis in manual:
            instead = (
                f"Call jax_seqpar.ulysses_attention(query, key, value, axis_name={axis!r}, "
                f"attention=...) here instead."
                if axis in names(layout.tokens)
                else f"Leave {axis!r} out of the MeshLayout."
            )
            raise ValueError(
                f"mesh axis {axis!r} is already manual: this is inside a jax.shard_map, where "
                f"arrays are per-device. {instead}"
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

    def divide(
        tensor: str, size_name: str, size: int, field: str, mesh_axes: Any, advice: str
    ) -> None:
        parts = axes_size(mesh_axes, mesh_shape)
        if size % parts:
            raise ValueError(
                f"{tensor} {size_name} = {size} is not divisible by the {parts} devices of mesh "
                f"axis {mesh_axes!r}. {got} {advice.format(-(-size // parts) * parts)} "
                f"MeshLayout({field}=None) leaves it whole."
            )

    B, T, N, _ = query
    S, K = key[1:3]
    pad = "Pad to {} and pass the true length as %s=, so that nobody attends to padding."
    divide("query", "batch B", B, "batch", layout.batch, "Pad to {} and cut the output.")
    divide("query", "tokens T", T, "tokens", layout.tokens, pad % "query_seq_lengths")
    divide("key", "tokens S", S, "tokens", layout.tokens, pad % "key_value_seq_lengths")
    divide("query", "heads N", N, "heads", layout.heads, "Use a mesh axis whose size divides it.")
    tensor_parallel = axes_size(layout.heads, mesh_shape)
    if K % tensor_parallel and tensor_parallel % K:
        raise ValueError(
            f"KV heads K = {K} neither is divisible by nor divides the {tensor_parallel} devices "
            f"of mesh axis {layout.heads!r}. {got} Use jnp.repeat(key, {N // K}, axis=2), and "
            f"value alike, or MeshLayout(heads=None)."
        )
    check_heads(query, key, layout.tokens, axes_size(layout.tokens, mesh_shape), tensor_parallel)


def check_sharding(name: str, spec: Iterable[Any], layout: MeshLayout) -> None:
    """Refuses an array sharded, by its type, over an axis that the layout does not name.

    It would be gathered first: right numbers, at the price of the parallelism.
    """
    fields = ("batch", "tokens", "heads")
    for field, mesh_axes in zip(fields, spec, strict=False):
        for axis in names(mesh_axes):
            if axis not in layout.axis_names:
                raise ValueError(
                    f"{name} is sharded over mesh axis {axis!r}, which {layout!r} does not name, "
                    f"so it would be gathered first. Write MeshLayout(..., {field}={axis!r})."
                )


def check_masks(
    query: Shape,
    key: Shape,
    *,
    bias: Any,
    mask: Any,
    query_seq_lengths: Any,
    key_value_seq_lengths: Any,
    segment_ids: Any,
) -> None:
    """Refuses a bias, mask, lengths or segment ids that do not fit `[B, N, T, S]`."""
    (B, T, N, _), S = query, key[1]
    full = (B, N, T, S)
    for name, x, kind, kind_name in (
        ("bias", bias, jnp.floating, "floating"),
        ("mask", mask, jnp.bool_, "boolean"),
    ):
        if x is None:
            continue
        _check_is_array(name, x)
        if not jnp.issubdtype(x.dtype, kind):
            other = (
                "mask= takes a boolean array, True attends"
                if name == "bias"
                else "write mask.astype(bool), or bias= for numbers added to the logits"
            )
            raise ValueError(f"{name} must be {kind_name}, got dtype {x.dtype}; {other}.")
        fits = len(x.shape) == 4 and all(n in (1, m) for n, m in zip(x.shape, full, strict=True))
        if not fits:
            raise ValueError(
                f"{name} must have 4 axes, each 1 or that of [B, N, T, S] = {full}, "
                f"got shape {x.shape}. Add missing axes, for example {name}[None, None]."
            )
    for name, x in (
        ("query_seq_lengths", query_seq_lengths),
        ("key_value_seq_lengths", key_value_seq_lengths),
    ):
        if x is None:
            continue
        _check_is_array(name, x)
        if x.shape != (B,) or not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(
                f"{name} must be integers of shape (B,) = ({B},), got {x.dtype}{list(x.shape)}. "
                f"Write jnp.array([...], jnp.int32), one length per batch entry."
            )
    _check_segment_ids(segment_ids, B, T, S)


def _check_segment_ids(segment_ids: Any, batch: int, query_tokens: int, key_tokens: int) -> None:
    if segment_ids is None:
        return
    pair = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
    for x in pair:
        _check_is_array("segment_ids", x)
    shapes = ((batch, query_tokens), (batch, key_tokens))
    if len(pair) != 2 or any(
        x.shape != shape or not jnp.issubdtype(x.dtype, jnp.integer)
        for x, shape in zip(pair, shapes, strict=True)
    ):
        got = ", ".join(f"{x.dtype}{list(x.shape)}" for x in pair)
        raise ValueError(
            f"segment_ids must be integers of shape [B, S] = {list(shapes[1])}, or a pair of "
            f"{list(shapes[0])} for queries and {list(shapes[1])} for keys, got {got}. "
            f"A query attends to the keys that have its own number."
        )


def check_exact(
    query: Any, key: Any, bias: Any, devices: int, *, query_chunk: Any, key_chunk: Any
) -> None:
    """Refuses what exact attention is not defined for."""
    if bias is not None and bias.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ValueError(
            f"the bias of exact attention is float32, bfloat16 or float16, got {bias.dtype}. "
            f"Write bias.astype(jnp.float32)."
        )
    if query.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ValueError(
            f"exact attention takes float32, bfloat16 and float16, got {query.dtype}. "
            f"Write query.astype(jnp.float32), and key and value alike."
        )
    S, rows = key.shape[1], query.shape[1] * (query.shape[2] // key.shape[2]) * devices
    if max(S, rows) >= 1 << 21:
        raise ValueError(
            f"exact attention has room for fewer than 2^21 keys, and queries of one KV head, got "
            f"{S} and {rows}. Got query {query.shape}, key {key.shape}. Split the sequence."
        )
    for name, chunk in (("query_chunk", query_chunk), ("key_chunk", key_chunk)):
        if chunk is not None and (type(chunk) is not int or chunk < 1):
            raise ValueError(f"{name} must be a positive integer or None, got {chunk!r}.")


def no_gradient_for_bias() -> ValueError:
    """The refusal of a derivative that is not defined."""
    return ValueError(
        "exact attention has no gradient for bias. Write jax.lax.stop_gradient(bias), or use "
        "another attention."
    )


def no_second_derivative() -> ValueError:
    """The refusal of a derivative of a gradient."""
    return ValueError(
        "exact attention can be differentiated once, not twice, as its gradients are rounded like "
        "its output. Use jax_seqpar.dense_attention for second derivatives."
    )


def check_scalars(
    *, scale: Any, is_causal: Any, local_window_size: Any, logits_soft_cap: Any = None
) -> None:
    """Refuses options that are not plain Python values."""
    cap = logits_soft_cap
    number = isinstance(cap, int | float) and not isinstance(cap, bool)
    if cap is not None and not (number and 1e-30 < cap < 1e30):
        raise ValueError(
            f"logits_soft_cap must be a Python number between 1e-30 and 1e30, got {cap!r}. "
            f"None, and not 0, leaves the logits as they are."
        )
    if isinstance(scale, bool) or not (scale is None or isinstance(scale, int | float)):
        raise ValueError(
            f"scale must be a Python number, got {type(scale).__name__}. "
            f"Multiply the query by a scale that is an array."
        )
    if scale is not None and not abs(scale) < 1e30:
        raise ValueError(
            f"scale must be finite and below 1e30, got {scale!r}. None is 1 / sqrt(H)."
        )
    if not isinstance(is_causal, bool):
        raise ValueError(
            f"is_causal must be True or False, got {type(is_causal).__name__}. Under jax.jit name "
            f"it in static_argnames; choose between two calls with jax.lax.cond if it is an array."
        )
    if local_window_size is None:
        return
    sizes = local_window_size if isinstance(local_window_size, tuple) else (local_window_size,) * 2
    if len(sizes) != 2 or not all(type(n) is int and n >= 0 for n in sizes):
        raise ValueError(
            f"local_window_size must be one integer or (left, right), none negative, "
            f"got {local_window_size!r}. (255, 0) is a query and the 255 keys before it."
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
