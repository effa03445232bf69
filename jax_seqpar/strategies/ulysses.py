"""Ulysses attention as one device sees it: reshard, attend, reshard back."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from .. import refusals
from ..exact.kv_replicas import adds_without_rounding, tell_shared_heads
from ..layout import AxisName, MeshAxes, names
from ..mask import Spec
from ..mask.keywords import PER_HEAD, keywords_of
from ..mask.nouns import Axes
from .heads import HeadPlan, merge_heads, plan_heads, split_heads
from .reshard import heads_to_sequence, sequence_to_heads
from .strategy import Shape

# (query [B, T, n, H], key [B, S, k, H], value [B, S, k, V]) -> [B, T, n, V], k dividing n.
LocalAttention = Callable[..., Array]


def ulysses_attention(
    query: Shaped[Array, "B localT N H"],
    key: Shaped[Array, "B localS K H"],
    value: Shaped[Array, "B localS K V"],
    *,
    axis_name: AxisName,
    attention: LocalAttention,
    per_head: Mapping[str, Any] | None = None,
    head_chunks: int = 1,
    overlap: bool = True,
) -> Shaped[Array, "B localT N V"]:
    """Attention over tokens that are sharded along a mesh axis; for use inside `jax.shard_map`.

    `[B, S@seq, N, H]` becomes `[B, S, N@seq, H]` by one all-to-all each for query, key and value;
    `attention` sees all the tokens of its heads, so masks stay in global positions; one all-to-all
    takes the output back. Jacobs et al. 2023, https://arxiv.org/abs/2309.14509.

    Heads that the devices do not divide are padded, so that each has `ceil(N / P)` of them
    (`jax_seqpar.strategies.heads`); with fewer KV heads than devices each is sent to several.

    Args:
      query, key, value: this device's tokens with all heads.
      axis_name: the mesh axis (or axes) that the tokens are sharded over, P devices.
      attention: any attention of one device, called as `attention(query, key, value)` with its
        part of the query heads. Bind masks and options beforehand, with `functools.partial`. If it
        has a parameter `shared_heads`, it is told which devices have the same KV head; a `lambda`
        around it hides the parameter.
      per_head: per-head keyword arguments of `attention`. The head axis is axis 0 of an array with
        one axis, else axis 1. Its size is N (sliced here), N / P of the padded heads (already
        sliced) or 1 (broadcast). For dropout pass `dropout_rng` here, as
        `jax_seqpar.head_keys(key, B, N)` of the whole attention.
      head_chunks: works on so many slices of the heads, each with reshards of its own. It divides
        the query heads of a device. With a kernel that computes head by head no bit depends on it,
        but in sums over slices: dk and dv where it does not divide the KV heads of a device, and
        the gradient of an array that heads share.
      overlap: all slices side by side, so that a compiler may hide the transfer of one under the
        attention of another (see `jax_seqpar.compiler_options`). If False one after another, and
        recomputed for the gradient: gathered query, key and value of one slice are in memory.

    Returns:
      This device's tokens of the output, all heads.

    Raises:
      ValueError: sizes or dtypes that do not fit, or an `attention` that returns another shape.
    """
    degree = refusals.axis_size(axis_name)
    refusals.check_arrays(query, key, value)
    refusals.check_has_numbers({"query": query, "key": key, "value": value} | dict(per_head or {}))
    refusals.check_per_head_arrays(attention, per_head or {})
    refusals.check_flag("overlap", overlap)
    asks = adds_without_rounding(attention)
    plan = _plan(query.shape[2], key.shape[2], degree, attention)
    heads, kv_heads = plan.query_heads // degree, plan.padded_kv_heads * plan.copies // degree
    refusals.check_head_chunks(head_chunks, heads, kv_heads, sums_exactly=asks)
    own = {
        name: _own_heads(name, x, plan, heads, axis_name) for name, x in (per_head or {}).items()
    }
    local = tell_shared_heads(attention, ((axis_name, plan.copies),))
    query, key, value = plan.pad_queries(query, 2), plan.spread_keys(key), plan.spread_keys(value)
    kv_chunks = min(head_chunks, kv_heads)
    chunks_each = head_chunks // kv_chunks
    size, kv_size = heads // head_chunks, kv_heads // kv_chunks

    def gather(x: Array, chunk: Any, size: int) -> Array:
        return sequence_to_heads(_chunk_of_each(x, degree, chunk, size), axis_name)

    def attend(chunk: Any, k: Array, v: Array) -> Array:
        """One slice of the query heads of every device."""
        q = gather(query, chunk, size)
        mine = {name: _slice(x, _head_axis(x), chunk * size, size) for name, x in own.items()}
        out = local(q, k, v, **mine)
        refusals.check_local_output(out, q, v)
        return heads_to_sequence(out, axis_name)

    def attend_all_of(kv_chunk: Any) -> Array:
        """The slices that read one slice of the KV heads."""
        k, v = (gather(x, kv_chunk, kv_size) for x in (key, value))
        return each(lambda i: attend(kv_chunk * chunks_each + i, k, v), chunks_each)

    each = _side_by_side if overlap else _one_by_one
    chunks = each(attend_all_of, kv_chunks)
    return plan.unpad_queries(_join(chunks, degree), 2)


@dataclass(frozen=True)
class Ulysses:
    """`[B, S@seq, N, H]` becomes `[B, S, N@seq, H]` and back, by four all-to-alls.

    The kernel sees all the tokens of some heads; see `ulysses_attention`.

    Args:
      head_chunks, overlap: as in `ulysses_attention`.
    """

    head_chunks: int = 1
    overlap: bool = True

    def __post_init__(self) -> None:
        refusals.check_flag("overlap", self.overlap)

    def heads_axes(self, tokens: MeshAxes) -> tuple[str, ...]:
        return names(tokens)

    def kv_replicas(self, heads: int, kv_heads: int, degree: int, kernel: Any) -> int:
        return _plan(heads, kv_heads, degree, kernel).copies

    def pad_heads(self, spec: Spec, heads: int, kv_heads: int, degree: int, kernel: Any) -> Spec:
        plan = _plan(heads, kv_heads, degree, kernel)
        return spec.map(partial(_with_added_heads, plan=plan, heads=heads))

    def __call__(
        self,
        kernel: LocalAttention,
        query: Array,
        key: Array,
        value: Array,
        spec: Spec,
        *,
        axis_name: AxisName,
    ) -> Array:
        given = keywords_of(spec)
        per_head = {name: given.pop(name) for name in PER_HEAD if name in given}
        return ulysses_attention(
            query,
            key,
            value,
            axis_name=axis_name,
            attention=partial(kernel, **given),
            per_head=per_head,
            head_chunks=self.head_chunks,
            overlap=self.overlap,
        )

    def traffic(self, query: Shape, key: Shape, value: Shape, *, degree: int, itemsize: int) -> int:
        B, T, N, H = query
        S, K, V = key[1], key[2], value[3]
        plan = plan_heads(N, K, degree)
        kv_heads = plan.padded_kv_heads * plan.copies
        moved = B * (T * plan.query_heads * (H + V) + S * kv_heads * (H + V))
        return moved * itemsize * (degree - 1) // degree**2


def _head_axis(x: Any) -> int:
    return min(x.ndim - 1, 1)


def _own_heads(name: str, x: Any, plan: HeadPlan, heads: int, axis_name: AxisName) -> Array:
    """A device's part of an array with a head axis, if it is not that already."""
    axis = _head_axis(x)
    size = x.shape[axis]
    if size in (1, heads):
        return x
    refusals.check_per_head(name, x.shape, axis, plan.kv_heads * plan.group, heads)
    start = jax.lax.axis_index(axis_name) * heads
    return _slice(plan.pad_queries(x, axis), axis, start, heads)


def _slice(x: Array, axis: int, start: Any, size: int) -> Array:
    """`dynamic_slice` along an axis; axes of size 1 broadcast."""
    if x.shape[axis] in (1, size):
        return x
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis)


def _chunk_of_each(x: Array, degree: int, chunk: Any, size: int) -> Array:
    """Of the heads `[B, S, P n, H]` that go to P devices, a slice of those for each."""
    B, S, heads, H = x.shape
    by_device = x.reshape(B, S, degree, heads // degree, H)
    return _slice(by_device, 3, chunk * size, size).reshape(B, S, degree * size, H)


def _side_by_side(function: Callable[[Any], Array], count: int) -> Array:
    return jnp.stack([function(i) for i in range(count)])


def _one_by_one(function: Callable[[Any], Array], count: int) -> Array:
    """In a loop that keeps nothing for the derivative."""
    return jax.lax.map(jax.checkpoint(function, prevent_cse=False), jnp.arange(count))


def _join(chunks: Array, degree: int) -> Array:
    """`[.., .., B, S, P n, V]`: slices of the heads of P devices, to all heads in order."""
    *counts, B, S, heads, V = chunks.shape
    count = math.prod(counts)
    by_device = chunks.reshape(count, B, S, degree, heads // degree, V)
    return jnp.moveaxis(by_device, 0, 3).reshape(B, S, count * heads, V)


def _with_added_heads(x: Array, axes: Axes, *, plan: HeadPlan, heads: int) -> Array:
    """An array as it is sharded: with the heads that are added to those of each shard."""
    if "heads" not in axes:
        return x
    axis = axes.index("heads")
    if x.shape[axis] == 1 or plan.is_trivial:
        return x
    return merge_heads(plan.pad_queries(split_heads(x, axis, heads), axis + 1), axis)


def _plan(heads: int, kv_heads: int, degree: int, kernel: Any) -> HeadPlan:
    return plan_heads(heads, kv_heads, degree, may_copy=not adds_without_rounding(kernel))
