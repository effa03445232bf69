"""The two reshards as permutations of one tensor whose leading axis is the rank.

No process group: what every rank holds, side by side. The specification in two lines.
"""

from einops import rearrange
from torch import Tensor


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
