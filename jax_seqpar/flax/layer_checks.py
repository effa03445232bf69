"""Checks of an Attention: its options, and what a call gives it."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from .._checks import check_is_array
from ..mask import Logits, Mask
from ..mesh import AnyMesh
from ..mesh_layout import MeshLayout, axes_size, check_mesh, names

PROJECTIONS = ("query", "key", "value", "out")


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


def check_token_division(shape: tuple[int, ...], layout: MeshLayout, mesh: AnyMesh) -> None:
    """Raises ValueError unless the devices divide the tokens of the input `[B, T, D]`.

    Inside a `jax.shard_map` over their axis the tokens are those of one device.
    """
    manual = jax.sharding.get_abstract_mesh().manual_axes
    if set(names(layout.tokens)) & set(manual):
        return
    check_mesh(layout, mesh.shape, manual)
    T, degree = shape[1], axes_size(layout.tokens, mesh.shape)
    if T % degree:
        raise ValueError(
            f"x has {T} tokens, which the {degree} devices of mesh axis {layout.tokens!r} do not "
            f"divide. Pad x to {-(-T // degree) * degree} tokens, with segment_ids that tell the "
            f"padding apart, or use jax_seqpar.training.TokenLayout(layout).shard(tokens), which "
            f"does both. Got x {shape}."
        )


def check_dropout(rate: float, deterministic: bool | None, rngs: Any) -> None:
    """Raises ValueError if dropout is neither on nor off, or has no key."""
    if rate == 0 or deterministic:
        return
    if deterministic is None:
        raise ValueError(
            f"dropout_rate = {rate}: say deterministic=True (evaluation) or False (training) at "
            f"the call, or write model.eval() or model.train()."
        )
    if rngs is None:
        raise ValueError(
            f"dropout_rate = {rate} needs rngs=nnx.Rngs(dropout=...) at the call. Give it, or "
            f"write deterministic=True."
        )


def check_own_rules(mask: Any, logits: Any) -> None:
    """Raises ValueError unless a layer can hold the mask and the logits: options, no arrays."""
    for name, value, kind in (("mask", mask, Mask), ("logits", logits, Logits)):
        if not isinstance(value, kind):
            raise ValueError(
                f"{name} of an Attention must be a jax_seqpar.{kind.__name__}, got {value!r}. "
                f"Write {name}={kind.__name__}(...)."
            )
        if jax.tree.leaves(value):
            raise ValueError(
                f"{name}={value} has arrays, which are those of one call. Give positions and "
                f"segment_ids at the call, sinks=True for learned sinks; anything else to "
                f"jax_seqpar.dot_product_attention."
            )


def check_use_bias(use_bias: Any) -> None:
    """Raises ValueError unless it is True, False, or names of projections."""
    if isinstance(use_bias, bool):
        return
    named = isinstance(use_bias, Sequence) and not isinstance(use_bias, str)
    if not named or not set(use_bias) <= set(PROJECTIONS):
        raise ValueError(
            f"use_bias must be True, False, or some of {PROJECTIONS}, got {use_bias!r}. Write "
            f"use_bias=('query', 'key', 'value') for all but the output."
        )


def check_modes(x: Any, lengths: Any, *, decode: bool, fill_cache: bool) -> None:
    """Raises ValueError for two uses of a cache at once, and for lengths that no cache needs."""
    if decode and fill_cache:
        raise ValueError(
            f"x of shape {x.shape}: decode=True follows what is in the cache, and fill_cache=True "
            f"replaces it. Write one of them."
        )
    if lengths is not None and not (decode or fill_cache):
        raise ValueError(
            f"lengths {lengths!r} tell a cache what is padding. Write fill_cache=True or "
            f"decode=True, or leave lengths out."
        )


def check_lengths(lengths: Any, x: Any) -> None:
    """Raises ValueError unless lengths are integers, one of each row of x, and fit it."""
    if lengths is None:
        return
    check_is_array("lengths", lengths)
    if lengths.shape != x.shape[:1] or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(
            f"lengths are {lengths.dtype} of shape {lengths.shape}, expected integers of shape "
            f"{x.shape[:1]}, one of each row. Write lengths.astype(jnp.int32)."
        )
    if isinstance(lengths, Tracer):
        return
    least, most = int(lengths.min(initial=0)), int(lengths.max(initial=0))
    if least < 0 or most > x.shape[1]:
        raise ValueError(
            f"lengths are {least} to {most}, expected 0 to {x.shape[1]}, the tokens of x. Write "
            f"how many of them are no padding."
        )
