"""Exact attention of one KV head in PyTorch: its weights, its output and its gradients.

Written from `jax_seqpar/exact/SPEC.md`. The weights are `[R, S]`, where the rows R = G * T are the
queries of the G query heads that read the KV head. Both passes compute some rows at a time.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..dropout import gain, is_kept
from ..masks import distance
from . import arithmetic
from .arithmetic import (
    dot,
    exp,
    exponent,
    flush,
    gradient_slices,
    norm,
    out,
    round32,
    tanh_and_slope,
    value,
    weighted_sum,
)

# Bits of a weight in the sum that divides it.
SUM_BITS = 41
# The sums of so many keys fit 53 bits, and the sums of these int64.
KEYS = 2**12
# Rows of `[R, S]` at a time in the forward pass. It changes no bit; that they stay in the cache
# makes it 3 times as fast.
ROWS = 256


class Options(NamedTuple):
    """Numbers, the same for every head."""

    scale: float
    cap: float | None
    rate: float
    shared_by: Any


class Beside(NamedTuple):
    """Operands of the logits beside query and key, broadcastable to `[B, N, T, S]`.

    The last axis of rng is 2.
    """

    bias: Tensor | None
    allowed: Tensor | None
    alibi: Tensor | None
    sink: Tensor | None
    rng: Tensor | None
    p_query: Tensor
    p_key: Tensor


class Rows(NamedTuple):
    """The queries that read a KV head: q `[R, H]`, bias and allowed `[R, S]`, the others `[R, 1]`.

    t is which query it is, p its position; rng is `[R, 2]`. allowed is where a row may attend to a
    key, also for its bias.
    """

    q: Tensor
    t: Tensor
    p: Tensor
    bias: Tensor | None
    allowed: Tensor
    alibi: Tensor | None
    sink: Tensor | None
    rng: Tensor | None


class Head(NamedTuple):
    """One KV head with its query heads: k `[S, H]`, v `[S, V]`, the positions p of the keys `[S]`.

    T is the number of queries of each query head.
    """

    T: int
    rows: Rows
    k: Tensor
    v: Tensor
    p: Tensor


class Weights(NamedTuple):
    """The softmax of a head before its division: p, slope and kept `[R, S]`, the others `[R, 1]`.

    kept is True for the weights that dropout keeps; None without dropout.
    """

    p: Tensor
    r: Tensor
    slope: Tensor | None
    has_key: Tensor
    kept: Tensor | None


class Anchors(NamedTuple):
    """The `A` of the gradients: of query `[R, 1]`, of key and value `[S, 1]`."""

    q: Tensor
    k: Tensor
    v: Tensor


def forward(head: Head, options: Options) -> Tensor:
    """`o`, `[R, V]`, in float32."""
    blocks = []
    for start in range(0, len(head.rows.q), ROWS):
        p, r, _, has_key, kept = _weights(_part(head, slice(start, start + ROWS)), options)
        o = out(weighted_sum(_where_kept(kept, p), head.v) * (r * gain(options.rate)))
        blocks.append(torch.where(has_key, o, 0.0))
    return torch.cat(blocks)


def backward(
    head: Head, do: Tensor, o: Tensor, options: Options, wants_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """`dq` `[R, H]`, `dk` `[S, H]` and `dv` `[S, V]`, in float32, and the ds of a bias `[R, S]`."""
    scale, shared_by = options.scale, options.shared_by
    q, do, o = head.rows.q * scale, flush(do), flush(o)
    A = _anchors(head, q, do, o, options)
    dq, of_keys, of_values, of_bias = [], [], [], []
    for rows in _blocks_of_queries(head):
        w, ds, before_slope, has_key = _weights_of_sums(
            _part(head, rows), do[rows], o[rows], options
        )
        sums = value(gradient_slices(ds, head.k, A.q[rows]), A.q[rows])
        dq.append(torch.where(has_key, out(sums * scale), 0.0))
        _add(of_keys, gradient_slices(ds.mT, q[rows], A.k))
        _add(of_values, gradient_slices(w.mT, do[rows], A.v))
        if wants_bias:
            of_bias.append(before_slope)
    for n in (*of_keys, *of_values):
        if shared_by is not None:
            # A sum of integers, so exact in any order.
            dist.all_reduce(n, group=shared_by)
    dk, dv = (out(value((n1, n2), a)) for (n1, n2), a in ((of_keys, A.k), (of_values, A.v)))
    return torch.cat(dq), dk, dv, torch.cat(of_bias) if wants_bias else None


def _blocks_of_queries(head: Head) -> Iterator[slice]:
    """The blocks `I`, as rows: none has queries of two query heads."""
    block = arithmetic.BLOCK
    for first in range(0, len(head.rows.q), head.T):
        for start in range(first, first + head.T, block):
            yield slice(start, min(start + block, first + head.T))


def _part(head: Head, rows: slice) -> Head:
    """Head with a slice of its rows, and all its keys."""
    return head._replace(rows=Rows._make(x if x is None else x[rows] for x in head.rows))


def _add(total: list[Tensor], slices: tuple[Tensor, Tensor]) -> None:
    """Adds slices in place to a total that is empty at first."""
    total[:] = [a.add_(b) for a, b in zip(total, slices, strict=True)] if total else slices


def _anchors(head: Head, q: Tensor, do: Tensor, o: Tensor, options: Options) -> Anchors:
    """Bounds of the gradients from what each query and each key may attend to; q is scaled."""
    Nv, Ek = norm(head.v).mT, exponent(head.k, dim=-1).mT
    Ndo, Edo, No, Eq = norm(do), exponent(do, dim=-1), norm(o), exponent(q, dim=-1)
    of_queries, of_keys = [], []
    for start in range(0, len(q), ROWS):
        rows = slice(start, start + ROWS)
        allowed = head.rows.allowed[rows]
        of_queries.append([_largest(x, allowed, dim=1) for x in (Ek, Nv + Ek)])
        of_keys.append([_largest(x[rows], allowed, dim=0) for x in (Ndo + Eq, No + Ndo + Eq, Edo)])
    k, vk = (torch.cat(x) for x in zip(*of_queries, strict=True))
    q, oq, v = (torch.cat(x).amax(dim=0) for x in zip(*of_keys, strict=True))
    Aq = torch.where(k == -math.inf, -math.inf, 1 + Ndo + torch.maximum(vk, No + k))
    # -inf also where the norm of v is infinity, "not a number": their sum would be NaN.
    Ak = torch.where(q == -math.inf, -math.inf, 1 + torch.maximum(Nv[0] + q, oq))
    met = torch.stack((Ak, v), dim=-1)
    if options.shared_by is not None:
        dist.all_reduce(met, dist.ReduceOp.MAX, options.shared_by)
    more = _bits_above_1(gain(options.rate))
    # Where nothing attends the slices are 0, so that any number will do.
    return Anchors(*(x.masked_fill(x == -math.inf, 0.0) + more for x in (Aq, *met.split(1, -1))))


def _largest(x: Tensor, allowed: Tensor, dim: int) -> Tensor:
    """The largest x of allowed pairs along an axis; -inf where no pair is allowed."""
    return torch.where(allowed, x, -math.inf).amax(dim, keepdim=True)


def _bits_above_1(c: float) -> int:
    """The smallest integer n with `c <= 2^n`."""
    mantissa, n = math.frexp(c)
    return n - 1 if mantissa == 0.5 else n


def _weights_of_sums(
    head: Head, do: Tensor, o: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`w` of dv, `ds`, and that before the slope, `[R, S]`; where there is a key, `[R, 1]`."""
    p, r, slope, has_key, kept = _weights(head, options)
    c = gain(options.rate)
    dp = _where_kept(kept, dot(do, head.v) * c)
    D = dot(do[:, None], o[:, None])[:, 0]
    before_slope = p * r * (dp - D)
    ds = before_slope if slope is None else before_slope * slope
    # A weight that is dropped counts where r is NaN: it makes the gradient of the value NaN, as an
    # anchor that is not a number would.
    w = p * (r * c) if kept is None else torch.where(kept | r.isnan(), p * (r * c), 0.0)
    w, ds, before_slope = (torch.where(head.rows.allowed, x, 0.0) for x in (w, ds, before_slope))
    return w, ds, before_slope, has_key


def _weights(head: Head, options: Options) -> Weights:
    """Weights of forward and backward alike, from the logits z to the normaliser r."""
    rows, cap = head.rows, options.cap
    # A value with NaN or infinity makes the rows that may attend to it NaN, as a key does.
    k = torch.where(exponent(head.v, dim=-1) == math.inf, math.nan, head.k)
    z = dot(rows.q * options.scale, k)
    slope = None
    if cap is not None:
        tanh, slope = tanh_and_slope(z, cap)
        z = cap * tanh
    if rows.bias is not None:
        z = z + rows.bias
    if rows.alibi is not None:
        z = z - rows.alibi * distance(rows.p, head.p)
    z = torch.where(rows.allowed, round32(z), -math.inf)

    m = z.amax(dim=-1, keepdim=True)
    has_key = m != -math.inf
    # torch.maximum of a NaN and a number is NaN.
    m = m if rows.sink is None else torch.maximum(m, rows.sink)
    m = torch.where(has_key, m, 0.0)
    p = _exp_below(m, z)
    L = _sum_of_weights(p)
    if rows.sink is not None:
        L = L + _sum_of_weights(_exp_below(m, rows.sink))
    r = torch.where(m.isfinite(), 2.0**SUM_BITS / L.double(), math.nan)
    r = torch.where(has_key, r, 0.0)
    kept = None
    if rows.rng is not None:
        s = torch.arange(len(head.k), device=rows.rng.device)
        kept = is_kept(rows.rng[:, None], options.rate, rows.t, s)
    return Weights(p, r, slope, has_key, kept)


def _exp_below(m: Tensor, z: Tensor) -> Tensor:
    # 0 of -inf where m is NaN or +inf too, which would make it NaN.
    return torch.where(z == -math.inf, 0.0, exp((z - m).float().double()))


def _sum_of_weights(p: Tensor) -> Tensor:
    """The sum over keys of `rint(p 2^41)`, as int64."""
    P = torch.round(p * 2.0**SUM_BITS)
    parts = [x.sum(dim=-1, keepdim=True).long() for x in P.split(KEYS, dim=-1)]
    return torch.stack(parts).sum(dim=0)


def _where_kept(kept: Tensor | None, x: Tensor) -> Tensor:
    return x if kept is None else torch.where(kept, x, 0.0)


def by_kv_head(x: Tensor, key: Tensor) -> Tensor:
    """`[B, T, N, H]` to `[B * K, R, H]`; keys use the same layout, with one head per group."""
    K = key.shape[2]
    return x.unflatten(2, (K, x.shape[2] // K)).permute(0, 2, 3, 1, 4).flatten(2, 3).flatten(0, 1)


def by_token(x: Tensor, like: Tensor) -> Tensor:
    """The inverse of `by_kv_head`, to the shape of `like`."""
    B, T, N, _ = like.shape
    K = x.shape[0] // B
    return x.unflatten(0, (B, K)).unflatten(2, (N // K, T)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def heads(query: Tensor, key: Tensor, value: Tensor, beside: Beside) -> Iterator[Head]:
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
        bias = None if bias is None else flush(bias)
        allowed = rows_if(beside.allowed, head, S)
        if allowed is None:
            allowed = torch.ones(1, 1, dtype=torch.bool, device=q.device).expand(N // K * T, S)
        of_head = Rows(
            q[head],
            t=rows(t, head),
            p=rows(beside.p_query, head),
            bias=bias,
            allowed=allowed if bias is None else allowed & (bias != -math.inf),
            alibi=rows_if(beside.alibi, head),
            sink=rows_if(beside.sink, head),
            rng=rows_if(beside.rng, head, 2),
        )
        yield Head(T, of_head, k[head], v[head], p_key[head // K, 0, 0])
