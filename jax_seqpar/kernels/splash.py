"""The TPU's splash attention, its block schedule computed instead of walked.

`jax.experimental.pallas.ops.tpu.splash_attention` finds the blocks that a mask leaves by looking at
every block of a mask object, minutes at a million tokens. Causality and windows leave a band, whose
blocks are known from its two edges. The kernels are those of JAX, so is their backward pass.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..mask import AnyTokens, Mask, Spec, TokenList, Tokens
from ..mask.keywords import to_flat
from ..mask.unused_segment import unused_id

LANES = 128
# Bytes of a schedule: three quarters of a core's scalar memory, 1 MiB on every TPU since v5e.
SCHEDULE_BYTES = 3 << 18
ROW_BYTES = 512  # of a key and a value of 128 numbers of 16 bits
MOST_ROW_BYTES = 8 * ROW_BYTES
# A logit below all others and above the kernel's -2.4e38 of a pair that does not attend: as a sink
# it weighs exp(-1e30 - max) = 0 beside any key, and 1 in a row without keys, whose output is 0.
NO_SINK = -1e30
_NO_QUERY, _NO_KEY = 1, 2  # segments of what lies beyond the lengths, where all others are 0
_WITHOUT = {
    "bias": "its kernel adds none",
    "mask": "it would be a T x S array in memory",
    "positions": "its blocks are known before any number is; query_offset= shifts all queries",
    "alibi_slopes": "its kernel adds no distance",
    "dropout_rate": "its kernel drops none",
}


@dataclass(frozen=True)
class Band:
    """Keys from `before` before a query's position to `after` after it; None without limit.

    Called by the kernel with the positions of a block. Hashable, as it is part of the program.
    """

    before: int | None
    after: int | None
    keys: int | None  # keys from here on are padding

    @classmethod
    def of(cls, mask: Mask, keys: int | None) -> "Band":
        return cls(*mask.reach, keys)

    def __call__(self, t: Int[Array, "..."], s: Int[Array, "..."]) -> Array:
        conditions = [] if self.keys is None else [s < self.keys]
        if self.before is not None:
            conditions.append(s >= t - self.before)
        if self.after is not None:
            conditions.append(s <= t + self.after)
        allowed, *rest = conditions
        for condition in rest:
            allowed = allowed & condition
        return allowed

    @property
    def is_everything(self) -> bool:
        return self == Band(None, None, None)


class Blocks(NamedTuple):
    """Tokens of a block of queries, of one of keys, and of the part of the latter at a time."""

    queries: int
    keys: int
    keys_at_once: int


class Passes(NamedTuple):
    """The blocks of the forward pass and of the gradient of keys and values, and those of dq."""

    wide: Blocks
    narrow: Blocks


class Schedule(NamedTuple):
    """Schedule of blocks: for each block of a row, the partners that it meets, in order."""

    partner: Any
    meets: Any

    @property
    def nbytes(self) -> int:
        return self.partner.nbytes + self.meets.nbytes


def why_not(query: Any, key: Any, value: Any, spec: Spec) -> str | None:
    """Why the kernel cannot do what is asked, None if it can.

    Args:
      query, key, value: anything with a shape and a dtype.
      spec: of such arrays, too.
    """
    if tokens := _unsupported_tokens(spec):
        return f"{tokens} is not supported by splash"
    asked = to_flat(spec).keys()
    for name, reason in _WITHOUT.items():
        if name in asked:
            return f"{name} is not supported by splash: {reason}"
    if query.dtype not in (jnp.bfloat16, jnp.float32):
        return f"dtype {query.dtype} is not supported by splash, which has bfloat16 and float32"
    precision = jax.config.jax_default_matmul_precision  # pyright: ignore
    if query.dtype == jnp.float32 and precision not in (None, "default", "fastest", "bfloat16"):
        return f"products of precision {precision!r} are not supported by splash"
    H, V = query.shape[3], value.shape[3]
    # Parts leave the kernel in float32, and so its keys and values come in for their gradients.
    dtype = jnp.dtype(query.dtype if spec.held_keys is None else jnp.float32)
    if kv_row_bytes(H, V, dtype) > MOST_ROW_BYTES:
        return (
            f"head dimensions H = {H} and V = {V} of {dtype} are not supported by splash: a "
            f"block of keys and values leaves no room in the vector memory of a core"
        )
    if any(x.dtype.itemsize > 4 for x in jax.tree.leaves(spec.mask.segment_ids)):
        return "segment_ids of 64 bits are not supported by splash, which compares 32"
    return None


def _unsupported_tokens(spec: Spec) -> str | None:
    """The tokens that are held and that the kernel cannot work with, None if it can."""
    keys, (before, after) = spec.held_keys, spec.mask.reach
    if keys is None:
        return None if spec.held_queries is None else "a part of the queries with all keys"
    if isinstance(keys, TokenList) and before is not None:
        return "local_window_size of keys that are no run"
    if isinstance(keys, TokenList) and after is not None and not keys.ascending:
        return "causality of keys that are not in ascending order"
    return None


def splash_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    spec: Spec,
    *,
    interpret: bool = False,
) -> Float[Array, "B T N V"]:
    """Attention by JAX's splash kernels, for calls that `why_not` returns None for."""
    (B, T, N, H), S, V = query.shape, key.shape[1], value.shape[3]
    mask = spec.mask
    if 0 in (B, T, N, S, H, V):
        return jnp.zeros((B, T, N, V), query.dtype)
    passes = choose_blocks(mask, T, S, kv_row_bytes(H, V, query.dtype))
    padded_T, padded_S = round_up(T, passes.wide.queries), round_up(S, passes.wide.keys)
    band = Band.of(mask, S if padded_S > S else None)
    scale = H**-0.5 if spec.logits.scale is None else spec.logits.scale
    # The kernel knows no scale. Rounded once; not at all where the scale is a power of two.
    q = (query.astype(jnp.float32) * scale).astype(query.dtype)
    q, k, v = (
        pad(x, tokens, 1).swapaxes(1, 2)
        for x, tokens in ((q, padded_T), (key, padded_S), (value, padded_S))
    )
    sinks = jnp.full((N,), NO_SINK, jnp.float32)
    if spec.logits.sinks is not None:
        given = spec.logits.sinks.astype(jnp.float32)
        sinks = _with_gradient_of_its_dtype(jnp.maximum(given, NO_SINK))
    segments = segments_of(mask, Tokens(0, T), Tokens(0, S))
    if segments is not None:
        from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds  # as in _kernel

        segments = SegmentIds(pad(segments[0], padded_T, 1), pad(segments[1], padded_S, 1))
    kernel: Any = _kernel(spec, band, passes, T, S, interpret)
    out = jax.vmap(kernel, in_axes=(0, 0, 0, 0, None))(q, k, v, segments, sinks)
    return out.swapaxes(1, 2)[:, :T]


@jax.custom_vjp
def _with_gradient_of_its_dtype(x: Array) -> Array:
    return x


# The kernel gives the gradient of float32 sinks in the dtype of the output.
_with_gradient_of_its_dtype.defvjp(
    lambda x: (x, None), lambda _, gradient: (gradient.astype(jnp.float32),)
)


def choose_blocks(mask: Mask, queries: int, keys: int, row_bytes: int = ROW_BYTES) -> Passes:
    """The smallest blocks whose schedule fits into scalar memory; the smallest of all if none do.

    Args:
      row_bytes: of a key and its value.
    """

    def fits(blocks: Blocks) -> bool:
        both = (schedule(mask, blocks, queries, keys, side) for side in (0, 1))
        return all(found is None or found.nbytes <= SCHEDULE_BYTES for found in both)

    # Vector memory has room for wide blocks of short rows only.
    factors = (1, 2, 4) if row_bytes <= ROW_BYTES else (1,)
    passes = [even_passes(queries, keys, row_bytes, factor) for factor in factors]
    return next((p for p in passes if fits(p.wide)), passes[0])


def even_passes(queries: int, keys: int, row_bytes: int, factor: int = 1) -> Passes:
    """Blocks of one size; those of keys in wide ones times a factor.

    Args:
      row_bytes: of a key and its value.
    """
    size = 1024 if row_bytes <= 4 * ROW_BYTES else 512
    block = _even(keys, factor * size, factor * 512 if keys > 512 else LANES)
    narrow = block // factor if keys > 512 else block
    of_queries = _even(queries, size, LANES)
    wide = Blocks(of_queries, block, min(narrow, 512 if factor == 1 else 256))
    return Passes(wide, Blocks(of_queries, narrow, narrow))


def schedule(mask: Mask, blocks: Blocks, queries: int, keys: int, side: int) -> Schedule | None:
    """Schedule of the partners that each block of one side meets; None if all blocks meet.

    Args:
      side: 0 for the blocks of queries, 1 for those of keys.
    """
    band, offset = Band.of(mask, None), mask.query_offset
    if band.is_everything:
        return None
    tokens, partners = ((queries, keys), (keys, queries))[side]
    size, partner_size = (blocks[:2], blocks[1::-1])[side]
    before, after = ((band.before, band.after), (band.after, band.before))[side]
    first = np.arange(0, tokens, size) + (offset, -offset)[side]
    last = np.minimum(first + size, tokens + (offset, -offset)[side]) - 1
    low = np.zeros_like(first) if before is None else first - before
    high = np.full_like(first, partners) if after is None else last + after + 1
    low, high = np.clip(low, 0, partners), np.clip(high, 0, partners)
    return meetings(low, high, partner_size, -(-partners // partner_size), np)


def meetings(low: Any, high: Any, size: int, count: int, xp: Any) -> Schedule:
    """The schedule of blocks that meet the partners `low ... high`, one range for each.

    Args:
      size: partners of a block.
      count: blocks of partners.
      xp: NumPy, for as many steps as some block takes, or `jax.numpy`, for `count` of them.
    """
    some = low < high
    low, high = low // size, -(-high // size)
    steps = xp.where(some, high - low, 0)
    step = np.arange(max(steps.max(), 1) if xp is np else count)[None]
    meets = step < steps[:, None]
    # After the last partner it stays, so nothing is fetched for the steps that are left out.
    partner = xp.clip(xp.minimum(low[:, None] + step, high[:, None] - 1), 0, count - 1)
    small = np.int8 if count <= 128 else np.int16 if count <= 1 << 15 else np.int32
    return Schedule(partner.astype(small), meets.astype(np.int8))


def _kernel(
    spec: Spec, band: Band, passes: Passes, queries: int, keys: int, interpret: bool
) -> Any:
    # Pallas takes a third of the time of `import jax_seqpar`, and only TPUs run this kernel.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as infos

    wide, narrow = passes
    positions = None
    if not band.is_everything:
        padded = round_up(queries, wide.queries)
        positions = jnp.arange(padded, dtype=jnp.int32) + spec.mask.query_offset

    def info(blocks: Blocks, side: int) -> infos.MaskInfo:
        found = schedule(spec.mask, blocks, queries, keys, side)
        tables: tuple = (None, None)
        # Without a schedule every block meets every one, half of them in vain if it is causal.
        if found is not None and found.nbytes <= SCHEDULE_BYTES:
            # The kernel reads [head or 1, block of queries, block of keys].
            tables = tuple((x if side == 0 else x.T)[None] for x in found)
        return infos.MaskInfo(tables[0], None, tables[1], None, positions)  # pyright: ignore

    return kernels.SplashAttentionKernel(
        info(wide, 0),
        info(narrow, 0),
        info(wide, 1),
        block_sizes=kernels.BlockSizes(
            block_q=wide.queries,
            block_kv=wide.keys,
            block_kv_compute=wide.keys_at_once,
            block_q_dq=narrow.queries,
            block_kv_dq=narrow.keys,
            block_q_dkv=wide.queries,
            block_kv_dkv=wide.keys,
            block_kv_dkv_compute=wide.keys_at_once,
        ),
        is_mqa=False,
        save_residuals=False,
        mask_value=kernels.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=spec.logits.soft_cap,
        residual_checkpoint_name=None,
        mask_function=None if band.is_everything else band,
        interpret=interpret,
    )


def segments_of(mask: Mask, queries: AnyTokens, keys: AnyTokens) -> tuple[Array, Array] | None:
    """Segment ids of queries and keys; tokens beyond the lengths get separate segments."""
    lengths = (mask.query_seq_lengths, mask.key_value_seq_lengths)
    ids = mask.segment_ids
    given = [x for x in (*(ids or ()), *lengths) if x is not None]
    if not given:
        return None
    held = (queries, keys)
    if ids is None:
        both = tuple(jnp.zeros((len(given[0]), x.size), jnp.int32) for x in held)
    else:
        both = tuple(x.slice(part, 1) for x, part in zip(held, ids, strict=True))
    of_queries, of_keys = (x.astype(jnp.int32) for x in both)
    # Segments that no token has, so that what lies beyond the lengths attends to nothing.
    if lengths[0] is not None:
        other = _NO_QUERY if ids is None else unused_id((of_queries, of_keys))
        of_queries = _within(lengths[0], of_queries, queries, other)
    if lengths[1] is not None:
        other = _NO_KEY if ids is None else unused_id((of_queries, of_keys))
        of_keys = _within(lengths[1], of_keys, keys, other)
    return of_queries, of_keys


def _within(length: Array, ids: Array, held: AnyTokens, other: Any) -> Array:
    numbers = held.numbers[None]
    return jnp.where(numbers < length.astype(jnp.int32)[:, None], ids, other)


def kv_row_bytes(head_dim: int, value_dim: int, dtype: Any) -> int:
    """Bytes of a key and its value in vector memory."""
    return sum(round_up(n, LANES) for n in (head_dim, value_dim)) * jnp.dtype(dtype).itemsize


def round_up(n: int, size: int) -> int:
    """The smallest multiple of a size that is at least n."""
    return -(-n // size) * size


def _even(tokens: int, most: int, unit: int) -> int:
    """The size of blocks of one size, at most `most` and a multiple of `unit`."""
    return round_up(-(-tokens // -(-tokens // most)), unit)


def pad(x: Array, size: int, axis: int) -> Array:
    """x with zeros at the end of one axis, up to a size."""
    return jnp.pad(x, [(0, size - n if a == axis else 0) for a, n in enumerate(x.shape)])
