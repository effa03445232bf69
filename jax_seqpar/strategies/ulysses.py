"""Ulysses attention as one device sees it: reshard, attend, reshard back."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._checks import axis_size, check_flag, divisors
from ..exact.undefined_derivatives import undifferentiated
from ..kernels import Kernel, Residual, blockwise_attention
from ..mask import Spec
from ..mask.array_fields import Axes as ArrayAxes
from ..mesh_layout import AxisName, MeshAxes, names
from ..order import Contiguous, TokenOrder
from .heads import HeadPlan, merge_heads, plan_heads, split_heads
from .reshard import heads_to_sequence, sequence_to_heads
from .strategy import Axes, Degree, Shape, array_bytes, check_traffic, output, share


@dataclass(frozen=True)
class Ulysses:
    """`[B, S@seq, N, H]` becomes `[B, S, N@seq, H]` and back, by four all-to-alls.

    One all-to-all each for query, key and value; the kernel sees all the tokens of its heads, so
    masks stay in global positions; one all-to-all takes the output back. Jacobs et al. 2023,
    https://arxiv.org/abs/2309.14509.

    Heads that the devices do not divide are padded, so that each has `ceil(N / P)` of them
    (`jax_seqpar.strategies.heads`); with fewer KV heads than devices each is sent to several.

    Args:
      head_chunks: number of slices of the heads, each with separate reshards. It divides the query
        heads of a device. With a kernel that computes head by head no bit depends on it, but in
        sums over slices: dk and dv where it does not divide the KV heads of a device, and the
        gradient of an array that heads share.
      overlap: all slices side by side, so that a compiler may hide the transfer of one under the
        attention of another (see `jax_seqpar.compiler_options`). If False one after another, and
        recomputed for the gradient: gathered query, key and value of one slice are in memory.
    """

    head_chunks: int = 1
    overlap: bool = True

    def __post_init__(self) -> None:
        check_flag("overlap", self.overlap)

    sees_all_tokens = sees_all_keys = True

    def heads_axes(self, tokens: MeshAxes) -> tuple[str, ...]:
        return names(tokens)

    def pad_heads(self, spec: Spec, heads: int, kv_heads: int, axes: Axes, kernel: Kernel) -> Spec:
        plan = head_plan(heads, kv_heads, math.prod(axes.values()), kernel)
        return spec.map(partial(_with_added_heads, plan=plan, heads=heads, kernel=kernel))

    def __call__(
        self,
        kernel: Kernel,
        query: Array,
        key: Array,
        value: Array,
        spec: Spec,
        *,
        axis_name: AxisName,
        order: TokenOrder = Contiguous(),
        return_residual: bool = False,
    ) -> tuple[Array, Residual | None]:
        degree = axis_size(axis_name)
        plan = head_plan(query.shape[2], key.shape[2], degree, kernel)
        heads, kv_heads = plan.query_heads // degree, plan.sent_kv_heads // degree
        _check_head_chunks(self.head_chunks, heads, kv_heads, sums_exactly=kernel.sums_exactly)
        spec = spec.map(
            partial(_own_heads, plan=plan, heads=heads, axis_name=axis_name, kernel=kernel)
        )
        if self.head_chunks > 1 and kernel.sums_exactly:
            spec = _with_bias_of_heads(spec, self.head_chunks)
        local = kernel.sharing(((axis_name, plan.copies),))
        query = plan.pad_queries(query, 2)  # [B, s, P heads, H], of this device's s tokens
        key, value = plan.spread_keys(key), plan.spread_keys(value)  # [B, s, P kv_heads, ...]
        # Slices of the query heads that read the same slice of the KV heads follow one another.
        kv_chunks = min(self.head_chunks, kv_heads)
        chunks_each = self.head_chunks // kv_chunks
        size, kv_size = heads // self.head_chunks, kv_heads // kv_chunks
        each = _side_by_side if self.overlap else _one_by_one

        def gather(x: Array, chunk: Any, size: int) -> Array:
            """`[B, s, P n, H] -> [B, S, size, H]`: every token of a slice of the device's heads."""
            whole = sequence_to_heads(_chunk_of_each(x, degree, chunk, size), axis_name)
            return order.restore(whole, 1, degree)

        def attend(chunk: Any, k: Array, v: Array) -> Any:
            """One slice of the query heads of every device: `[B, s, P size, V]`, and residuals."""
            q = gather(query, chunk, size)
            own = spec.map(partial(_take_heads, start=chunk * size, size=size))
            out, residual = local.attend(q, k, v, own)  # [B, S, size, V]
            rows = (out, jnp.stack(residual, -1)) if return_residual and residual else (out,)
            return tuple(heads_to_sequence(order.reorder(x, 1, degree), axis_name) for x in rows)

        def attend_all_of(kv_chunk: Any) -> Any:
            """The slices that read one slice of the KV heads."""
            k, v = (gather(x, kv_chunk, kv_size) for x in (key, value))
            return each(lambda i: attend(kv_chunk * chunks_each + i, k, v), chunks_each)

        chunks = each(attend_all_of, kv_chunks)  # [kv_chunks, chunks_each, B, s, P size, V]
        out, *rest = (plan.unpad_queries(_join(x, degree), 2) for x in chunks)
        residual = None
        for x in rest:
            residual = Residual(x[..., 0], x[..., 1])
        return out, residual

    def traffic(
        self,
        query: Shape,
        key: Shape,
        value: Shape,
        *,
        degree: Degree,
        itemsize: int,
        kernel: Kernel = blockwise_attention,
    ) -> int:
        (B, T, N, H), (_, S, K, V) = query, value
        P = check_traffic(query, key, degree)
        plan = head_plan(N, K, P, kernel)
        moved = B * (T * plan.query_heads + S * plan.sent_kv_heads) * (H + V)
        return moved * itemsize * (P - 1) // P**2

    def memory(
        self,
        query: Shape,
        key: Shape,
        value: Shape,
        *,
        degree: Degree,
        itemsize: int,
        gradients: bool = False,
        kernel: Kernel = blockwise_attention,
    ) -> int:
        """All tokens of a device's heads of query, key, value and output.

        With gradients each of these arrays counts twice, for itself and its gradient. Chunks that
        follow one another hold one chunk of these, and the output of the earlier chunks.
        """
        P, (_, S, K, _) = check_traffic(query, key, degree), key
        plan = head_plan(query[2], K, P, kernel)
        chunks = 1 if self.overlap else self.head_chunks
        heads, kv_heads = (max(n // P // chunks, 1) for n in (plan.query_heads, plan.sent_kv_heads))
        q, k, v = share(query, query[1], heads), share(key, S, kv_heads), share(value, S, kv_heads)
        arrays = array_bytes(q, k, v, output(q, v), itemsize=itemsize)
        earlier = array_bytes(output(query, value), itemsize=itemsize) // P if chunks > 1 else 0
        options = {"itemsize": itemsize, "gradients": gradients}
        return (1 + gradients) * arrays + earlier + kernel.workspace(q, k, v, **options)


def head_plan(heads: int, kv_heads: int, degree: int, kernel: Kernel) -> HeadPlan:
    """The heads that Ulysses gives each of so many devices, with this kernel on each."""
    return plan_heads(heads, kv_heads, degree, may_copy=not kernel.sums_exactly)


def _own_heads(
    x: Array, axes: ArrayAxes, *, plan: HeadPlan, heads: int, axis_name: AxisName, kernel: Kernel
) -> Array:
    """A device's part of an array with a head axis, if it is not that already."""
    if "heads" not in axes:
        return x
    axis = axes.index("heads")
    if x.shape[axis] in (1, heads):
        return x
    start = jax.lax.axis_index(axis_name) * heads
    return _slice(_padded(x, axes, plan, kernel, axis), axis, start, heads)


def _with_bias_of_heads(spec: Spec, chunks: int) -> Spec:
    """The Spec, whose bias has no gradient where heads of several chunks share it.

    Each chunk is a call of the kernel, and JAX adds up what the calls give, with roundings.
    """
    bias = spec.logits.bias
    if bias is None or bias.shape[1] > 1:
        return spec

    def refusal() -> ValueError:
        return ValueError(
            f"head_chunks = {chunks} would round the gradient of bias {bias.shape}, which all "
            f"heads share, in a sum over chunks. Write head_chunks=1, or "
            f"jax.lax.stop_gradient(bias)."
        )

    return spec.with_logits(bias=undifferentiated(refusal, bias))


def _take_heads(x: Array, axes: ArrayAxes, *, start: Any, size: int) -> Array:
    return _slice(x, axes.index("heads"), start, size) if "heads" in axes else x


def _slice(x: Array, axis: int, start: Any, size: int) -> Array:
    """`dynamic_slice` along an axis; axes of size 1 broadcast."""
    if x.shape[axis] in (1, size):
        return x
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis)


def _chunk_of_each(x: Array, degree: int, chunk: Any, size: int) -> Array:
    """Slice of the heads for each device, from heads `[B, S, P n, H]` that go to P devices."""
    B, S, heads, H = x.shape
    by_device = x.reshape(B, S, degree, heads // degree, H)
    return _slice(by_device, 3, chunk * size, size).reshape(B, S, degree * size, H)


def _side_by_side(function: Callable[[Any], Any], count: int) -> Any:
    return jax.tree.map(lambda *xs: jnp.stack(xs), *(function(i) for i in range(count)))


def _one_by_one(function: Callable[[Any], Any], count: int) -> Any:
    """Maps a function in a loop that keeps no residuals for the derivative."""
    return jax.lax.map(jax.checkpoint(function, prevent_cse=False), jnp.arange(count))


def _join(chunks: Array, degree: int) -> Array:
    """`[.., .., B, S, P n, V]`: slices of the heads of P devices, to all heads in order."""
    *counts, B, S, heads, V = chunks.shape
    count = math.prod(counts)
    # In two steps: JAX 0.10.2 has no rule for one that both merges and splits axes of an array
    # whose batch axis is sharded by its type, as under jax.vmap(spmd_axis_name=).
    by_device = chunks.reshape(count, B, S, heads, V)
    by_device = by_device.reshape(count, B, S, degree, heads // degree, V)
    return jnp.moveaxis(by_device, 0, 3).reshape(B, S, count * heads, V)


def _with_added_heads(
    x: Array, axes: ArrayAxes, *, plan: HeadPlan, heads: int, kernel: Kernel
) -> Array:
    """An array as it is sharded: with the heads that are added to those of each shard."""
    if "heads" not in axes:
        return x
    axis = axes.index("heads")
    if x.shape[axis] == 1 or plan.is_trivial:
        return x
    return merge_heads(_padded(split_heads(x, axis, heads), axes, plan, kernel, axis + 1), axis)


def _padded(x: Array, axes: ArrayAxes, plan: HeadPlan, kernel: Kernel, axis: int) -> Array:
    """An array of a Spec with the added query heads, which attend to nothing, or to everything.

    To nothing, as a NaN in a key that all others mask would come into the gradients through them.
    """
    if "keys" not in axes:
        return plan.pad_queries(x, axis)
    allowed, forbidden = (True, False) if x.dtype == jnp.bool_ else (0.0, -jnp.inf)
    return plan.pad_queries(x, axis, fill=allowed if kernel.needs_a_key else forbidden)


def _check_head_chunks(chunks: Any, heads: int, kv_heads: int, *, sums_exactly: bool) -> None:
    """Raises ValueError unless the head chunks divide a device's heads evenly."""
    if type(chunks) is not int or chunks < 1 or heads % chunks:
        raise ValueError(
            f"head_chunks must divide the {heads} query heads of a device, got {chunks!r}. "
            f"Use one of {divisors(heads)}."
        )
    if kv_heads % chunks and chunks % kv_heads:
        fits = [c for c in divisors(heads) if kv_heads % c == 0 or c % kv_heads == 0]
        raise ValueError(
            f"head_chunks = {chunks} neither divides nor is divisible by the {kv_heads} KV heads "
            f"of a device. Use one of {fits}."
        )
    if sums_exactly and kv_heads % chunks:
        raise ValueError(
            f"head_chunks = {chunks} would split the {kv_heads} KV heads of a device, whose "
            f"gradients this kernel adds up without rounding. Use one of {divisors(kv_heads)}."
        )
