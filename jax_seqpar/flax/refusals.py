"""Checks of the arguments of the Flax layers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.lax import Precision

from .._checks import check_has_numbers, check_is_array

# The arguments of Flax's layers that Flax passes on under other names.
_GIVEN_AS = {
    "qk_attn_weights_einsum": "qk_attn_weights_einsum_cls",
    "attn_weights_value_einsum": "attn_weights_value_einsum_cls",
}


def check_flax(**arguments: Any) -> None:
    """Raises ValueError for arguments of Flax that this attention function does not support."""
    for name, x in arguments.items():
        if x is None:
            continue
        if name == "module":
            raise ValueError(
                f"SequenceParallel does not support {name}: sow_weights needs the T x S weights, "
                f"which are never in memory. Use Flax's own dot_product_attention to look at them, "
                f"on a short sequence."
            )
        raise ValueError(
            f"SequenceParallel does not support {name}: the kernels make their own products. "
            f"Leave {_GIVEN_AS.get(name, name)} out."
        )


def check_makes_instance(arguments: Sequence[Any], options: Mapping[str, Any]) -> None:
    """Raises TypeError for the arguments that Flax gives to an attention function."""
    if any(hasattr(x, "shape") for x in arguments[:1]) or {"query", "mask"} & set(options):
        raise TypeError(
            "attention_fn=SequenceParallel is the class: Flax would call it in place of an "
            "instance. Write attention_fn=SequenceParallel(), or SequenceParallel(layout)."
        )


def check_precision(layer: str, precision: Any) -> Precision:
    """The one precision of both operands; raises ValueError for what is not one."""
    pair = precision if isinstance(precision, tuple | list) else (precision, precision)
    try:
        a, b = (Precision(p) for p in pair)
    except ValueError:
        a, b = None, None
    if a is None or a != b:
        raise ValueError(
            f"{layer} cannot carry precision = {precision!r} to the products of its kernel, which "
            f"take one jax.lax.Precision for both operands. Write jax.lax.Precision.HIGHEST or "
            f"'highest'; for a dot algorithm jax.default_matmul_precision(...) around the step."
        )
    return a


def check_array(name: str, x: Any) -> None:
    """Raises ValueError for a list, a number, or the shape of an array without its data."""
    check_is_array(name, x)
    check_has_numbers({name: x})


def check_floats(name: str, x: Any) -> None:
    """Raises ValueError unless x is an array of floats."""
    check_array(name, x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"{name} must have a floating dtype, got {x.dtype}. Write {name}.astype(jnp.float32), "
            f"or embed the tokens first."
        )


def check_projected(letters: str, x: Any, kernel: Any) -> None:
    """Raises ValueError unless x has the axes that the letters name, of the kernel's sizes."""
    check_floats("x", x)
    operands = letters.replace(" ", "").partition("->")[0].split(",")
    sizes = dict(zip(operands[1], kernel.shape, strict=True))
    fits = len(x.shape) == len(operands[0]) and all(
        sizes.get(c, n) == n for c, n in zip(operands[0], x.shape, strict=True)
    )
    if not fits:
        raise ValueError(
            f"x must have the axes {operands[0]!r} of {letters!r}, with {sizes}, got shape "
            f"{tuple(x.shape)}. For one sequence write x[None]."
        )


def check_rotated(x: Any, positions: Any) -> None:
    """Raises ValueError unless x is `[B, T, N, H]` and positions are `[B, T]` or `[1, T]` of it."""
    check_floats("x", x)
    check_array("positions", positions)
    check_integers("positions", positions)
    if len(x.shape) != 4 or positions.shape not in ((1, x.shape[1]), tuple(x.shape[:2])):
        raise ValueError(
            f"x must be [B, T, N, H] and positions [B, T] or [1, T] of its tokens, got shapes "
            f"{tuple(x.shape)} and {tuple(positions.shape)}. Write positions[None] of one row."
        )


def check_cache_sizes(batch: Any, tokens: Any, dtype: Any) -> None:
    """Raises ValueError unless a cache of floats can be made."""
    for name, n in (("batch", batch), ("tokens", tokens)):
        if isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 1:
            raise ValueError(
                f"init_cache takes a positive integer of {name}, got {n!r}. Write "
                f"init_cache(batch, tokens) with x.shape[0] and the longest sequence."
            )
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"the cache must have a floating dtype, got {dtype}. Write jnp.bfloat16.")


def check_batch_axes(query: Any, key: Any, value: Any) -> None:
    """Raises ValueError unless query, key and value have the same batch axes."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_array(name, x)
    shapes = [x.shape for x in (query, key, value)]
    if any(len(shape) < 3 for shape in shapes) or len({shape[:-3] for shape in shapes}) > 1:
        raise ValueError(
            f"query, key and value must be [*batch, tokens, heads, channels] with the same batch "
            f"axes, got {shapes[0]}, {shapes[1]}, {shapes[2]}. Broadcast the smaller ones."
        )


def check_axes(batch: Sequence[int], **arrays: Any) -> None:
    """Raises ValueError for a mask or bias that does not broadcast to `[*batch, N, T, S]`."""
    for name, x in arrays.items():
        if x is None:
            continue
        shape = np.shape(x)
        pairs = zip(reversed(batch), reversed(shape[:-3]), strict=False)
        if len(shape) > len(batch) + 3 or any(n not in (1, size) for size, n in pairs):
            raise ValueError(
                f"{name} must broadcast to [*batch, N, T, S] with the batch axes {tuple(batch)} of "
                f"the query, got shape {shape}. Take its other axes away, {name}[0] say."
            )


def check_query_positions(
    queries: int, keys: int, *, own_rules: bool, is_causal_at_call: bool
) -> None:
    """Raises ValueError for rules about positions where nobody said where the queries are.

    Args:
      own_rules: `is_causal` or a window of the SequenceParallel; they need T = S.
      is_causal_at_call: query i sees the keys up to i, as in Flax. A single query of more keys is
        taken for a step of decoding: it would see the first key only.
    """
    if queries != keys and own_rules:
        raise ValueError(
            f"{queries} queries and {keys} keys: SequenceParallel(is_causal=, local_window_size=) "
            f"is not told where the queries are. Decode with SequenceParallel() and Flax's mask, "
            f"or with jax_seqpar.flax.Attention."
        )
    if queries == 1 < keys and is_causal_at_call:
        raise ValueError(
            f"1 query and {keys} keys with is_causal=True: the query would be taken for the first "
            f"token and see one key. When decoding write is_causal=False: Flax's mask of its cache "
            f"leaves out what follows the query. Elsewhere give mask=."
        )


def check_letters(letters: str, sizes: Mapping[str, int]) -> None:
    """Raises ValueError unless the equation is an einsum of an input and a kernel."""
    operands, _, output = letters.replace(" ", "").partition("->")
    x, _, kernel = operands.partition(",")
    kept = "".join(c for c in kernel if c in output)
    summed = "".join(c for c in kernel if c in x and c not in output)
    fits = x and summed and kept and kernel == summed + kept and output.endswith(kept)
    if not fits or not set(output) <= set(x + kernel):
        raise ValueError(
            f"letters must be an einsum of an input and a kernel whose summed axes come first and "
            f"whose others end the output, such as 'BSD,DNH->BSNH', got {letters!r}. Name the axes "
            f"of the kernel in that order."
        )
    without = [c for c in kernel if c not in sizes]
    if without:
        raise ValueError(
            f"axis {without[0]!r} of {letters!r} has no size, got sizes={sizes}. Add "
            f"{without[0]!r} to the sizes."
        )


def check_rotary(
    turning: int, head_dim: int, fraction: float, frequencies: Sequence[float] | None
) -> None:
    """Raises ValueError unless the rotated channels come in pairs, with a frequency for each."""
    if not 0 < fraction <= 1 or turning % 2 or turning == 0:
        raise ValueError(
            f"Rotary turns an even number of the H = {head_dim} channels, got fraction = "
            f"{fraction}, which is {turning}. Use an even H, or a fraction that gives pairs."
        )
    if frequencies is not None and len(frequencies) != turning // 2:
        raise ValueError(
            f"Rotary needs a frequency for each of the {turning // 2} pairs of channels, got "
            f"{len(frequencies)}. Give {turning // 2} frequencies, or another fraction than "
            f"{fraction}."
        )
    if frequencies is not None and not all(math.isfinite(f) for f in frequencies):
        raise ValueError(
            f"Rotary needs finite frequencies, in radians per token, got {frequencies}. Write 0.0 "
            f"for a pair that does not turn."
        )


def check_attention_factor(factor: Any) -> None:
    """Raises ValueError unless cosine and sine can be multiplied by the factor."""
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < math.inf:
        raise ValueError(
            f"attention_factor must be a positive Python number, got {factor!r}. Write 1.0 for a "
            f"rotary embedding without one, float(...) of a number that is an array."
        )


def check_integers(name: str, x: Any) -> None:
    """Raises ValueError unless every number is an integer."""
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(
            f"{name} must be integers, got {x.dtype}. For scaled positions give "
            f"Rotary(frequencies=...)."
        )


def check_layer(features: int, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    """Raises ValueError unless the KV heads divide the query heads."""
    if min(features, num_heads, num_kv_heads, head_dim) < 1 or num_heads % num_kv_heads:
        raise ValueError(
            f"num_heads = {num_heads} must be a multiple of num_kv_heads = {num_kv_heads}, and all "
            f"sizes at least 1, got features = {features}, head_dim = {head_dim}. Give positive "
            f"sizes, and a num_kv_heads that divides num_heads."
        )


def check_head_dim(features: int, num_heads: int) -> None:
    """Raises ValueError unless the heads divide the features."""
    if features % num_heads:
        raise ValueError(
            f"features = {features} is not divisible by num_heads = {num_heads}: give head_dim."
        )


def check_tokens(x: Any, features: int, positions: Any, segment_ids: Any) -> None:
    """Raises ValueError unless x is `[B, T, features]` and positions and segments fit it."""
    check_floats("x", x)
    if len(x.shape) != 3 or x.shape[-1] != features:
        raise ValueError(
            f"x must be [B, T, {features}], got shape {x.shape}. For one sequence write x[None]."
        )
    for name, ids in (("positions", positions), ("segment_ids", segment_ids)):
        if ids is None:
            continue
        check_array(name, ids)
        fits = len(ids.shape) == 2 and ids.shape[1] == x.shape[1]
        if not fits or ids.shape[0] not in (1, x.shape[0]):
            raise ValueError(
                f"{name} must be [B, T] of all tokens of x {x.shape}, got shape {ids.shape}. "
                f"Positions and segments are global: give those of the whole sequence."
            )
        check_integers(name, ids)


def check_dropout(rate: float, deterministic: bool | None, rngs: Any) -> None:
    """Raises ValueError if dropout is neither on nor off, or has no key."""
    if rate == 0 or deterministic:
        return
    if deterministic is None:
        raise ValueError(
            f"dropout_rate = {rate}: say deterministic=True (evaluation) or False (training) at "
            f"construction or at the call."
        )
    if rngs is None:
        raise ValueError(
            f"dropout_rate = {rate} needs rngs=nnx.Rngs(dropout=...) at the call. Give it, or "
            f"write deterministic=True."
        )


def check_cache_batch(batch: int, devices: int, axes: object) -> None:
    """Raises ValueError unless the devices divide the sequences of the cache."""
    if batch % devices:
        raise ValueError(
            f"init_cache of batch = {batch} sequences, which the {devices} devices of mesh axes "
            f"{axes!r} do not divide. Decode a batch that they divide, or with "
            f"MeshLayout(batch=None)."
        )


def check_cache_heads(num_heads: int, num_kv_heads: int, devices: int, axes: object) -> None:
    """Raises ValueError unless the devices can share the heads of the cache."""
    if num_heads % devices or (num_kv_heads % devices and devices % num_kv_heads):
        raise ValueError(
            f"decoding shares the heads of the cache among the {devices} devices of mesh axes "
            f"{axes!r}: num_heads = {num_heads} must be divisible by them, and num_kv_heads = "
            f"{num_kv_heads} divisible by them or divide them. Decode on a mesh with fewer."
        )


def check_decode(
    cache: Any, index: Any, x: Any, mesh_shape: Any, segment_ids: Any, dropout_rate: float
) -> None:
    """Raises ValueError for decoding without a cache, or with what a cache does not keep.

    Args:
      index: how many tokens the cache holds; under `jit` that is not known.
      mesh_shape: of the mesh of this call, by axis; empty if that of the arrays is taken.
      dropout_rate: of this call, 0 if it is deterministic.
    """
    batch, tokens = x.shape[:2]
    if cache is None:
        raise ValueError(f"decode=True needs a cache: call init_cache({batch}, tokens) first.")
    held = 0 if isinstance(index[...], Tracer) else int(index[...])
    if cache.shape[0] != batch:
        raise ValueError(
            f"x has batch B = {batch}, but the cache is of {cache.shape[0]} sequences: call "
            f"init_cache({batch}, tokens) for this batch."
        )
    own = getattr(getattr(cache[...], "sharding", None), "mesh", None)
    if own is not None and mesh_shape and own.shape and dict(own.shape) != dict(mesh_shape):
        raise ValueError(
            f"the cache is on a mesh {dict(own.shape)}, this call on {dict(mesh_shape)}: call "
            f"init_cache(batch, tokens) under the mesh of the call."
        )
    if held + tokens > cache.shape[1]:
        raise ValueError(
            f"{tokens} tokens after {held} do not fit the cache of {cache.shape[1]}: "
            f"call init_cache({batch}, {held + tokens}), or with more tokens."
        )
    if segment_ids is not None:
        raise ValueError(
            f"decode=True keeps one document per sequence, got segment_ids of shape "
            f"{segment_ids.shape}: leave segment_ids out."
        )
    if dropout_rate > 0:
        raise ValueError(
            f"decode=True has no dropout, got dropout_rate = {dropout_rate}: write "
            f"deterministic=True."
        )
