"""The collectives of a compiled program, one by one: groups, bytes, asynchronous, under what.

The compilers, libtpu, XLA for GPUs and for CPUs, write groups in three forms. libtpu fuses gathers
that it makes asynchronous into other work, and prints each several times: they count by channel.
"""

import re
from dataclasses import dataclass

import numpy as np

from .compiled_text import (
    COLLECTIVES,
    bytes_of_types,
    calls_of_transfers,
    kernels_under_transfers,
)
from .scopes import part_of

Groups = frozenset[frozenset[int]]
# The primitives that a program writes; any other name is of a product whose operands were moved.
WRITTEN = re.compile(r"(?:^|/)(?:all_to_all|all_gather|psum|reduce_scatter|ppermute|pmax|pmin)\w*$")


@dataclass(frozen=True)
class Transfer:
    """One collective of a compiled program, which may be in a loop.

    Attributes:
      kind: "all-to-all".
      groups: devices that take part together, by their place in the mesh; pairs of a permute.
      nbytes: of its results.
      written: whether the program writes it; the compiler's partitioner added it otherwise. None
        where the text does not tell, as that of several slices by libtpu 0.0.42.
      part: the named scope.
      asynchronous: whether other work may run meanwhile.
      under: kernels and loops scheduled between its start and its end.
      in_loop: whether it runs as often as a loop does, which the text does not tell.
    """

    name: str
    kind: str
    groups: Groups
    nbytes: int
    written: bool | None
    part: str
    asynchronous: bool
    under: tuple[str, ...]
    in_loop: bool


def transfers(text: str) -> list[Transfer]:
    """The collectives of a compiled program's text, in its order."""
    under, calls = kernels_under_transfers(text), calls_of_transfers(text)
    results = {
        operand: types
        for types, operand in re.findall(rf"= (.*?) (?:{COLLECTIVES})-done\(%?([\w.-]+)", text)
    }
    found: dict[object, Transfer] = {}
    loops = _loop_bodies(text)
    for computation, line in _instructions(text):
        head = re.match(rf"\s+(?:ROOT )?%?([\w.-]+) = (.*?) ({COLLECTIVES})(-start)?\(", line)
        if head is None:
            continue
        name, types, kind, start = head.groups()
        fused = "chain_id=" in line
        scope = re.search(r'op_name="([^"]*)"', line)
        # Of several instructions made into one libtpu names each, first what gives the result.
        scope = "" if scope is None else scope[1].partition(";")[0]
        transfer = Transfer(
            name,
            kind,
            _groups(line),
            bytes_of_types(results.get(name, types)),
            bool(WRITTEN.search(scope)) if scope else None,
            part_of(scope.rpartition("/")[0]),
            fused or computation in calls or (start is not None and name in under),
            under.get(calls.get(computation, name), (("a fusion",) if fused else ())),
            computation in loops,
        )
        channel = re.search(r"channel_id=(\d+)", line)
        found.setdefault(("fused", channel and channel[1]) if fused else name, transfer)
    return list(found.values())


def across_slices(text: str) -> dict[str, int]:
    """Numbers of libtpu's sends between slices, of all strategies, by the kind of collective.

    A collective over several slices becomes `send` and `recv`, and a collective within a slice.
    """
    kinds = re.findall(r' send\(.*?_xla_megascale_transfer_type="?(\w+)', text)
    return {kind.lower().replace("_", "-"): kinds.count(kind) for kind in dict.fromkeys(kinds)}


def _instructions(text: str) -> list[tuple[str, str]]:
    """Each line with the name of its computation."""
    found, computation = [], ""
    for line in text.splitlines():
        opened = re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line)
        if opened is not None:
            computation = opened[1]
        found.append((computation, line))
    return found


def _loop_bodies(text: str) -> set[str]:
    """Computations that run in loops: bodies, and what those call."""
    calls: dict[str, set[str]] = {}
    for computation, line in _instructions(text):
        named = re.findall(r"(?:body|calls|to_apply|computation|condition)=%?([\w.-]+)", line)
        calls.setdefault(computation, set()).update(named)
    todo, bodies = set(re.findall(r"body=%?([\w.-]+)", text)), set()
    while todo:
        bodies |= todo
        todo = {x for body in todo for x in calls.get(body, ())} - bodies
    return bodies


def _groups(line: str) -> Groups:
    """The devices of each group, from any of the three forms, or the pairs of a permute."""
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", line)
    if listed is not None:
        groups = re.findall(r"\{([\d,]*)\}", listed[1])
        return _frozen([[int(n) for n in group.split(",") if n] for group in groups])
    meshed = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line)
    if meshed is not None:
        sizes = {k: int(n) for k, n in re.findall(r"'(\w+)'=(\d+)", meshed[1])}
        along = [list(sizes).index(k) for k in re.findall(r"'(\w+)'", meshed[2])]
        numbers = np.arange(np.prod(list(sizes.values()))).reshape(tuple(sizes.values()))
        moved = np.moveaxis(numbers, along, range(-len(along), 0))
        return _frozen(moved.reshape(-1, int(np.prod([numbers.shape[i] for i in along]))).tolist())
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    if iota is not None:
        rows, columns = int(iota[1]), int(iota[2])
        sizes = [int(n) for n in iota[3].split(",")]
        numbers = np.arange(rows * columns).reshape(sizes)
        if iota[4]:
            numbers = numbers.transpose([int(n) for n in iota[4].split(",")])
        return _frozen(numbers.reshape(rows, columns).tolist())
    return frozenset()


def _frozen(groups: list[list[int]]) -> Groups:
    return frozenset(map(frozenset, groups))
