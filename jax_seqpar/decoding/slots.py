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

Axes = tuple[str, ...]

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


def deal(
    slots: Slots, key: Array, value: Array, positions: Array, axes: Axes, window: Any
) -> Slots:
    """All devices' tokens, dealt one by one to the devices.

    A reduce-scatter of each array, for which a device holds all slots. The token after n others of
    its row belongs to device n mod P; in a ring buffer, which keeps the last tokens alone, that at
    position p has a place by p, as in `append`.

    Args:
      axes: the mesh axes of the tokens, of which there may be none.
      window: of a ring buffer, else None.
    """
    degree = axis_size(axes) if axes else 1
    total = slots.capacity * degree
    if window is None:
        number = _ranks(positions, axes)
        kept = positions < EMPTY
    else:
        last = jnp.where(positions < EMPTY, positions, -1).max(1, keepdims=True)
        last = jax.lax.pmax(last, axes) if axes else last
        number, kept = positions, (positions < EMPTY) & (positions > last - total)
    owner, place = number % degree, number // degree % slots.capacity
    places = jnp.where(kept, owner * slots.capacity + place, total)

    def dealt(x: Array) -> Array:
        whole = jnp.zeros((x.shape[0], total, *x.shape[2:]), x.dtype)
        whole = _write(whole, x, places)
        if not axes:
            return whole
        return jax.lax.psum_scatter(whole, axes, scatter_dimension=1, tiled=True)

    # An integer is added to zeros, so no bit of a number changes; and an empty slot is 0.
    numbers = dealt(positions - EMPTY) + EMPTY
    used = (numbers < EMPTY).sum(1, keepdims=True, dtype=jnp.int32)
    return Slots(
        _of_bits(dealt(_bits(key.astype(slots.key.dtype))), slots.key.dtype),
        _of_bits(dealt(_bits(value.astype(slots.value.dtype))), slots.value.dtype),
        numbers,
        used if window is None else jnp.zeros_like(used),
    )


def _ranks(positions: Array, axes: Axes) -> Array:
    """How many tokens of its row, on all devices, have a smaller position."""
    if not axes:
        return jnp.argsort(jnp.argsort(positions, axis=1), axis=1).astype(jnp.int32)
    everyone = jax.lax.all_gather(positions, axes, axis=1, tiled=True)
    ranks = jnp.argsort(jnp.argsort(everyone, axis=1), axis=1).astype(jnp.int32)
    start = jax.lax.axis_index(axes) * positions.shape[1]
    return jax.lax.dynamic_slice_in_dim(ranks, start, positions.shape[1], axis=1)


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


def _write(x: Array, new: Array, places: Array) -> Array:
    """x with the tokens of each row at its places; those beyond the end are dropped."""
    rows = jnp.arange(x.shape[0], dtype=jnp.int32)[:, None]
    return x.at[rows, places].set(new.astype(x.dtype), mode="drop")


def _bits(x: Array) -> Array:
    """The bits of each number, as an integer that a sum of several devices holds."""
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    return bits if x.dtype.itemsize >= 4 else bits.astype(jnp.uint32)


def _of_bits(bits: Array, dtype: Any) -> Array:
    unsigned = f"uint{8 * jnp.dtype(dtype).itemsize}"
    return jax.lax.bitcast_convert_type(bits.astype(unsigned), dtype)
