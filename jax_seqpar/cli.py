"""The `seqpar` command."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import jax

try:
    import typer
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
except ImportError as error:
    raise SystemExit('The seqpar command needs: pip install "jax-seqpar[parity]"') from error

from .bridge.cases import Case
from .bridge.certify import certificate_table, certificates
from .bridge.extras import require_torch
from .bridge.parity import Result, run_parity
from .bridge.plan import DTYPES, Kernels, inputs_by_label, plan
from .bridge.ranks import RankError
from .bridge.report import parity_table, summary

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


def _size(help: str, default: int) -> Any:
    return typer.Option(min=1, help=f"{help} Default: {default}.")


@app.callback()
def seqpar() -> None:
    """Sequence-parallel attention for JAX, compared bit for bit with PyTorch."""


@app.command()
def parity(
    degree: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Devices and ranks; repeat. Default: 1, 2, 4, 8."),
    ] = None,
    kernel: Annotated[
        Kernels,
        typer.Option(help="The attention: exact in each framework, one shared, or plain in each."),
    ] = Kernels.EXACT,
    batch: Annotated[int | None, _size("Sequences.", Case.batch)] = None,
    tokens: Annotated[int | None, _size("Of the whole sequence.", Case.tokens)] = None,
    heads: Annotated[int | None, _size("Query heads.", Case.heads)] = None,
    kv_heads: Annotated[int | None, _size("KV heads.", Case.kv_heads)] = None,
    head_dim: Annotated[int | None, _size("Channels of a head.", Case.head_dim)] = None,
    dtype: Annotated[
        str | None, typer.Option(help=f"{', '.join(DTYPES)}. Default: {Case.dtype}.")
    ] = None,
    causal: Annotated[bool, typer.Option(help="Causal attention.")] = True,
    seed: Annotated[int, typer.Option(help="Of the generated inputs.")] = 0,
    input: Annotated[
        list[Path] | None,
        typer.Option(help="Your own query, key, value (and grad): .npz or .safetensors; repeat."),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the results to this file.")
    ] = None,
    save_failing: Annotated[
        Path | None, typer.Option(help="Write inputs and outputs of failing checks here.")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds for the ranks of one degree.")] = 300.0,
) -> None:
    """Run the same attention on PyTorch ranks and on JAX devices; compare every bit.

    Exit status: 0 if all is equal, 1 if anything differs, 2 for sizes or files that do not fit, 3
    if the PyTorch ranks failed, 130 if interrupted.
    """
    require_torch()
    sizes: dict[str, Any] = dict(
        batch=batch, tokens=tokens, heads=heads, kv_heads=kv_heads, head_dim=head_dim
    )
    given: dict[str, Any] = {
        name: x for name, x in (sizes | {"dtype": dtype}).items() if x is not None
    }
    try:
        if input and given:
            options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise ValueError(f"--input has its own sizes and dtype. Leave out {options}.")
        case = Case(**given, is_causal=causal)
        if json_file is not None and not json_file.parent.is_dir():
            raise ValueError(f"--json {json_file}: there is no folder {json_file.parent}.")
        named = inputs_by_label(case, input or [], seed, kernel)
        plans = {d: plan(d, named, causal, kernel) for d in sorted(set(degree or (1, 2, 4, 8)))}
        jax.config.update("jax_num_cpu_devices", max(plans))
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from None

    console = Console()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    results = []
    with _ranks_may_fail(console), Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("parity", total=sum(map(len, plans.values())))
        for d, checks in plans.items():
            progress.update(task, description=f"degree {d}: PyTorch ranks, then JAX devices")
            results += run_parity(
                checks,
                d,
                timeout=timeout,
                save_failing=save_failing,
                on_result=lambda _: progress.advance(task),
            )
    console.print(parity_table(results))
    for result in results:
        if not result.passed:
            _explain(console, result)
    passed = all(result.passed for result in results)
    console.print(summary(results), style="bold green" if passed else "bold red")
    if json_file is not None:
        payload = {"passed": passed, "results": [result.to_json() for result in results]}
        json_file.write_text(json.dumps(payload, indent=2) + "\n")
    if not passed:
        raise typer.Exit(1)


@app.command()
def certify(
    backend: Annotated[
        str | None, typer.Option(help="cpu, gpu or tpu. Default: JAX's default.")
    ] = None,
) -> None:
    """Ask JAX's backend, and PyTorch, whether exact attention has its bits on this machine.

    Exit status: 0 if both can be trusted, 1 if not, 2 if JAX has no such backend.
    """
    require_torch()
    console = Console()
    try:
        jax.devices(backend)
    except RuntimeError as error:
        raise typer.BadParameter(str(error)) from None
    with console.status("asking"):
        found = certificates(backend)
    console.print(certificate_table(found))
    for certificate in found:
        style = "bold green" if certificate.trusted else "bold red"
        console.print(str(certificate), style=style, markup=False, highlight=False)
    if not all(certificate.trusted for certificate in found):
        raise typer.Exit(1)


@contextmanager
def _ranks_may_fail(console: Console) -> Iterator[None]:
    try:
        yield
    except (RankError, TimeoutError) as error:
        console.print(f"The PyTorch ranks failed: {error}", markup=False, highlight=False)
        raise typer.Exit(3) from None
    except KeyboardInterrupt:
        typer.echo("Interrupted: the PyTorch ranks were stopped.", err=True)
        # JAX compiles on a thread of its own. The usual way out destroys the backend that this
        # thread still uses: SIGSEGV in 5 of 5 interrupted compilations (JAX 0.10.2, CPU).
        os._exit(130)


def _explain(console: Console, result: Result) -> None:
    head = f"\n{result.name}, degree {result.degree}: {result.verdict}"
    console.print(head, style="bold red", markup=False, highlight=False)
    if result.error is not None:
        console.print(result.error, markup=False, highlight=False)
    if result.golden not in (None, result.sha256):
        console.print(f"SHA-256 {result.sha256}, expected {result.golden}", highlight=False)
    for name, report in result.reports.items():
        if not report.equal:
            console.print(f"{name}: {report}", markup=False, highlight=False)
