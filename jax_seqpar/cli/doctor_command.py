"""`seqpar doctor`: what is installed, which devices and kernels there are, and what to change."""

from collections.abc import Callable, Iterable
from typing import Annotated

import jax
import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .console import say, stdout
from .devices import attention, devices, exact_arithmetic
from .finding import Finding, State
from .installed import examine, packages
from .kernels_by_feature import Choices, choices

STYLES = {State.OK: "green", State.NOTE: "yellow", State.FAILS: "bold red"}


def doctor(
    platform: Annotated[
        str | None, typer.Option(help="cpu, gpu or tpu, to see its kernels. Default: this machine.")
    ] = None,
) -> None:
    """Look at what is installed, at devices and kernels, and say what to change.

    Exit status: 0 if attention runs, 1 if something installed does not fit or attention does not
    run, 2 for an unknown platform.
    """
    if platform not in (None, "cpu", "gpu", "tpu"):
        raise typer.BadParameter(f"--platform {platform} is none of cpu, gpu, tpu. Write one.")
    console = stdout()
    found = _findings(Console(stderr=True))
    console.print(_table(found))
    on = platform or _default_platform()
    if on is not None:
        _print_kernels(console, on)
    failing = [finding.subject for finding in found if finding.state is State.FAILS]
    if failing:
        say(console, f"Something does not fit: {', '.join(failing)}.", style="bold red")
        raise typer.Exit(1)
    say(console, "Attention can run here.", style="bold green")


def _findings(progress: Console) -> list[Finding]:
    """All findings, while the terminal shows which of them is being made: it takes 10 seconds."""
    found = []
    for package in packages():
        with progress.status(f"looking at {package.name}"):
            found.append(examine(package))
    steps: dict[str, Callable[[], Iterable[Finding]]] = {
        "looking for devices": devices,
        "running attention on all devices": lambda: [attention()],
        "certifying the arithmetic of exact attention": lambda: [exact_arithmetic()],
    }
    for doing, step in steps.items():
        with progress.status(doing):
            found += step()
    return found


def _default_platform() -> str | None:
    """The platform of JAX's default backend; None if it has none, of which a finding tells."""
    try:
        return jax.default_backend()
    except RuntimeError:
        return None


def _table(found: Iterable[Finding]) -> Table:
    table = Table(box=box.SIMPLE, show_header=False)
    for finding in found:
        style = STYLES[finding.state]
        table.add_row(finding.subject, f"[{style}]{finding.state}[/]", escape(finding.says))
    return table


def _print_kernels(console: Console, platform: str) -> None:
    """The kernel of each feature; a reason that all share is said once."""
    rows = choices(platform)
    reasons = {row.reason for row in rows}
    console.print(_kernel_table(platform, rows, with_reasons=len(reasons) > 1))
    if len(reasons) == 1:
        say(console, f"One reason holds for all: {platform}: {reasons.pop()}")


def _kernel_table(platform: str, rows: Iterable[Choices], *, with_reasons: bool) -> Table:
    table = Table(title=f"Which kernel runs on platform {platform}", box=box.SIMPLE)
    for column in ("attention", "16 bits", "32 bits", *(["why"] if with_reasons else [])):
        table.add_column(column)
    for row in rows:
        reason = [escape(row.reason)] if with_reasons else []
        table.add_row(row.feature, *row.kernels, *reason)
    return table
