"""The answer to a request: traced, counted, compiled and read, in this process."""

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding

from ..mesh_layout import MeshLayout
from .assumed_gpu import assumed_gpu
from .collective_rows import collectives_of
from .compiled_text import layout_copies
from .count import Counts, count
from .gibibytes import gib_apart
from .machine import Machine
from .report import Chosen, Memory, Plan
from .roofline import parts
from .targets import HasStrategy, Target
from .transfers import across_slices, transfers

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
# libtpu's two sentences, of temporaries alone and of all. The excess of the second is the finer
# number: "Used 31.25G of 31.25G hbm. Exceeded hbm capacity by 3.1M."
OUT_OF_MEMORY = re.compile(
    r"\(([\d.]+[KMGT]?)\) exceeds available HBM \("
    r"|Used ([\d.]+[KMGT]?) of [\d.]+[KMGT]? hbm(?:\. Exceeded hbm capacity by ([\d.]+[KMGT]?))?"
)
# Messages of XLA: for all arrays together, and for a single array that is too large.
OUT_OF_HOST_MEMORY = re.compile(
    r"Used ([\d.]+[KMGT]?) of ([\d.]+[KMGT]?) host\."
    r"|\(size=(\d+)\) would exceed memory \(size=(\d+)\) :: \S+ = \S+\.host "
)


@dataclass(frozen=True)
class Request:
    """Request of a plan: the target, the machine, and how to compile.

    Attributes:
      compiler_options: of `jax.jit`.
      compiled: whether the compiler is to be asked, too.
      automatic: whether the strategy is the one that `choose_strategy` takes.
      dump: a folder for the program: traced, lowered and compiled.
    """

    target: Target
    machine: Machine
    compiler_options: Mapping[str, Any] = field(default_factory=dict)
    compiled: bool = True
    automatic: bool = False
    dump: str | None = None

    @property
    def start(self) -> Plan:
        """The plan before anything is counted or compiled: its names and sizes."""
        machine = self.machine
        return Plan(
            self.target.name,
            machine.topology,
            machine.slices,
            dict(machine.mesh),
            machine.count,
            machine.chip,
            self.target.tokens,
            versions=versions(),
        )


def answer(request: Request) -> Plan:
    """The plan of a request; an error becomes its `failure`."""
    plan = request.start
    machine, target = request.machine, request.target
    seconds: dict[str, float] = {}
    with machine.entered():
        chosen = None
        if isinstance(target, HasStrategy) and _layout(target).tokens is not None:
            choice = target.choice(_layout(target).on(machine.links))
            chosen = _chosen(choice)
            strategy = choice.strategy if request.automatic else target.strategy
            target, plan = target.with_strategy(strategy), replace(plan, strategy=repr(strategy))
        with _timed(seconds, "tracing"), _assumed(machine):
            function, shapes = target.build()
            jitted = function if hasattr(function, "trace") else jax.jit(function)
            traced = jitted.trace(*_placed(shapes, machine))
        counts = count(traced.jaxpr, machine.mesh)
        plan = replace(plan, choice=chosen, kernels=dict(counts.kernels), seconds=seconds)
        plan = _with_transfers(plan, counts, None, machine, _notes(counts, request))
        if not request.compiled or machine.missing is not None:
            return plan
        with _timed(seconds, "compiling"), _assumed(machine):
            try:
                lowered = traced.lower()
                _dump(request.dump, "lowered.mlir", lowered.as_text)
                compiled = lowered.compile(compiler_options=_options(request) or None)
            except jax.errors.JaxRuntimeError as error:
                return _without_program(plan, str(error))
    text = compiled.as_text() or ""
    _dump(request.dump, "compiled.txt", lambda: text)
    plan = replace(plan, memory=_memory(compiled, machine), copies=layout_copies(text))
    if left := _left_on_devices(counts, plan):
        counts = replace(counts, to_host=0.0, from_host=0.0)
    return _with_transfers(plan, counts, text, machine, plan.notes + left)


def versions() -> dict[str, str]:
    """Versions of the packages that an answer depends on."""
    found = {}
    for package in ("jax-seqpar", "jax", "jaxlib", "libtpu"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _layout(target: Any) -> MeshLayout:
    return getattr(target, "layout", None) or target.decoder.layout


def _chosen(choice: Any) -> Chosen:
    able = [x for x in choice.candidates if x.cost is not None]
    second = able[1] if len(able) > 1 else None
    return Chosen(
        repr(choice.strategy),
        None if second is None else repr(second.strategy),
        choice.reason,
        able[0].cost.seconds,
        None if second is None else second.cost.seconds,
    )


def _placed(shapes: Any, machine: Machine) -> Any:
    """The shapes, with their shardings on the mesh of the machine."""
    mesh = machine.devices() if machine.missing is None else machine.without_devices

    def placed(x: Any) -> Any:
        if not isinstance(getattr(x, "sharding", None), NamedSharding):
            return x
        given = x.sharding
        sharding = NamedSharding(mesh, given.spec, memory_kind=given.memory_kind)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(placed, shapes)


def _assumed(machine: Machine) -> Any:
    return assumed_gpu(machine.topology) if machine.platform == "gpu" else nullcontext()


def _options(request: Request) -> dict[str, Any]:
    # Which of several kernels is fastest, a GPU would have to try.
    of_platform = {"xla_gpu_autotune_level": 0} if request.machine.platform == "gpu" else {}
    return {**of_platform, **request.compiler_options}


def _notes(counts: Counts, request: Request) -> tuple[str, ...]:
    """Notes on parts that could not be checked, and on numbers that are only bounds."""
    found = []
    if request.machine.missing is not None:
        found.append(
            f"not checked: memory, layouts, what the compiler adds and what hides under what: "
            f"{request.machine.missing}"
        )
    if counts.open_loops:
        loops = "1 loop has" if counts.open_loops == 1 else f"{counts.open_loops} loops have"
        found.append(
            f"{loops} a length that is known only at run time, so the body counts once: FLOPs, "
            f"bytes and collectives are a lower bound"
        )
    if counts.whole_grids:
        kernels = "1 kernel" if counts.whole_grids == 1 else f"{counts.whole_grids} kernels"
        found.append(f"{kernels} may skip blocks that are counted: FLOPs are an upper bound")
    return tuple(found)


def _left_on_devices(counts: Counts, plan: Plan) -> tuple[str, ...]:
    """Note if the compiler keeps arrays on the devices that the program offloads to the host."""
    if not counts.to_host or plan.memory is None or plan.memory.host:
        return ()
    where = (
        "CPUs, whose memory is that of the host" if plan.topology.startswith("cpu") else "devices"
    )
    return (f"nothing was moved to the host: the compiler keeps it in the memory of the {where}",)


def _with_transfers(
    plan: Plan, counts: Counts, text: str | None, machine: Machine, notes: tuple[str, ...]
) -> Plan:
    compiled = None if text is None else transfers(text)
    across = {} if text is None else across_slices(text)
    rows, received = collectives_of(counts.sent, compiled, machine, across)
    if compiled is not None and any(x.in_loop and not x.written for x in compiled):
        notes += ("collectives that the compiler adds inside of loops count once",)
    if across:
        kinds = ", ".join(f"{n} {kind}" for kind, n in across.items())
        notes += (f"between slices the compiler sends by {kinds}",)
    found = parts(counts, received, plan.chip)
    moved = {"to_host": counts.to_host, "from_host": counts.from_host}
    return replace(plan, collectives=rows, parts=found, notes=notes, **moved)


def _memory(compiled: Any, machine: Machine) -> Memory | None:
    found = compiled.memory_analysis()
    if found is None:
        return None
    peak, host = found.peak_memory_in_bytes, found.host_temp_size_in_bytes
    host += found.host_argument_size_in_bytes + found.host_output_size_in_bytes
    host -= found.host_alias_size_in_bytes
    if host:
        # XLA states the larger of the peaks in both memories: 27.5 GiB of a program of 3.5 GiB of
        # arguments and results with 24 GiB on the host, compiled for chips of 15.75 GiB. The device
        # has no more than all at once, nor, on a TPU, than the compiler would have accepted.
        held = found.argument_size_in_bytes + found.temp_size_in_bytes
        held += found.output_size_in_bytes - found.alias_size_in_bytes
        accepted = machine.chip.memory if machine.platform == "tpu" else held
        peak = int(min(peak, held, accepted or held))
    return Memory(
        peak,
        found.argument_size_in_bytes,
        found.temp_size_in_bytes,
        found.output_size_in_bytes,
        found.alias_size_in_bytes,
        host,
    )


def _without_program(plan: Plan, error: str) -> Plan:
    """The plan of a program that the compiler refused, mostly as too large."""
    if (said := re.search(OUT_OF_HOST_MEMORY, error)) is not None:
        needed, most = _bytes(said[1] or said[3]), _bytes(said[2] or said[4])
        sentence = f"out of the host's memory: a device needs {_excess(needed, most)}"
        sentence += " that the compiler grants it"
        return replace(plan, needed_of_host=needed, failure=sentence)
    said = re.search(OUT_OF_MEMORY, error)
    if "RESOURCE_EXHAUSTED" not in error:
        return replace(plan, failure=f"the compiler refused the program: {first_line(error)}")
    if said is None:
        return replace(plan, failure=f"out of memory: {first_line(error)}")
    needed, most = _bytes(said[1] or said[2]), plan.chip.memory
    if said[3] and most:
        needed = int(most) + _bytes(said[3])
    sentence = f"out of memory: a device needs {_excess(needed, most)} of a {plan.chip.name}"
    return replace(plan, needed=needed, failure=sentence)


def _excess(needed: int, most: int | float) -> str:
    """A device's need and the limit that it is above, with digits that show the difference."""
    found, limit = gib_apart(needed, most)
    # The compiler rounds to two digits, too.
    return f"{found} GiB of the {limit} GiB" if needed > most else f"more than the {limit} GiB"


def _bytes(text: str) -> int:
    """Bytes of a number with a unit, as "57.00G"."""
    number = text.rstrip("KMGT")
    return int(float(number) * UNITS[text[len(number) :]])


def first_line(text: str) -> str:
    """The first line that is not blank, for a message of one line."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "no word")


def _dump(folder: str | None, name: str, text: Any) -> None:
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / name).write_text(text())


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - began
