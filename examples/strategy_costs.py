"""A table of the bytes, memory and waiting of each strategy, by degree and KV heads, from formulas.

    python examples/strategy_costs.py
    python examples/strategy_costs.py --tokens 1048576 --window 4096 --forward
    python examples/strategy_costs.py --bidirectional

One causal attention of 32 query heads of 128 channels in bfloat16, in zigzag order (in contiguous
order with a window), blockwise attention in all. Bytes are those of compiled programs
(`parity_tests/test_strategies_choice.py`). A hybrid is of groups of eight; waiting is at the speed
of a TPU v5e. `--bidirectional` is another table, of rings alone with splash on 16 chips.
"""

from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer
from jax.sharding import AbstractMesh
from rich import box
from rich.console import Console
from rich.table import Table

from jax_seqpar import (
    Blockwise,
    Contiguous,
    Fused,
    Hybrid,
    MeshLayout,
    Ring,
    Zigzag,
    choose_strategy,
)
from jax_seqpar.chips import CHIPS

HEADS, CHANNELS, GROUP = 32, 128, 8
DEGREES = (2, 4, 8, 16, 32, 64)
PER_DEVICE = (256, 512, 1024, 2048, 4096, 8192, 16384)


def main(
    tokens: Annotated[int, typer.Option(min=1, help="A multiple of 128, for 64 devices.")] = 1
    << 17,
    window: Annotated[
        int | None, typer.Option(min=1, help="Keys that a query sees; all if left out.")
    ] = None,
    forward: Annotated[bool, typer.Option(help="Without the backward pass.")] = False,
    bidirectional: Annotated[
        bool, typer.Option("--bidirectional", help="What rings both ways at once save, alone.")
    ] = False,
) -> None:
    """MB that a device receives / MB that it holds at most / ms that it waits."""
    if bidirectional:
        return of_rings()
    order = Zigzag() if window is None else Contiguous()
    if tokens % (2 * DEGREES[-1]):
        raise typer.BadParameter(
            f"{tokens} tokens are no multiple of {2 * DEGREES[-1]}. Write --tokens 131072."
        )
    keywords: dict[str, Any] = {"kernel": Blockwise(), "gradients": not forward, "is_causal": True}
    if window is not None:
        keywords["local_window_size"] = (window - 1, 0)
    columns: dict[str, None] = {}
    rows = []
    for kv_heads in (1, 4, 8, 16):
        query, key = (
            jax.ShapeDtypeStruct((1, tokens, heads, CHANNELS), jnp.bfloat16)
            for heads in (HEADS, kv_heads)
        )
        for degree in DEGREES:
            groups = degree // GROUP
            axes = ("seq",) if groups < 2 else ("outer", "inner")
            mesh = AbstractMesh((degree,) if groups < 2 else (groups, GROUP), axes)
            layout = MeshLayout(tokens=axes, mesh=mesh, order=order)
            chip = CHIPS["TPU v5 lite"]
            found = choose_strategy(query, key, key, layout=layout, chip=chip, **keywords)
            cells = {}
            for x in found.candidates:
                assert x.cost is not None
                if x.strategy == Ring(bidirectional=True):
                    continue  # as many bytes, and nothing to hide where the other waits for none
                name = type(x.strategy).__name__
                if isinstance(x.strategy, Hybrid):
                    name = f"Hybrid({type(x.strategy.outer).__name__})"
                columns[name] = None
                held, waiting = x.cost.memory / 1e6, 1e3 * x.cost.waiting
                cells[name] = f"{x.cost.inside / 1e6:,.0f} / {held:,.0f} / {waiting:,.1f}"
            rows.append((str(kv_heads), str(degree), cells))
    names = sorted(columns, key=len)
    table = Table("K", "P", *names, box=box.SIMPLE)
    for kv_heads, degree, cells in rows:
        table.add_row(kv_heads, degree, *(cells.get(name, "") for name in names))
        if degree == str(DEGREES[-1]):
            table.add_section()
    Console(width=130).print(table)


def of_rings(degree: int = 16) -> None:
    """Seconds of a ring / seconds of a bidirectional one, forward and with gradients."""
    table = Table("chip", "K", "", *(f"{tokens:,}" for tokens in PER_DEVICE), box=box.SIMPLE)
    layout = MeshLayout(mesh=AbstractMesh((degree,), ("seq",)), order=Zigzag())
    for kind, kv_heads in ((x, k) for x in ("TPU v5 lite", "TPU v5") for k in (1, 8, 32)):
        chip = CHIPS[kind]
        for gradients in (False, True):
            ratios = []
            for tokens in PER_DEVICE:
                query, key = (
                    jax.ShapeDtypeStruct((1, degree * tokens, heads, CHANNELS), jnp.bfloat16)
                    for heads in (HEADS, kv_heads)
                )
                options: Any = {"kernel": Fused("tpu"), "chip": chip, "gradients": gradients}
                found = choose_strategy(query, key, key, layout=layout, is_causal=True, **options)
                seconds = {x.strategy: x.cost.seconds for x in found.candidates if x.cost}
                ratios.append(f"{seconds[Ring()] / seconds[Ring(bidirectional=True)]:.2f}")
            table.add_row(chip.name, str(kv_heads), "both" if gradients else "forward", *ratios)
    Console(width=130).print(table)


if __name__ == "__main__":
    typer.run(main)
