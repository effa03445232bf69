"""Ring attention over `torch.distributed`: keys and values visit the queries of every rank.

Each rank keeps its queries. Keys and values go round: after h hops a rank has those of the rank h
before it. A softmax is a quotient of two sums over the keys, and sums can be taken in parts:

    out = sum(exp(logits - top) * value) / sum(exp(logits - top)),   top the greatest logit.

Every hop adds its part to both sums, and they are brought to one `top` first. The backward pass is
the quotient rule, in a second ring: the cotangents of the two sums are known at once, so each part
has a separate derivative, and gradients of keys and values travel with them until they are home.
Liu et al. 2023, https://arxiv.org/abs/2310.01889.

All the weights of a part are in memory at once, and a rank waits for each transfer: this is written
to be read, and to be compared with. All that masks or drops goes by the numbers of the tokens in
the whole sequence, which are `layout.token_numbers`, so the order of the tokens changes no result.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dropout import gain, given_keys, is_kept
from .masks import Numbers, Positions, Window, attends, distance, places
from .rank_layout import Order, token_numbers


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    group: Any = None,
    order: Order = "contiguous",
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
) -> Tensor:
    """`dense_attention` of a sequence that the ranks of a group share; this rank's tokens of it.

    Every rank has to call this, and to take the gradient if one does, with the same shapes, dtypes
    and options. Segments, positions and lengths are of the whole sequence, in its own order.

    Args:
      query: `[B, T/P, N, H]`, the tokens `token_numbers(order, T/P, rank, P)` of T.
      key: `[B, S/P, K, H]`, in the same way of S; K divides N and query head n reads KV head
        `n // (N / K)`.
      value: `[B, S/P, K, V]`.
      group: the process group that shares the sequence; None for the default group.
      order: which tokens a rank holds, "contiguous", "zigzag" or "striped"; see `token_numbers`.
      scale: of the logits; `1 / sqrt(H)` if None.
      is_causal, local_window_size, query_offset: see `masks.attends`.
      segment_ids: `[B, S]`, or a pair `[B, T]`, `[B, S]`; a query attends to its own segment.
      positions: integers `[B, S]`, or a pair `[B, T]`, `[B, S]`, in place of the tokens' numbers.
      query_seq_lengths, key_value_seq_lengths: `[B]`, see `masks.attends`.
      logits_soft_cap: logits become `cap * tanh(logits / cap)`.
      alibi_slopes: `[N]`; the slope times the distance of their positions is taken from the logits.
      sinks: `[N]`, one more logit for every query of a head, which has no value.
      dropout_rate, dropout_rng: as of `dense_attention`, the same key on every rank.

    Returns:
      `[B, T/P, N, V]` in the query's dtype; 0 for a query without a key. Sums are in float32, or in
      float64 if an input is. Differentiable once, in query, key, value, slopes and sinks. Of slopes
      and sinks a rank gets the gradient of its own queries' outputs, as of any other parameter that
      all ranks have: it is complete when it is summed over the ranks.

    Raises:
      ValueError: shapes that do not fit, before any communication, and as `token_numbers`,
        `masks.attends` and `dropout.given_keys`.
    """
    world_size, rank = dist.get_world_size(group), dist.get_rank(group)
    _check_shapes(query, key, value, alibi_slopes, sinks)
    (B, T, N, H), S = query.shape, key.shape[1]
    _check_segments(segment_ids, T * world_size, S * world_size)
    rules = {
        "is_causal": is_causal,
        "local_window_size": local_window_size,
        "segment_ids": segment_ids,
        "query_offset": query_offset,
        "positions": positions,
        "query_seq_lengths": query_seq_lengths,
        "key_value_seq_lengths": key_value_seq_lengths,
    }
    attention = Attention(
        group=group,
        world_size=world_size,
        queries=token_numbers(order, T, rank, world_size, query.device, "query"),
        # Hop h brings the keys of the rank h before this one.
        keys=[
            token_numbers(order, S, (rank - hop) % world_size, world_size, query.device, "key")
            for hop in range(world_size)
        ],
        scale=1 / math.sqrt(H) if scale is None else scale,
        soft_cap=logits_soft_cap,
        rules=rules,
        dropout_rate=dropout_rate,
        head_keys=given_keys(dropout_rate, dropout_rng, B, N, query.device),
    )
    attention.allowed(0)  # raises for rules of another size, before any communication
    out = _Ring.apply(attention, query, key, value, alibi_slopes, sinks)
    assert isinstance(out, Tensor)
    return out


class Sums(NamedTuple):
    """The two sums of a softmax over some of the keys, with each weight `exp(logits - top)`.

    `top` and `total` are kept apart. Float32 numbers of 1e5 are 0.0078 apart, so at logits of 1e5
    the rounding of `top + log(total)` would change every weight of a row by up to 0.4 %.
    """

    top: Tensor  # [B, N, T, 1], the greatest logit; -inf without a key
    total: Tensor  # [B, N, T, 1], the sum of the weights
    weighted: Tensor  # [B, N, T, V], the sum of the weights that are kept times the values


@dataclass(frozen=True)
class Attention:
    """Constants that all parts of one attention share, and the computation of one part.

    The methods take q, k and v in the dtype of the sums; hop `hop` has brought k and v.
    """

    group: Any
    world_size: int
    queries: Tensor  # the numbers of this rank's queries, [T/P]
    keys: list[Tensor]  # the numbers of the keys of every hop, [S/P]
    scale: float
    soft_cap: float | None
    rules: dict[str, Any]  # of `masks.attends`
    dropout_rate: float
    head_keys: Tensor | None

    def numbers(self, hop: int) -> Numbers:
        return self.queries, self.keys[hop]

    def sizes(self) -> tuple[int, int]:
        """Queries and keys of the whole sequence."""
        return len(self.queries) * self.world_size, len(self.keys[0]) * self.world_size

    def allowed(self, hop: int) -> Tensor | None:
        device = self.queries.device
        return attends(*self.sizes(), **self.rules, device=device, numbers=self.numbers(hop))

    def logits(self, hop: int, q: Tensor, k: Tensor, slopes: Tensor | None = None) -> Tensor:
        """`[B, N, T/P, S/P]`, -inf where a query does not attend to a key."""
        k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
        logits = torch.einsum("btnh,bsnh->bnts", q, k) * self.scale
        if self.soft_cap is not None:
            logits = self.soft_cap * torch.tanh(logits / self.soft_cap)
        if slopes is not None:
            offset, positions = self.rules["query_offset"], self.rules["positions"]
            numbers = self.numbers(hop)
            apart = distance(*places(*self.sizes(), offset, positions, q.device, numbers))
            logits = logits - slopes[:, None, None] * apart
        allowed = self.allowed(hop)
        return logits if allowed is None else logits.masked_fill(~allowed, -math.inf)

    def sums(self, hop: int, logits: Tensor, top: Tensor, v: Tensor) -> Sums:
        """Sums over the keys of one part, with the weights `exp(logits - top)`."""
        # Without a key both are -inf, whose difference is NaN.
        weights = torch.exp(logits - top.masked_fill(top == -math.inf, 0.0))
        kept = weights
        if self.head_keys is not None:
            t, s = self.numbers(hop)
            keys = self.head_keys[:, :, None, None]
            kept = weights * is_kept(keys, self.dropout_rate, t[:, None], s)
            kept = kept * gain(self.dropout_rate)
        v = v.repeat_interleave(weights.shape[1] // v.shape[2], dim=2)
        weighted = torch.einsum("bnts,bsnv->bntv", kept, v)
        return Sums(top, weights.sum(-1, keepdim=True), weighted)


class _Ring(torch.autograd.Function):
    """The forward ring, and the backward ring of its derivative."""

    @staticmethod
    def forward(
        ctx: Any,
        attention: Attention,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        slopes: Tensor | None,
        sinks: Tensor | None,
    ) -> Tensor:
        wide = sum_dtype(query, key, value)
        q, slopes_, sinks_ = (None if x is None else x.to(wide) for x in (query, slopes, sinks))
        assert q is not None
        so_far = empty_sums(q, value.shape[3], sinks_)
        k, v = key, value
        for hop in range(attention.world_size):
            logits = attention.logits(hop, q, k.to(wide), slopes_)
            top = logits.amax(-1, keepdim=True)
            so_far = merge(so_far, attention.sums(hop, logits, top, v.to(wide)))
            if hop < attention.world_size - 1:
                k, v = pass_on(attention.group, k, v)
        out, top, total = finish(so_far)
        ctx.attention = attention
        ctx.save_for_backward(query, key, value, slopes, sinks, out, top, total)
        return out.transpose(1, 2).to(query.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, /, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        attention = ctx.attention
        query, key, value, slopes, sinks, out, top, total = ctx.saved_tensors
        # The quotient rule of out = weighted / total. `top` cancels, so it counts as a constant.
        dout = grad_outputs[0].transpose(1, 2).to(out.dtype)
        d_weighted = dout / total
        d_total = -(d_weighted * out).sum(-1, keepdim=True)

        q, k, v = query, key, value
        dq, dk, dv = (torch.zeros_like(x, dtype=out.dtype) for x in (q, k, v))
        d_slopes = None if slopes is None else torch.zeros_like(slopes, dtype=out.dtype)
        for hop in range(attention.world_size):
            inputs = [x.detach().to(out.dtype).requires_grad_() for x in (q, k, v)]
            if slopes is not None:
                inputs.append(slopes.detach().to(out.dtype).requires_grad_())
            with torch.enable_grad():
                logits = attention.logits(hop, *inputs[:2], *inputs[3:])
                part = attention.sums(hop, logits, top, inputs[2])
            sums, cotangents = (part.total, part.weighted), (d_total, d_weighted)
            to_q, to_k, to_v, *to_slopes = torch.autograd.grad(sums, inputs, cotangents)
            dq, dk, dv = dq + to_q, dk + to_k, dv + to_v
            if d_slopes is not None:
                d_slopes = d_slopes + to_slopes[0]
            if hop < attention.world_size - 1:
                k, v = pass_on(attention.group, k, v)
            # Once more than k and v: the last time they come home.
            dk, dv = pass_on(attention.group, dk, dv)

        d_sinks = None
        if sinks is not None:
            weight = torch.exp(sinks.to(out.dtype)[:, None, None] - top)
            d_sinks = (d_total * weight).sum((0, 2, 3))
        grads = zip(ctx.saved_tensors, (dq, dk, dv, d_slopes, d_sinks), strict=False)
        return None, *(None if grad is None else grad.to(x.dtype) for x, grad in grads)


def sum_dtype(*inputs: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in {x.dtype for x in inputs} else torch.float32


def empty_sums(q: Tensor, channels: int, sinks: Tensor | None) -> Sums:
    """Sums before the first key: those of the sinks, logits without a value, counted here alone."""
    B, T, N, _ = q.shape
    top = q.new_full((B, N, T, 1), -math.inf)
    if sinks is not None:
        top = sinks[:, None, None].expand_as(top)
    return Sums(top, (top > -math.inf).to(q.dtype), q.new_zeros(B, N, T, channels))


def merge(a: Sums, b: Sums) -> Sums:
    """Sums over the keys of both, whose weights are brought to one `top`."""
    top = torch.maximum(a.top, b.top)
    # Where neither has a key, -inf less -inf would be NaN; 0 in its place leaves both sums at 0.
    finite = top.masked_fill(top == -math.inf, 0.0)
    of_a, of_b = torch.exp(a.top - finite), torch.exp(b.top - finite)
    total = of_a * a.total + of_b * b.total
    return Sums(top, total, of_a * a.weighted + of_b * b.weighted)


def finish(sums: Sums) -> tuple[Tensor, Tensor, Tensor]:
    """The output `[B, N, T, V]`, and the `top` and `total` that its derivative divides by.

    A query without a key or a sink has weights of 0: its output and gradients are 0 for any finite
    `top` and any `total` but 0.
    """
    no_key = sums.top == -math.inf
    top, total = sums.top.masked_fill(no_key, 0.0), sums.total.masked_fill(no_key, 1.0)
    return sums.weighted / total, top, total


def pass_on(group: Any, *tensors: Tensor) -> list[Tensor]:
    """Sends tensors to the next rank of the group, and returns those of the rank before."""
    world_size, rank = dist.get_world_size(group), dist.get_rank(group)
    if world_size == 1:
        return list(tensors)
    members = dist.get_process_group_ranks(dist.group.WORLD if group is None else group)
    following, previous = members[(rank + 1) % world_size], members[rank - 1]
    sent = [x.contiguous() for x in tensors]
    received = [torch.empty_like(x) for x in sent]
    operations = [dist.P2POp(dist.isend, x, following, group) for x in sent]
    operations += [dist.P2POp(dist.irecv, x, previous, group) for x in received]
    for request in dist.batch_isend_irecv(operations):
        request.wait()
    return received


def _check_shapes(
    query: Tensor, key: Tensor, value: Tensor, slopes: Tensor | None, sinks: Tensor | None
) -> None:
    got = f"Got query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}."
    if not query.ndim == key.ndim == value.ndim == 4:
        raise ValueError(
            f"query, key and value must have 4 axes. {got} Reshape them to [B, S/P, N, H]."
        )
    if key.shape[:3] != value.shape[:3] or query.shape[0] != key.shape[0]:
        raise ValueError(
            f"key and value must have the same shape but for their channels, and the query's "
            f"batch. {got} Pass the same tokens and heads of both."
        )
    N, K = query.shape[2], key.shape[2]
    if K == 0 or N % K or query.shape[3] != key.shape[3]:
        raise ValueError(
            f"KV heads K = {K} must divide the query heads N = {N}, and query and key have the "
            f"same channels. {got} Give heads and channels that do."
        )
    for name, x in {"alibi_slopes": slopes, "sinks": sinks}.items():
        if x is not None and x.shape != (N,):
            raise ValueError(
                f"{name} must be [N] = ({N},), got {tuple(x.shape)}. Give one for each query head."
            )


def _check_segments(segment_ids: Any, T: int, S: int) -> None:
    pair = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
    for name, x, tokens in zip(("queries", "keys"), pair, (T, S), strict=True):
        if x is not None and (x.ndim != 2 or x.shape[1] != tokens):
            raise ValueError(
                f"segment_ids of the {tokens} {name} of all ranks must be [B, {tokens}], got "
                f"{tuple(x.shape)}. Give those of the whole sequence on every rank, in its order."
            )
