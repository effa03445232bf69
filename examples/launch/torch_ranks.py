"""Trains the PyTorch reference on the ranks that torchrun starts: the same bits on any number.

torchrun --nproc-per-node 2 examples/launch/torch_ranks.py
torchrun --nnodes 2 --node-rank 0 --nproc-per-node 1 --rdzv-endpoint HOST:29500 \
    --rdzv-backend c10d examples/launch/torch_ranks.py          # on each host, with its number
"""

import struct

import torch
import torch.distributed as dist

from torch_ref.exact.decoder import Decoder
from torch_ref.exact.optimizer import adamw_numbers
from torch_ref.exact.ranks import make_ranks
from torch_ref.exact.training_step import first_state, step

STEPS = 3
TOKENS = 32
DECODER = Decoder(vocabulary=64, width=16, layers=1, heads=4, kv_heads=2, head_dim=4, hidden=32)


def main() -> None:
    """Each rank has its part of the tokens; rank 0 prints."""
    dist.init_process_group("gloo")
    rank, degree = dist.get_rank(), dist.get_world_size()
    ranks = make_ranks(1, degree, DECODER.kv_heads)
    generator = torch.Generator().manual_seed(0)
    shapes = DECODER.shapes().items()
    state = first_state({n: torch.randn(s, generator=generator) / 4 for n, s in shapes})
    for number in range(1, STEPS + 1):
        text = torch.randint(DECODER.vocabulary, (2, TOKENS + 1), generator=generator)
        batch = text[:, :-1].chunk(degree, 1)[rank], text[:, 1:].chunk(degree, 1)[rank]
        numbers = adamw_numbers(number, 1e-2)
        loss, state = step(DECODER, state, [batch], numbers, largest_norm=1.0, ranks=ranks)
        if rank == 0:
            bits = struct.pack(">f", loss.item()).hex()
            print(f"step {number}: loss {loss.item():.6f}, bits {bits}", flush=True)
    # Without both lines a rank that ends first takes the connections of the others with it.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
