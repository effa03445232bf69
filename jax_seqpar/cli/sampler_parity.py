"""The sampler of `seqpar parity --decode`, with its progress and its table."""

import jax
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ..parity.sampler import TRAINERS, SamplerResult, run_sampler
from .console import say

NEW = 16


def run() -> SamplerResult:
    """The sampler and its trainers, while standard error shows how far it is."""
    jax.config.update("jax_num_cpu_devices", max(TRAINERS))
    errors = Console(stderr=True)
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as progress:
        task = progress.add_task("sampling with a cache on four devices", total=2 * NEW)
        return run_sampler(new=NEW, on_step=lambda: progress.advance(task))


def show(console: Console, result: SamplerResult) -> None:
    """A line for each token that was drawn, and the verdict."""
    console.print(_table(result))
    for line in _summary(result):
        say(console, line, style="bold green" if result.passed else "bold red")
    other, count = result.ordinary_different, result.sample.found.size
    say(console, f"With attention in float32 {other} of {count} differ from a trainer's.")


def _table(result: SamplerResult) -> Table:
    names = ("row", "at", "token", "log p", "bits")
    table = Table(*names, *result.trainers, "equal", box=box.SIMPLE, padding=0, pad_edge=False)
    for column in table.columns:
        column.no_wrap, column.justify = True, "right"
    sample = result.sample
    for row, columns in enumerate(sample.drawn):
        for i, position in enumerate(columns):
            bits = [
                f"{x[row, i].view('uint32'):08x}" for x in (sample.found, *result.trainers.values())
            ]
            table.add_row(
                str(row),
                str(position),
                str(sample.tokens[row, position]),
                f"{sample.found[row, i]:.6f}",
                *bits,
                "[green]yes" if len(set(bits)) == 1 else "[bold red]no",
            )
        table.add_section()
    return table


def _summary(result: SamplerResult) -> list[str]:
    found = {name: n for name, n in result.different.items() if n}
    count = result.sample.found.size
    if found:
        lines = [f"{name}: {n} of {count} log-probabilities differ" for name, n in found.items()]
        return [*lines, "NOT EQUAL: the sampler is off the policy of a trainer."]
    return [
        f"EQUAL: {count} log-probabilities of a sampler with a cache on four devices are those of "
        f"{len(result.trainers)} training forwards, 0 bits differ."
    ]
