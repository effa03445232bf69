"""Checks of Flax's layers in exact arithmetic: what it lacks is refused, and never left out."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from ..exact.attention import Exact
from .attention_fn import SequenceParallel

# Attention functions that add in an order of their own.
INEXACT = (nnx.dot_product_attention, jax.nn.dot_product_attention)


def check_is_narrow(x: Array) -> None:
    """Raises ValueError unless x is float32 or bfloat16."""
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(
            f"exact arithmetic takes float32 and bfloat16 between layers, got {x.dtype}. Write "
            f"dtype=jnp.float32."
        )


def check_parameter(name: str, x: Array) -> None:
    """Raises ValueError for a parameter that is not float32."""
    if x.dtype != jnp.float32:
        raise ValueError(
            f"exact arithmetic takes parameters of float32, and the {name} {x.shape} is {x.dtype}. "
            f"Write param_dtype=jnp.float32 (and dtype=jnp.float32 of an nnx.Embed that it is of)."
        )


def check_precision(precision: Any) -> None:
    """Raises ValueError for a precision of products."""
    if precision is not None:
        raise ValueError(
            f"precision={precision!r} rounds the products of float32, and exact arithmetic has one "
            f"rounding of its own. Write precision=None."
        )


def check_norm(layer: nnx.LayerNorm | nnx.RMSNorm, x: Array) -> None:
    """Raises ValueError unless the layer norms the last axis of x, with parameters of float32."""
    kind = type(layer).__name__
    parameters = ["scale", "bias"] if isinstance(layer, nnx.LayerNorm) else ["scale"]
    missing = [name for name in parameters if getattr(layer, name) is None]
    if missing:
        raise ValueError(
            f"exact {kind} has {' and '.join(parameters)}, got use_{missing[0]} = False. Write "
            f"nnx.{kind}({', '.join(f'use_{name}=True' for name in parameters)})."
        )
    for name in parameters:
        check_parameter(name, getattr(layer, name)[...])
    for name in ("feature_axes", "reduction_axes"):
        axes = _from_the_last(getattr(layer, name), x.ndim)
        if axes != (-1,):
            raise ValueError(
                f"exact {kind} goes over the last axis, got {name} = {getattr(layer, name)} for x "
                f"of shape {x.shape}. Write {name}=-1."
            )
    if layer.axis_name is not None:
        raise ValueError(
            f"exact {kind} sees global arrays, got axis_name = {layer.axis_name!r}. Write "
            f"axis_name=None."
        )
    check_dtype(layer, x)


def check_dense(layer: nnx.Linear | nnx.LinearGeneral, x: Array) -> None:
    """Raises ValueError unless the layer sums over the last axes of x by products of exact
    arithmetic, with parameters of float32."""
    kind = type(layer).__name__
    for name in ("kernel", "bias"):
        if getattr(layer, name) is not None:
            check_parameter(name, getattr(layer, name)[...])
    if isinstance(layer, nnx.LinearGeneral):
        if layer.batch_axis:
            raise ValueError(
                f"exact {kind} has one kernel for all tokens, got batch_axis = "
                f"{dict(layer.batch_axis)}. Write batch_axis={{}}, and a layer for each of them."
            )
        trailing = tuple(range(-len(layer.axis), 0))
        if _from_the_last(layer.axis, x.ndim) != trailing:
            raise ValueError(
                f"exact {kind} sums over the last axes, in their order, got axis = {layer.axis} "
                f"for x of shape {x.shape}. Write axis={trailing}, of x with these axes last."
            )
    for name in ("dot_general", "dot_general_cls", "preferred_element_type"):
        given = getattr(layer, name, None)
        if given is not None and given is not jax.lax.dot_general:
            raise ValueError(
                f"exact {kind} makes its own products, got {name} = {given}. Write no {name}."
            )
    check_dtype(layer, x)


def check_dtype(layer: Any, x: Array) -> None:
    """Raises ValueError where a layer computes in another dtype than x has; None is that of x."""
    if layer.dtype is not None and layer.dtype != x.dtype:
        raise ValueError(
            f"exact {type(layer).__name__} returns the dtype of x, got dtype = "
            f"{jnp.dtype(layer.dtype)} and x of {x.dtype}. Write dtype=jnp.{x.dtype}."
        )


def check_attends_exactly(layer: nnx.MultiHeadAttention) -> None:
    """Raises ValueError for options that exact arithmetic lacks, and for an attention function that
    is known to add in an order of its own, also inside a partial or a wrapper of `functools`."""
    if layer.normalize_qk or layer.dropout_rate or layer.decode:
        raise ValueError(
            f"exact self-attention has neither dropout_rate = {layer.dropout_rate}, normalize_qk = "
            f"{layer.normalize_qk} nor decode = {layer.decode}. Leave them out, or write "
            f"jax_seqpar.flax.Attention."
        )
    for attend in _unwrapped(layer.attention_fn):
        is_ours = isinstance(attend, SequenceParallel)
        if attend in INEXACT or (is_ours and not isinstance(attend.kernel, Exact)):
            raise ValueError(
                f"attention_fn = {attend} adds in an order of its own, which exact arithmetic "
                f"cannot have. Write attention_fn=SequenceParallel(kernel=Exact())."
            )


def _unwrapped(function: Any) -> Iterator[Callable[..., Any]]:
    """A function, and whatever it is made of."""
    while function is not None:
        yield function
        is_partial = isinstance(function, partial)
        function = function.func if is_partial else getattr(function, "__wrapped__", None)


def _from_the_last(axes: Any, ndim: int) -> tuple[int, ...]:
    """Axes of x, the last of which is -1."""
    return tuple(a if a < 0 else a - ndim for a in ((axes,) if isinstance(axes, int) else axes))
