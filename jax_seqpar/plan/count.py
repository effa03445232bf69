"""Counts of a traced program: FLOPs, bytes, collectives, loops multiplied out.

A walk over the jaxpr. What is inside a `jax.shard_map` is that of one device; what is outside is
global and counts as shared out evenly. `cost_analysis` of a compiled program is not asked: it has a
loop's body once, and nothing of a kernel (5.6e12 FLOPs of a train step that has 8.8e13).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np

from .kernel_counts import Kernel, kernel_of
from .scopes import part_of

# What a device receives of n devices, in units of the bytes of the operand (of the result of a
# gather): a sum is counted as a reduce-scatter and an all-gather.
RECEIVED = {
    "all-to-all": lambda n: (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "collective-permute": lambda n: 1.0,
}
KINDS = {
    "all_to_all": "all-to-all",
    "all_gather": "all-gather",
    "all_gather_invariant": "all-gather",
    "all_gather_reduced": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "unreduced_reduce_scatter": "reduce-scatter",
    "psum": "all-reduce",
    "psum_invariant": "all-reduce",
    "unreduced_psum": "all-reduce",
    "pmax": "all-reduce",
    "pmin": "all-reduce",
    "ppermute": "collective-permute",
}
# They give their operand, as far as its numbers go.
SAME = {"pvary", "pcast", "copy", "reshard", "sharding_constraint", "optimization_barrier"}
CALLS = {"jit", "pjit", "closed_call", "shard_map", "remat2", "checkpoint", "core_call"}


@dataclass(frozen=True)
class Sent:
    """A collective that the program writes, as often as it runs.

    Attributes:
      kind: as in a compiled program, "all-to-all".
      axes: the mesh axes along which it goes.
      part: the named scope that it is in.
      received: bytes that a device receives from others, all runs together.
      count: how often it runs.
    """

    kind: str
    axes: tuple[str, ...]
    part: str
    received: float
    count: int


@dataclass
class Counts:
    """Counts of one device in a traced program.

    Attributes:
      flops, bytes: by named scope: of matrix products and kernels; bytes are those of their
        operands and results, each once.
      sent: the collectives.
      kernels: calls by name.
      open_loops: loops whose length nobody knows before they run; their body counts once.
      whole_grids: kernels of which it is not known which blocks they skip; all count.
      to_host, from_host: bytes that are copied to the memory of the host, and back.
    """

    flops: dict[str, float] = field(default_factory=dict)
    bytes: dict[str, float] = field(default_factory=dict)
    sent: list[Sent] = field(default_factory=list)
    kernels: dict[str, int] = field(default_factory=dict)
    open_loops: int = 0
    whole_grids: int = 0
    to_host: float = 0.0
    from_host: float = 0.0

    def add(self, other: "Counts") -> None:
        for name in self.__dataclass_fields__:
            mine, more = getattr(self, name), getattr(other, name)
            if isinstance(mine, dict):
                for key, number in more.items():
                    mine[key] = mine.get(key, 0) + number
            else:
                setattr(self, name, mine + more)

    @property
    def work(self) -> tuple[float, float, float]:
        """FLOPs, bytes received and bytes: the key by which the costliest branch is found."""
        sent = sum((x.received for x in self.sent), 0.0)
        return sum(self.flops.values(), 0.0), sent, sum(self.bytes.values(), 0.0)


@dataclass(frozen=True)
class Place:
    """Place of the walk in the program.

    Attributes:
      mesh: size of each mesh axis.
      times: how often this runs.
      share: the part of what is written here that is one device's.
      scope: the names of the scopes around.
    """

    mesh: Mapping[str, int]
    times: int = 1
    share: float = 1.0
    scope: str = ""


def count(closed: Any, mesh: Mapping[str, int]) -> Counts:
    """The counts of a `ClosedJaxpr`, traced for a mesh of these sizes."""
    share = 1 / max(math.prod(mesh.values()), 1)
    return _Walk(dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))).jaxpr(
        closed.jaxpr, Place(mesh, share=share)
    )


class _Walk:
    """A walk that knows the constants on its way: of a kernel's blocks, which are computed."""

    def __init__(self, known: dict[Any, Any]) -> None:
        self.known = known

    def value(self, variable: Any) -> Any:
        """The numbers of a constant; None of anything that is computed."""
        if hasattr(variable, "val"):
            return variable.val
        return self.known.get(variable)

    def jaxpr(self, jaxpr: Any, place: Place) -> Counts:
        found = Counts()
        for equation in jaxpr.eqns:
            scope = f"{place.scope}/{equation.source_info.name_stack}"
            found.add(self.equation(equation, replace(place, scope=scope)))
        return found

    def equation(self, equation: Any, place: Place) -> Counts:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            return _product(equation, place)
        if name in KINDS:
            return _collective(equation, place)
        if (kernel := kernel_of(equation, self.value)) is not None:
            return _kernel(kernel, place)
        if name == "device_put":
            return _host_copies(equation, place)
        if name in SAME:
            for inside, outside in zip(equation.invars, equation.outvars, strict=False):
                self.learn(outside, self.value(inside))
            return Counts()
        if name == "cond":
            branches = [self.call(x, equation.invars[1:], (), place) for x in params["branches"]]
            return max(branches, key=lambda x: x.work)
        if name == "scan":
            times = place.times * params["length"]
            return self.call(params["jaxpr"], equation.invars, (), replace(place, times=times))
        if name == "while":
            found = self.call(params["body_jaxpr"], (), (), place)
            found.open_loops += 1
            return found
        if name == "shard_map":
            inside = (
                math.prod(place.mesh[axis] for axis in params["manual_axes"])
                if ("manual_axes" in params)
                else math.prod(place.mesh[axis] for axis in params["newly_manual_axes"])
            )
            place = replace(place, share=place.share * inside)
        found = Counts()
        for jaxpr in _jaxprs(params):
            found.add(self.call(jaxpr, equation.invars, equation.outvars, place))
        return found

    def call(
        self, closed: Any, arguments: Sequence[Any], results: Sequence[Any], place: Place
    ) -> Counts:
        """The counts of a jaxpr that is called; constants go in and come out."""
        jaxpr = getattr(closed, "jaxpr", closed)
        for variable, number in zip(jaxpr.constvars, getattr(closed, "consts", ()), strict=True):
            self.learn(variable, number)
        if len(arguments) == len(jaxpr.invars):
            for inside, outside in zip(jaxpr.invars, arguments, strict=True):
                self.learn(inside, self.value(outside))
        found = self.jaxpr(jaxpr, place)
        if len(results) == len(jaxpr.outvars):
            for inside, outside in zip(jaxpr.outvars, results, strict=True):
                self.learn(outside, self.value(inside))
        return found

    def learn(self, variable: Any, value: Any) -> None:
        """Keeps a constant, of small arrays of whole numbers: those are schedules of kernels."""
        same = value is not None and np.shape(value) == getattr(variable.aval, "shape", None)
        if same and np.issubdtype(np.asarray(value).dtype, np.integer):
            self.known[variable] = value


def _jaxprs(params: Mapping[str, Any]) -> Iterator[Any]:
    """The program of a call; a custom derivative's own is not part of what runs."""
    for name in ("call_jaxpr", "jaxpr", "fun_jaxpr", "call"):
        if hasattr(params.get(name), "eqns") or hasattr(params.get(name), "jaxpr"):
            yield params[name]


def _host_copies(equation: Any, place: Place) -> Counts:
    """What `device_put` moves between the memories of devices and their hosts."""
    found, host = Counts(), jax.memory.Space.Host
    for before, after in zip(equation.invars, equation.outvars, strict=True):
        spaces = [getattr(x.aval, "memory_space", None) == host for x in (before, after)]
        moved = nbytes(before.aval) * place.times * place.share
        found.to_host += moved if spaces == [False, True] else 0
        found.from_host += moved if spaces == [True, False] else 0
    return found


def _product(equation: Any, place: Place) -> Counts:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, out = equation.invars[0].aval, equation.outvars[0].aval
    flops = 2 * math.prod(out.shape) * math.prod(left.shape[i] for i in contracted)
    moved = sum(nbytes(x.aval) for x in (*equation.invars, *equation.outvars))
    times, part = place.times * place.share, part_of(place.scope)
    return Counts({part: flops * times}, {part: moved * times})


def _collective(equation: Any, place: Place) -> Counts:
    kind, params = KINDS[equation.primitive.name], equation.params
    named = params["axis_name"] if "axis_name" in params else params["axes"]
    axes = tuple(x for x in (named if isinstance(named, tuple) else (named,)) if x in place.mesh)
    size = math.prod(place.mesh[name] for name in axes)
    if groups := params.get("axis_index_groups"):
        size = len(groups[0])
    if size < 2:
        return Counts()
    arrays = equation.outvars if kind == "all-gather" else equation.invars
    received = sum(nbytes(x.aval) for x in arrays) * RECEIVED[kind](size)
    part, count = part_of(place.scope), place.times
    return Counts(sent=[Sent(kind, axes, part, received * count, count)])


def _kernel(kernel: Kernel, place: Place) -> Counts:
    part, times = part_of(place.scope), place.times
    return Counts(
        {part: kernel.flops * times},
        {part: float(kernel.bytes * times)},
        kernels={kernel.name: times},
        whole_grids=int(kernel.whole_grid),
    )


def nbytes(aval: Any) -> int:
    """Bytes of an array by its type."""
    return math.prod(aval.shape) * np.dtype(aval.dtype).itemsize
