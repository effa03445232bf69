"""Pictures of results that the benchmarks wrote with `--json`, and of bytes by strategy.

python examples/benchmark_attention.py kernels --json kernels.json
python examples/plot_benchmarks.py ratios kernels.json
python examples/accuracy_exact.py --json accuracy.json
python examples/plot_benchmarks.py accuracy accuracy.json
python examples/plot_benchmarks.py traffic
python examples/plot_benchmarks.py break-even
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from jax_seqpar import AllGatherKV, Contiguous, Mask, Ring, Ulysses
from jax_seqpar.chips import UNKNOWN
from jax_seqpar.strategies.cost import Group, Layer, cost_of

# Sizes for `traffic`: the attention of a Llama 3 8B layer with 32K tokens, in bfloat16.
TOKENS, HEADS, HEAD_DIM, ITEMSIZE = 32_768, 32, 128, 2
DEGREES = (2, 4, 8, 16, 32)
KV_HEADS = (8, 2, 1)
# Sizes for `break-even`.
ALL_DEGREES, ALL_KV_HEADS = (2, 4, 8, 16, 32, 64), (1, 2, 4, 8, 16, 32)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Found = Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="What --json wrote.")]
Out = Annotated[Path, typer.Option(help="The PNG.")]


@app.command()
def ratios(found: Found, out: Out = Path("examples/kernel_ratios.png")) -> None:
    """Draws seconds of each kernel by tokens, as a ratio to the baseline of the same run."""
    results = json.loads(found.read_text())
    rows = results["rows"]
    titles = {"forward": "forward", "both": "forward and gradients"}
    with figure(out, columns=2) as panels:
        for axes, (part, title) in zip(panels, titles.items(), strict=True):
            for what in dict.fromkeys(row["what"] for row in rows):
                points = [(r["tokens"], r[part]["ratio"]) for r in rows if r["what"] == what]
                axes.plot(*zip(*points, strict=True), marker="o", label=what)
            axes.set(title=title, xlabel="tokens", xscale="log", yscale="log")
            axes.set_xticks(sorted({row["tokens"] for row in rows}))
            axes.set_yticks([0.5, 1, 2, 4, 8])
            label_with_numbers(axes)
        panels[0].set(ylabel=f"time, ratio to {results['baseline']}")
        panels[0].legend(frameon=False)


@app.command()
def accuracy(found: Found, out: Out = Path("examples/exact_accuracy.png")) -> None:
    """Draws the relative rms error of each float32 attention by distribution."""
    parts = json.loads(found.read_text())["distributions"]
    methods = [name for name in next(iter(parts.values()))["rows"] if "bfloat16" not in name]
    with figure(out, columns=2) as panels:
        for axes, result in zip(panels, ("out", "dk"), strict=True):
            for name in methods:
                errors = [part["rows"][name]["rms"][result] for part in parts.values()]
                axes.plot(errors, list(parts), marker="o", linestyle="none", label=name)
            titles = {"out": "output", "dk": "gradient of the key"}
            axes.set(title=titles[result], xlabel="relative rms error", xscale="log")
            axes.grid(axis="y", alpha=0.3)
        panels[1].set(yticklabels=[])
        panels[1].legend(frameon=False, loc="lower right")


@app.command()
def traffic(out: Out = Path("examples/strategy_traffic.png")) -> None:
    """Draws the MB that a device receives in a forward pass, by degree, of each strategy."""
    query = (1, TOKENS, HEADS, HEAD_DIM)
    with figure(out, columns=len(KV_HEADS)) as panels:
        for axes, kv_heads in zip(panels, KV_HEADS, strict=True):
            key = (1, TOKENS, kv_heads, HEAD_DIM)
            for strategy in (Ulysses(), AllGatherKV()):
                sent = [
                    strategy.traffic(query, key, key, degree=P, itemsize=ITEMSIZE) / 1e6
                    for P in DEGREES
                ]
                axes.plot(DEGREES, sent, marker="o", label=type(strategy).__name__)
            axes.set(title=f"{kv_heads} KV heads", xlabel="degree", xscale="log", yscale="log")
            axes.set_xticks(DEGREES)
            label_with_numbers(axes)
        panels[0].set(ylabel="MB received by a device")
        panels[0].legend(frameon=False)


@app.command()
def break_even(out: Out = Path("examples/strategy_break_even.png")) -> None:
    """Draws bytes that strategies receive as a multiple of Ulysses', by degree and KV heads.

    Forward the multiple is below 1 where K P < N + K': of N query and K KV heads, P devices, and
    the K' KV heads that Ulysses sends.
    """
    titles = {
        (AllGatherKV(), False): "AllGatherKV, and Ring forward: less where K P < N + K'",
        (Ring(), True): "Ring, forward and backward",
    }
    with figure(out, columns=2) as panels:
        for axes, ((strategy, gradients), title) in zip(panels, titles.items(), strict=True):
            ratios = [
                [
                    received(strategy, K, P, gradients) / received(Ulysses(), K, P, gradients)
                    for P in ALL_DEGREES
                ]
                for K in ALL_KV_HEADS
            ]
            draw_ratios(axes, ratios)
            axes.set(title=title, xlabel="devices P")
        panels[0].set(ylabel="KV heads K")
        panels[0].figure.suptitle(
            f"Bytes that a device receives, as a multiple of Ulysses' ({HEADS} query heads): "
            f"below the line they are fewer"
        )


def received(strategy: Any, kv_heads: int, degree: int, gradients: bool) -> int:
    """Bytes that a device receives in one layer."""
    query, key = ((1, TOKENS, heads, HEAD_DIM) for heads in (HEADS, kv_heads))
    layer = Layer(query, key, key, ITEMSIZE, Mask(), Contiguous(), gradients)
    return cost_of(strategy, layer, Group((degree,), (degree,)), UNKNOWN, 1.0).inside


def draw_ratios(axes: Any, ratios: list[list[float]]) -> None:
    """Numbers in cells, blue below 1 and red above, with a line between the two."""
    from math import log2

    logs = [[max(min(log2(x), 3), -3) for x in row] for row in ratios]
    axes.imshow(logs, cmap="RdBu_r", vmin=-4.5, vmax=4.5, origin="lower", aspect="auto")
    for k, row in enumerate(ratios):
        for p, x in enumerate(row):
            axes.text(p, k, f"{x:.2f}" if x < 0.995 else f"{x:.2g}", ha="center", va="center")
            right = p + 1 < len(row) and (x < 1) != (row[p + 1] < 1)
            above = k + 1 < len(ratios) and (x < 1) != (ratios[k + 1][p] < 1)
            if right:
                axes.plot([p + 0.5] * 2, [k - 0.5, k + 0.5], color="black", linewidth=2)
            if above:
                axes.plot([p - 0.5, p + 0.5], [k + 0.5] * 2, color="black", linewidth=2)
    axes.set_xticks(range(len(ALL_DEGREES)), ALL_DEGREES)
    axes.set_yticks(range(len(ALL_KV_HEADS)), ALL_KV_HEADS)
    axes.tick_params(length=0)


@contextmanager
def figure(out: Path, columns: int) -> Iterator[Any]:
    """Panels side by side, written as a PNG at the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn, panels = pyplot.subplots(
        1, columns, figsize=(9, 3.6), sharey=columns > 2, layout="constrained"
    )
    yield panels
    drawn.savefig(out, dpi=120)
    pyplot.close(drawn)


def label_with_numbers(axes: Any) -> None:
    """Writes the numbers at ticks as they are, not as powers of ten."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    def text(x: float, _: int) -> str:
        return f"{x / 1024:g}K" if x >= 1024 and x % 1024 == 0 else f"{x:g}"

    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(text))
        axis.set_minor_formatter(NullFormatter())


if __name__ == "__main__":
    app()
