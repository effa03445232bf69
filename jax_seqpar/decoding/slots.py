"""Slots: the keys and values that one device holds, each with the position of its token.

Which device holds a token does not matter to attention, nor in which slot, because the slot has a
position. A slot without a token has the position `EMPTY`, later than that of any query, so
causality hides it and no other mask is needed. All functions here are for one device, inside a
`jax.shard_map`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .._checks import axis_size

# The greatest position that an attention takes.
EMPTY = 2**30 - 1


class Slots(NamedTuple):
    """Keys and values of one device, or of all devices as global arrays.

    Attributes:
      key, value: `[B, C, K, H]` and `[B, C, K, V]`.
      positions: `[B, C]`, int32.
      used: `[B, 1]`, int32: the slots from the first that were written to. More than C where a
        token was lost. As a global array it has a column for each device.
    """

    key: Float[Array, "B C K H"]
    value: Float[Array, "B C K V"]
    positions: Int[Array, "B C"]
    used: Int[Array, "B P"]

    @property
    def capacity(self) -> int:
        """C."""
        return self.positions.shape[1]

    @property
    def lost(self) -> Bool[Array, "B P"]:
        """Whether a token of the sequence had no slot."""
        return self.used > self.capacity


def fill(slots: Slots, key: Array, value: Array, positions: Array) -> Slots:
    """The first slots hold these tokens `[B, S, ...]`, the others none."""
    size = key.shape[1]
    places = jnp.arange(1, size + 1, dtype=jnp.int32)
    used = jnp.where(positions < EMPTY, places, 0).max(1, keepdims=True)
    empty = jnp.full_like(slots.positions, EMPTY)
    return Slots(
        slots.key.at[:, :size].set(key.astype(slots.key.dtype)),
        slots.value.at[:, :size].set(value.astype(slots.value.dtype)),
        empty.at[:, :size].set(positions),
        used,
    )


def fill_ring_buffer(
    slots: Slots, key: Array, value: Array, positions: Array, axes: tuple[str, ...]
) -> Slots:
    """The slots hold the last of all devices' tokens, each at the place of its position.

    One reduce-scatter of each array: a prompt's last tokens may all lie on one device.

    Args:
      axes: the mesh axes of the tokens, of which there may be none.
    """
    degree = axis_size(axes) if axes else 1
    last = jnp.where(positions < EMPTY, positions, -1).max(1, keepdims=True)
    last = jax.lax.pmax(last, axes) if axes else last
    kept = (positions < EMPTY) & (positions > last - slots.capacity * degree)
    owner, place = positions % degree, positions // degree % slots.capacity
    places = jnp.where(kept, owner * slots.capacity + place, slots.capacity * degree)

    def dealt(x: Array) -> Array:
        whole = jnp.zeros((x.shape[0], slots.capacity * degree, *x.shape[2:]), x.dtype)
        whole = _write(whole, x, places)
        if not axes:
            return whole
        return jax.lax.psum_scatter(whole, axes, scatter_dimension=1, tiled=True)

    # An integer is added to zeros, so no bit of a number changes; and an empty slot is 0.
    numbers = dealt(jnp.where(kept, positions, EMPTY) - EMPTY) + EMPTY
    return Slots(
        _of_bits(dealt(_bits(key.astype(slots.key.dtype))), slots.key.dtype),
        _of_bits(dealt(_bits(value.astype(slots.value.dtype))), slots.value.dtype),
        numbers,
        jnp.zeros_like(slots.used),
    )


def append(
    slots: Slots,
    key: Array,
    value: Array,
    positions: Array,
    *,
    device: Any,
    degree: int,
    ring_buffer: bool,
) -> Slots:
    """Tokens `[B, T, ...]`, the same on every device, of which each keeps its own.

    The token at position p belongs to device p mod P, so that all devices receive as many.

    Args:
      ring_buffer: whether the slot goes by the position, and an old token is written over.
    """
    own = (positions % degree == device) & (positions < EMPTY)
    if ring_buffer:
        places, used = positions // degree % slots.capacity, slots.used
    else:
        places = slots.used + jnp.cumsum(own, axis=1, dtype=jnp.int32) - 1
        used = slots.used + own.sum(1, keepdims=True, dtype=jnp.int32)
    places = jnp.where(own, places, slots.capacity)
    return Slots(
        _write(slots.key, key, places),
        _write(slots.value, value, places),
        _write(slots.positions, positions, places),
        used,
    )


def drop(slots: Slots, first: Array, last: Array, *, degree: int, window: int | None) -> Slots:
    """Forgets the tokens from position `first` `[B]` on.

    Args:
      last: `[B]`, the last position of all devices.
      window: of a ring buffer. Where a forgotten token was written over one that the next query
        may attend to, the row has lost it.
    """
    positions = jnp.where(slots.positions >= first[:, None], EMPTY, slots.positions)
    if window is not None:
        lost = last - slots.capacity * degree >= jnp.minimum(first, last + 1) - window
        lost &= first <= last
        used = jnp.where(lost[:, None], slots.capacity + 1, slots.used)
        return slots._replace(positions=positions, used=used)
    places = jnp.arange(1, slots.capacity + 1, dtype=jnp.int32)
    used = jnp.where(positions < EMPTY, places, 0).max(1, keepdims=True)
    # A token without a slot may be before `first`, which no slot tells.
    return slots._replace(positions=positions, used=jnp.where(slots.lost, slots.used, used))


def compact(slots: Slots) -> Slots:
    """The tokens in the first slots, in the order in which they lie."""
    order = jnp.argsort(slots.positions == EMPTY, axis=1, stable=True)
    taken = (jnp.take_along_axis(x, _beside(order, x), axis=1) for x in slots[:3])
    used = (slots.positions < EMPTY).sum(1, keepdims=True, dtype=jnp.int32)
    return Slots(*taken, used)


def _write(x: Array, new: Array, places: Array) -> Array:
    """x with the tokens of each row at its places; those beyond the end are dropped."""
    rows = jnp.arange(x.shape[0], dtype=jnp.int32)[:, None]
    return x.at[rows, places].set(new.astype(x.dtype), mode="drop")


def _beside(order: Array, x: Array) -> Array:
    return order.reshape(*order.shape, *(1,) * (x.ndim - 2))


def _bits(x: Array) -> Array:
    """The bits of each number, as an integer that a sum of several devices holds."""
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    return bits if x.dtype.itemsize >= 4 else bits.astype(jnp.uint32)


def _of_bits(bits: Array, dtype: Any) -> Array:
    unsigned = f"uint{8 * jnp.dtype(dtype).itemsize}"
    return jax.lax.bitcast_convert_type(bits.astype(unsigned), dtype)
