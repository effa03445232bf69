"""Layouts of ranks, as permutations of one tensor whose leading axis is the rank.

The tensors of all ranks lie side by side, without a process group. The two reshards of Ulysses are
the specification in two lines; `token_numbers` specifies the token orders of a ring.
"""

from typing import Literal, get_args

import torch
from einops import rearrange
from torch import Tensor

Order = Literal["contiguous", "zigzag", "striped"]


def sequence_to_heads(x: Tensor) -> Tensor:
    """`[P, B, S/P, N, H] -> [P, B, S, N/P, H]`: rank p gets all the tokens of its heads."""
    return rearrange(x, "p b s (q n) h -> q b (p s) n h", q=x.shape[0])


def heads_to_sequence(x: Tensor) -> Tensor:
    """`[P, B, S, N/P, H] -> [P, B, S/P, N, H]`: rank p gets all the heads of its tokens."""
    return rearrange(x, "q b (p s) n h -> p b s (q n) h", p=x.shape[0])


def split_tokens(x: Tensor, world_size: int) -> Tensor:
    """`[B, S, N, H] -> [P, B, S/P, N, H]`: a whole sequence as the ranks hold it."""
    return rearrange(x, "b (p s) n h -> p b s n h", p=world_size)


def join_tokens(x: Tensor) -> Tensor:
    """`[P, B, S/P, N, H] -> [B, S, N, H]`: what the ranks hold as a whole sequence."""
    return rearrange(x, "p b s n h -> b (p s) n h")


def token_numbers(
    order: Order,
    size_per_rank: int,
    rank: int,
    world_size: int,
    device: torch.device | None = None,
    name: str = "x",
) -> Tensor:
    """The numbers in the whole sequence of the tokens that a rank holds, int64 `[size_per_rank]`.

    Args:
      order: "contiguous", rank r holds the r-th of P runs; "zigzag", the runs r and 2P - 1 - r of
        2P, so that every rank has as much to do under a causal mask; "striped", the tokens r,
        r + P, r + 2P and so on.
      size_per_rank: S/P.
      rank, world_size: r and P.
      device: of the tensor that is made here.
      name: of the tensor whose tokens they are, for the error.

    Raises:
      ValueError: an unknown order, or an odd number of tokens per rank in a zigzag.
    """
    own = torch.arange(size_per_rank, device=device)
    if order == "contiguous":
        return rank * size_per_rank + own
    if order == "striped":
        return rank + world_size * own
    if order != "zigzag":
        raise ValueError(f"order = {order!r} is unknown. Write one of {get_args(Order)}.")
    if size_per_rank % 2:
        raise ValueError(
            f"{name} has {size_per_rank} tokens on each of {world_size} ranks, but in a zigzag a "
            f"rank has two runs of one length. Pad the whole sequence from "
            f"{size_per_rank * world_size} to {(size_per_rank + 1) * world_size} tokens, or use "
            f"order='striped'."
        )
    half = size_per_rank // 2
    return torch.cat((rank * half + own[:half], (2 * world_size - 1 - rank) * half + own[:half]))


def split(x: Tensor, order: Order, world_size: int, axis: int = 1) -> Tensor:
    """`[..., S, ...] -> [P, ..., S/P, ...]`: the tokens of an axis as the ranks hold them.

    Raises:
      ValueError: tokens that the ranks do not divide, or as `token_numbers`.
    """
    size = x.shape[axis]
    if size % world_size:
        raise ValueError(
            f"axis {axis} of {size} tokens is not divisible by the {world_size} ranks. Got x "
            f"{tuple(x.shape)}. Pad it to {-(-size // world_size) * world_size}."
        )
    numbers = [
        token_numbers(order, size // world_size, rank, world_size, x.device)
        for rank in range(world_size)
    ]
    return torch.stack([x.index_select(axis, held) for held in numbers])


def join(parts: Tensor, order: Order, axis: int = 1) -> Tensor:
    """`[P, ..., S/P, ...] -> [..., S, ...]`: the inverse of `split`, with its axis."""
    world_size, size = len(parts), parts[0].shape[axis]
    numbers = [token_numbers(order, size, rank, world_size) for rank in range(world_size)]
    place = torch.cat(numbers).argsort().to(parts.device)
    return torch.cat(list(parts), dim=axis).index_select(axis, place)
