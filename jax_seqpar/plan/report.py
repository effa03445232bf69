"""Plan: costs of a program on a machine that may be absent; as a value, and as JSON."""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from ..chips import Chip
from .collective_rows import Collective
from .compiled_text import Copies
from .roofline import Part, together


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, as the compiler of a platform states them.

    Attributes:
      peak: the most at once. Less than arguments and temporaries together: not all temporaries are
        there at the same time, and what is donated is counted once.
      arguments, temporaries, results: of the program.
      donated: of the results, those that take the place of arguments.
      host: bytes of the device's host, for what the program keeps there; in none of the others.
        With them the compiler states no peak of the device, and `peak` is a bound of it.
    """

    peak: int
    arguments: int
    temporaries: int
    results: int
    donated: int
    host: int = 0


@dataclass(frozen=True)
class Chosen:
    """Choice of `choose_strategy` for a plan's attention.

    Attributes:
      strategy, runner_up: by their reprs; None without a second strategy.
      reason: in one sentence.
      seconds: of one layer, by formula.
    """

    strategy: str
    runner_up: str | None
    reason: str
    seconds: float
    runner_up_seconds: float | None


@dataclass(frozen=True)
class Plan:
    """Costs of a function on a machine, per device.

    Attributes:
      name: of the target.
      topology, slices, mesh: the machine, and its mesh.
      devices: how many.
      chip: of one device: its speeds and memory.
      tokens: of a sequence, where the question has them.
      memory: None unless it was compiled.
      needed: bytes that the compiler missed memory for, where it ran out of it.
      needed_of_host: the same of the memory of a device's host.
      failure: the reason for a missing answer, in one sentence; None with an answer.
      collectives, kernels, parts: kernels are calls by name, all loops multiplied out.
      copies: only of TPUs.
      to_host, from_host: bytes that the program copies between a device and its host.
      strategy: of the target's attention, by its repr, where the planner knows it.
      choice: of the strategy, where it was asked for.
      notes: on parts that could not be checked, and on numbers that are only bounds.
      seconds: that tracing and compiling took, by name.
      versions: of the packages that the answer depends on.
    """

    name: str
    topology: str
    slices: int
    mesh: dict[str, int]
    devices: int
    chip: Chip
    tokens: int | None = None
    memory: Memory | None = None
    needed: int | None = None
    needed_of_host: int | None = None
    failure: str | None = None
    collectives: tuple[Collective, ...] = ()
    kernels: dict[str, int] = field(default_factory=dict)
    parts: tuple[Part, ...] = ()
    copies: Copies | None = None
    to_host: float = 0.0
    from_host: float = 0.0
    strategy: str | None = None
    choice: Chosen | None = None
    notes: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def fits(self) -> bool | None:
        """Whether the peak is within the chip's memory; None if nothing was compiled."""
        if self.needed is not None or self.needed_of_host is not None:
            return False
        if self.memory is None or not self.chip.memory:
            return None
        return self.memory.peak <= self.chip.memory

    @property
    def step(self) -> Part:
        """The whole program as one part."""
        return together("step", self.parts, self.chip)

    @property
    def flops(self) -> float:
        return self.step.flops

    @property
    def exposed(self) -> float:
        """Seconds of transfers that nothing is known to run under."""
        found = 0.0
        for x in self.collectives:
            seconds = x.inside / self.chip.inside + x.between / self.chip.between
            found += seconds * (1 - x.hidden / x.compiled if x.compiled else 1)
        return found

    @property
    def host(self) -> float | None:
        """Seconds of copies to the host and back, at once; None if its speed is not known.

        They are those of the longer direction, as a link has its speed in each (`Chip.host`).
        """
        moved = max(self.to_host, self.from_host)
        if moved and not self.chip.host:
            return None
        return moved / self.chip.host if moved else 0.0

    @property
    def bound(self) -> str:
        """Bound of the program, whichever takes longest: as `Part.bound`, or "host"."""
        return "host" if (self.host or 0.0) > self.step.seconds else self.step.bound

    @property
    def at_least(self) -> float:
        """Seconds of a step at full speed: the longer of computation and memory, and the exposed
        transfers; or copies to the host, which may run beside all of these, where they are longer.
        """
        return max(max(self.step.compute, self.step.memory) + self.exposed, self.host or 0.0)

    def to_json(self) -> str:
        """The plan as JSON, which `from_json` reads."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """The plan that `to_json` wrote.

        Raises:
          ValueError: for JSON that is not a plan.
        """
        try:
            found: dict[str, Any] = json.loads(text)
            return cls(**(found | _nested(found)))
        except (TypeError, KeyError) as error:
            raise ValueError(
                f"the JSON {text[:40]!r}... is not a plan ({error}). Give what Plan.to_json wrote."
            ) from None


def _nested(found: dict[str, Any]) -> dict[str, Any]:
    """The fields of a plan that are values of classes."""

    def one(name: str, kind: Any) -> Any:
        return None if found[name] is None else kind(**found[name])

    def row(x: dict[str, Any]) -> Collective:
        fields: dict[str, Any] = x | {name: tuple(x[name]) for name in ("axes", "under")}
        return Collective(**fields)

    return {
        "chip": Chip(**found["chip"]),
        "memory": one("memory", Memory),
        "copies": one("copies", Copies),
        "choice": one("choice", Chosen),
        "collectives": tuple(row(x) for x in found["collectives"]),
        "parts": tuple(Part(**x) for x in found["parts"]),
        "notes": tuple(found["notes"]),
    }
