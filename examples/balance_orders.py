"""Counts the load imbalance of the orders of tokens in a ring, in blocks of queries and keys.

    python examples/balance_orders.py

In each round of a ring a device computes the blocks of its queries by the keys that are there in
which some query attends to some key; the round takes as long as the device with the most. Nothing
is timed and no accelerator is needed. The imbalance is the sum over rounds of the largest count,
divided by the mean of all devices; computed by needed is how many blocks that is, by those of the
contiguous order.
"""

from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from jax_seqpar import Contiguous, Striped, TokenOrder, Zigzag

ORDERS = {"contiguous": Contiguous(), "zigzag": Zigzag(), "striped": Striped()}
app = typer.Typer(add_completion=False)


def masks(tokens: int, seed: int = 0) -> dict[str, np.ndarray]:
    """`[S, S]` by name: causal, a causal window of an eighth, 13 documents of random lengths."""
    t, s = np.arange(tokens)[:, None], np.arange(tokens)[None]
    causal = s <= t
    ends = np.sort(np.random.default_rng(seed).choice(np.arange(1, tokens), 12, replace=False))
    document = np.searchsorted(ends, np.arange(tokens), side="right")
    window = tokens // 8
    return {
        "causal": causal,
        f"window {window}": causal & (t - s <= window),
        "13 documents": causal & (document[:, None] == document[None]),
    }


def blocks_of_rounds(allowed: np.ndarray, order: TokenOrder, degree: int, block: int) -> np.ndarray:
    """`[rounds, devices]`: the blocks that each device computes in each round."""
    tokens = len(allowed)
    place = order.permutation(tokens, degree)
    blocks = tokens // degree // block
    seen = allowed[place][:, place].reshape(degree, blocks, block, degree, blocks, block)
    count = seen.any((2, 5)).sum((1, 3))  # [devices, devices]
    ranks = np.arange(degree)
    return np.stack([count[ranks, (ranks - distance) % degree] for distance in range(degree)])


@app.command()
def main(
    tokens: Annotated[int, typer.Option(help="Of the sequence.")] = 4096,
    degree: Annotated[int, typer.Option(help="Devices of the ring.")] = 16,
    block: Annotated[int, typer.Option(help="Tokens of a block.")] = 64,
) -> None:
    """Load imbalance by mask and order."""
    if tokens % (2 * degree * block):
        raise typer.BadParameter(
            f"{tokens} tokens are not whole blocks of {block} in two halves on {degree} devices. "
            f"Write a multiple of {2 * degree * block}."
        )
    table = Table(title=f"{tokens} tokens on {degree} devices, blocks of {block}")
    for column in ("mask", "order", "imbalance", "rounds nobody needs", "computed / needed"):
        table.add_column(column)
    for mask, allowed in masks(tokens).items():
        needed = blocks_of_rounds(allowed, Contiguous(), degree, block).sum()
        for name, order in ORDERS.items():
            count = blocks_of_rounds(allowed, order, degree, block)
            imbalance = count.max(1).sum() / (count.sum() / degree)
            empty = int((count.sum(1) == 0).sum())
            more = count.sum() / needed
            table.add_row(mask, name, f"{imbalance:.2f}", str(empty), f"{more:.2f}")
    Console().print(table)


if __name__ == "__main__":
    app()
