"""`seqpar plan`: what an attention or a train step costs on machines that are not here."""

import json
import os
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from ..plan.decoder import Decoder
from ..plan.report import Plan
from .console import say, stdout
from .plan_chart import chart
from .plan_question import DTYPES, POINTS, STRATEGIES, TOKENS, Question
from .plan_table import print_plan, sweep_table


def _size(help: str, default: int) -> Any:
    return typer.Option(min=1, help=f"{help} Default: {default}.")


def plan(
    what: Annotated[str, typer.Argument(help="layer, decoder, or FILE.py:function.")],
    topology: Annotated[
        str, typer.Option(help='"v5e:4x4", v4 to tpu7x; "h100:8"; "a100.json:8"; "cpu:8".')
    ],
    slices: Annotated[int, typer.Option(help="Slices of that topology, or hosts of GPUs.")] = 1,
    mesh: Annotated[
        str | None,
        typer.Option(
            help="Axes, as data=2,seq=8: data shares the batch, tensor the heads, others tokens."
        ),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            help=f"Tokens of a sequence: 128K, 1M. Default: {TOKENS}; a function is called without "
            f"them unless they are given."
        ),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Sequences. Default: one a data group.")
    ] = None,
    heads: Annotated[int | None, _size("Query heads.", Decoder.heads)] = None,
    kv_heads: Annotated[int | None, _size("KV heads.", Decoder.kv_heads)] = None,
    head_dim: Annotated[int | None, _size("Channels of a head.", Decoder.head_dim)] = None,
    dtype: Annotated[str | None, typer.Option(help=f"{', '.join(DTYPES)}. Default: bf16.")] = None,
    strategy: Annotated[
        str | None, typer.Option(help=f"{', '.join(STRATEGIES)}, auto. Default: ulysses.")
    ] = None,
    train: Annotated[
        bool | None,
        typer.Option(help="With gradients; of a decoder a whole step. Default: --no-train."),
    ] = None,
    layers: Annotated[int | None, _size("Layers of the decoder.", Decoder.layers)] = None,
    features: Annotated[int | None, _size("Features of the decoder.", Decoder.features)] = None,
    hidden: Annotated[
        int | None, _size("Hidden features of the decoder's MLP.", Decoder.hidden)
    ] = None,
    vocabulary: Annotated[
        str | None,
        typer.Option(help=f"Vocabulary of the decoder. Default: {Decoder.vocabulary}."),
    ] = None,
    tiles: Annotated[
        int | None,
        _size("Tiles of a device's tokens, in the decoder's MLP and loss.", Decoder.tiles),
    ] = None,
    offload: Annotated[
        bool | None,
        typer.Option(
            help="Keep the inputs of the decoder's layers in the host's memory. Default: "
            "--no-offload."
        ),
    ] = None,
    find_largest: Annotated[
        bool | None, typer.Option("--largest", help="Find the longest sequence that fits.")
    ] = None,
    step: Annotated[
        str | None,
        typer.Option(
            help="Unit of --largest in tokens. Default: an eighth of --tokens, rounded down to a "
            "multiple of the devices that share them."
        ),
    ] = None,
    sweep: Annotated[
        str | None, typer.Option(help="tokens, twice as many each time; or degree.")
    ] = None,
    points: Annotated[int | None, _size("Plans of --sweep tokens.", POINTS)] = None,
    overlap: Annotated[
        bool | None,
        typer.Option(help="With jax_seqpar.compiler_options, for asynchronous transfers."),
    ] = None,
    compiled: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile", help="Ask the compiler, or only count. Default: --compile."
        ),
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds for each program.")] = 600.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the plan here.")] = None,
    png: Annotated[Path | None, typer.Option(help="A chart of --sweep or --largest.")] = None,
    dump: Annotated[Path | None, typer.Option(help="A folder for the compiled program.")] = None,
) -> None:
    """Costs on TPUs and GPUs that are not here: memory, transfers, FLOPs, seconds at least.

    layer is one causal attention, decoder a model of the shape of Llama; the options set the
    sizes of both; a function of a file returns a function and the shapes of its arguments.

    Exit status: 0 with an answer, 2 without one and a sentence that says why: out of memory, a
    compiler that is missing, aborts or takes too long, sizes that do not fit.
    """
    given = locals()
    try:
        plans, against = Question(**given).plans()
        _show(stdout(), plans, against, strategy == "auto")
        _write(json_file, plans, single=against is None)
        if png is not None:
            chart(plans, against or "tokens", png)
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        _stop(str(error))
    for one in plans:
        if one.failure is not None and (against is None or one.fits is None):
            _stop(one.failure)


def _show(console: Console, plans: list[Plan], against: str | None, automatic: bool) -> None:
    if against is not None:
        console.print(sweep_table(plans, against))
        taken = dict.fromkeys(x.choice.strategy for x in plans if x.choice is not None)
        if automatic and taken:
            say(console, f"strategy, by choose_strategy: {', '.join(taken)}")
    elif plans[0].failure is None:
        print_plan(console, plans[0])


def _write(file: Path | None, plans: list[Plan], single: bool) -> None:
    if file is None:
        return
    found = [json.loads(x.to_json()) for x in plans]
    file.write_text(json.dumps(found[0] if single else found, indent=2) + os.linesep)


def _stop(sentence: str) -> NoReturn:
    """Ends with status 2 and one sentence."""
    say(Console(stderr=True), " ".join(sentence.split()))
    raise typer.Exit(2)
