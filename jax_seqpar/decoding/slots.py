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
      used: `[B, 1]`, int32: the slots from the first that were written to; in a ring buffer, where
        a slot goes by the position, one more than the largest position ever written. As a global
        array it has a column for each device.
      lost: `[B, 1]`: whether a token that a query may attend to has no slot any more.
    """

    key: Float[Array, "B C K H"]
    value: Float[Array, "B C K V"]
    positions: Int[Array, "B C"]
    used: Int[Array, "B P"]
    lost: Bool[Array, "B P"]

    @property
    def capacity(self) -> int:
        """C."""
        return self.positions.shape[1]


def fill(slots: Slots, key: Array, value: Array, positions: Array) -> Slots:
    """The first slots hold these tokens `[B, S, ...]`, the others none.

    Padding is not kept: a NaN in it times a weight of 0 would be NaN.
    """
    size, is_token = key.shape[1], (positions < EMPTY)[..., None, None]

    def filled(old: Array, new: Array) -> Array:
        new = jnp.where(is_token, new, jnp.zeros_like(new)).astype(old.dtype)
        return jnp.zeros_like(old).at[:, :size].set(new)

    return Slots(
        filled(slots.key, key),
        filled(slots.value, value),
        jnp.full_like(slots.positions, EMPTY).at[:, :size].set(positions),
        _first_free(positions),
        jnp.zeros_like(slots.lost),
    )


def _first_free(positions: Array) -> Array:
    """`[B, 1]`, the number of slots up to the last that holds a token."""
    places = jnp.arange(1, positions.shape[1] + 1, dtype=jnp.int32)[None]
    return jnp.where(positions < EMPTY, places, 0).max(1, keepdims=True, initial=0)


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
    is_token = positions < EMPTY
    last = jnp.where(is_token, positions, -1).max(1, keepdims=True, initial=-1)
    last = jax.lax.pmax(last, axes) if axes else last
    if window is None:
        number, kept = _ranks(positions, axes), is_token
    else:
        number, kept = positions, is_token & (positions > last - total)
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
    return Slots(
        _of_bits(dealt(_bits(key.astype(slots.key.dtype))), slots.key.dtype),
        _of_bits(dealt(_bits(value.astype(slots.value.dtype))), slots.value.dtype),
        numbers,
        _first_free(numbers) if window is None else last + 1,
        jnp.zeros_like(slots.lost),
    )


def _ranks(positions: Array, axes: Axes) -> Array:
    """Rank of each token: the tokens of its row, on all devices, with a smaller position."""
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
    """Slots with tokens `[B, T, ...]` added, the same on every device; each keeps a part of them.

    The token at position p belongs to device p mod P, so that all devices receive as many.

    Args:
      ring_buffer: whether the slot goes by the position, and an old token is written over.
    """
    own = (positions % degree == device) & (positions < EMPTY)
    if ring_buffer:
        places, lost = positions // degree % slots.capacity, slots.lost
        written = jnp.where(own, positions + 1, 0).max(1, keepdims=True, initial=0)
        used = jnp.maximum(slots.used, written)
    else:
        places = slots.used + jnp.cumsum(own, axis=1, dtype=jnp.int32) - 1
        used = slots.used + own.sum(1, keepdims=True, dtype=jnp.int32)
        lost = slots.lost | (used > slots.capacity)
    places = jnp.where(own, places, slots.capacity)
    return Slots(
        _write(slots.key, key, places),
        _write(slots.value, value, places),
        _write(slots.positions, positions, places),
        used,
        lost,
    )


def drop(slots: Slots, first: Array, *, axes: Axes, window: int | None) -> Slots:
    """Forgets the tokens from position `first` `[B, 1]` on.

    Args:
      axes: the mesh axes of the tokens, of which there may be none.
      window: of a ring buffer. Where a token was written over one that the next query may attend
        to, the row has lost it.
    """
    positions = jnp.where(slots.positions >= first, EMPTY, slots.positions)
    if window is None:
        used, lost = _first_free(positions), slots.lost
    else:
        used = slots.used
        written = jax.lax.pmax(used, axes) if axes else used
        held = slots.capacity * (axis_size(axes) if axes else 1)
        lost = slots.lost | (written - 1 - held >= jnp.maximum(first - window, 0))
    # Where nothing is left, nothing is missing.
    is_new = first <= 0
    used, lost = jnp.where(is_new, 0, used), ~is_new & lost
    return slots._replace(positions=positions, used=used, lost=lost)


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
