"""The `seqpar` command."""

import json
import math
import os
import platform
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import jax

try:
    import typer
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
except ImportError as error:
    raise SystemExit('The seqpar command needs: pip install "jax-seqpar[cli]"') from error

from . import __version__
from ._extras import require_torch
from .bridge.torch_ranks import RankError
from .mask.keywords import from_flat
from .parity.checks import Check
from .parity.inputs import DTYPES, OPTIONAL, Case
from .parity.plan import Kernels, inputs_by_label, plan, understood
from .parity.report import parity_table, summary
from .parity.run import Result, run_parity
from .parity.torch_self_test import certificate_table, certificates

# Without rich's panels, which cut the names of options and break paths at the width of a terminal.
app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _size(help: str, default: int) -> Any:
    return typer.Option(min=1, help=f"{help} Default: {default}.")


def _print_version(asked: bool | None) -> None:
    if asked:
        typer.echo(f"jax-seqpar {__version__}")
        raise typer.Exit


@app.callback()
def seqpar(
    version: Annotated[
        bool | None,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = None,
) -> None:
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
    window: Annotated[
        tuple[int, int] | None,
        typer.Option(help="Tokens that a query sees before and after its own position."),
    ] = None,
    scale: Annotated[
        float | None, typer.Option(help="Scale of the logits. Default: 1 / sqrt(head dimension).")
    ] = None,
    soft_cap: Annotated[
        float | None, typer.Option(help="Logits become cap * tanh(logits / cap).")
    ] = None,
    query_offset: Annotated[int, typer.Option(help="Position of the first query.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the generated inputs.")] = 0,
    input: Annotated[
        list[Path] | None,
        typer.Option(
            help="Your own query [B, S, N, H], key, value [B, S, K, H] and, optionally, grad and "
            f"{', '.join(OPTIONAL)}, in a file .npz or .safetensors; repeat."
        ),
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
    asked = {name: x for name, x in locals().items() if x is not None}
    about = {
        "seed": seed,
        "options": json.loads(json.dumps(asked, default=str)),
        "versions": _versions(),
        "platform": platform.platform(),
    }
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
        if not 0 < timeout < math.inf:
            raise ValueError(
                f"--timeout must be a positive number of seconds, got {timeout}. Write 300."
            )
        _refuse_places(json_file, save_failing)
        spec = from_flat(
            {
                "scale": scale,
                "is_causal": causal,
                "query_offset": query_offset,
                "local_window_size": window,
                "logits_soft_cap": soft_cap,
            }
        )
        named = inputs_by_label(Case(**given), input or [], seed, kernel)
        plans = {d: plan(d, named, spec, kernel, seed) for d in sorted(set(degree or (1, 2, 4, 8)))}
        jax.config.update("jax_num_cpu_devices", max(plans))
        if json_file is not None:
            # Of a run before, or of one that does not get to its end, nobody is to read "passed".
            _write_json(json_file, {"passed": False, "error": "the run did not end", **about})
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from None

    console = _stdout()
    for label, inputs in (named if input else {"generated": named["grouped"]}).items():
        for line in understood(label, inputs, spec, kernel):
            style = "bold yellow" if line.startswith("WARNING") else None
            _say(console, line, style=style)
    results = _run(console, plans, timeout, save_failing)
    passed = all(result.passed for result in results)
    _print_results(console, results, save_failing)
    if json_file is not None:
        found = [result.to_json() for result in results]
        _write_json(json_file, {"passed": passed, **about, "results": found})
    if not passed:
        raise typer.Exit(1)


@app.command()
def certify(
    backend: Annotated[
        str | None, typer.Option(help="cpu, gpu or tpu. Default: JAX's default.")
    ] = None,
) -> None:
    """Ask JAX's backend, and PyTorch, whether exact attention has its bits on this machine.

    Without PyTorch, JAX alone is asked. Exit status: 0 if all that was asked can be trusted, 1 if
    not, 2 if JAX has no such backend.
    """
    console = _stdout()
    try:
        jax.devices(backend)
    except RuntimeError as error:
        raise typer.BadParameter(str(error)) from None
    with console.status("asking"):
        found = certificates(backend)
    console.print(certificate_table(found))
    for certificate in found:
        style = "bold green" if certificate.trusted else "bold red"
        _say(console, str(certificate), style=style)
    if find_spec("torch") is None:
        _say(console, 'PyTorch is not installed, so it was not asked: "jax-seqpar[parity]" has it.')
    if not all(certificate.trusted for certificate in found):
        raise typer.Exit(1)


def _run(
    console: Console, plans: dict[int, list[Check]], timeout: float, save_failing: Path | None
) -> list[Result]:
    """Runs the checks of each degree, with their progress on standard error."""
    errors = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    shown = errors.is_terminal
    results = []
    with (
        _ranks_may_fail(console),
        Progress(*columns, console=errors, transient=True, disable=not shown) as progress,
    ):
        task = progress.add_task("parity", total=sum(map(len, plans.values())))
        for degree, checks in plans.items():
            progress.update(task, description=f"degree {degree}: PyTorch ranks, then JAX devices")
            if not shown:
                _say(errors, f"degree {degree}: {len(checks)} checks")
            results += run_parity(
                checks,
                degree,
                timeout=timeout,
                save_failing=save_failing,
                on_result=lambda _: progress.advance(task),
            )
    return results


def _print_results(console: Console, results: list[Result], save_failing: Path | None) -> None:
    """The table, an explanation of each check that failed, and the sum of all."""
    console.print(parity_table(results, console.width))
    for result in results:
        if not result.passed:
            _explain(console, result)
    passed = all(result.passed for result in results)
    if not passed and save_failing is not None:
        _say(console, f"Inputs and outputs of what failed are in {save_failing}")
    _say(console, summary(results), style="bold green" if passed else "bold red")


@contextmanager
def _ranks_may_fail(console: Console) -> Iterator[None]:
    before = signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    except (RankError, TimeoutError) as error:
        _say(console, f"The PyTorch ranks failed: {error}")
        raise typer.Exit(3) from None
    except KeyboardInterrupt:
        _stop()
    finally:
        signal.signal(signal.SIGINT, before)


def _interrupt(number: int, frame: Any) -> None:
    """Raises KeyboardInterrupt; should nobody see it, the program ends after five seconds.

    What is raised while JAX traces and compiles can be lost: on a busy machine a Ctrl-C was, in two
    runs of the tests (JAX 0.10.2), and the command went on to its end.
    """
    timer = threading.Timer(5, _stop)
    timer.daemon = True
    timer.start()
    raise KeyboardInterrupt


def _stop() -> None:
    """Ends the program; ranks that are still there see it and end, too."""
    show_cursor = b"\x1b[?25h" if os.isatty(2) else b""
    os.write(2, show_cursor + b"Interrupted: the PyTorch ranks were stopped.\n")
    # JAX compiles on a thread of its own. The usual way out destroys the backend that this thread
    # still uses: SIGSEGV in 5 of 5 interrupted compilations (JAX 0.10.2, CPU).
    os._exit(130)


def _explain(console: Console, result: Result) -> None:
    head = f"\n{result.name}, degree {result.degree}: {result.verdict}"
    _say(console, head, style="bold red")
    if result.error is not None:
        _say(console, result.error)
    if result.golden not in (None, result.sha256):
        _say(console, f"SHA-256 {result.sha256}, expected {result.golden}")
    for name, report in result.reports.items():
        if not report.equal:
            _say(console, f"{name}: {report}")


def _stdout() -> Console:
    """Standard output, as wide as its terminal or COLUMNS; a file or a pipe has no width."""
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 10_000
    return console


def _say(console: Console, text: str, style: str | None = None) -> None:
    """Prints text as it is; a line is broken by the terminal alone, so that paths stay whole."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _refuse_places(json_file: Path | None, save_failing: Path | None) -> None:
    """Raises ValueError for a file or folder that could not be written after the run."""
    if json_file is not None and json_file.is_dir():
        raise ValueError(f"--json {json_file} is a folder. Write the name of a file.")
    if json_file is not None and not json_file.parent.is_dir():
        raise ValueError(
            f"--json {json_file}: there is no folder {json_file.parent}. Make it, or name another."
        )
    for place in (save_failing, *save_failing.parents) if save_failing is not None else ():
        if place.exists() and not place.is_dir():
            raise ValueError(
                f"--save-failing {save_failing}: {place} is a file, not a folder. Write the name "
                f"of a folder."
            )


def _write_json(file: Path, payload: dict[str, Any]) -> None:
    file.write_text(json.dumps(payload, indent=2) + "\n")


def _versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that bits may depend on; None where there is none."""
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "jax-seqpar": __version__,
    }
    for package in ("jax", "jaxlib", "numpy", "torch"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found
