"""DeepSpeed-Ulysses over `torch.distributed`, corrected: one changed import for a DeepSpeed user.

    from deepspeed.sequence.layer import DistributedAttention    # before
    from torch_ref.ulysses import DistributedAttention           # after

Right for every batch size, degree and layout, because the data is never permuted by hand: split
along one axis, exchange, concatenate along the other. The layouts are those of DeepSpeed,
`[S, B, N, H]` (token-first, `batch_dim_idx=1`) and `[B, S, N, H]` (batch-first, `batch_dim_idx=0`).
Jacobs et al. 2023, https://arxiv.org/abs/2309.14509.

A program of torchrun ends with both of these lines:

    dist.barrier()
    dist.destroy_process_group()

A thread of gloo may hold the tensors of an all-to-all that has returned, and needs Python's lock to
let go of them. In an interpreter that is ending it gets none, and the rank aborts with "terminate
called without an active exception". PyTorch 2.13, four ranks on a CPU: 3 of 12 runs without either
line; where a `DistributedAttention` holds the group, 1 of 15 without the barrier, 0 of 15 with it.
The barrier lets the threads finish; the second line ends them.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Exchange = Callable[[Tensor, int, int, int, Any], Tensor]


def single_all_to_all(
    input: Tensor,
    scatter_idx: int,
    gather_idx: int,
    batch_dim_idx: int,
    group: Any = None,
    *,
    heads: Sequence[int] | None = None,
) -> Tensor:
    """Scatters one axis over the ranks of a group and gathers another.

    Args:
      input: this rank's `[S, B, N, H]` or `[B, S, N, H]`, any dtype; its bits travel unchanged.
      scatter_idx: the axis to split, 2 for the heads or that of the tokens. Tokens have to be
        divisible by the number of ranks.
      gather_idx: the axis to concatenate, in rank order.
      batch_dim_idx: which axis is the batch, 0 or 1; the tokens are the other one.
      group: the sequence-parallel process group; None for the default group.
      heads: how many each rank has, in rank order. If None they are shared as evenly as possible,
        the first ranks having one more, and where heads are gathered the ranks tell one another.

    Returns:
      A tensor with all of axis `gather_idx` and this rank's part of axis `scatter_idx`.

    Raises:
      ValueError: axes that are not the tokens and the heads, tokens that do not divide, or fewer
        heads than ranks.
    """
    world_size, rank = dist.get_world_size(group), dist.get_rank(group)
    _check_axes(scatter_idx, gather_idx, batch_dim_idx)
    size = input.shape[scatter_idx]
    if heads is not None and len(heads) != world_size:
        raise ValueError(
            f"heads must be one number for each of {world_size} ranks, got {heads}. Leave heads "
            f"out to share them evenly."
        )
    if scatter_idx == 2:
        _check_head_count(size, world_size, f"Got input {tuple(input.shape)}.")
        sent = _shared(size, world_size) if heads is None else list(heads)
        if sum(sent) != size:
            raise ValueError(
                f"heads {heads} must add up to the {size} of {tuple(input.shape)}. Leave heads out "
                f"to share them evenly."
            )
        gathered = [input.shape[gather_idx]] * world_size
    else:
        if size % world_size:
            raise ValueError(
                f"axis {scatter_idx} of size {size} is not divisible by the {world_size} ranks of "
                f"the group. Got input {tuple(input.shape)}. Pad it to "
                f"{-(-size // world_size) * world_size}."
            )
        sent = [size // world_size] * world_size
        if heads is None:
            # No rank can tell from its own heads how many another one has.
            own = torch.tensor([input.shape[gather_idx]], device=input.device)
            counts = [torch.empty_like(own) for _ in range(world_size)]
            dist.all_gather(counts, own, group=group)
            heads = [int(count) for count in counts]
        gathered = list(heads)
        if gathered[rank] != input.shape[gather_idx]:
            raise ValueError(
                f"heads says {gathered[rank]} for rank {rank}, which has {tuple(input.shape)}. "
                f"Give how many heads each rank has, in rank order."
            )
    chunks = [_bytes(x) for x in input.split(sent, dim=scatter_idx)]
    shapes = []
    for count in gathered:
        shape = list(input.shape)
        shape[scatter_idx], shape[gather_idx] = sent[rank], count
        shapes.append(shape)
    sizes = [math.prod(shape) * input.element_size() for shape in shapes]
    received = torch.empty(sum(sizes), dtype=torch.uint8, device=input.device)
    # Bytes travel: gloo has no bfloat16 or float8 of its own, and bytes keep every NaN.
    dist.all_to_all_single(
        received, torch.cat(chunks), sizes, [x.numel() for x in chunks], group=group
    )
    parts = received.split(sizes)
    # Copies: the part of another rank may start where no element of this dtype can.
    pieces = [x.clone().view(input.dtype).view(s) for x, s in zip(parts, shapes, strict=True)]
    return torch.cat(pieces, dim=gather_idx)


def _bytes(x: Tensor) -> Tensor:
    """A contiguous tensor's bytes; a channels-last tensor becomes contiguous first."""
    return x.contiguous(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def _shared(count: int, parts: int) -> list[int]:
    """Sizes of `parts` parts of `count` that differ by one at most, the larger ones first."""
    return [count // parts + (part < count % parts) for part in range(parts)]


def heads_of_ranks(N: int, K: int, world_size: int) -> tuple[list[int], int]:
    """Number of query heads of each rank, and of the copies of each KV head that are sent.

    With at least as many KV heads as ranks, a KV head is on one rank, with all its query heads.
    Where K divides the ranks, a KV head is on P/K ranks, which share its query heads. Otherwise the
    ranks share the query heads without regard to groups, and every query head gets a copy of its KV
    head.
    """
    if world_size <= K:
        return [kv_heads * (N // K) for kv_heads in _shared(K, world_size)], 1
    if world_size % K == 0:
        return _shared(N // K, world_size // K) * K, world_size // K
    return _shared(N, world_size), N // K


class SeqAllToAll(torch.autograd.Function):
    """`single_all_to_all` with a derivative, which is itself: scatter and gather change places."""

    @staticmethod
    def forward(
        ctx: Any,
        group: Any,
        input: Tensor,
        scatter_idx: int,
        gather_idx: int,
        batch_dim_idx: int,
        exchange: Exchange = single_all_to_all,
    ) -> Tensor:
        ctx.arguments = group, scatter_idx, gather_idx, batch_dim_idx, exchange
        return exchange(input, scatter_idx, gather_idx, batch_dim_idx, group)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,) = grad_outputs
        group, scatter_idx, gather_idx, batch_dim_idx, exchange = ctx.arguments
        grad = SeqAllToAll.apply(
            group, grad_output, gather_idx, scatter_idx, batch_dim_idx, exchange
        )
        return None, grad, None, None, None, None


class DistributedAttention(torch.nn.Module):
    """Ulysses attention around any local attention, with DeepSpeed's constructor and call.

    Args:
      local_attention: called as `local_attention(query, key, value, *args, **kwargs)` with all the
        tokens of this rank's heads, in the layout of the inputs; returns the query's shape.
      sequence_process_group: the ranks that share a sequence; None for the default group.
      scatter_idx: the head axis, 2.
      gather_idx: the token axis, 0 for token-first and 1 for batch-first tensors; if None, the one
        that is not `batch_dim_idx`. DeepSpeed's default of 0 is wrong for batch-first tensors and
        was the other half of its bug, so it is not the default here.
      sp_stream: refused; communication here does not overlap with computation.
      exchange: runs in place of `single_all_to_all`, with its first five arguments. For
        controls that must fail.
    """

    def __init__(
        self,
        local_attention: Callable[..., Tensor],
        sequence_process_group: Any = None,
        scatter_idx: int = 2,
        gather_idx: int | None = None,
        sp_stream: Any = None,
        *,
        exchange: Exchange | None = None,
    ) -> None:
        super().__init__()
        if sp_stream is not None:
            raise ValueError(
                f"sp_stream is not supported: communication and computation do not overlap here. "
                f"Got {sp_stream!r}. Leave it out; the result is the same."
            )
        self.local_attn = local_attention
        self.spg = sequence_process_group
        self.scatter_idx = scatter_idx
        self.gather_idx = gather_idx
        self.exchange = exchange

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        batch_dim_idx: int,
        rotary_pos_emb: tuple[Tensor, Tensor] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Attention over the whole sequence, from and to this rank's tokens.

        Args:
          query: `[S/P, B, N, H]` or `[B, S/P, N, H]`, N at least P. `heads_of_ranks` says how
            many of the N each rank has.
          key, value: the same with K heads, K dividing N, and `value` with channels of its own.
          batch_dim_idx: 1 for token-first, 0 for batch-first tensors.
          rotary_pos_emb: cosines and sines `[S, 1, 1, R]` of the rotary embedding of the first R
            channels, applied to query and key in global positions.
          args, kwargs: passed on to the local attention.

        Returns:
          This rank's tokens of the output, of the query's shape with the channels of `value`.

        Raises:
          ValueError: shapes or axes that do not fit, before any communication.
        """
        tokens_idx = 1 - batch_dim_idx
        gather_idx = tokens_idx if self.gather_idx is None else self.gather_idx
        world_size = dist.get_world_size(self.spg)
        _check_axes(self.scatter_idx, gather_idx, batch_dim_idx)
        _check_heads(query, key, value, world_size)

        N, K = query.shape[2], key.shape[2]
        heads, copies = heads_of_ranks(N, K, world_size)
        kv_heads = heads if copies == N // K else _shared(K * copies, world_size)

        def reshard(x: Tensor, scatter_idx: int, gather_idx: int, heads: list[int]) -> Tensor:
            exchange = self.exchange or partial(single_all_to_all, heads=heads)
            out = SeqAllToAll.apply(self.spg, x, scatter_idx, gather_idx, batch_dim_idx, exchange)
            assert isinstance(out, Tensor)
            return out

        key, value = (_repeat_heads(x, copies) for x in (key, value))
        q = reshard(query, self.scatter_idx, gather_idx, heads)
        k, v = (reshard(x, self.scatter_idx, gather_idx, kv_heads) for x in (key, value))
        if rotary_pos_emb is not None:
            q, k = (_rotate(x, *rotary_pos_emb, tokens_idx) for x in (q, k))
        out = self.local_attn(q, k, v, *args, **kwargs)
        expected = (*q.shape[:3], v.shape[3])
        if out.shape != expected:
            raise ValueError(
                f"local_attention returned shape {tuple(out.shape)}, expected that of the query it "
                f"was given, with the channels of the value, {expected}. Return the output alone, "
                f"its axes in the order of the query's."
            )
        return reshard(out, gather_idx, self.scatter_idx, heads)


def _repeat_heads(x: Tensor, copies: int) -> Tensor:
    """Each head repeated side by side; gradients are added in order."""
    return x if copies == 1 else torch.stack([x] * copies, dim=3).flatten(2, 3)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, tokens_idx: int) -> Tensor:
    """Rotary embedding, channels paired across two halves (Su et al. 2021, arXiv:2104.09864)."""
    cos, sin = (table.movedim(0, tokens_idx) for table in (cos, sin))
    rotated, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
    left, right = rotated.chunk(2, dim=-1)
    turned = rotated * cos + torch.cat((-right, left), dim=-1) * sin
    return torch.cat((turned, rest), dim=-1)


def _check_axes(scatter_idx: int, gather_idx: int, batch_dim_idx: int) -> None:
    if batch_dim_idx not in (0, 1):
        raise ValueError(
            f"batch_dim_idx must be 0 or 1, got {batch_dim_idx}. Write 0 for [B, S, N, H], 1 for "
            f"[S, B, N, H]."
        )
    tokens_idx = 1 - batch_dim_idx
    if {scatter_idx, gather_idx} != {2, tokens_idx}:
        raise ValueError(
            f"scatter_idx = {scatter_idx} and gather_idx = {gather_idx} must be the heads and the "
            f"tokens, but with batch_dim_idx = {batch_dim_idx} the heads are axis 2 and the tokens "
            f"axis {tokens_idx}. Use scatter_idx=2, gather_idx={tokens_idx}."
        )


def _check_heads(query: Tensor, key: Tensor, value: Tensor, world_size: int) -> None:
    got = f"Got query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}."
    if not query.ndim == key.ndim == value.ndim == 4:
        raise ValueError(
            f"query, key and value must have 4 axes, the heads being axis 2. {got} Reshape them to "
            f"[B, S, N, H] or [S, B, N, H]."
        )
    if key.shape[:3] != value.shape[:3]:
        raise ValueError(
            f"key and value must have the same shape but for their channels. {got} Repeat or "
            f"project the smaller one."
        )
    N, K = query.shape[2], key.shape[2]
    _check_head_count(N, world_size, got)
    if K == 0 or N % K:
        raise ValueError(
            f"KV heads K = {K} must divide the query heads N = {N}. {got} Give a number of KV "
            f"heads that does."
        )


def _check_head_count(heads: int, world_size: int, got: str) -> None:
    if heads < world_size:
        raise ValueError(
            f"heads N = {heads} are fewer than the {world_size} ranks, so a rank would have none. "
            f"{got} Use at most {heads} ranks."
        )
