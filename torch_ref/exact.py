"""Attention whose bits do not depend on how it is computed: the reference in PyTorch.

Written from the page `jax_seqpar.exact`, beside which it is to be read: its names, its order, and
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

from .masks import attends

CHANNEL_BITS = 31
WEIGHT_BITS = 32
TOKEN_BITS = 32
DIGIT_BITS = 11
# Up to here the sums of `contract` are at most 2^53: 32 + 10 + 11 bits.
EXACT_TOKENS = 2048
# Below here they are below 2^63, and the sum of P is below 2^53.
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
    local_window_size: int | tuple[int, int] | None = None,
    segment_ids: Tensor | tuple[Tensor, Tensor] | None = None,
    logits_soft_cap: float | None = None,
    shared_by: Any = None,
) -> Tensor:
    """`softmax(query . key * scale + bias) . value`, to the bit; 0 for a query without a key.

    Args:
      query: `[B, T, N, H]`, float32, bfloat16 or float16.
      key, value: `[B, S, K, H]`; K divides N and query head n reads KV head `n // (N / K)`.
      bias: added to the logits, broadcastable to `[B, N, T, S]`; it gets no gradient.
      mask: boolean, True attends, broadcastable to `[B, N, T, S]`.
      scale: of the logits, as the nearest float32; `1 / sqrt(H)` if None.
      is_causal: query t attends to keys `s <= t`, both counted from 0 (top left, as in `jax.nn`).
      local_window_size: `(left, right)` or one integer for both: keys `t - left <= s <= t + right`.
      segment_ids: `[B, S]`, or a pair `[B, T]`, `[B, S]`; a query attends to its own segment.
      logits_soft_cap: logits become `cap * tanh(logits / cap)` before the bias is added.
      shared_by: a process group whose ranks hold the same KV heads, each with query heads of its
        own. In the backward pass their sums meet before any rounding; its first rank returns the
        gradients of key and value and the others 0, for the caller adds those of the copies up.

    Returns:
      `[B, T, N, H]` of the query's dtype. Differentiable once, in query, key and value.

    Raises:
      ValueError: dtypes or shapes that do not fit, a bias that wants a gradient, or 2^21 keys, or
        as many rows of one KV head: queries, times the query heads that read it on every rank.
    """
    _check(query, key, value, bias, logits_soft_cap)
    _check_length(query, key, shared_by)
    allowed = attends(
        query.shape[1],
        key.shape[1],
        mask=mask,
        is_causal=is_causal,
        local_window_size=local_window_size,
        segment_ids=segment_ids,
        device=query.device,
    )
    scale = nearest32(1 / math.sqrt(max(query.shape[3], 1)) if scale is None else scale)
    cap = None if logits_soft_cap is None else nearest32(logits_soft_cap)
    return _ExactAttention.apply(query, key, value, bias, allowed, scale, cap, shared_by)


class _ExactAttention(torch.autograd.Function):
    """Head by KV head: `_forward` and `_backward` between two changes of layout."""

    @staticmethod
    def forward(ctx, query, key, value, bias, allowed, scale, cap, shared_by):
        ctx.options = scale, cap, shared_by
        if _is_empty(query, key):
            ctx.save_for_backward(query, key, value)
            return torch.zeros_like(query)
        rows = [_forward(head, scale, cap) for head in _heads(query, key, value, bias, allowed)]
        # Saved before its rounding to 16 bits: D_i is of this.
        out32 = by_token(torch.stack(rows), query)
        ctx.save_for_backward(query, key, value, bias, allowed, out32)
        return narrow(out32, query.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, /, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        scale, cap, shared_by = ctx.options
        query, key, value, *others = ctx.saved_tensors
        if _is_empty(query, key):
            grads = [torch.zeros_like(x) for x in (query, key, value)]
            return *grads, None, None, None, None, None
        bias, allowed, out32 = others
        do, o = (by_kv_head(x, key) for x in (*grad_outputs, out32))
        heads = _heads(query, key, value, bias, allowed)
        grads = [_backward(*x, scale, cap, shared_by) for x in zip(heads, do, o, strict=True)]
        dq, dk, dv = (
            narrow(by_token(torch.stack(x), like), like.dtype)
            for x, like in zip(zip(*grads, strict=True), (query, key, value), strict=True)
        )
        if shared_by is not None and dist.get_rank(shared_by) != 0:
            dk, dv = torch.zeros_like(dk), torch.zeros_like(dv)
        return dq, dk, dv, None, None, None, None, None


class Head(NamedTuple):
    """What one KV head takes part in: q `[R, H]`, k and v `[S, H]`, bias and allowed `[R, S]`."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    allowed: Tensor | None


class Weights(NamedTuple):
    """The softmax of a head before its division: p and slope `[R, S]`, the others `[R, 1]`."""

    p: Tensor
    r: Tensor
    slope: Tensor | None
    has_key: Tensor


def _forward(head: Head, scale: float, cap: float | None) -> Tensor:
    """`o`, `[R, H]`, in float32."""
    E = exponent(head.v, dim=0)
    v = grid(head.v, E, TOKEN_BITS)
    blocks = []
    for _, block in _blocks(head):
        p, r, _, has_key = _weights(block, scale, cap)
        o = out(contract(_integers(p), v) * power(E - TOKEN_BITS) * r)
        blocks.append(torch.where(has_key, o, 0.0))
    return torch.cat(blocks)


def _backward(
    head: Head, do: Tensor, o: Tensor, scale: float, cap: float | None, shared_by: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """`dq` `[R, H]`, `dk` and `dv` `[S, H]`, in float32."""
    do, o = flush(do), flush(o)
    blocks = [_weights_of_sums(x, do[rows], o[rows], scale, cap) for rows, x in _blocks(head)]
    w, ds, has_key = (torch.cat(x) for x in zip(*blocks, strict=True))
    dq = torch.where(has_key, out(_sum_over_tokens(ds, head.k) * scale), 0.0)
    dk = out(_sum_over_tokens(ds.mT, head.q, shared_by) * scale)
    dv = out(_sum_over_tokens(w.mT, do, shared_by))
    return dq, dk, dv


def _weights_of_sums(
    head: Head, do: Tensor, o: Tensor, scale: float, cap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`w` and `ds`, `[R, S]`, and where there is a key, `[R, 1]`."""
    p, r, slope, has_key = _weights(head, scale, cap)
    D = dot(do[:, None], o[:, None])[:, 0]
    w = _where_weighed(p, p * (r * 2.0**WEIGHT_BITS))
    ds = _where_weighed(p, w * (dot(do, head.v) - D))
    if slope is not None:
        ds = _where_weighed(p, ds * slope)
    return w, ds, has_key


def _blocks(head: Head) -> Iterator[tuple[slice, Head]]:
    """The head in blocks of rows, each with all the keys."""
    q, k, v, bias, allowed = head
    for start in range(0, len(q), BLOCK):
        rows = slice(start, start + BLOCK)
        of_rows = (None if x is None else x[rows] for x in (bias, allowed))
        yield rows, Head(q[rows], k, v, *of_rows)


def _weights(head: Head, scale: float, cap: float | None) -> Weights:
    """The part of forward and backward that is the same, from s to r."""
    z = round32(dot(head.q, head.k)) * scale
    slope = None
    if cap is not None:
        tanh, slope = tanh_and_slope(z, cap)
        z = cap * tanh
    if head.bias is not None:
        z = z + head.bias
    if head.allowed is not None:
        z = z.masked_fill(~head.allowed, -math.inf)

    m = z.amax(dim=-1, keepdim=True)
    has_key = m != -math.inf
    p = exp(round32(z - torch.where(has_key, m, 0.0)))
    # Where m is NaN or +inf too, which would make it NaN.
    p = torch.where(z == -math.inf, 0.0, p)
    total = _integers(p).sum(dim=-1, keepdim=True)
    r = torch.where(total == 0, 0.0, 1 / total)
    return Weights(p, r, slope, has_key)


def _integers(p: Tensor) -> Tensor:
    """`P`, which is to `p` what `grid` is to numbers of any size."""
    return torch.round(p * 2.0**WEIGHT_BITS)


def _where_weighed(p: Tensor, x: Tensor) -> Tensor:
    """0 where p is, even if x is NaN there: a gradient of no weight counts for nothing."""
    return torch.where(p == 0, 0.0, x)


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
    """`[B, T, N, H]` to `[B * K, R, H]`; keys too, whose only head is each their own."""
    K = key.shape[2]
    return x.unflatten(2, (K, x.shape[2] // K)).permute(0, 2, 3, 1, 4).flatten(2, 3).flatten(0, 1)


def by_token(x: Tensor, like: Tensor) -> Tensor:
    """The inverse of `by_kv_head`, to the shape of `like`."""
    B, T, N, _ = like.shape
    K = x.shape[0] // B
    return x.unflatten(0, (B, K)).unflatten(2, (N // K, T)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _heads(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, allowed: Tensor | None
) -> Iterator[Head]:
    """The heads in the order of `by_kv_head`, one after another: the biases of all are large."""
    (B, T, N, _), (S, K) = query.shape, key.shape[1:3]
    q, k, v = (flush(by_kv_head(x, key)) for x in (query, key, value))

    def rows(x: Tensor | None, head: int) -> Tensor | None:
        if x is None:
            return None
        return x.expand(B, N, T, S).unflatten(1, (K, N // K))[divmod(head, K)].flatten(0, 1)

    for head in range(B * K):
        of_head = rows(bias, head)
        of_head = None if of_head is None else flush(of_head)
        yield Head(q[head], k[head], v[head], of_head, rows(allowed, head))


def _is_empty(query: Tensor, key: Tensor) -> bool:
    """Nothing to attend with or to: all is 0, and a maximum over nothing has no value."""
    return 0 in (*query.shape, *key.shape)


def _check(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, cap: float | None
) -> None:
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
    if not query.ndim == key.ndim == value.ndim == 4 or key.shape != value.shape:
        raise ValueError(f"query must be [B, T, N, H], key and value both [B, S, K, H]. {got}")
    (B, _, N, H), K = query.shape, key.shape[2]
    if (key.shape[0], key.shape[3]) != (B, H):
        raise ValueError(f"query and key must agree in B and H. {got}")
    if K == 0 or N % K:
        raise ValueError(f"KV heads K = {K} must divide the query heads N = {N}. {got}")
    if bias is not None and bias.dtype not in DTYPES:
        raise ValueError(
            f"bias must be float32, bfloat16 or float16, got {bias.dtype}. Write bias.float()."
        )
    if bias is not None and bias.requires_grad:
        raise ValueError("bias has no gradient here, but requires one. Write bias.detach().")
    if cap is not None and not 0 < nearest32(cap) < math.inf:
        raise ValueError(
            f"logits_soft_cap must be a positive finite float32, got {cap!r}. Write None for none."
        )


def _check_length(query: Tensor, key: Tensor, shared_by: Any) -> None:
    (_, T, N, _), (S, K) = query.shape, key.shape[1:3]
    ranks = 1 if shared_by is None else dist.get_world_size(shared_by)
    rows = N // K * T * ranks
    if max(S, rows) >= TOO_MANY_TOKENS:
        raise ValueError(
            f"Exact sums have room for fewer than {TOO_MANY_TOKENS} tokens. Got {S} keys and, of "
            f"one KV head, {rows} rows: {T} queries * {N // K} query heads * {ranks} ranks."
        )
