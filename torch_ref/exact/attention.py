"""Attention whose bits do not depend on how it is computed: the reference in PyTorch.

Written from `jax_seqpar/exact/SPEC.md`, beside which it is to be read: its names, its order, and
nothing of its code.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..dropout import given_keys
from ..masks import Positions, Window, attends, places
from .arithmetic import flush, narrow, nearest32, out, sum_of_digits
from .attention_head import Beside, Options, backward, by_kv_head, by_token, forward, heads

# Below here the sum of the weights, up to 2^41 each, is below 2^63, with a sink.
TOO_MANY_TOKENS = 2**21
# Where the table of the specification ends: a dot product, and the blocks of a sum of gradients.
MOST_CHANNELS = 512
MOST_HEADS = 4096
# Digits of 26 bits in 53: the ds of one entry of a bias.
MOST_SUMMANDS = 2**27
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

    The output is causal to the last bit: a row is a function of its query and of the set of tokens
    that the query may attend to. No other token can change a bit of it, even one of NaN, nor can
    the order of the tokens. Gradients of queries are causal too, but know where in the array the
    keys lie, for these are summed in blocks of 256.

    Args:
      query: `[B, T, N, H]`, float32, bfloat16 or float16.
      key: `[B, S, K, H]`; K divides N and query head n reads KV head `n // (N / K)`.
      value: `[B, S, K, V]`.
      bias: added to the logits, broadcastable to `[B, N, T, S]`.
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
      sinks: `[N]`, one more logit for every query of a head, which has no value (as in GPT-OSS);
        -inf has no effect. They get no gradient.
      dropout_rate: the share of the weights that is dropped, after the softmax.
      dropout_rng: `(2,)`, the words of a threefry key, or keys of heads; see `dropout.head_keys`.
      shared_by: a process group whose ranks hold the same KV heads, each with query heads of its
        own. In the backward pass their anchors meet, and their sums before any rounding; its first
        rank returns the gradients of key and value and the others 0, for the caller adds those of
        the copies up.

    Returns:
      `[B, T, N, V]` of the query's dtype. Differentiable once, in query, key, value and bias.

    Raises:
      ValueError: dtypes or shapes that do not fit, slopes or sinks that want a gradient, a bias
        that wants one of more than 2^27 logits or on several ranks, or 2^21 keys, or as many rows
        of one KV head: queries, times the query heads that read it on every rank; a scale that is
        not finite. Also as `masks.attends` and `dropout.given_keys`.
    """
    _check(query, key, value, logits_soft_cap)
    if scale is not None and not math.isfinite(nearest32(scale)):
        raise ValueError(
            f"scale must be finite in float32, got {scale!r}. Write None for 1 / sqrt(H)."
        )
    (B, T, N, H), S = query.shape, key.shape[1]
    _check_bias(bias, (B, N, T, S), shared_by)
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
    p_query, p_key = places(T, S, query_offset, positions, query.device)
    rng = given_keys(dropout_rate, dropout_rng, B, N, query.device)
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


class _ExactAttention(torch.autograd.Function):
    """Head by KV head: `forward` and `backward` between two changes of layout."""

    @staticmethod
    def forward(ctx, query, key, value, options, *beside):
        ctx.options = options
        if _is_empty(query, key, value):
            ctx.save_for_backward(query, key, value, beside[0])
            return query.new_zeros(*query.shape[:3], value.shape[3])
        rows = [forward(head, options) for head in heads(query, key, value, Beside(*beside))]
        # Saved before its rounding to 16 bits: D_i is of this.
        out32 = by_token(torch.stack(rows), query)
        ctx.save_for_backward(query, key, value, out32, *beside)
        return narrow(out32, query.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, /, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        options = ctx.options
        others: list[Tensor | None] = [None] * (1 + len(Beside._fields))
        wants_bias = ctx.needs_input_grad[4]
        query, key, value, *saved = ctx.saved_tensors
        if _is_empty(query, key, value):
            others[1] = torch.zeros_like(saved[0]) if wants_bias else None
            return *(torch.zeros_like(x) for x in (query, key, value)), *others
        out32, *beside = saved
        do, o = (by_kv_head(x, key) for x in (*grad_outputs, out32))
        each = zip(heads(query, key, value, Beside(*beside)), do, o, strict=True)
        *grads, of_bias = zip(*(backward(*x, options, wants_bias) for x in each), strict=True)
        dq, dk, dv = (
            narrow(by_token(torch.stack(x), like), like.dtype)
            for x, like in zip(grads, (query, key, value), strict=True)
        )
        if wants_bias:
            others[1] = _bias_gradient(torch.stack(of_bias), beside[0], query)
        shared_by = options.shared_by
        if shared_by is not None and dist.get_rank(shared_by) != 0:
            dk, dv = map(torch.zeros_like, (dk, dv))
        return dq, dk, dv, *others


def _bias_gradient(ds: Tensor, bias: Tensor, query: Tensor) -> Tensor:
    """The gradient of a bias, from the ds `[B * K, R, S]` of every head."""
    B, T, N, _ = query.shape
    ds = ds.reshape(B, N, T, ds.shape[-1])
    shape = (1,) * (4 - bias.ndim) + bias.shape
    return narrow(out(sum_of_digits(ds, shape)), bias.dtype).reshape(bias.shape)


def _is_empty(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether an operand is empty: the output is 0, as a maximum over nothing has no value."""
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
    if max(H, value.shape[3]) > MOST_CHANNELS:
        raise ValueError(
            f"Exact dot products have room for {MOST_CHANNELS} channels. {got} Split the heads."
        )
    if cap is not None and not 0 < nearest32(cap) < math.inf:
        raise ValueError(
            f"logits_soft_cap must be a positive finite float32, got {cap!r}. Write None for none."
        )


def _check_dtype(name: str, x: Tensor) -> None:
    """Raises ValueError unless x, added to the logits, has a dtype that float32 holds."""
    if x.dtype not in DTYPES:
        raise ValueError(
            f"{name} must be float32, bfloat16 or float16, got {x.dtype}. Write {name}.float()."
        )


def _check_bias(bias: Tensor | None, shape: tuple[int, ...], shared_by: Any) -> None:
    """A bias, and whether its gradient is one sum of this rank."""
    if bias is None:
        return
    _check_dtype("bias", bias)
    if not bias.requires_grad:
        return
    if shared_by is not None:
        raise ValueError(
            f"bias {tuple(bias.shape)} has no gradient where ranks share KV heads: its sum over "
            f"them would round. Write bias.detach()."
        )
    full = (1,) * (4 - bias.ndim) + bias.shape
    summands = math.prod(n for n, size in zip(shape, full, strict=True) if size == 1)
    if summands > MOST_SUMMANDS:
        raise ValueError(
            f"Exact sums have room for 2^27 logits in the gradient of one entry of a bias. Got "
            f"{summands} of bias {tuple(bias.shape)}. Write bias.detach()."
        )


def _check_constant(name: str, x: Tensor | None, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless x, added to the logits of each head, fits and needs no gradient."""
    if x is None:
        return
    _check_dtype(name, x)
    if x.shape != shape:
        raise ValueError(
            f"{name} must be [N], one for each of {shape[0]} query heads. Got {tuple(x.shape)}. "
            f"Write {name}.expand({shape[0]}) for one value."
        )
    if x.requires_grad:
        raise ValueError(f"{name} has no gradient here, but requires one. Write {name}.detach().")


def _check_length(query: Tensor, key: Tensor, shared_by: Any) -> None:
    (_, T, N, _), (S, K) = query.shape, key.shape[1:3]
    ranks = 1 if shared_by is None else dist.get_world_size(shared_by)
    heads = N // K * ranks
    if heads > MOST_HEADS:
        raise ValueError(
            f"Exact sums have room for {MOST_HEADS} query heads of one KV head. Got {heads} on "
            f"{ranks} ranks. Split the query heads."
        )
    rows = heads * T
    if max(S, rows) >= TOO_MANY_TOKENS:
        raise ValueError(
            f"Exact sums have room for fewer than {TOO_MANY_TOKENS} tokens. Got {S} keys and, of "
            f"one KV head, {rows} rows: {T} queries * {N // K} query heads * {ranks} ranks. Split "
            f"the sequence."
        )
