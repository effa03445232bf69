"""Question of a call of `seqpar plan`: its options, read, and the plans that answer it."""

import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from rich.console import Console

from .. import compiler_options
from ..mesh_layout import names
from ..plan.answer import Request
from ..plan.decoder import Decoder
from ..plan.largest import largest
from ..plan.machine import Machine, devices_of_slice
from ..plan.report import Plan
from ..plan.targets import AttentionLayer, DecoderStep, FromFile, Target
from ..plan.worker import ask
from ..strategies import AllGatherKV, Hybrid, Ring, Strategy, Ulysses
from .console import say, stdout
from .places import check_files, check_folder
from .plan_chart import check_format
from .plan_options import as_written, check_options
from .plan_sizes import layout_of, mesh_as_text, mesh_of, size_of, tokens_as_text

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
SWEEPS = ("tokens", "degree")
TOKENS, POINTS = "128K", 4  # defaults


class Question:
    """The options of a call, read.

    Args:
      given: values by parameter of the command; None for an option that is not given, whose default
        is that of the target.

    Raises:
      ValueError: for options that do not go together, or sizes that do not fit.
    """

    def __init__(self, **given: Any) -> None:
        self.given = given
        self._check_values()
        check_options(given)
        self.tokens = size_of(given["tokens"] or TOKENS)
        self.topology, self.slices = given["topology"], given["slices"]
        self.automatic = given["strategy"] == "auto"
        # The default, and what the worker replaces where "auto" is given.
        self.strategy = STRATEGIES.get(given["strategy"], Ulysses())
        self.mesh = self._mesh()
        self._check_strategy()
        self._check_compiler()

    def plans(self) -> tuple[list[Plan], str | None]:
        """The plans, and against what they are shown; None for a single one."""
        if self.given["find_largest"]:
            return self._largest(), "tokens"
        against, asked = self.given["sweep"], [(self.tokens, self.mesh)]
        if against == "degree":
            asked = [(self.tokens, mesh) for mesh in self._degrees()]
        elif against == "tokens":
            points = self.given["points"] or POINTS
            asked = [(self.tokens << i, self.mesh) for i in range(points)]
        # Each is checked before the first is compiled.
        requests = [self._request(tokens, mesh) for tokens, mesh in asked]
        return [self._ask(request) for request in requests], against

    def _check_values(self) -> None:
        """Raises ValueError for a word that an option does not know, or a place not to write to."""
        given = self.given
        words = {"strategy": (*STRATEGIES, "auto"), "dtype": DTYPES, "sweep": SWEEPS}
        for option, known in words.items():
            if given[option] is not None and given[option] not in known:
                raise ValueError(
                    f"--{option} {given[option]!r} is unknown. Write {', '.join(known)}."
                )
        check_files({"--json": given["json_file"], "--png": given["png"]})
        check_folder("--dump", given["dump"])
        if given["png"] is not None:
            check_format(given["png"])
        if not 0 < given["timeout"] < math.inf:
            raise ValueError(
                f"--timeout must be a positive number of seconds, got {given['timeout']}. Write "
                f"--timeout 600."
            )

    def _check_strategy(self) -> None:
        """Raises ValueError for a strategy without the mesh axes that it works on."""
        axes, strategy = names(layout_of(self.mesh).tokens), self.given["strategy"]
        mesh = mesh_as_text(self.mesh)
        if strategy is not None and not axes:
            raise ValueError(
                f"--strategy {strategy} would change nothing: no axis of the mesh {mesh} "
                f"shares the tokens. Write one more, as --mesh data=2,seq=4, or leave --strategy "
                f"out."
            )
        if isinstance(self.strategy, Hybrid) and len(axes) != 2:
            raise ValueError(
                f"--strategy {strategy} works on two mesh axes of the tokens, and "
                f"the mesh {mesh} has {len(axes)}. Write them major to minor, as --mesh "
                f"ring=2,seq=8, without --sweep degree."
            )

    def _check_compiler(self) -> None:
        """Raises ValueError for options that the compiler of the topology cannot answer."""
        machine = Machine(self.topology, self.slices, self.mesh)
        if self.given["find_largest"] and not machine.chip.memory:
            raise ValueError(
                f"the memory of a device of {self.topology} is not known, so nothing says what "
                f"fits. Write the topology of a TPU or a GPU, as v5e:4x4."
            )
        if self.given["overlap"] and not compiler_options(machine.platform):
            raise ValueError(
                f"--overlap would change nothing of {self.topology}, whose compiler has no such "
                f"options. Write the topology of a TPU or a GPU, as v5e:4x4."
            )
        for option in ("dump", "overlap"):
            if self.given[option] and machine.missing is not None:
                raise ValueError(
                    f"{as_written(option, self.given[option])} is for a compiler, and "
                    f"{machine.missing}. Leave --{option} out, or write --topology cpu:8 for "
                    f"simulated devices."
                )

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

    def _largest(self) -> list[Plan]:
        step, degree = self.given["step"], _devices(self.mesh, layout_of(self.mesh).tokens)
        unit = size_of(step) if step else max(self.tokens // 8 // degree, 1) * degree
        if self.given["what"] in ("layer", "decoder"):
            _check_shared("step", unit, degree, self.mesh)
        found, plans = largest(lambda n: self._ask(self._request(n, self.mesh)), self.tokens, unit)
        text = f"{tokens_as_text(found)} tokens fit, {tokens_as_text(found + unit)} do not"
        say(stdout(), text, style="bold")
        return plans

    def _ask(self, request: Request) -> Plan:
        tokens = request.target.tokens
        sized = "" if tokens is None else f"{tokens_as_text(tokens)} tokens on "
        with Console(stderr=True).status(f"{sized}{self.topology}"):
            return ask(request, self.given["timeout"])

    def _request(self, tokens: int, mesh: dict[str, int]) -> Request:
        machine = Machine(self.topology, self.slices, mesh)
        options = compiler_options(machine.platform) if self.given["overlap"] else {}
        dump = self.given["dump"]
        return Request(
            self._target(tokens, mesh),
            machine,
            options,
            compiled=self.given["compiled"] is not False,
            automatic=self.automatic,
            dump=None if dump is None else str(dump.resolve()),
        )

    def _target(self, tokens: int, mesh: dict[str, int]) -> Target:
        what, layout = self.given["what"], layout_of(mesh)
        if ":" in what:
            return self._from_file(tokens)
        sizes = self._given("heads", "kv_heads", "head_dim")
        sizes |= {"batch": self.given["batch"] or mesh.get("data", 1), "tokens": tokens}
        _check_shared("tokens", tokens, _devices(mesh, layout.tokens), mesh)
        _check_shared("batch", sizes["batch"], _devices(mesh, layout.batch), mesh)
        sizes |= {"dtype": DTYPES[self.given["dtype"] or "bf16"], "layout": layout}
        sizes |= {"strategy": self.strategy, "train": bool(self.given["train"])}
        if what == "layer":
            layer = AttentionLayer(**sizes)
            _check_heads(layer.heads, layer.kv_heads, mesh)
            return layer
        if self.given["vocabulary"] is not None:
            sizes["vocabulary"] = size_of(self.given["vocabulary"])
        of_decoder = self._given("layers", "features", "hidden", "tiles", "offload")
        decoder = Decoder(**sizes, **of_decoder)
        _check_heads(decoder.heads, decoder.kv_heads, mesh, copies=True)
        return DecoderStep(decoder)

    def _from_file(self, tokens: int) -> FromFile:
        """The function of a file, with tokens if the call names any."""
        file, _, function = self.given["what"].rpartition(":")
        sized = self.given["tokens"] is not None or self.given["find_largest"]
        sized = sized or self.given["sweep"] == "tokens"
        return FromFile(str(Path(file).resolve()), function, tokens if sized else None)

    def _given(self, *options: str) -> dict[str, Any]:
        """The options among these that are given; the target has defaults of the others."""
        return {x: self.given[x] for x in options if self.given[x] is not None}


def _check_heads(heads: int, kv_heads: int, mesh: dict[str, int], *, copies: bool = False) -> None:
    """Raises ValueError for heads that the devices of mesh axis tensor cannot share equally.

    Args:
      copies: whether a KV head may have copies, as in a decoder, which computes its keys; those of
        a layer are given, as shards.
    """

    def fits(devices: int) -> bool:
        few = copies and devices % kv_heads == 0
        return heads % devices == 0 and (kv_heads % devices == 0 or few)

    devices = _devices(mesh, layout_of(mesh).heads)
    if not fits(devices):
        option, size = ("heads", heads) if heads % devices else ("kv-heads", kv_heads)
        others = ", ".join(str(n) for n in range(1, heads + 1) if fits(n))
        raise ValueError(
            f"--{option} {size} is not divisible by the {devices} devices of mesh axis tensor in "
            f"the mesh {mesh_as_text(mesh)}. Write tensor= one of {others}, and another axis "
            f"larger."
        )


def _devices(mesh: dict[str, int], axes: Any) -> int:
    """Number of devices along mesh axes."""
    return math.prod(mesh[name] for name in names(axes))


def _check_shared(option: str, size: int, devices: int, mesh: dict[str, int]) -> None:
    """Raises ValueError for a size of which not every device gets the same part."""
    if size % devices:
        raise ValueError(
            f"--{option} {size} is not divisible by the {devices} devices that share it in the "
            f"mesh {mesh_as_text(mesh)}. Write --{option} {-(-size // devices) * devices}."
        )
