"""Attention whose bits do not depend on how it is computed: the reference in PyTorch.

Written from `jax_seqpar/exact/SPEC.md`, beside which it is to be read: its names, its order, and
nothing of its code. One KV head at a time; its weights are `[R, S]`, where the rows R = G * T are
the queries of the G query heads that read it. The backward pass holds them all at once.

Arithmetic is float64. Integers are float64 too, and a float32 is a float64 of that value.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dropout import gain, given_keys, is_kept
from .masks import Positions, Window, attends, distance, places

CHANNEL_BITS = 31
WEIGHT_BITS = 32
TOKEN_BITS = 32
DIGIT_BITS = 11
# Up to here the sums of `contract` are at most 2^53: 32 + 10 + 11 bits.
EXACT_TOKENS = 2048
# Below here they are below 2^63, and the sum of P, with a sink, is at most 2^53.
TOO_MANY_TOKENS = 2**21
# Rows of `[R, S]` at a time. No bit depends on it; that they stay in the cache makes it 3 times
# as fast.
BLOCK = 256

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def exact_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    local_window_size: Window | None = None,
    segment_ids: Tensor | tuple[Tensor, Tensor] | None = None,
    query_offset: int = 0,
    positions: Positions | None = None,
    query_seq_lengths: Tensor | None = None,
    key_value_seq_lengths: Tensor | None = None,
    logits_soft_cap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: Tensor | None = None,
    shared_by: Any = None,
) -> Tensor:
    """`softmax(query . key * scale + bias) . value`, to the bit; 0 for a query without a key.

    Args:
      query: `[B, T, N, H]`, float32, bfloat16 or float16.
      key: `[B, S, K, H]`; K divides N and query head n reads KV head `n // (N / K)`.
      value: `[B, S, K, V]`.
      bias: added to the logits, broadcastable to `[B, N, T, S]`; it gets no gradient.
      mask: boolean, True attends, broadcastable to `[B, N, T, S]`.
      scale: of the logits, as the nearest float32; `1 / sqrt(H)` if None.
      is_causal: a query attends to the keys at positions up to its own.
      local_window_size: `(left, right)` or one integer for both: a query at position p attends to
        the keys at positions `p - left` to `p + right`.
      segment_ids: `[B, S]`, or a pair `[B, T]`, `[B, S]`; a query attends to its own segment.
      query_offset: the position of the first query. Keys count from 0, and so do queries by default
        (top left, as in `jax.nn`); S - T aligns the last query with the last key.
      positions: integers `[B, S]`, or a pair `[B, T]`, `[B, S]`, in place of those counts.
      query_seq_lengths: `[B]`; only the first so many queries attend, in the order of the array.
      key_value_seq_lengths: `[B]`; only the first so many keys are attended to.
      logits_soft_cap: logits become `cap * tanh(logits / cap)` before the bias is added.
      alibi_slopes: `[N]`; the slope times the distance of their positions, at most 2^29, is taken
        from the logits, after the bias (ALiBi, Press et al. 2021). They get no gradient.
      sinks: `[N]`, one more logit for every query of a head, which has no value (as in GPT-OSS); of
        -inf there is none. They get no gradient.
      dropout_rate: the share of the weights that is dropped, after the softmax.
      dropout_rng: `(2,)`, the words of a threefry key, or keys of heads; see `dropout.head_keys`.
      shared_by: a process group whose ranks hold the same KV heads, each with query heads of its
        own. In the backward pass their sums meet before any rounding; its first rank returns the
        gradients of key and value and the others 0, for the caller adds those of the copies up.

    Returns:
      `[B, T, N, V]` of the query's dtype. Differentiable once, in query, key and value.

    Raises:
      ValueError: dtypes or shapes that do not fit, a bias, slopes or sinks that want a gradient, or
        2^21 keys, or as many rows of one KV head: queries, times the query heads that read it on
        every rank. Also as `masks.attends` and `dropout.given_keys`.
    """
    _check(query, key, value, logits_soft_cap)
    (B, T, N, H), S = query.shape, key.shape[1]
    _check_constant("bias", bias)
    for name, x in {"alibi_slopes": alibi_slopes, "sinks": sinks}.items():
        _check_constant(name, x, (N,))
    _check_length(query, key, shared_by)
    allowed = attends(
        T,
        S,
        mask=mask,
        is_causal=is_causal,
        local_window_size=local_window_size,
        segment_ids=segment_ids,
        query_offset=query_offset,
        positions=positions,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        device=query.device,
    )
    is_read = attends(
        T,
        S,
        segment_ids=segment_ids,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        device=query.device,
    )
    if is_read is not None:
        by_any = is_read.any(dim=2)[:, 0, :, None, None]
        key, value = (torch.where(by_any, x, 0) for x in (key, value))
    p_query, p_key = places(T, S, query_offset, positions, query.device)
    rng = given_keys(dropout_rate, dropout_rng, B, N)
    options = Options(
        scale=nearest32(1 / math.sqrt(max(H, 1)) if scale is None else scale),
        cap=None if logits_soft_cap is None else nearest32(logits_soft_cap),
        rate=dropout_rate,
        shared_by=shared_by,
    )
    beside = Beside(
        bias,
        allowed,
        alibi=None if alibi_slopes is None else flush(alibi_slopes)[:, None, None],
        sink=None if sinks is None else flush(sinks)[:, None, None],
        rng=None if rng is None else rng[:, :, None],
        p_query=p_query,
        p_key=p_key,
    )
    return _ExactAttention.apply(query, key, value, options, *beside)


class Options(NamedTuple):
    """Numbers, the same for every head."""

    scale: float
    cap: float | None
    rate: float
    shared_by: Any


class Beside(NamedTuple):
    """Tensors without a gradient, broadcastable to `[B, N, T, S]`; the last axis of rng is 2."""

    bias: Tensor | None
    allowed: Tensor | None
    alibi: Tensor | None
    sink: Tensor | None
    rng: Tensor | None
    p_query: Tensor
    p_key: Tensor


class _ExactAttention(torch.autograd.Function):
    """Head by KV head: `_forward` and `_backward` between two changes of layout."""

    @staticmethod
    def forward(ctx, query, key, value, options, *beside):
        ctx.options = options
        if _is_empty(query, key, value):
            ctx.save_for_backward(query, key, value)
            return query.new_zeros(*query.shape[:3], value.shape[3])
        rows = [_forward(head, options) for head in _heads(query, key, value, Beside(*beside))]
        # Saved before its rounding to 16 bits: D_i is of this.
        out32 = by_token(torch.stack(rows), query)
        ctx.save_for_backward(query, key, value, out32, *beside)
        return narrow(out32, query.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, /, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        options = ctx.options
        others = [None] * (1 + len(Beside._fields))
        query, key, value, *saved = ctx.saved_tensors
        if _is_empty(query, key, value):
            return *(torch.zeros_like(x) for x in (query, key, value)), *others
        out32, *beside = saved
        do, o = (by_kv_head(x, key) for x in (*grad_outputs, out32))
        heads = _heads(query, key, value, Beside(*beside))
        grads = [_backward(*x, options) for x in zip(heads, do, o, strict=True)]
        dq, dk, dv = (
            narrow(by_token(torch.stack(x), like), like.dtype)
            for x, like in zip(zip(*grads, strict=True), (query, key, value), strict=True)
        )
        shared_by = options.shared_by
        if shared_by is not None and dist.get_rank(shared_by) != 0:
            # -0 is what adds nothing: 0 would turn a float16 gradient of -0 into 0.
            dk, dv = (torch.full_like(x, -0.0) for x in (dk, dv))
        return dq, dk, dv, *others


class Rows(NamedTuple):
    """The queries that read a KV head: q `[R, H]`, bias and allowed `[R, S]`, the others `[R, 1]`.

    t is which query it is, p its position; rng is `[R, 2]`.
    """

    q: Tensor
    t: Tensor
    p: Tensor
    bias: Tensor | None
    allowed: Tensor | None
    alibi: Tensor | None
    sink: Tensor | None
    rng: Tensor | None


class Head(NamedTuple):
    """What one KV head takes part in: k `[S, H]`, v `[S, V]`, the positions p of its keys `[S]`."""

    rows: Rows
    k: Tensor
    v: Tensor
    p: Tensor


class Weights(NamedTuple):
    """The softmax of a head before its division: p, slope and kept `[R, S]`, the others `[R, 1]`.

    kept is where no dropout is; None if there is none.
    """

    p: Tensor
    r: Tensor
    slope: Tensor | None
    has_key: Tensor
    kept: Tensor | None


def _forward(head: Head, options: Options) -> Tensor:
    """`o`, `[R, V]`, in float32."""
    E = exponent(head.v, dim=0)
    v = grid(head.v, E, TOKEN_BITS)
    blocks = []
    for _, block in _blocks(head):
        p, r, _, has_key, kept = _weights(block, options)
        P = _where_kept(kept, _integers(p))
        o = out(contract(P, v) * power(E - TOKEN_BITS) * (r * gain(options.rate)))
        blocks.append(torch.where(has_key, o, 0.0))
    return torch.cat(blocks)


def _backward(head: Head, do: Tensor, o: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """`dq` `[R, H]`, `dk` `[S, H]` and `dv` `[S, V]`, in float32."""
    scale, shared_by = options.scale, options.shared_by
    do, o = flush(do), flush(o)
    blocks = [_weights_of_sums(x, do[rows], o[rows], options) for rows, x in _blocks(head)]
    w, ds, has_key = (torch.cat(x) for x in zip(*blocks, strict=True))
    q, do = (torch.where(has_key, x, 0.0) for x in (head.rows.q, do))
    dq = torch.where(has_key, out(_sum_over_tokens(ds, head.k) * scale), 0.0)
    dk = out(_sum_over_tokens(ds.mT, q, shared_by) * scale)
    dv = out(_sum_over_tokens(w.mT, do, shared_by))
    return dq, dk, dv


def _weights_of_sums(
    head: Head, do: Tensor, o: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """`w` of dv and `ds`, `[R, S]`, and where there is a key, `[R, 1]`."""
    p, r, slope, has_key, kept = _weights(head, options)
    c = gain(options.rate)
    dp = _where_kept(kept, dot(do, head.v) * c)
    D = dot(do[:, None], o[:, None])[:, 0]
    w = _where_weighed(p, p * (r * 2.0**WEIGHT_BITS))
    ds = _where_weighed(p, w * (dp - D))
    if slope is not None:
        ds = _where_weighed(p, ds * slope)
    if kept is not None:
        w = _where_kept(kept, _where_weighed(p, p * (r * c * 2.0**WEIGHT_BITS)))
    return w, ds, has_key


def _blocks(head: Head) -> Iterator[tuple[slice, Head]]:
    """The head in blocks of rows, each with all the keys."""
    for start in range(0, len(head.rows.q), BLOCK):
        rows = slice(start, start + BLOCK)
        yield rows, head._replace(rows=Rows._make(x if x is None else x[rows] for x in head.rows))


def _weights(head: Head, options: Options) -> Weights:
    """The part of forward and backward that is the same, from s to r."""
    rows, cap = head.rows, options.cap
    z = round32(dot(rows.q, head.k)) * options.scale
    slope = None
    if cap is not None:
        tanh, slope = tanh_and_slope(z, cap)
        z = cap * tanh
    if rows.bias is not None:
        z = z + rows.bias
    if rows.alibi is not None:
        z = z - rows.alibi * distance(rows.p, head.p)
    if rows.allowed is not None:
        z = z.masked_fill(~rows.allowed, -math.inf)

    m = z.amax(dim=-1, keepdim=True)
    has_key = m != -math.inf
    # Of a NaN and a number the maximum is NaN.
    m = m if rows.sink is None else torch.maximum(m, rows.sink)
    m = torch.where(m == -math.inf, 0.0, m)
    p = _exp_below(m, z)
    total = _integers(p).sum(dim=-1, keepdim=True)
    if rows.sink is not None:
        total = total + _integers(_exp_below(m, rows.sink))
    r = torch.where(total == 0, 0.0, 1 / total)
    kept = None
    if rows.rng is not None:
        s = torch.arange(len(head.k), device=rows.rng.device)
        kept = is_kept(rows.rng[:, None], options.rate, rows.t, s)
    return Weights(p, r, slope, has_key, kept)


def _exp_below(m: Tensor, z: Tensor) -> Tensor:
    # 0 of -inf where m is NaN or +inf too, which would make it NaN.
    return torch.where(z == -math.inf, 0.0, exp(round32(z - m)))


def _integers(p: Tensor) -> Tensor:
    """`P`, which is to `p` what `grid` is to numbers of any size."""
    return torch.round(p * 2.0**WEIGHT_BITS)


def _where_weighed(p: Tensor, x: Tensor) -> Tensor:
    """0 where p is, even if x is NaN there: a gradient of no weight counts for nothing."""
    return torch.where(p == 0, 0.0, x)


def _where_kept(kept: Tensor | None, x: Tensor) -> Tensor:
    return x if kept is None else torch.where(kept, x, 0.0)


def _sum_over_tokens(a: Tensor, b: Tensor, shared_by: Any = None) -> Tensor:
    """The sum over tokens of weights `[M, tokens]` times vectors `[tokens, H]`, each on its grid.

    With a process group the tokens are those of all its ranks.
    """

    def meet(e: Tensor) -> Tensor:
        if shared_by is not None:
            dist.all_reduce(e, dist.ReduceOp.MAX, shared_by)
        return e

    eb = meet(exponent(b, dim=0))
    b = grid(b, eb, TOKEN_BITS)
    blocks = []
    for rows in a.split(BLOCK):
        ea = meet(exponent(rows, dim=1))
        sums = contract(grid(rows, ea, TOKEN_BITS), b, shared_by=shared_by)
        blocks.append(sums * power(ea - TOKEN_BITS))
    return torch.cat(blocks) * power(eb - TOKEN_BITS)


def flush(x: Tensor) -> Tensor:
    """In float64; a zero is +0."""
    x = x.double()
    return torch.where(x.abs() < 2.0**-126, 0.0, x)


def round32(x: Tensor) -> Tensor:
    return flush(x).float().double()


def out(x: Tensor) -> Tensor:
    """In float32."""
    return narrow(flush(x), torch.float32)


def narrow(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to a dtype, any NaN as the one NaN that `out` allows."""
    x = x.to(dtype)
    return x.masked_fill(x.isnan(), math.nan)


def nearest32(x: float) -> float:
    return torch.tensor(x, dtype=torch.float32).item()


def exponent(x: Tensor, dim: int) -> Tensor:
    """`E` along an axis, which stays, with size 1; infinity stands for "not a number".

    It survives a maximum over processes, as a NaN would not, and every shift.
    """
    # The maximum of a NaN is one; the exponent field of a NaN or infinity is full.
    field = x.abs().amax(dim, keepdim=True).view(torch.int64) >> 52 & 0x7FF
    e = (field - 1022).clamp(min=-400).double()
    return torch.where(field == 0x7FF, math.inf, e)


def power(e: Tensor) -> Tensor:
    """`2^e` from its bits, for integers in `[-1022, 1023]`; NaN of an infinity."""
    is_number = e.isfinite()
    bits = torch.where(is_number, e, 0.0).long() + 1023 << 52
    return torch.where(is_number, bits.view(torch.float64), math.nan)


def grid(x: Tensor, e: Tensor, bits: int) -> Tensor:
    # Half to even, as rint.
    return torch.round(x * power(bits - e))


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Of every row of x with every row of y: `[..., M, H]` and `[..., L, H]` to `[..., M, L]`."""
    C = min(32, 38 - (x.shape[-1] - 1).bit_length())
    ex, ey = exponent(x, dim=-1), exponent(y, dim=-1)
    X, Y = grid(x, ex, CHANNEL_BITS), grid(y, ey, C).mT
    hi = torch.round(X * 2.0**-16)
    lo = X - hi * 2.0**16
    sums = (hi @ Y) * 2.0**16 + lo @ Y
    return sums * power(ex - CHANNEL_BITS) * power(ey - C).mT


def contract(a: Tensor, b: Tensor, *, limit: int | None = None, shared_by: Any = None) -> Tensor:
    """The sum over tokens of integers, up to 2^32.

    Args:
      a, b: `[M, tokens]`, `[tokens, H]`.
      limit: how many tokens are summed as float64, `EXACT_TOKENS` if None.
      shared_by: a process group; the tokens are those of all its ranks.

    Returns:
      `[M, H]`.
    """
    digit = 2.0**DIGIT_BITS
    b2 = torch.round(b / digit**2)
    rest = b - b2 * digit**2
    b1 = torch.round(rest / digit)
    b0 = rest - b1 * digit
    # Side by side: one product of matrices is faster than three.
    sums = _exact_sum(a, torch.cat((b2, b1, b0), dim=-1), limit or EXACT_TOKENS, shared_by)
    s2, s1, s0 = sums.chunk(3, dim=-1)
    return (s2 * digit + s1) * digit + s0


def _exact_sum(a: Tensor, b: Tensor, limit: int, shared_by: Any) -> Tensor:
    """`a @ b`, rounded once if at all: pieces that are exact in float64, added as int64."""
    pieces = [x @ y for x, y in zip(a.split(limit, dim=1), b.split(limit, dim=0), strict=True)]
    if len(pieces) == 1 and shared_by is None:
        return pieces[0]
    stack = torch.stack(pieces)
    total = stack.nan_to_num().long().sum(dim=0)
    if shared_by is not None:
        dist.all_reduce(total, group=shared_by)
    # An integer has no NaN. That of another rank is in the exponents, which have met.
    return torch.where(stack.isnan().any(dim=0), math.nan, total.double())


def exp(x: Tensor) -> Tensor:
    """Correctly rounded: float64 errs by less than any float32 is from a tie of its result."""
    return torch.where(x < -80, 0.0, torch.exp(x).float().double())


def tanh_and_slope(z: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """`tanh(z / cap)`, a float32, and its derivative in `z / cap`."""
    u = round32(z * (1 / cap))
    size = u.abs()
    t = exp(-2 * size)

    square = size * size
    denominator = torch.full_like(u, 11)
    for odd in (9, 7, 5, 3, 1):
        denominator = odd + square / denominator
    f = torch.where(size < 0.5, size / denominator, (1 - t) / (1 + t))

    g = 1 / (1 + t)
    return torch.copysign(round32(f), u), 4 * t * g * g


def by_kv_head(x: Tensor, key: Tensor) -> Tensor:
    """`[B, T, N, H]` to `[B * K, R, H]`; keys use the same layout, with one head per group."""
    K = key.shape[2]
    return x.unflatten(2, (K, x.shape[2] // K)).permute(0, 2, 3, 1, 4).flatten(2, 3).flatten(0, 1)


def by_token(x: Tensor, like: Tensor) -> Tensor:
    """The inverse of `by_kv_head`, to the shape of `like`."""
    B, T, N, _ = like.shape
    K = x.shape[0] // B
    return x.unflatten(0, (B, K)).unflatten(2, (N // K, T)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _heads(query: Tensor, key: Tensor, value: Tensor, beside: Beside) -> Iterator[Head]:
    """The heads in the order of `by_kv_head`, one after another: the biases of all are large."""
    (B, T, N, _), (S, K) = query.shape, key.shape[1:3]
    q, k, v = (flush(by_kv_head(x, key)) for x in (query, key, value))
    t = torch.arange(T, device=query.device)[:, None]
    p_key = beside.p_key.expand(B, 1, 1, S)

    def rows(x: Tensor, head: int, width: int = 1) -> Tensor:
        return x.expand(B, N, T, width).unflatten(1, (K, N // K))[divmod(head, K)].flatten(0, 1)

    def rows_if(x: Tensor | None, head: int, width: int = 1) -> Tensor | None:
        return None if x is None else rows(x, head, width)

    for head in range(B * K):
        bias = rows_if(beside.bias, head, S)
        of_head = Rows(
            q[head],
            t=rows(t, head),
            p=rows(beside.p_query, head),
            bias=None if bias is None else flush(bias),
            allowed=rows_if(beside.allowed, head, S),
            alibi=rows_if(beside.alibi, head),
            sink=rows_if(beside.sink, head),
            rng=rows_if(beside.rng, head, 2),
        )
        yield Head(of_head, k[head], v[head], p_key[head // K, 0, 0])


def _is_empty(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Nothing to attend with or to: all is 0, and a maximum over nothing has no value."""
    return 0 in (*query.shape, *key.shape, *value.shape)


def _check(query: Tensor, key: Tensor, value: Tensor, cap: float | None) -> None:
    got = f"Got query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}."
    for name, x in {"query": query, "key": key, "value": value}.items():
        if x.dtype not in DTYPES:
            raise ValueError(
                f"{name} must be float32, bfloat16 or float16, got {x.dtype}. Write {name}.float()."
            )
        if x.dtype != query.dtype:
            raise ValueError(
                f"query, key and value must have one dtype, got {query.dtype} and, of {name}, "
                f"{x.dtype}. Write {name}.to(query.dtype)."
            )
    if not query.ndim == key.ndim == value.ndim == 4 or key.shape[:3] != value.shape[:3]:
        raise ValueError(
            f"query must be [B, T, N, H], key [B, S, K, H] and value [B, S, K, V]. {got} Reshape "
            f"or transpose them to these axes."
        )
    (B, _, N, H), K = query.shape, key.shape[2]
    if (key.shape[0], key.shape[3]) != (B, H):
        raise ValueError(
            f"query and key must agree in B and H. {got} Project or slice one of them."
        )
    if H == 0 and value.shape[3] != 0:
        raise ValueError(
            f"Values need queries and keys of at least one channel. {got} Pad them with one of "
            f"zeros."
        )
    if K == 0 or N % K:
        raise ValueError(
            f"KV heads K = {K} must divide the query heads N = {N}. {got} Give a number of KV "
            f"heads that does."
        )
    if cap is not None and not 0 < nearest32(cap) < math.inf:
        raise ValueError(
            f"logits_soft_cap must be a positive finite float32, got {cap!r}. Write None for none."
        )


def _check_constant(name: str, x: Tensor | None, shape: tuple[int, ...] | None = None) -> None:
    """What is added to the logits: of a dtype that float32 holds, and without a gradient."""
    if x is None:
        return
    if x.dtype not in DTYPES:
        raise ValueError(
            f"{name} must be float32, bfloat16 or float16, got {x.dtype}. Write {name}.float()."
        )
    if shape is not None and x.shape != shape:
        raise ValueError(
            f"{name} must be [N], one for each of {shape[0]} query heads. Got {tuple(x.shape)}. "
            f"Write {name}.expand({shape[0]}) for one value."
        )
    if x.requires_grad:
        raise ValueError(f"{name} has no gradient here, but requires one. Write {name}.detach().")


def _check_length(query: Tensor, key: Tensor, shared_by: Any) -> None:
    (_, T, N, _), (S, K) = query.shape, key.shape[1:3]
    ranks = 1 if shared_by is None else dist.get_world_size(shared_by)
    rows = N // K * T * ranks
    if max(S, rows) >= TOO_MANY_TOKENS:
        raise ValueError(
            f"Exact sums have room for fewer than {TOO_MANY_TOKENS} tokens. Got {S} keys and, of "
            f"one KV head, {rows} rows: {T} queries * {N // K} query heads * {ranks} ranks. Split "
            f"the sequence."
        )
