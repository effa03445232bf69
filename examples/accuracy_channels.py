"""Channels far larger than the others: exact attention with and without scales of channels.

    python examples/accuracy_channels.py

One channel is so many times larger than the others; the rest is standard normal. A number is an
error of the other channels against float64, root mean square, over that of the better of JAX's and
PyTorch's float32 kernels: the median of three seeds.

    value         of value alone
    key           of key, and in query as much smaller: logits are as of ordinary inputs
    query, key    one of query, another one of key: logits are as large as the channels

The scales are those of other inputs of the same kind, as a layer has them from its activations.
"""

from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from accuracy_exact import RESULTS, exact, jax_nn, oracle, with_torch
from distributions import gaussian
from rich.console import Console
from rich.table import Table

from jax_seqpar import exact_attention
from jax_seqpar.exact.channel_scaling import ChannelScales, channel_scales
from jax_seqpar.parity.inputs import NAMES, Arrays, Case

TIMES = (1_000, 10_000, 100_000)
KINDS = {
    "value": {("value", 3): 1},
    "key": {("key", 3): 1, ("query", 3): -1},
    "query, key": {("query", 3): 1, ("key", 5): 1},
}


def draw(kind: str, times: float, case: Case, seed: int) -> Arrays:
    """Standard normal inputs, float32, with channels of a kind enlarged."""
    inputs = gaussian(np.random.default_rng(seed), case)
    for (name, channel), power in KINDS[kind].items():
        inputs[name][..., channel] *= times**power
    return {name: x.astype(np.float32) for name, x in inputs.items()}


@jax.jit
def with_scales(
    query: Any, key: Any, value: Any, grad: Any, scales: ChannelScales
) -> tuple[jax.Array, ...]:
    """Output and gradients of a causal attention of scaled channels."""

    def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        operands = (query * scales.query, key * scales.key, value * scales.value)
        return exact_attention(*operands, is_causal=True) * scales.out

    out, pull = jax.vjp(attend, query, key, value)
    return out, *pull(grad)


def errors(got: Arrays, expected: Arrays, kind: str) -> dict[str, float]:
    """Root mean square of the channels that are enlarged in no operand."""
    enlarged = [channel for _, channel in KINDS[kind]]
    differences = {n: np.delete(got[n] - expected[n], enlarged, axis=3) for n in RESULTS}
    return {n: float(np.sqrt(np.mean(x**2))) for n, x in differences.items()}


def ratios(kind: str, times: float, case: Case, seed: int) -> dict[str, list[float]]:
    """Error ratios of exact attention to the better stock kernel, without and with scales."""
    inputs, others = (draw(kind, times, case, n) for n in (seed, seed + 1))
    scales = channel_scales(*(jnp.asarray(others[name]) for name in NAMES[:3]))
    expected = oracle(inputs)
    stock = [errors(run(inputs), expected, kind) for run in (jax_nn, with_torch)]
    found = {}
    scaled = dict(zip(RESULTS, map(np.asarray, with_scales(**inputs, scales=scales)), strict=True))
    for name, got in {"as they are": exact(inputs), "scaled": scaled}.items():
        own = errors(got, expected, kind)
        found[name] = [own[n] / min(x[n] for x in stock) for n in RESULTS]
    return found


def main(tokens: int = 512, seeds: int = 3) -> None:
    """Prints the table."""
    case = Case(batch=1, tokens=tokens, heads=4, kv_heads=2, head_dim=64)
    table = Table("channel of", "times", "channels", *RESULTS)
    for kind, times in product(KINDS, TIMES):
        of_seeds = [ratios(kind, times, case, seed) for seed in range(0, 2 * seeds, 2)]
        for name in of_seeds[0]:
            row = np.median([found[name] for found in of_seeds], axis=0)
            table.add_row(kind, f"{times:,}", name, *(f"{x:.2f}" for x in row))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
