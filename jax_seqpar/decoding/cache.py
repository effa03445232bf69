"""KeyValueCache: the keys and values of the tokens so far, sharded along the tokens."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Integer

from .._checks import axis_size
from ..mesh import AnyMesh, find_mesh, place, set_explicit_sharding
from ..mesh_layout import MeshLayout, axes_size, check_is_layout, names
from . import slots as of_device
from .checks import (
    as_numbers,
    as_positions,
    check_distinct,
    check_fits,
    check_sizes,
    check_tokens,
    no_slots,
)
from .slots import EMPTY, Slots


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["slots"],
    meta_fields=["layout", "window"],
)
@dataclass(frozen=True)
class KeyValueCache:
    """Slots of keys, values and positions, `[B@batch, C@tokens, K@heads, H]`; a pytree.

    Functions return a new cache. Under `jax.jit` donate the old one, and it is updated in place:

        @partial(jax.jit, donate_argnames="cache")
        def step(cache, query, key, value, positions):
            cache = cache.append(key, value, positions)
            return attend_to_cache(query, cache, positions=positions), cache

    Rows may be of different length: each has its own positions. A row that loses a token because
    its device has no slot left is refused eagerly, and NaN from there on under `jax.jit`, which
    does not know how many slots are taken; other rows are not touched.

    Attributes:
      slots: of all devices, as global arrays.
      layout: mesh axes of tokens, batch and heads; with `tokens=None` every device has all tokens
        of its heads.
      window: of a ring buffer, which keeps the last tokens alone: how many before its own a query
        may attend to. None keeps all.
    """

    slots: Slots
    layout: MeshLayout
    window: int | None = None

    @classmethod
    def empty(
        cls,
        batch: int,
        tokens: int,
        kv_heads: int,
        head_dim: int,
        *,
        value_dim: int | None = None,
        dtype: Any = jnp.float32,
        layout: MeshLayout = MeshLayout(),
        window: int | None = None,
    ) -> "KeyValueCache":
        """A cache without tokens, on the devices of the layout's mesh.

        Args:
          batch, kv_heads, head_dim: B, K, H.
          tokens: that a row holds at most, with the padding of its prompt, rounded up so that the
            devices divide them. With `window` as many as that and those that are appended at once.
          value_dim: V; H if None.

        Raises:
          ValueError: for sizes and dtypes that make no cache, and where the devices do not divide
            batch or KV heads.
        """
        check_sizes(batch, tokens, kv_heads, head_dim, value_dim, dtype, window)
        check_is_layout(layout)
        mesh = find_mesh(layout.mesh)
        check_fits(batch, kv_heads, layout, mesh.shape)
        degree = axes_size(layout.tokens, mesh.shape)
        shape = (batch, -(-tokens // degree) * degree, kv_heads)
        slots = Slots(
            jnp.zeros((*shape, head_dim), dtype),
            jnp.zeros((*shape, head_dim if value_dim is None else value_dim), dtype),
            jnp.full(shape[:2], EMPTY, jnp.int32),
            jnp.zeros((batch, degree), jnp.int32),
            jnp.zeros((batch, degree), bool),
        )
        return cls(_placed(slots, layout, mesh), layout, window)

    @property
    def tokens(self) -> int:
        """C, the slots of a row."""
        return self.slots.capacity

    def fill(
        self,
        key: Float[Array, "B S K H"],
        value: Float[Array, "B S K V"],
        *,
        positions: Integer[Array | np.ndarray, "#B S"] | None = None,
        lengths: Integer[Array | np.ndarray, "B"] | None = None,
    ) -> "KeyValueCache":
        """The cache of a prompt, in place of what it held.

        Each device keeps the tokens that it has: whatever the strategy and the order of the
        prefill, nothing is sent. A ring buffer sends each device its part of the last tokens, in
        one reduce-scatter.

        Args:
          key, value: with their tokens in the layout's order, sharded as it says.
          positions: of the tokens; their numbers in the sequence if None.
          lengths: of each row. Tokens whose position is that or more are padding, and are not kept.

        Raises:
          ValueError: for more tokens than there are slots, and shapes that do not fit.
        """
        check_tokens("fill", self, key, value)
        (B, S), mesh = key.shape[:2], find_mesh(self.layout.mesh, key)
        degree = axes_size(self.layout.tokens, mesh.shape)
        if self.window is None and self.tokens < S:
            raise no_slots("fill", S, self.tokens)
        self.layout.order.check("key", S, degree)
        if positions is None:
            positions = jnp.asarray(self.layout.order.permutation(S, degree), jnp.int32)[None]
        elif self.window is not None:
            check_distinct(positions)
        positions = jnp.broadcast_to(as_positions("fill", positions, ((1, S), (B, S))), (B, S))
        if lengths is not None:
            held = positions < as_numbers("lengths", lengths, B)[:, None]
            positions = jnp.where(held, positions, EMPTY)
        return replace(self, slots=_fill(self, mesh, key, value, positions))

    def append(
        self,
        key: Float[Array, "B T K H"],
        value: Float[Array, "B T K V"],
        positions: Integer[Array | np.ndarray, "B T"],
    ) -> "KeyValueCache":
        """The cache with more tokens, each on device p mod P of its position p.

        Args:
          key, value: whole on every device of the tokens.
          positions: of the tokens; `jax_seqpar.decoding.slots.EMPTY` for padding, which is not
            kept.

        Raises:
          ValueError: for a row that has no slot left, where that is known; and shapes that do not
            fit.
        """
        check_tokens("append", self, key, value)
        mesh = find_mesh(self.layout.mesh, key)
        positions = as_positions("append", positions, (key.shape[:2],))
        slots = _append(self, mesh, key, value, positions)
        new = slots.lost if isinstance(slots.lost, Tracer) else slots.lost & ~self.slots.lost
        if not isinstance(new, Tracer) and new.is_fully_addressable and new.any():
            capacity = self.tokens // new.shape[1]
            raise no_slots("append", int(slots.used.max()), capacity, on="one device")
        return replace(self, slots=slots)

    def drop(self, positions: Integer[Array | np.ndarray, "B"]) -> "KeyValueCache":
        """The cache without the tokens at these positions and after, row by row.

        For speculative decoding. What a ring buffer has written over does not come back: a row
        whose next query may attend to such a token is NaN from there on.

        Args:
          positions: of each row, the first that is dropped; 0 makes a row new.
        """
        mesh = find_mesh(self.layout.mesh, self.slots.key)
        first = as_numbers("positions of drop", positions, self.slots.key.shape[0])
        return replace(self, slots=_drop(self, mesh, first[:, None]))

    def on(self, layout: MeshLayout) -> "KeyValueCache":
        """The same tokens on another mesh, or shared in another way; eagerly.

        Each device has a copy of all slots for a moment.

        Raises:
          ValueError: where its devices do not divide slots, batch or KV heads.
        """
        check_is_layout(layout)
        mesh, old = find_mesh(layout.mesh), self.slots
        check_fits(old.key.shape[0], old.key.shape[2], layout, mesh.shape)
        degree = axes_size(layout.tokens, mesh.shape)
        if self.tokens % degree:
            raise ValueError(
                f"a cache of {self.tokens} slots is not divisible by the {degree} devices of mesh "
                f"axis {layout.tokens!r}. Write KeyValueCache.empty(..., tokens="
                f"{-(-self.tokens // degree) * degree}) at the start."
            )
        of_row = (old.key.shape[0], degree)
        used = jnp.broadcast_to(old.used.max(1, keepdims=True), of_row)
        lost = jnp.broadcast_to(old.lost.any(1, keepdims=True), of_row)
        moved = _placed(Slots(*old[:3], used, lost), layout, mesh)
        cache = KeyValueCache(moved, layout, self.window)
        return replace(cache, slots=_dealt(cache, mesh))

    @property
    def specs(self) -> Any:
        """PartitionSpecs, as `Slots`."""
        return _specs(self.layout)

    @property
    def whole_tokens(self) -> PartitionSpec:
        """PartitionSpec of query, key, value and output: whole on every device of the tokens."""
        return replace(self.layout, tokens=None).partition_spec


def shard_map(mesh: AnyMesh, function: Any, in_specs: Any, out_specs: Any) -> Any:
    """`jax.shard_map` unchecked for varying axes: all devices make the same row of `used`."""
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def place_on_devices(axes: tuple[str, ...]) -> tuple[Any, int]:
    """This device's place along the mesh axes of the tokens, and how many there are."""
    return (jax.lax.axis_index(axes), axis_size(axes)) if axes else (0, 1)


def _specs(layout: MeshLayout) -> Any:
    array: Any = layout.partition_spec
    row: Any = layout.token_spec
    return Slots(array, array, row, row, row)


def _placed(slots: Slots, layout: MeshLayout, mesh: AnyMesh) -> Slots:
    return Slots(*(place(x, s, mesh=mesh) for x, s in zip(slots, _specs(layout), strict=True)))


@partial(jax.jit, static_argnums=1)
def _fill(cache: KeyValueCache, mesh: AnyMesh, key: Any, value: Any, positions: Any) -> Slots:
    axes = names(cache.layout.tokens)

    def fill(slots: Slots, key: Array, value: Array, positions: Array) -> Slots:
        if cache.window is None:
            return of_device.fill(slots, key, value, positions)
        return of_device.deal(slots, key, value, positions, axes, cache.window)

    new = cache.specs[:3]
    function = shard_map(mesh, fill, (cache.specs, *new), cache.specs)
    return function(cache.slots, *_resharded((key, value, positions), new, mesh))


@partial(jax.jit, static_argnums=1)
def _append(cache: KeyValueCache, mesh: AnyMesh, key: Any, value: Any, positions: Any) -> Slots:
    def append(slots: Slots, *tokens: Array) -> Slots:
        device, degree = place_on_devices(names(cache.layout.tokens))
        ring_buffer = cache.window is not None
        where = {"device": device, "degree": degree, "ring_buffer": ring_buffer}
        return of_device.append(slots, *tokens, **where)

    row = PartitionSpec(cache.layout.batch, None)
    new = cache.whole_tokens, cache.whole_tokens, row
    function = shard_map(mesh, append, (cache.specs, *new), cache.specs)
    return function(cache.slots, *_resharded((key, value, positions), new, mesh))


@partial(jax.jit, static_argnums=1)
def _drop(cache: KeyValueCache, mesh: AnyMesh, first: Any) -> Slots:
    def drop(slots: Slots, first: Array) -> Slots:
        axes = names(cache.layout.tokens)
        return of_device.drop(slots, first, axes=axes, window=cache.window)

    row = PartitionSpec(cache.layout.batch, None)
    function = shard_map(mesh, drop, (cache.specs, row), cache.specs)
    return function(cache.slots, *_resharded((first,), (row,), mesh))


@partial(jax.jit, static_argnums=1)
def _dealt(cache: KeyValueCache, mesh: AnyMesh) -> Slots:
    axes = names(cache.layout.tokens)

    def deal(slots: Slots) -> Slots:
        dealt = of_device.deal(slots, *slots[:3], axes, cache.window)
        # Rows keep the record of lost tokens, and a ring buffer that of slots written over.
        used = dealt.used if cache.window is None else slots.used
        return dealt._replace(used=used, lost=slots.lost)

    return shard_map(mesh, deal, (cache.specs,), cache.specs)(cache.slots)


def _resharded(arrays: Any, specs: Any, mesh: AnyMesh) -> list[Array]:
    return [set_explicit_sharding(x, s, mesh=mesh) for x, s in zip(arrays, specs, strict=True)]
