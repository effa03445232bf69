"""`seqpar plan`: what an attention or a train step costs on machines that are not here."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NoReturn

import jax.numpy as jnp
import typer
from rich.console import Console

from .. import compiler_options
from ..mesh_layout import MeshLayout, names
from ..plan.answer import Request
from ..plan.decoder import Decoder
from ..plan.largest import largest
from ..plan.machine import Machine, devices_of_slice
from ..plan.report import Plan
from ..plan.targets import AttentionLayer, DecoderStep, FromFile, Target
from ..plan.worker import ask
from ..strategies import AllGatherKV, Hybrid, Ring, Strategy, Ulysses
from .console import say, stdout
from .plan_chart import chart, require_matplotlib
from .plan_sizes import mesh_of, size_of, tokens_as_text
from .plan_table import print_plan, sweep_table

DTYPES = {"bf16": jnp.bfloat16, "f16": jnp.float16, "f32": jnp.float32}
STRATEGIES: dict[str, Strategy] = {
    "ulysses": Ulysses(),
    "ulysses-2": Ulysses(2),
    "ulysses-4": Ulysses(4),
    "ulysses-4-in-turn": Ulysses(4, overlap=False),
    "ring": Ring(),
    "ring-bidirectional": Ring(bidirectional=True),
    "all-gather": AllGatherKV(),
    "hybrid-ring": Hybrid(Ring()),
    "hybrid-all-gather": Hybrid(AllGatherKV()),
}


def plan(
    what: Annotated[str, typer.Argument(help="layer, decoder, or FILE.py:function.")],
    topology: Annotated[
        str, typer.Option(help='"v5e:4x4", v4 to tpu7x; "h100:8"; "a100.json:8"; "cpu:8".')
    ],
    slices: Annotated[int, typer.Option(help="Of that topology, or hosts of GPUs.")] = 1,
    mesh: Annotated[
        str | None,
        typer.Option(
            help="Axes, as data=2,seq=8: data shares the batch, tensor the heads, others tokens."
        ),
    ] = None,
    tokens: Annotated[str, typer.Option(help="Of a sequence: 128K, 1M.")] = "128K",
    batch: Annotated[
        int | None, typer.Option(min=1, help="Sequences. Default: one a data group.")
    ] = None,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 32,
    kv_heads: Annotated[int, typer.Option(help="KV heads.")] = 8,
    head_dim: Annotated[int, typer.Option(help="Channels of a head.")] = 128,
    dtype: Annotated[str, typer.Option(help=", ".join(DTYPES))] = "bf16",
    strategy: Annotated[str, typer.Option(help=f"{', '.join(STRATEGIES)}, auto.")] = "ulysses",
    train: Annotated[bool, typer.Option(help="With gradients; of a decoder a whole step.")] = False,
    layers: Annotated[int, typer.Option(min=1, help="Of the decoder.")] = 1,
    features: Annotated[int, typer.Option(min=1, help="Of the decoder.")] = 4096,
    hidden: Annotated[int, typer.Option(min=1, help="Features of the decoder's MLP.")] = 14336,
    vocabulary: Annotated[str, typer.Option(help="Of the decoder.")] = "128256",
    tiles: Annotated[int, typer.Option(help="Of a device's tokens, in MLP and loss.")] = 16,
    offload: Annotated[
        bool, typer.Option(help="The inputs of the decoder's layers, to the host's memory.")
    ] = False,
    find_largest: Annotated[
        bool, typer.Option("--largest", help="The longest sequence that fits.")
    ] = False,
    step: Annotated[str | None, typer.Option(help="Of --largest: its tokens' unit.")] = None,
    sweep: Annotated[
        str | None, typer.Option(help="tokens, twice as many each time; or degree.")
    ] = None,
    points: Annotated[int, typer.Option(help="Of --sweep tokens.")] = 4,
    overlap: Annotated[
        bool, typer.Option(help="With jax_seqpar.compiler_options, for asynchronous transfers.")
    ] = False,
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Ask the compiler, or only count.")
    ] = True,
    timeout: Annotated[float, typer.Option(help="Seconds for each program.")] = 600.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the plan here.")] = None,
    png: Annotated[Path | None, typer.Option(help="A chart of --sweep or --largest.")] = None,
    dump: Annotated[Path | None, typer.Option(help="A folder for the compiled program.")] = None,
) -> None:
    """Costs on TPUs and GPUs that are not here: memory, transfers, FLOPs, seconds at least.

    Exit status: 0 with an answer, 2 without one and a sentence that says why: out of memory, a
    compiler that is missing, aborts or takes too long, sizes that do not fit.
    """
    given = locals()
    try:
        plans, against = _Question(**given).plans()
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


class _Question:
    """The options of a call, read."""

    def __init__(self, **given: Any) -> None:
        self.given = given
        self.tokens, self.topology, self.slices = (
            size_of(given["tokens"]),
            given["topology"],
            given["slices"],
        )
        named = {"auto": Ulysses()} | STRATEGIES
        for option, known in (("strategy", named), ("dtype", DTYPES)):
            if given[option] not in known:
                raise ValueError(
                    f"--{option} {given[option]!r} is unknown. Write {', '.join(known)}."
                )
        if given["sweep"] not in (None, "tokens", "degree"):
            raise ValueError(f"--sweep {given['sweep']!r} is unknown. Write tokens or degree.")
        if given["find_largest"] and given["sweep"] is not None:
            raise ValueError(
                f"--largest and --sweep {given['sweep']} are two questions. Leave one out."
            )
        if given["step"] is not None and not given["find_largest"]:
            raise ValueError(f"--step {given['step']} is of --largest. Add --largest.")
        for option in ("json_file", "png"):
            file = given[option]
            if file is not None and not file.absolute().parent.is_dir():
                raise ValueError(
                    f"--{option.removesuffix('_file')} {file}: there is no folder "
                    f"{str(file.parent)!r}. Write a file in a folder that is there."
                )
        if given["png"] is not None:
            if given["sweep"] is None and not given["find_largest"]:
                raise ValueError(f"--png {given['png']} needs several plans. Add --sweep tokens.")
            require_matplotlib()
        if given["offload"] and (given["what"] != "decoder" or not given["train"]):
            raise ValueError(
                f"--offload keeps the layers' inputs of a train step, and {given['what']} "
                f"has none. Write decoder --train --offload."
            )
        if not 0 < given["timeout"] < float("inf"):
            raise ValueError(f"--timeout {given['timeout']} is no time. Write --timeout 600.")
        self.strategy = named[given["strategy"]]
        self.mesh = self._mesh()
        self._check_axes()
        if given["find_largest"]:
            self._check_largest()

    def plans(self) -> tuple[list[Plan], str | None]:
        """The plans, and against what they are shown; None for a single one."""
        if self.given["sweep"] == "degree":
            return [self._ask(self.tokens, mesh) for mesh in self._degrees()], "degree"
        if self.given["sweep"] == "tokens":
            sizes = [self.tokens << i for i in range(self.given["points"])]
            return [self._ask(n, self.mesh) for n in sizes], "tokens"
        if self.given["find_largest"]:
            return self._largest(), "tokens"
        return [self._ask(self.tokens, self.mesh)], None

    def _check_axes(self) -> None:
        """Raises ValueError for a hybrid strategy without two mesh axes of the tokens."""
        axes = names(layout_of(self.mesh).tokens)
        if isinstance(self.strategy, Hybrid) and (
            len(axes) != 2 or self.given["sweep"] == "degree"
        ):
            raise ValueError(
                f"--strategy {self.given['strategy']} works on two mesh axes of the tokens, and "
                f"the mesh {self.mesh} has {len(axes)}. Write them major to minor, as --mesh "
                f"ring=2,seq=8, without --sweep degree."
            )

    def _check_largest(self) -> None:
        """Raises ValueError where nobody can tell what fits."""
        if not self.given["compiled"]:
            raise ValueError(
                f"--largest asks the compiler of {self.topology} what fits, and --no-compile "
                f"forbids it. Leave one out."
            )
        if not Machine(self.topology, self.slices, self.mesh).chip.memory:
            raise ValueError(
                f"the memory of a device of {self.topology} is not known, so nothing says what "
                f"fits. Write the topology of a TPU or a GPU, as v5e:4x4."
            )

    def _largest(self) -> list[Plan]:
        step = self.given["step"]
        unit = size_of(step) if step else max(self.tokens // 8, 1)
        found, plans = largest(lambda n: self._ask(n, self.mesh), self.tokens, unit)
        text = f"{tokens_as_text(found)} tokens fit, {tokens_as_text(found + unit)} do not"
        say(stdout(), text, style="bold")
        return plans

    def _ask(self, tokens: int, mesh: dict[str, int]) -> Plan:
        machine = Machine(self.topology, self.slices, mesh)
        options = compiler_options(machine.platform) if self.given["overlap"] else {}
        dump = self.given["dump"]
        request = Request(
            self._target(tokens, mesh),
            machine,
            options,
            compiled=self.given["compiled"],
            automatic=self.given["strategy"] == "auto",
            dump=None if dump is None else str(dump.resolve()),
        )
        errors = Console(stderr=True)
        with errors.status(f"{tokens_as_text(tokens)} tokens on {self.topology}"):
            return ask(request, self.given["timeout"])

    def _mesh(self) -> dict[str, int]:
        if self.given["mesh"] is not None:
            return mesh_of(self.given["mesh"])
        each = devices_of_slice(self.topology)
        return {"seq": each} if self.slices == 1 else {"data": self.slices, "seq": each}

    def _degrees(self) -> list[dict[str, int]]:
        """All devices as data x seq, the tokens shared by more each time."""
        count = devices_of_slice(self.topology) * self.slices
        degrees = [1 << i for i in range(count.bit_length()) if count % (1 << i) == 0]
        return [{"data": count // degree, "seq": degree} for degree in degrees]

    def _target(self, tokens: int, mesh: dict[str, int]) -> Target:
        what, given = self.given["what"], self.given
        if what not in ("layer", "decoder"):
            file, colon, function = what.rpartition(":")
            if not colon:
                raise ValueError(
                    f"{what!r} is no target. Write layer, decoder or FILE.py:function."
                )
            return FromFile(str(Path(file).resolve()), function, tokens)
        common = {name: given[name] for name in ("heads", "kv_heads", "head_dim", "train")}
        layer = AttentionLayer(
            tokens,
            batch=given["batch"] or mesh.get("data", 1),
            dtype=DTYPES[given["dtype"]],
            layout=layout_of(mesh),
            strategy=self.strategy,
            **common,
        )
        return layer if what == "layer" else DecoderStep(self._decoder(layer))

    def _decoder(self, layer: AttentionLayer) -> Decoder:
        of_layer = {name: getattr(layer, name) for name in layer.__dataclass_fields__}
        sizes = {
            name: self.given[name] for name in ("layers", "features", "hidden", "tiles", "offload")
        }
        return Decoder(**of_layer, **sizes, vocabulary=size_of(self.given["vocabulary"]))


def layout_of(mesh: dict[str, int]) -> MeshLayout:
    """The layout of axes by their names: data is the batch, tensor the heads, others the tokens."""
    rest = tuple(name for name in mesh if name not in ("data", "tensor"))
    layout = MeshLayout(tokens=rest[0] if len(rest) == 1 else rest or None)
    layout = replace(layout, batch="data" if "data" in mesh else None)
    return replace(layout, heads="tensor" if "tensor" in mesh else None)


def _write(file: Path | None, plans: list[Plan], single: bool) -> None:
    if file is None:
        return
    found = [json.loads(x.to_json()) for x in plans]
    file.write_text(json.dumps(found[0] if single else found, indent=2) + os.linesep)


def _stop(sentence: str) -> NoReturn:
    """Ends with status 2 and one sentence."""
    say(Console(stderr=True), " ".join(sentence.split()))
    raise typer.Exit(2)
