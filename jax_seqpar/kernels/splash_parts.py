"""Parts of an attention by the TPU's splash kernels: keys that are anywhere in the sequence.

What a ring needs: each round a device's keys are those of another device, and a compiled program
knows no more than their number. So the schedule of blocks and the positions of the queries are
arrays that are computed each round, of one shape for all rounds; the kernels read them either way.

Keys in ascending order that causality alone limits are seen by a query up to some place. Counted
by that place, the causal diagonal is in a zigzag and in stripes what it is in a run of tokens.

The operand whose dtype a kernel gives its result is widened to float32: query for output and dq,
key and value for dk and dv. Products and weights are those of the kernel on one device.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from ..mask import AnyTokens, Mask, Spec, TokenList, Tokens
from ..mask.block_ranges import keys_of, queries_of
from .parts import Part
from .softmax_residual import Residual
from .splash import (
    NO_SINK,
    SCHEDULE_BYTES,
    Band,
    Blocks,
    Passes,
    Schedule,
    even_passes,
    kv_row_bytes,
    meetings,
    pad,
    round_up,
    segments_of,
)


def attend_part(
    query: Array, key: Array, value: Array, spec: Spec, *, interpret: bool = False
) -> Part:
    """The attention to the keys of `spec.held_keys`, in float32."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels

    T, N = query.shape[1:3]
    plan = _Plan.of(query, key, value, spec)
    q, k, v = plan.operands(query, key, value)
    forward = partial(
        kernels._splash_attention_forward,
        plan.info(plan.passes.wide, 0),
        sinks=jnp.full((N,), NO_SINK, jnp.float32),
        block_sizes=kernels.BlockSizes(
            plan.passes.wide.queries, plan.passes.wide.keys, plan.passes.wide.keys_at_once
        ),
        residual_checkpoint_name=None,
        save_residuals=True,
        **plan.options(interpret),
    )
    out, (lse,) = jax.vmap(forward)(q.astype(jnp.float32), k, v, plan.segments())
    lse = lse.swapaxes(1, 2)[:, :T]
    some = lse > NO_SINK / 2
    total = some.astype(jnp.float32)
    return Part(out.swapaxes(1, 2)[:, :T], Residual(jnp.where(some, lse, 0), total))


def part_gradients(
    query: Array,
    key: Array,
    value: Array,
    spec: Spec,
    D: Array,
    residual: Residual,
    out_gradient: Array,
    *,
    interpret: bool = False,
) -> tuple[Array, Array, Array, dict[str, Array]]:
    """Gradients by the keys of `spec.held_keys` alone, in float32.

    Args:
      D: `[B, T, N]`, the sum of output times gradient, less `residual_products`.
      residual: of whole rows.
    """
    T, S = query.shape[1], key.shape[1]
    plan = _Plan.of(query, key, value, spec)
    lse = residual.top + jnp.log(residual.divisor)
    rows = (plan.of_queries(x) for x in (lse, out_gradient, D))
    gradients = jax.vmap(partial(_gradients_of_one, plan, interpret))
    found = gradients(*plan.operands(query, key, value), plan.segments(), *rows)
    dq, dk, dv = (x.swapaxes(1, 2)[:, :n] for x, n in zip(found, (T, S, S), strict=True))
    return dq, dk, dv, {}


def _gradients_of_one(
    plan: "_Plan", interpret: bool, q: Array, k: Array, v: Array, segments: Any, *rows: Array
) -> tuple[Array, Array, Array]:
    """The gradients of one sequence, heads first: dq by one kernel, dk and dv by another.

    Args:
      rows: log of the sums, gradient of the output and `D`.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels

    wide, narrow = plan.passes
    wide_q, wide_k, wide_v = (x.astype(jnp.float32) for x in (q, k, v))
    layout = kernels.QKVLayout.HEAD_DIM_MINOR
    both = {f"{x}_layout": layout for x in "qkv"} | plan.options(interpret)
    dq = kernels._splash_attention_bwd_dq(
        *(wide_q, k, v, segments, None, *rows),
        bq=narrow.queries,
        bkv=narrow.keys,
        mask_info=plan.info(narrow, 0),
        **both,
    )
    _, dk, dv = kernels._splash_attention_bwd_dkv(
        *(q, wide_k, wide_v, segments, None, *rows),
        bq=wide.queries,
        bkv=wide.keys,
        bkv_compute=wide.keys_at_once,
        mask_info=plan.info(wide, 1),
        use_fused_bwd_kernel=False,
        **both,
    )
    return dq * plan.scale, dk, dv


@dataclass(frozen=True)
class _Plan:
    """Plan shared by the forward and backward passes of a part.

    Attributes:
      queries, keys: the tokens of the arrays.
      reach: causality, window and offset, without segments and lengths.
      band: the keys of a query, by places.
    """

    spec: Spec
    queries: AnyTokens
    keys: AnyTokens
    passes: Passes
    reach: Mask
    band: Band
    scale: float

    @classmethod
    def of(cls, query: Array, key: Array, value: Array, spec: Spec) -> "_Plan":
        (T, _, H), S = query.shape[1:], key.shape[1]
        mask = spec.mask
        queries, keys = spec.held_queries or Tokens(0, T), spec.held_keys or Tokens(0, S)
        passes = even_passes(T, S, kv_row_bytes(H, value.shape[3], jnp.float32))
        reach = Mask(mask.is_causal, mask.query_offset, mask.local_window_size)
        padded = S if round_up(S, passes.wide.keys) > S else None
        band = Band.of(mask, padded)
        if isinstance(keys, TokenList) and band.after is not None:
            band = replace(band, after=0)  # of the last place that a query sees
        scale = H**-0.5 if spec.logits.scale is None else spec.logits.scale
        return cls(spec, queries, keys, passes, reach, band, scale)

    def operands(self, query: Array, key: Array, value: Array) -> tuple[Array, Array, Array]:
        """Operands of the kernel: the query scaled, heads first, in whole blocks."""
        # Rounded as on one device, so that the logits of all passes are the same.
        q = (query.astype(jnp.float32) * self.scale).astype(query.dtype)
        S = round_up(self.keys.size, self.passes.wide.keys)
        k, v = (pad(x, S, 1).swapaxes(1, 2) for x in (key, value))
        return self.of_queries(q), k, v

    def of_queries(self, x: Array) -> Array:
        """An array `[B, T, N, ...]` heads first, in whole blocks."""
        return pad(x, round_up(self.queries.size, self.passes.wide.queries), 1).swapaxes(1, 2)

    def options(self, interpret: bool) -> dict[str, Any]:
        from jax.experimental.pallas.ops.tpu.splash_attention import (
            splash_attention_kernel as kernels,
        )

        return {
            "is_mqa": False,
            "mask_value": kernels.DEFAULT_MASK_VALUE,
            "attn_logits_soft_cap": self.spec.logits.soft_cap,
            "mask_function": None if self.band.is_everything else self.band,
            "interpret": interpret,
        }

    def segments(self) -> Any:
        from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

        segments = segments_of(self.spec.mask, self.queries, self.keys)
        if segments is None:
            return None
        wide = self.passes.wide
        sizes = (
            round_up(x.size, n) for x, n in ((self.queries, wide.queries), (self.keys, wide.keys))
        )
        return SegmentIds(*(pad(x, size, 1) for x, size in zip(segments, sizes, strict=True)))

    def info(self, blocks: Blocks, side: int) -> Any:
        """The blocks that meet, for a pass over blocks of queries (0) or of keys (1)."""
        from jax.experimental.pallas.ops.tpu.splash_attention import (
            splash_attention_mask_info as infos,
        )

        positions: Any = None if self.band.is_everything else self.positions
        found = self.schedule(blocks, side)
        tables: tuple = (None, None)
        if found is not None and found.nbytes <= SCHEDULE_BYTES:
            tables = tuple((x if side == 0 else x.T)[None] for x in found)
        return infos.MaskInfo(tables[0], None, tables[1], None, positions)

    @property
    def positions(self) -> Int[Array, "T"]:
        """The place among the keys that each query has, or the last one that it sees."""
        t = self.queries.numbers + self.reach.query_offset
        if not isinstance(self.keys, TokenList):
            place = t - self.keys.start
        else:
            # Compared with all keys, as fast as a hundredth of the attention of eight heads: a
            # search would gather.
            last = t + (self.reach.reach[1] or 0)
            place = jnp.sum(self.keys.numbers[None] <= last[:, None], 1, dtype=jnp.int32) - 1
        more = round_up(len(t), self.passes.wide.queries) - len(t)
        return jnp.pad(place, (0, more), mode="edge")

    def schedule(self, blocks: Blocks, side: int) -> Schedule | None:
        """Schedule of the partners that each block of queries (side 0) or of keys (side 1) meets.

        None where all blocks meet.
        """
        if self.reach.reach == (None, None):
            return None
        own, others = (self.queries, self.keys)[:: 1 if side == 0 else -1]
        size, other_size = blocks[:2] if side == 0 else blocks[1::-1]
        find = partial((keys_of, queries_of)[side], self.reach)

        if isinstance(own, TokenList):
            # A reshape, as XLA would gather slices of the list in a loop.
            rows = jnp.pad(own.numbers, (0, -own.size % size), mode="edge").reshape(-1, size)
            low, high = jax.vmap(lambda numbers: find(TokenList(numbers), others))(rows)
        else:
            starts = own.start + jnp.arange(0, own.size, size, dtype=jnp.int32)
            low, high = jax.vmap(lambda start: find(Tokens(start, size), others))(starts)
        return meetings(low, high, other_size, -(-others.size // other_size), jnp)
