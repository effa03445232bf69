"""Ranks of a training step and the tokens that each holds: data times sequence parallel."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ..dropout import head_keys
from ..ulysses import DistributedAttention, heads_of_ranks
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

    def first_sequence(self, sequences: int) -> int:
        """The number of this rank's first sequence, of so many that each rank has."""
        if self.sequence is None:
            return 0
        return dist.get_rank(self.everyone) // dist.get_world_size(self.sequence) * sequences

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        dropout_rate: float = 0.0,
        rng: Tensor | None = None,
    ) -> Tensor:
        """Causal attention over the whole sequence, from and to this rank's tokens.

        Args:
          query: `[B, S / P, N, H]`.
          key, value: `[B, S / P, K, H]`.
          dropout_rate: the share of the weights that is dropped.
          rng: `(2,)`, the key of the whole attention, of the sequences and heads of all ranks.
        """
        (B, _, N, _), K = query.shape, key.shape[2]
        options: dict[str, Any] = {"is_causal": True, "shared_by": self.kv_replicas}
        if rng is not None:
            first = self.first_sequence(B)
            keys = head_keys(rng, first + B, N)[first:, self._heads(N, K)]
            options |= {"dropout_rate": dropout_rate, "dropout_rng": keys}
        attend = partial(exact_attention, **options)
        if self.sequence is None:
            return attend(query, key, value)
        return DistributedAttention(attend, self.sequence)(query, key, value, 0)

    def _heads(self, N: int, K: int) -> slice:
        """The query heads whose attention this rank computes."""
        if self.sequence is None:
            return slice(None)
        rank = dist.get_rank(self.sequence)
        heads, _ = heads_of_ranks(N, K, dist.get_world_size(self.sequence))
        return slice(sum(heads[:rank]), sum(heads[: rank + 1]))


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
