"""Errors of attentions against float64: `exact_attention` beside the stock kernels.

    python examples/accuracy_exact.py
    python examples/accuracy_exact.py --quick --json accuracy.json

Each error is that of the output or of a gradient against the same inputs in float64, divided by the
largest magnitude of the float64 result: the largest error of an element, and the root mean square.
The gradient of the output is standard normal. The rows `bfloat16` are of inputs rounded to it and
are compared with float64 of those rounded inputs: what a fused kernel gives that takes bfloat16,
adds in float32 and rounds its results to bfloat16.

A ratio is an error of `exact` over that of a stock kernel. `better` and `worse` are, entry by
entry, the smaller and the larger error of JAX and PyTorch in float32. The aim is 1.5.

The inputs are those of `distributions.py`.

A token of `exact_attention` has 32 bits below its largest channel, so beside a channel 10 000 times
as large the others have 19, where float32 keeps 24 of each. The gradients dq and dk of `peak` are
differences that almost vanish: every float32 kernel is far off there.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import torch
import typer
from distributions import DISTRIBUTIONS, Draw
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table
from torch.nn.functional import scaled_dot_product_attention

from jax_seqpar import exact_attention
from jax_seqpar.compare.numpy_conversion import numpy_to_torch, torch_to_numpy
from jax_seqpar.parity.inputs import NAMES, Arrays, Case
from torch_ref.dense import dense_attention

RESULTS = ("out", "dq", "dk", "dv")
MEASURES = ("max", "rms")
AIM = 1.5

Step = Callable[[str], None]
Errors = dict[str, dict[str, float]]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def oracle(inputs: Arrays, block: int = 512) -> Arrays:
    """Returns output and gradients in float64, a block of queries at a time."""
    query, key, value, grad = (numpy_to_torch(inputs[name]).double() for name in NAMES)
    leaves = [key.requires_grad_(), value.requires_grad_()]
    dk, dv = (torch.zeros_like(x) for x in leaves)
    outs, dqs = [], []
    for start in range(0, query.shape[1], block):
        own = slice(start, start + block)
        q = query[:, own].clone().requires_grad_()
        end = start + q.shape[1]
        mask = torch.ones(q.shape[1], end, dtype=torch.bool).tril(start)[None, None]
        out = dense_attention(q, key[:, :end], value[:, :end], mask=mask)
        dq, *parts = torch.autograd.grad(out, (q, *leaves), grad[:, own])
        for total, part in zip((dk, dv), parts, strict=True):
            total += part
        outs.append(out.detach())
        dqs.append(dq)
    results = (torch.cat(outs, 1), torch.cat(dqs, 1), dk, dv)
    return dict(zip(RESULTS, map(torch_to_numpy, results), strict=True))


def with_jax(attention: Callable[..., jax.Array], inputs: Arrays) -> Arrays:
    """Returns output and gradients of a causal attention, compiled."""
    results = map(np.asarray, _run_jax(attention, *(inputs[name] for name in NAMES)))
    return dict(zip(RESULTS, results, strict=True))


@partial(jax.jit, static_argnums=0)
def _run_jax(attention: Callable[..., jax.Array], query: Any, key: Any, value: Any, grad: Any):
    out, pull = jax.vjp(partial(attention, is_causal=True), query, key, value)
    return out, *pull(grad)


def with_torch(inputs: Arrays) -> Arrays:
    """Returns output and gradients of PyTorch's kernel: fused on a CPU, with sums in float32."""
    leaves = [numpy_to_torch(inputs[name]).requires_grad_() for name in NAMES[:3]]
    q, k, v = (x.transpose(1, 2) for x in leaves)
    gqa = q.shape[1] != k.shape[1]
    out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa).transpose(1, 2)
    gradients = torch.autograd.grad(out, leaves, numpy_to_torch(inputs["grad"]))
    return dict(zip(RESULTS, map(torch_to_numpy, (out, *gradients)), strict=True))


def exact(inputs: Arrays) -> Arrays:
    """Returns output and gradients of `exact_attention`."""
    return with_jax(exact_attention, inputs)


def jax_nn(inputs: Arrays) -> Arrays:
    """Returns output and gradients of `jax.nn.dot_product_attention`."""
    return with_jax(jax.nn.dot_product_attention, inputs)


@dataclass(frozen=True)
class Method:
    """Errors of one method on one distribution: a row of the table."""

    run: Callable[[Arrays], Arrays]
    dtype: str


METHODS = {
    "exact": Method(exact, "float32"),
    "jax float32": Method(jax_nn, "float32"),
    "torch float32": Method(with_torch, "float32"),
    "exact bfloat16": Method(exact, "bfloat16"),
    "torch bfloat16": Method(with_torch, "bfloat16"),
}
STOCK = ("jax float32", "torch float32")


def errors(got: Arrays, expected: Arrays) -> Errors:
    """Returns errors by measure and result, relative to the largest magnitude that is expected."""
    found: Errors = {measure: {} for measure in MEASURES}
    for name in RESULTS:
        difference = np.abs(got[name].astype(np.float64) - expected[name])
        size = np.abs(expected[name]).max()
        found["max"][name] = float(difference.max() / size)
        found["rms"][name] = float(np.sqrt(np.mean(difference**2)) / size)
    return found


def measure(draw: Draw, case: Case, seed: int, step: Step = lambda _: None) -> dict[str, Errors]:
    """The errors of every method on one distribution."""
    inputs = draw(np.random.default_rng(seed), case)
    rows: dict[str, Errors] = {}
    for dtype in dict.fromkeys(method.dtype for method in METHODS.values()):
        rounded = {name: x.astype(jax.numpy.dtype(dtype)) for name, x in inputs.items()}
        step(f"float64 of {dtype}")
        expected = oracle(rounded)
        for name, method in METHODS.items():
            if method.dtype == dtype:
                step(name)
                rows[name] = errors(method.run(rounded), expected)
    return rows


def ratios(rows: dict[str, Errors]) -> dict[str, Errors]:
    """Ratios of the errors of exact attention to those of the better and worse float32 kernel."""

    def against(ours: str, theirs: tuple[str, ...], choose: Callable[..., float]) -> Errors:
        return {
            measure: {
                name: rows[ours][measure][name] / choose(rows[row][measure][name] for row in theirs)
                for name in RESULTS
            }
            for measure in MEASURES
        }

    return {
        "exact / better": against("exact", STOCK, min),
        "exact / worse": against("exact", STOCK, max),
        "bf16: ours / theirs": against("exact bfloat16", ("torch bfloat16",), max),
    }


def worst(found: dict[str, Any], row: str, measure: str) -> tuple[float, str]:
    """The largest ratio of all distributions, and where it is."""
    places = (
        (ratio, f"{name} of {distribution}")
        for distribution, part in found["distributions"].items()
        for name, ratio in part["ratios"][row][measure].items()
    )
    return max(places)


def results_table(found: dict[str, Any]) -> Table:
    """Errors and ratios of every distribution, 80 columns wide."""
    title = "Errors against float64, relative to the largest magnitude of the result"
    table = Table(title=title, box=box.SIMPLE, padding=0, show_edge=False, pad_edge=False)
    table.add_column("inputs, method", no_wrap=True)
    for name in RESULTS:
        for measure in MEASURES:
            table.add_column(f"{name}\n{measure}", justify="right", no_wrap=True)
    for name, part in found["distributions"].items():
        table.add_row(f"[bold]{name}[/bold]")
        for kind, shown in (("rows", "{:.0e}"), ("ratios", "{:.2f}")):
            for row, numbers in part[kind].items():
                cells = (numbers[m][result] for result in RESULTS for m in MEASURES)
                table.add_row(f" {row}", *(_styled(x, kind, shown) for x in cells))
        table.add_section()
    return table


def _styled(x: float, kind: str, shown: str) -> str:
    text = shown.format(x) if x < 1000 else f"{x:.0f}"
    return f"[bold red]{text}[/bold red]" if kind == "ratios" and x > AIM else text


def summary(found: dict[str, Any]) -> list[str]:
    """The worst ratio of each kind, and the distributions that miss the aim."""
    lines = []
    for row in ("exact / better", "exact / worse", "bf16: ours / theirs"):
        for measure in MEASURES:
            ratio, where = worst(found, row, measure)
            verdict = "within" if ratio <= AIM else "ABOVE"
            lines.append(f"Worst {row}, {measure}: {ratio:.2f}, {where}: {verdict} {AIM}")
    missed = [
        name
        for name, part in found["distributions"].items()
        if max(x for m in MEASURES for x in part["ratios"]["exact / better"][m].values()) > AIM
    ]
    lines.append(f"Above {AIM} of the better kernel somewhere: {', '.join(missed) or 'none'}")
    return lines


def cases(quick: bool) -> dict[str, Case]:
    """The shapes of every distribution."""
    usual = Case(batch=1, tokens=128 if quick else 1024, heads=4, kv_heads=2, head_dim=64)
    long = replace(usual, tokens=1024 if quick else 16_384, heads=1, kv_heads=1)
    return {name: long if name == "long rows" else usual for name in DISTRIBUTIONS}


@app.command()
def accuracy(
    only: Annotated[
        list[str] | None,
        typer.Option(help=f"Distributions; repeat. Default: {', '.join(DISTRIBUTIONS)}."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the inputs.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Short sequences: seconds.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write every number to this file.")
    ] = None,
) -> None:
    """Errors of attentions against float64, by distribution of the inputs."""
    chosen = list(dict.fromkeys(only or DISTRIBUTIONS))
    for name in chosen:
        if name not in DISTRIBUTIONS:
            raise typer.BadParameter(f"{name!r} is not one of {', '.join(DISTRIBUTIONS)}.")

    console = Console()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    found: dict[str, Any] = {"seed": seed, "distributions": {}}
    with Progress(*columns, console=console, transient=True) as progress:
        oracles = len({method.dtype for method in METHODS.values()})
        task = progress.add_task("", total=len(chosen) * (len(METHODS) + oracles))
        for name in chosen:
            case = cases(quick)[name]

            def step(description: str, name: str = name) -> None:
                progress.update(task, description=f"{name}: {description}", advance=1)

            rows = measure(DISTRIBUTIONS[name], case, seed, step)
            part = {"case": asdict(case), "rows": rows, "ratios": ratios(rows)}
            found["distributions"][name] = part
    console.print(results_table(found))
    for line in summary(found):
        console.print(line, highlight=False)
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    app()
