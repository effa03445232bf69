"""Which rank holds which tokens of a training step: data parallel times sequence parallel."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ..ulysses import DistributedAttention
from .attention import exact_attention


@dataclass(frozen=True)
class Ranks:
    """Process groups as one rank sees them; by default there is one process.

    everyone: all ranks, over which sums over tokens go.
    sequence: the ranks that share the sequences of this one, in the order of their tokens.
    kv_replicas: those of them that hold the same KV head in the attention.
    """

    everyone: Any = None
    sequence: Any = None
    kv_replicas: Any = None

    def first_token(self, tokens: int) -> int:
        """The position of this rank's first token, of so many that each rank has."""
        return 0 if self.sequence is None else dist.get_rank(self.sequence) * tokens

    def attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Causal attention over the whole sequence, from and to this rank's tokens.

        Args:
          query: `[B, S / P, N, H]`.
          key, value: `[B, S / P, K, H]`.
        """
        attend = partial(exact_attention, is_causal=True, shared_by=self.kv_replicas)
        if self.sequence is None:
            return attend(query, key, value)
        return DistributedAttention(attend, self.sequence)(query, key, value, 0)


def make_ranks(data: int, sequence: int, kv_heads: int) -> Ranks:
    """The groups of `data * sequence` ranks; called by all of them.

    Rank r has the batches of part `r // sequence` and, of those, the tokens of part
    `r % sequence`.

    Raises:
      ValueError: another number of ranks than the process group has, or sequence ranks of which
        KV heads are neither a multiple nor a divisor.
    """
    if data * sequence != dist.get_world_size():
        raise ValueError(
            f"data = {data} times sequence = {sequence} must be the {dist.get_world_size()} ranks. "
            f"Give two numbers with that product."
        )
    if sequence > kv_heads and sequence % kv_heads:
        raise ValueError(
            f"KV heads K = {kv_heads} must divide the {sequence} ranks of a sequence where they "
            f"are fewer. Use fewer ranks."
        )
    of_sequence = _groups(sequence)
    replicas = sequence // kv_heads
    return Ranks(dist.group.WORLD, of_sequence, _groups(replicas) if replicas > 1 else None)


def _groups(size: int) -> Any:
    """This rank's group of so many consecutive ranks; every rank makes every group."""
    starts = range(0, dist.get_world_size(), size)
    groups = [dist.new_group(list(range(start, start + size))) for start in starts]
    return groups[dist.get_rank() // size]
