"""The two reshards of Ulysses attention, for use inside `jax.shard_map`: one all-to-all each.

Reshards move a label and nothing else. `[B, S@seq, N, H]` is a slice of the tokens with all heads,
`[B, S, N@seq, H]` all the tokens with some heads; the global array is the same before and after.
Rank p of P holds tokens `p*S/P ... (p+1)*S/P` before and heads `p*N/P ... (p+1)*N/P` after.

Any dtype of whole bytes, and int4; any bits. XLA:CPU widens bfloat16 and float8 collectives to
float32 and float16, which doubles the bytes and replaces the payload of a NaN; on a CPU such dtypes
therefore travel as integers. The same widening remains for their *cotangents*, which a derivative
has to carry as floats.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from .._checks import axis_size, check_has_numbers, check_is_array, divisors
from ..mesh_layout import AxisName


def sequence_to_heads(
    x: Shaped[Array, "B localS N H"], axis_name: AxisName
) -> Shaped[Array, "B S localN H"]:
    """`[B, S@seq, N, H] -> [B, S, N@seq, H]`: all the tokens, some heads.

    Args:
      x: this device's tokens with all heads, any dtype.
      axis_name: the mesh axis (or axes) that the tokens are sharded over; N must be divisible by
        its size.

    Raises:
      ValueError: heads that do not divide, or an axis that is not manual.
    """
    return _all_to_all(x, axis_name, split_axis=2, concat_axis=1)


def heads_to_sequence(
    x: Shaped[Array, "B S localN H"], axis_name: AxisName
) -> Shaped[Array, "B localS N H"]:
    """`[B, S, N@seq, H] -> [B, S@seq, N, H]`: some tokens, all heads; the inverse of the other.

    Args:
      x: all the tokens with this device's heads, any dtype.
      axis_name: the mesh axis (or axes) to shard the tokens over; S must be divisible by its size.

    Raises:
      ValueError: tokens that do not divide, or an axis that is not manual.
    """
    return _all_to_all(x, axis_name, split_axis=1, concat_axis=2)


def _all_to_all(x: Array, axis_name: AxisName, *, split_axis: int, concat_axis: int) -> Array:
    _check_reshard(x, split_axis, axis_name)
    narrow_float = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4
    exchange = _exchange_narrow if narrow_float else _exchange
    return exchange(x, axis_name, split_axis, concat_axis)


def _exchange(x: Array, axis_name: AxisName, split_axis: int, concat_axis: int) -> Array:
    """The exchange with the devices first and heads before tokens: `[P, B, n, s, H]`.

    So a tile of a TPU's memory, 8 by 128 numbers, is of one head, as the kernel and the model have
    it. With heads and channels folded, `[P, B, s, n H]`, bringing arrays into layouts takes 1.7 and
    1.9 times as many cycles (as libtpu 0.0.42 estimates them for v5e:2x4, 32K tokens, forward and
    backward, of 16 and 32 query heads and 8 KV heads of 128 channels; 1.1 times with batch 2, as
    many with 64 channels).
    """
    degree = axis_size(axis_name)
    B, tokens, heads, H = x.shape
    if split_axis == 2:
        parts = x.reshape(B, tokens, degree, heads // degree, H).transpose(2, 0, 3, 1, 4)
    else:
        parts = x.reshape(B, degree, tokens // degree, heads, H).transpose(1, 0, 3, 2, 4)
    parts = jax.lax.all_to_all(parts, axis_name, 0, 0, tiled=True)
    _, _, n, s, _ = parts.shape
    if concat_axis == 1:
        return parts.transpose(1, 0, 3, 2, 4).reshape(B, degree * s, n, H)
    return parts.transpose(1, 3, 0, 2, 4).reshape(B, s, degree * n, H)


# A bitcast has no derivative, so the derivative is stated: the same exchange, of the tangent.
@partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def _exchange_narrow(x: Array, axis_name: AxisName, split_axis: int, concat_axis: int) -> Array:
    """All-to-all of a narrow dtype, as integers on a CPU, and elsewhere without the detour."""

    def as_integers(x: Array) -> Array:
        unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
        bits = jax.lax.bitcast_convert_type(x, unsigned)
        bits = _exchange(bits, axis_name, split_axis, concat_axis)
        return jax.lax.bitcast_convert_type(bits, x.dtype)

    def as_it_is(x: Array) -> Array:
        return _exchange(x, axis_name, split_axis, concat_axis)

    return jax.lax.platform_dependent(x, cpu=as_integers, default=as_it_is)


@_exchange_narrow.defjvp
def _exchange_narrow_jvp(axis_name, split_axis, concat_axis, primals, tangents):
    (x,), (tangent,) = primals, tangents
    return (
        _exchange_narrow(x, axis_name, split_axis, concat_axis),
        _exchange(tangent, axis_name, split_axis, concat_axis),
    )


def _check_reshard(x: Any, split_axis: int, axis_name: Any) -> None:
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
            f"{axis_name!r}. Got shape {shape}. Use one of {divisors(shape[split_axis])} devices."
        )
