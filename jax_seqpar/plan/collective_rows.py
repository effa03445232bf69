"""The collectives of a plan: those that the program writes, and those that the compiler adds."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from .count import RECEIVED, Sent
from .machine import Machine
from .roofline import Received
from .transfers import Transfer

# What libtpu calls a permute that it sends between slices.
OF_MEGASCALE = {"collective-permute": "one-to-one"}
# The factors of a count are of the operand, and a compiled program states the result.
OF_RESULT = {"reduce-scatter": lambda n: float(n - 1)}


@dataclass(frozen=True)
class Collective:
    """All collectives of one kind along the same mesh axes, of one origin.

    Attributes:
      kind: "all-to-all".
      axes: of the mesh; () for devices that no axes describe.
      count: runs in a call of the function, loops multiplied out.
      inside, between: bytes that a device receives from devices of its slice and of others, in all.
      written: whether the program writes them; otherwise the compiler's partitioner adds them, and
        a loop's count once.
      compiled: instructions of them in the compiled program; None if nothing was compiled.
      asynchronous: of these, those beside which other work may run.
      hidden: of these, those that a kernel, a loop or a fusion runs under.
      under: the names of such kernels and loops.
    """

    kind: str
    axes: tuple[str, ...]
    count: int
    inside: float
    between: float
    written: bool
    compiled: int | None = None
    asynchronous: int = 0
    hidden: int = 0
    under: tuple[str, ...] = ()

    @property
    def link(self) -> str:
        """The slowest link that they use: "between" slices or "inside" one."""
        return "between" if self.between else "inside"


@dataclass(frozen=True)
class _One:
    """One collective of either origin."""

    kind: str
    axes: tuple[str, ...]
    part: str
    received: float
    count: int
    written: bool


def collectives_of(
    sent: Iterable[Sent],
    compiled: list[Transfer] | None,
    machine: Machine,
    across: Mapping[str, int] = MappingProxyType({}),
) -> tuple[tuple[Collective, ...], list[Received]]:
    """The rows of a plan, and what each named part receives.

    Args:
      across: by kind, the sends between slices that libtpu makes of a collective, as
        `across_slices` finds them; a send is awaited by a separate instruction.
    """
    sent = list(sent)
    if compiled is not None:
        compiled = _told_apart(compiled, sent, machine)
    ones = [_One(x.kind, x.axes, x.part, x.received, x.count, True) for x in sent]
    ones += [_added(x, machine) for x in compiled or () if not x.written]
    rows = tuple(
        _row(key, [x for x in ones if (x.kind, x.axes, x.written) == key], compiled, machine)
        for key in dict.fromkeys((x.kind, x.axes, x.written) for x in ones)
    )
    received = []
    for x in ones:
        far = machine.far(x.axes)
        received.append(Received(x.part, x.received * (1 - far), x.received * far))
    return tuple(_sent_across(row, across) for row in rows), received


def _told_apart(compiled: list[Transfer], sent: list[Sent], machine: Machine) -> list[Transfer]:
    """The same, each either written or added.

    Of those of which the text does not tell, as many are written as the program has more than the
    others, if what they bring is what one of the program's brings. Of a sum of which each device
    keeps a part libtpu makes a reduce-scatter, for tpu7x: it is listed as the sum that it is.
    """
    left: dict[object, int] = {}
    for x in sent:
        left[x.kind, x.axes] = left.get((x.kind, x.axes), 0) + 1
    for x in compiled:
        if x.written:
            key = x.kind, axes_of(x, machine)
            left[key] = left.get(key, 0) - 1
    brought = {(x.kind, x.axes, round(x.received / x.count)) for x in sent}
    found = []
    for x in compiled:
        if x.written is None:
            one = _added(x, machine)
            summed = ("all-reduce", one.axes, round(2 * one.received))
            if x.kind == "reduce-scatter" and summed in brought:
                x, one = replace(x, kind="all-reduce"), replace(one, kind="all-reduce")
                one = replace(one, received=2 * one.received)
            mine = (one.kind, one.axes, round(one.received)) in brought
            written = mine and left.get((one.kind, one.axes), 0) > 0
            left[one.kind, one.axes] = left.get((one.kind, one.axes), 0) - written
            x = replace(x, written=written)
        found.append(x)
    return found


def _sent_across(row: Collective, across: Mapping[str, int]) -> Collective:
    count = across.get(OF_MEGASCALE.get(row.kind, row.kind), 0)
    if not row.between or row.compiled != 0:
        return row
    return replace(row, compiled=count, asynchronous=count)


def _added(transfer: Transfer, machine: Machine) -> _One:
    axes, size = axes_of(transfer, machine), group_size(transfer, machine)
    factor = OF_RESULT.get(transfer.kind) or RECEIVED.get(transfer.kind, lambda n: 1.0)
    received = transfer.nbytes * factor(size) if size > 1 else 0.0
    return _One(transfer.kind, axes, transfer.part, received, 1, False)


def axes_of(transfer: Transfer, machine: Machine) -> tuple[str, ...]:
    """The mesh axes of a transfer's groups; () where no axes describe them."""
    groups = transfer.groups or frozenset([frozenset(range(machine.count))])
    if transfer.kind != "collective-permute":
        return machine.groups.get(groups, ())
    for along, axes in machine.groups.items():
        if all(any(pair <= group for group in along) for pair in groups):
            return axes
    return ()


def group_size(transfer: Transfer, machine: Machine) -> int:
    """Devices that take part in one transfer; all of them where the program names no groups."""
    return max(map(len, transfer.groups), default=machine.count)


def _row(
    key: tuple[str, tuple[str, ...], bool],
    ones: list[_One],
    compiled: list[Transfer] | None,
    machine: Machine,
) -> Collective:
    kind, axes, written = key
    received, far = sum(x.received for x in ones), machine.far(axes)
    count = sum(x.count for x in ones)
    row = Collective(kind, axes, count, received * (1 - far), received * far, written)
    if compiled is None:
        return row
    mine = [
        x for x in compiled if (x.kind, axes_of(x, machine), x.written) == (kind, axes, written)
    ]
    under = dict.fromkeys(name for x in mine for name in x.under)
    return Collective(
        *(kind, axes, count, row.inside, row.between, written),
        compiled=len(mine),
        asynchronous=sum(x.asynchronous for x in mine),
        hidden=sum(bool(x.under) for x in mine),
        under=tuple(under),
    )
