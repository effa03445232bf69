"""Validation of the arrays of a Spec against query and key, and against each other."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._checks import Shape, as_boolean, check_arrays, check_has_numbers, check_is_array
from .attention_spec import Spec
from .mask import OPEN
from .threefry import check_key


def check_call(
    query: Any, key: Any, value: Any, spec: Spec, *, degree: int = 1, shapes_suffice: bool = False
) -> None:
    """Raises ValueError unless query, key, value and the arrays of a Spec are one attention's.

    Args:
      degree: devices that share the tokens, where query, key and value have those of one device.
      shapes_suffice: whether any of the arrays may be a `jax.ShapeDtypeStruct`.
    """
    check_arrays(query, key, value)
    if not shapes_suffice:
        check_has_numbers({"query": query, "key": key, "value": value} | spec.arrays)
    mask, logits = spec.mask, spec.logits
    B, T, N = query.shape[0], query.shape[1] * degree, query.shape[2]
    S = key.shape[1] * degree
    full = (B, N, T, S)
    for name, x, kind, kind_name in (
        ("bias", logits.bias, jnp.floating, "floating"),
        ("mask", mask.array, jnp.bool_, "boolean"),
    ):
        if x is None:
            continue
        check_is_array(name, x)
        if not jnp.issubdtype(x.dtype, kind):
            raise ValueError(
                f"{name} must be {kind_name}, got dtype {x.dtype}; "
                + (
                    "mask= takes a boolean array, True attends. Write bias.astype(jnp.float32) for "
                    "numbers added to the logits."
                    if name == "bias"
                    else f"write {as_boolean(name, x.dtype)}."
                )
            )
        fits = len(x.shape) == 4 and all(n in (1, m) for n, m in zip(x.shape, full, strict=True))
        if not fits:
            raise ValueError(
                f"{name} must have 4 axes, each 1 or that of [B, N, T, S] = {full}, "
                f"got shape {x.shape}. Write {_with_four_axes(name, x.shape)}."
            )
    for name in ("query_seq_lengths", "key_value_seq_lengths"):
        _check_per_sequence(name, getattr(mask, name), B)
    which = "alike where they attend to one another"
    _check_per_token("segment_ids", mask.segment_ids, B, T, S, which)
    which = "from 0, or from where you like"
    _check_per_token("positions", mask.positions, B, T, S, which)
    if mask.positions is not None and mask.query_offset != 0:
        raise ValueError(
            f"positions and query_offset = {mask.query_offset} both say where the queries "
            f"are. Add the offset to the positions of the queries."
        )
    for name in ("alibi_slopes", "sinks"):
        _check_per_head(name, getattr(logits, name), N)
    _check_dropout(spec.dropout.rng, spec.dropout.rate, B, N)


def _with_four_axes(name: str, shape: Shape) -> str:
    if len(shape) == 2:
        return (
            f"{name}[None, None] for [T, S], {name}[:, None, None] for the keys of each sequence "
            f"[B, S]"
        )
    if len(shape) == 3:
        return f"{name}[None] for [N, T, S], {name}[:, None] for [B, T, S]"
    return f"{name} with 1 for an axis along which it is the same"


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
    name: str, x: Any, batch: int, query_tokens: int, key_tokens: int, which: str
) -> None:
    if x is None:
        return
    if isinstance(x, list):
        raise ValueError(
            f"{name} must be an array, or a tuple of two, got list. Write jnp.asarray({name})."
        )
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
            f"{list(shapes[0])} for queries and {list(shapes[1])} for keys, got {got}. Number the "
            f"tokens {which}."
        )
    for part in pair:
        if name == "positions" and isinstance(part, np.ndarray):
            _check_positions(part)
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


def _check_positions(x: np.ndarray) -> None:
    low, high = x.min(initial=0), x.max(initial=0)
    if low <= -OPEN or high >= OPEN:
        raise ValueError(
            f"positions has numbers from {low} to {high}, and from 2^30 on their sum with a window "
            f"is no number of 32 bits. Write positions - positions.min(), the same number less for "
            f"queries and keys, as only differences count."
        )


def _check_per_head(name: str, x: Any, heads: int) -> None:
    if x is None:
        return
    check_is_array(name, x)
    if x.shape != (heads,) or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"{name} must be floating of shape (N,) = ({heads},), one for each query head, got "
            f"{x.dtype}{list(x.shape)}. Write jnp.broadcast_to({name}, {heads}) for one value."
        )


def _check_dropout(rng: Any, rate: float, batch: int, heads: int) -> None:
    if rng is not None:
        check_key(rng, batch, heads)
    elif rate > 0:
        raise ValueError(
            f"Dropout(rate={rate}) needs a key. Write Dropout({rate}, jax.random.key(...)), "
            f"another one for each layer and step."
        )


def no_local_dropout(rate: float) -> ValueError:
    """Error for one dropout key where each device would count heads and sequences from 0."""
    return ValueError(
        f"Dropout has one key here, inside a jax.shard_map, where a device sees some of the heads "
        f"and sequences only: each device would drop the same weights. Write "
        f"jax_seqpar.head_keys(key, B, N), with B and N of the whole attention, and give this "
        f"device's sequences and heads of it as Dropout({rate}, rng=...)."
    )
