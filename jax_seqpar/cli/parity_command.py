"""`seqpar parity`: the same attention on PyTorch ranks and on JAX devices, every bit compared."""

import inspect
import json
import platform
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import jax
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

from .._extras import require, require_torch
from ..bridge.torch_ranks import RankError
from ..parity.checks import Check
from ..parity.html_report import html_report, unfinished_report
from ..parity.inputs import DTYPES, OPTIONAL, Case
from ..parity.plan import Kernels
from ..parity.report import parity_table, summary
from ..parity.run import Result, run_parity
from .console import say, stdout
from .interrupt import stop, stop_soon
from .parity_question import Question, check_timeout
from .places import check_files
from .versions import versions

# Options that a training and a sampler have, too; their sizes are their own.
OF_SAMPLER = ("decode", "json_file")
OF_TRAINING = ("training", "json_file", "timeout")


def _size(help: str, default: int) -> Any:
    return typer.Option(min=1, help=f"{help} Default: {default}.")


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
    report: Annotated[
        Path | None, typer.Option(help="Write a page with pictures of every difference, FILE.html.")
    ] = None,
    save_failing: Annotated[
        Path | None, typer.Option(help="Write inputs and outputs of failing checks here.")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds for the ranks of one degree.")] = 300.0,
    training: Annotated[
        bool, typer.Option("--training", help="A short training in place of attention alone.")
    ] = False,
    decode: Annotated[
        bool, typer.Option("--decode", help="A sampler beside the trainers instead.")
    ] = False,
) -> None:
    """Run the same attention on PyTorch ranks and on JAX devices; compare every bit.

    With --training, run the same steps of training on both, and compare every loss, weight and
    moment. With --decode, sample from a decoder, and compare the log-probability of each token with
    what training forwards find for it.

    Exit status: 0 if all is equal, 1 if anything differs, 2 for sizes or files that do not fit, 3
    if the PyTorch ranks failed, 130 if interrupted.
    """
    require_torch()
    asked = {name: x for name, x in locals().items() if x is not None}
    about = {
        "command": shlex.join(["seqpar", *sys.argv[1:]]),
        "seed": seed,
        "options": json.loads(json.dumps(asked, default=str)),
        "versions": versions(),
        "platform": platform.platform(),
    }
    if training or decode:
        _other(asked, about, json_file, timeout)
        return
    try:
        question = Question.of(asked)
        jax.config.update("jax_num_cpu_devices", max(question.plans))
        _begin_json(json_file, about)
        if report is not None:
            report.write_text(unfinished_report(about), encoding="utf-8")
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from None

    console = stdout()
    for line in question.lines:
        say(console, line, style="bold yellow" if line.startswith("WARNING") else None)
    results = _run(console, question.plans, timeout, save_failing, pictures=report is not None)
    passed = all(result.passed for result in results)
    _print_results(console, results, save_failing)
    if json_file is not None:
        found = [result.to_json() for result in results]
        _write_json(json_file, {"passed": passed, **about, "results": found})
    if report is not None:
        report.write_text(html_report(results, question.lines, about), encoding="utf-8")
    if not passed:
        raise typer.Exit(1)


def _run(
    console: Console,
    plans: dict[int, list[Check]],
    timeout: float,
    save_failing: Path | None,
    *,
    pictures: bool,
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
                say(errors, f"degree {degree}: {len(checks)} checks")
            results += run_parity(
                checks,
                degree,
                timeout=timeout,
                save_failing=save_failing,
                pictures=pictures,
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
        say(console, f"Inputs and outputs of what failed are in {save_failing}")
    say(console, summary(results), style="bold green" if passed else "bold red")


@contextmanager
def _ranks_may_fail(console: Console) -> Iterator[None]:
    before = signal.signal(signal.SIGINT, stop_soon)
    try:
        yield
    except (RankError, TimeoutError) as error:
        say(console, f"The PyTorch ranks failed: {error}")
        raise typer.Exit(3) from None
    except KeyboardInterrupt:
        stop()
    finally:
        signal.signal(signal.SIGINT, before)


def _explain(console: Console, result: Result) -> None:
    head = f"\n{result.name}, degree {result.degree}: {result.verdict}"
    say(console, head, style="bold red")
    if result.error is not None:
        say(console, result.error)
    if result.golden not in (None, result.sha256):
        say(console, f"SHA-256 {result.sha256}, expected {result.golden}")
    for name, report in result.reports.items():
        if not report.equal:
            say(console, f"{name}: {report}")


def _refuse_others(asked: dict[str, Any]) -> None:
    """Raises ValueError for an option that would change nothing of a training or a sampler."""
    if asked["training"] and asked["decode"]:
        raise ValueError(
            f"--training and --decode are two runs, got {asked['training']} and "
            f"{asked['decode']}. Write one of them."
        )
    what, allowed = ("--training", OF_TRAINING) if asked["training"] else ("--decode", OF_SAMPLER)
    options = inspect.signature(parity).parameters.items()
    changed = [name for name, option in options if asked.get(name) != option.default]
    if others := [name for name in changed if name not in allowed]:
        named = ", ".join(f"--{name.replace('_', '-')}" for name in others)
        raise ValueError(f"{what} has its own sizes and arithmetic. Leave out {named}.")


def _other(
    asked: dict[str, Any], about: dict[str, Any], json_file: Path | None, timeout: float
) -> None:
    """A training or a sampler in place of attention: table, verdict and exit status."""
    require("optax")
    from . import sampler_parity, training_parity

    try:
        _refuse_others(asked)
        check_timeout(timeout)
        check_files({"--json": json_file})
        _begin_json(json_file, about)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from None
    console = stdout()
    with _ranks_may_fail(console):
        result: Any = training_parity.run(timeout) if asked["training"] else sampler_parity.run()
    show: Any = training_parity.show if asked["training"] else sampler_parity.show
    show(console, result)
    if json_file is not None:
        _write_json(json_file, {"passed": result.passed, **about, **result.to_json()})
    if not result.passed:
        raise typer.Exit(1)


def _begin_json(file: Path | None, about: dict[str, Any]) -> None:
    """Writes `"passed": False` before a run, so that a run that breaks off leaves no "passed"."""
    if file is not None:
        _write_json(file, {"passed": False, "error": "the run did not end", **about})


def _write_json(file: Path, payload: dict[str, Any]) -> None:
    file.write_text(json.dumps(payload, indent=2) + "\n")
