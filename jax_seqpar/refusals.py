"""Checks of arguments: each error names the array, the size, the axis, and what to write."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .layout import MeshLayout, axes_size, names

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
    got = _got(query.shape, key.shape, value.shape)
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"query, key and value must have one dtype, got {query.dtype}, {key.dtype} and "
            f"{value.dtype}. Cast them, for example key.astype(query.dtype)."
        )
    if key.shape[:3] != value.shape[:3]:
        raise ValueError(
            f"key [B, S, K, H] and value [B, S, K, V] must agree in B, S and K. {got} "
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
    if 0 in (N, query.shape[3]):
        raise ValueError(
            f"query must have at least one head and one channel, got N = {N} and "
            f"H = {query.shape[3]}. {got} Leave the call out where there is nothing to attend with."
        )
    if K == 0 or N % K:
        raise ValueError(
            f"query heads N = {N} must be a multiple of the KV heads K = {K}. {got} "
            f"Query head n reads KV head n // (N / K)."
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


def check_reshard(x: Any, split_axis: int, axis_name: Any) -> None:
    """Raises ValueError unless x is `[B, S, N, H]` and the devices divide the axis to split."""
    degree = axis_size(axis_name)
    check_is_array("x", x)
    check_has_numbers({"x": x})
    shape, dtype = x.shape, x.dtype
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


def check_head_chunks(chunks: Any, heads: int, kv_heads: int, *, sums_exactly: bool) -> None:
    """Raises ValueError unless the head chunks divide a device's heads evenly."""
    if type(chunks) is not int or chunks < 1 or heads % chunks:
        raise ValueError(
            f"head_chunks must divide the {heads} query heads of a device, got {chunks!r}. "
            f"Use one of {_divisors(heads)}."
        )
    if kv_heads % chunks and chunks % kv_heads:
        fits = [c for c in _divisors(heads) if kv_heads % c == 0 or c % kv_heads == 0]
        raise ValueError(
            f"head_chunks = {chunks} neither divides nor is divisible by the {kv_heads} KV heads "
            f"of a device. Use one of {fits}."
        )
    if sums_exactly and kv_heads % chunks:
        raise ValueError(
            f"head_chunks = {chunks} would split the {kv_heads} KV heads of a device, whose "
            f"gradients this attention adds up without rounding. Use one of {_divisors(kv_heads)}."
        )


def check_degree(degree: Any) -> None:
    """Raises ValueError unless the degree is a positive Python integer."""
    if type(degree) is not int or degree < 1:
        raise ValueError(
            f"degree must be a positive Python integer, got {degree!r}. It is the size of the "
            f'mesh axis of the tokens, as mesh.shape["seq"].'
        )


def check_platform(platform: Any, known: Sequence[str]) -> None:
    """Raises ValueError for an unknown platform."""
    if platform not in known:
        raise ValueError(
            f"platform must be one of {list(known)}, got {platform!r}. Write jax.default_backend()."
        )


def check_flag(name: str, value: Any, choices: Sequence[Any] = (True, False)) -> None:
    """Raises ValueError unless the value is one of the choices."""
    if not any(value is choice for choice in choices):
        raise ValueError(f"{name} must be one of {list(choices)}, got {value!r}.")


def check_strategy(strategy: Any, kind: Any, layout: MeshLayout) -> None:
    """Raises ValueError unless the strategy is one, and has an axis where it has options."""
    if not isinstance(strategy, kind) or isinstance(strategy, type):
        raise ValueError(
            f"strategy must be Ulysses(...) or AllGatherKV(), got {strategy!r}. Write "
            f"strategy=jax_seqpar.Ulysses()."
        )
    if layout.tokens is None and strategy != type(strategy)():
        raise ValueError(
            f"{strategy!r} has no reshard to work on: {layout!r} shards no tokens. Leave it out, "
            f"or name the mesh axis in MeshLayout(tokens=)."
        )


def form_of_spec(kernel: Any) -> Callable[..., Any]:
    """The form of a kernel that takes a Spec; raises ValueError for a function without one."""
    keywords = dict(getattr(kernel, "keywords", {}))
    attend = getattr(getattr(kernel, "func", kernel), "of_spec", None)
    if attend is None or getattr(kernel, "args", ()):
        raise ValueError(
            f"attention={_name(kernel)} cannot be told that it has a part of the queries. Use "
            f"jax_seqpar.blockwise_attention, or strategy=Ulysses()."
        )
    known = inspect.signature(attend).parameters
    if masks := [name for name in keywords if name not in known]:
        raise ValueError(
            f"{masks[0]} is bound to {_name(attend)}, which has a part of the queries here. Pass "
            f"it to jax_seqpar.dot_product_attention."
        )
    return partial(attend, **keywords)


def check_per_head_arrays(attention: Callable[..., Any], arrays: Mapping[str, Any]) -> None:
    """Raises ValueError unless every per-head array has a head axis, and dropout has head keys."""
    check_keywords(attention, list(arrays))
    for name, x in arrays.items():
        check_is_array(name, x)
        if not x.shape or (name == "dropout_rng" and len(x.shape) != 3):
            raise ValueError(
                f"per_head {name} must have a head axis, got shape {x.shape}. Of a dropout key "
                f"write jax_seqpar.head_keys(key, B, N), with B and N of the whole attention."
            )
    rng = getattr(attention, "keywords", {}).get("dropout_rng")
    if rng is not None and len(rng.shape) != 3:
        raise no_local_dropout()


def no_local_dropout() -> ValueError:
    """Error for one dropout key where each device would count heads and sequences from 0."""
    return ValueError(
        "dropout_rng is one key here, where a device sees some of the heads and sequences only: "
        "each device would drop the same weights. Write jax_seqpar.head_keys(key, B, N), with B "
        "and N of the whole attention, and pass this device's sequences of it to "
        "ulysses_attention as per_head={'dropout_rng': ...}."
    )


def check_per_head(name: str, shape: Shape, axis: int, heads: int, local_heads: int) -> None:
    """Raises ValueError unless the array has all the query heads."""
    if shape[axis] != heads:
        raise ValueError(
            f"{name} has {shape[axis]} heads on axis {axis}, expected all {heads}, a device's "
            f"{local_heads}, or 1 for all alike. Got shape {shape}."
        )


def check_local_output(out: Any, query: Any, value: Any) -> None:
    """Raises ValueError unless the kernel's output is `[B, T, N, V]`, which the reshard needs."""
    expected = (*query.shape[:3], value.shape[3])
    if not hasattr(out, "shape"):
        raise ValueError(
            f"attention returned {type(out).__name__}, expected one array [B, T, N, V]. A kernel "
            f"with return_lse=True is for use on one device, outside Ulysses."
        )
    if out.shape != expected:
        raise ValueError(
            f"attention returned shape {out.shape}, expected {expected} = [B, T, N, V], the axes "
            f"of query and value it was given. Transpose the output of a kernel that puts heads "
            f"first."
        )
    if out.dtype != query.dtype:
        raise ValueError(
            f"attention returned dtype {out.dtype}, expected the query's {query.dtype}. "
            f"Write .astype(query.dtype) at its end."
        )


def check_is_mesh(mesh: Any, context: Any) -> None:
    """Raises ValueError unless `mesh` is a Mesh, and that of the enclosing `jax.shard_map`.

    Args:
      context: the mesh of that; None if there is none.
    """
    if mesh is None:
        return
    if not hasattr(mesh, "axis_names"):
        raise ValueError(f"mesh must be a jax.sharding.Mesh, got {mesh!r}. Write jax.make_mesh().")
    if context is not None and dict(mesh.shape) != dict(context.shape):
        raise ValueError(
            f"mesh has the axes {dict(mesh.shape)}, but this is inside a jax.shard_map over "
            f"{dict(context.shape)}, whose mesh it is on. Leave mesh= out."
        )


def check_devices(tree: Mapping[str, Any], devices: set[Any] | None) -> None:
    """Raises ValueError for arrays committed to other devices than those of the mesh.

    Args:
      tree: arrays by name.
      devices: of the mesh; None where they are not known.
    """
    if devices is None:
        return
    for name, x in tree.items():
        for leaf in jax.tree.leaves(x):
            if isinstance(leaf, Tracer) or not isinstance(leaf, jax.Array) or not leaf.committed:
                continue
            if leaf.sharding.device_set != devices:
                raise ValueError(
                    f"{name} is on {_ids(leaf.sharding.device_set)}, the mesh has "
                    f"{_ids(devices)}. Write jax.device_put({name}, jax.NamedSharding(mesh, spec)),"
                    f" where spec says which mesh axis shards which axis of the array."
                )


def _ids(devices: set[Any]) -> str:
    (platform, *more) = {device.platform for device in devices}
    ids = ", ".join(str(n) for n in sorted(device.id for device in devices))
    return f"{'/'.join((platform, *more))} device{'s' if len(devices) > 1 else ''} {ids}"


def check_mesh(layout: MeshLayout, mesh_shape: Mapping[str, int], manual: Sequence[str]) -> None:
    """Raises ValueError unless the layout names axes of the mesh, each once, none manual."""
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
    """Raises ValueError unless the mesh axes divide batch, tokens and heads."""
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
    degree = axes_size(layout.tokens, mesh_shape)
    pad = f"Use jax_seqpar.pad_to_degree(query, key, value, degree={degree}), which pads to {{}}."
    divide("query", "batch B", B, "batch", layout.batch, "Pad to {} and cut the output.")
    divide("query", "tokens T", T, "tokens", layout.tokens, pad)
    divide("key", "tokens S", S, "tokens", layout.tokens, pad)
    divide("query", "heads N", N, "heads", layout.heads, "Use a mesh axis whose size divides it.")
    tensor_parallel = axes_size(layout.heads, mesh_shape)
    if K % tensor_parallel and tensor_parallel % K:
        raise ValueError(
            f"KV heads K = {K} neither is divisible by nor divides the {tensor_parallel} devices "
            f"of mesh axis {layout.heads!r}. {got} Use jnp.repeat(key, {N // K}, axis=2), and "
            f"value alike, or MeshLayout(heads=None)."
        )


def check_ranks(query: Shape, key: Shape, ranks: int, *, adds_exactly: bool) -> None:
    """Raises ValueError unless the ranks of the PyTorch reference share the heads as JAX does.

    Args:
      query, key: shapes `[B, T, N, H]` and `[B, S, K, H]`.
      ranks: how many.
      adds_exactly: whether the kernel adds up a KV head's gradients without rounding. If not, the
        bits depend on which rank has which query heads of a group, and where the ranks do not
        divide the heads the two frameworks differ in that.

    Raises:
      ValueError: fewer heads than ranks, or KV heads that several ranks would share unevenly.
    """
    N, K = query[2], key[2]
    got = f"Got query {query}, key {key}. jax_seqpar itself takes such heads."
    if ranks > N:
        raise ValueError(
            f"query heads N = {N} are fewer than the {ranks} ranks, and a rank of PyTorch has one "
            f"at least. {got}"
        )
    if ranks > K and ranks % K and N != K:
        raise ValueError(
            f"KV heads K = {K} are fewer than the {ranks} ranks and do not divide their number: "
            f"ranks of PyTorch would share the query heads of a KV head unevenly. {got}"
        )
    if not adds_exactly and N != K and (N % ranks or (K % ranks and ranks % K)):
        raise ValueError(
            f"with kernels that round sums, the gradients of KV heads depend on which rank has "
            f"which query heads, so of query heads N = {N} and KV heads K = {K} each must be "
            f"divisible by the {ranks} ranks, or K divide their number. {got}"
        )


def check_sharding(name: str, spec: Iterable[Any], layout: MeshLayout) -> None:
    """Raises ValueError for an array sharded, by its type, over an axis that the layout lacks.

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


def check_spec(query: Shape, key: Shape, spec: Any, arrays: Mapping[str, Any]) -> None:
    """Raises unless arrays fit `[B, N, T, S]` and go together.

    Args:
      spec: the options beside the arrays.
      arrays: by keyword, as they were given; None where they were not.
    """
    (B, T, N, _), S = query, key[1]
    full = (B, N, T, S)
    for name, x, kind, kind_name in (
        ("bias", arrays["bias"], jnp.floating, "floating"),
        ("mask", arrays["mask"], jnp.bool_, "boolean"),
    ):
        if x is None:
            continue
        check_is_array(name, x)
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
                f"got shape {x.shape}. {_with_four_axes(name, x.shape)}To ulysses_attention pass "
                f"that of all heads in per_head=."
            )
    for name in ("query_seq_lengths", "key_value_seq_lengths"):
        _check_per_sequence(name, arrays[name], B)
    meaning = "A query attends to the keys that have its own number."
    _check_per_token("segment_ids", arrays["segment_ids"], B, T, S, meaning)
    meaning = "They count from 0, or from where you like."
    _check_per_token("positions", arrays["positions"], B, T, S, meaning)
    if arrays["positions"] is not None and spec.mask.query_offset != 0:
        raise ValueError(
            f"positions and query_offset = {spec.mask.query_offset} both say where the queries "
            f"are. Add the offset to the positions of the queries."
        )
    for name in ("alibi_slopes", "sinks"):
        _check_per_head(name, arrays[name], N)
    _check_dropout(arrays["dropout_rng"], spec.dropout.rate, B, N)


def _with_four_axes(name: str, shape: Shape) -> str:
    if len(shape) == 2:
        return (
            f"Write {name}[None, None] for [T, S], {name}[:, None, None] for the keys of each "
            f"sequence [B, S]. "
        )
    if len(shape) == 3:
        return f"Write {name}[None] for [N, T, S], {name}[:, None] for [B, T, S]. "
    return ""


def _check_per_sequence(name: str, x: Any, batch: int) -> None:
    if x is None:
        return
    check_is_array(name, x)
    if x.shape != (batch,) or not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(
            f"{name} must be integers of shape (B,) = ({batch},), got {x.dtype}{list(x.shape)}. "
            f"Write jnp.array([...], jnp.int32), one length per batch entry."
        )


def _check_per_token(
    name: str, x: Any, batch: int, query_tokens: int, key_tokens: int, meaning: str
) -> None:
    if x is None:
        return
    if isinstance(x, list):
        raise ValueError(f"{name} must be an array, or a tuple of two, got list.")
    pair = x if isinstance(x, tuple) else (x, x)
    for part in pair:
        check_is_array(name, part)
    shapes = ((batch, query_tokens), (batch, key_tokens))
    if len(pair) != 2 or any(
        part.shape != shape or not jnp.issubdtype(part.dtype, jnp.integer)
        for part, shape in zip(pair, shapes, strict=True)
    ):
        got = ", ".join(f"{part.dtype}{list(part.shape)}" for part in pair)
        raise ValueError(
            f"{name} must be integers of shape [B, S] = {list(shapes[1])}, or a pair of "
            f"{list(shapes[0])} for queries and {list(shapes[1])} for keys, got {got}. {meaning}"
        )
    for part in pair:
        # An array of JAX has such numbers where 64 bits are switched on, and keeps them.
        if isinstance(part, np.ndarray) and part.dtype != jax.dtypes.canonicalize_dtype(part.dtype):
            low, high = part.min(initial=0), part.max(initial=0)
            if low < -(2**31) or high >= 2**31:
                raise ValueError(
                    f"{name} has numbers from {low} to {high}, which JAX would cut to 32 bits. "
                    f"Switch jax_enable_x64 on, or number them anew, for example by "
                    f"np.unique({name}, return_inverse=True)."
                )
    unsigned = [part for part in pair if jnp.issubdtype(part.dtype, jnp.unsignedinteger)]
    if len(unsigned) == 1 and unsigned[0].dtype.itemsize >= 4:
        raise ValueError(
            f"{name} of queries and keys must be both signed or both unsigned, got "
            f"{pair[0].dtype} and {pair[1].dtype}: -1 of int32 and 2^32 - 1 of uint32 have the "
            f"same bits. Write .astype({pair[0].dtype})."
        )


def _check_per_head(name: str, x: Any, heads: int) -> None:
    if x is None:
        return
    check_is_array(name, x)
    if x.shape != (heads,) or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"{name} must be floating of shape (N,) = ({heads},), one for each query head, got "
            f"{x.dtype}{list(x.shape)}. Write jnp.broadcast_to({name}, {heads}) for one value; to "
            f"ulysses_attention pass those of all heads in per_head=."
        )


def _check_dropout(rng: Any, rate: float, batch: int, heads: int) -> None:
    if rng is not None:
        check_key(rng, batch, heads)
    elif rate > 0:
        raise ValueError(
            f"dropout_rate = {rate} needs a key. Write dropout_rng=jax.random.key(...), "
            f"another one for each layer and step."
        )


def check_key(rng: Any, batch: Any, heads: Any) -> None:
    """Raises ValueError unless `rng` is one threefry key, or the keys of a batch's heads."""
    for name, size in (("batch", batch), ("heads", heads)):
        if not isinstance(size, int) or size < 0:
            raise ValueError(f"{name} must be a Python integer, not negative, got {size!r}.")
    write = 'Write jax.random.key(seed, impl="threefry2x32").'
    if not hasattr(rng, "dtype"):
        raise ValueError(f"dropout_rng must be a key, got {rng!r}. {write}")
    check_is_array("dropout_rng", rng)
    if jnp.issubdtype(rng.dtype, jax.dtypes.prng_key):
        implementation = str(jax.random.key_impl(rng))
        if implementation != "threefry2x32":
            raise ValueError(
                f"dropout_rng must be a threefry key, got one of {implementation}. {write}"
            )
        fits = rng.shape == ()
    else:
        fits = rng.dtype == jnp.uint32 and rng.shape in ((2,), (batch, heads, 2))
    if not fits:
        raise ValueError(
            f"dropout_rng must be one key, or keys of heads [B, N, 2] = {[batch, heads, 2]}, got "
            f"{rng.dtype}{list(rng.shape)}. {write}"
        )


def check_exact(
    query: Any,
    key: Any,
    added: Mapping[str, Any],
    devices: int,
    *,
    query_chunk: Any,
    key_chunk: Any,
) -> None:
    """Raises ValueError for dtypes and sizes that exact attention is not defined for.

    Args:
      added: bias, slopes and sinks by name, where there are any.
    """
    for name, x in added.items():
        if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
            raise ValueError(
                f"{name} of exact attention is float32, bfloat16 or float16, got {x.dtype}. "
                f"Write {name}.astype(jnp.float32)."
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
    check_chunk_sizes(query_chunk=query_chunk, key_chunk=key_chunk)


def check_chunk_sizes(**chunks: Any) -> None:
    """Raises ValueError unless every chunk size is None or a positive integer."""
    for name, chunk in chunks.items():
        if chunk is not None and (type(chunk) is not int or chunk < 1):
            raise ValueError(f"{name} must be a positive integer or None, got {chunk!r}.")


def no_exact_gradient(name: str) -> ValueError:
    """Error for a derivative that exact attention does not define."""
    return ValueError(
        f"exact attention has no gradient for {name}. Write jax.lax.stop_gradient({name}), or use "
        f"another attention."
    )


def no_second_derivative() -> ValueError:
    """Error for the derivative of a gradient of exact attention."""
    return ValueError(
        "exact attention can be differentiated once, not twice, as its gradients are rounded like "
        "its output. Use jax_seqpar.dense_attention for second derivatives."
    )


def check_interpret(platform: str | None, interpret: Any) -> None:
    """Raises ValueError for `interpret=True` on a platform other than the TPU's."""
    check_flag("interpret", interpret)
    if interpret and platform not in (None, "tpu"):
        raise ValueError(
            f"interpret=True runs the TPU's kernel on any platform, got platform={platform!r}, "
            f"too. Leave one of them out."
        )


def no_fused(reason: str, query: Shape, key: Shape, value: Shape) -> ValueError:
    """Error for what the platform's fused kernel does not support."""
    return ValueError(
        f"fused_attention cannot do this: {reason}. {_got(query, key, value)} "
        f"Write attention=jax_seqpar.blockwise_attention, which supports it, or take that of "
        f"jax_seqpar.choose_kernel(query, key, value, ...)."
    )


def varies_under_pallas() -> ValueError:
    """Error for a Pallas kernel where JAX checks how arrays vary over the mesh."""
    return ValueError(
        "fused_attention on platform 'tpu' is a Pallas kernel, which does not state how its output "
        "varies over the mesh. Write check_vma=False in the jax.shard_map, or in "
        "jax_seqpar.dot_product_attention."
    )


def check_keywords(attention: Callable[..., Any], keywords: Sequence[str]) -> None:
    """Raises ValueError unless the kernel is a function that names every keyword it is given."""
    if not callable(attention):
        known = ("dense", "blockwise", "exact", "fused")
        name = attention if attention in known else "blockwise"
        raise ValueError(
            f"attention must be a function of query, key and value, got {attention!r}. Write "
            f"attention=jax_seqpar.{name}_attention, or leave it out."
        )
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
    """Error for a call without a mesh."""
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
