"""Roofline: how long a part of a program takes at least, and what bounds it.

FLOPs at the chip's peak, bytes at its memory's, and what arrives over links: of another device of
the slice at the speed of one link, of another slice at that of the network. Nobody reaches these;
an attention kernel has half of the peak, or less.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..chips import Chip
from .count import Counts


@dataclass(frozen=True)
class Part:
    """A named part of a program on one device.

    Attributes:
      name: the named scope; "" outside of any.
      flops, bytes: of matrix products and kernels.
      inside, between: bytes received from devices of the slice, and of others.
      compute, memory, link: seconds of each at full speed.
    """

    name: str
    flops: float
    bytes: float
    inside: float
    between: float
    compute: float
    memory: float
    link: float

    @property
    def bound(self) -> str:
        """Bound of the roofline, whichever takes longest: "compute", "memory" or "link"."""
        return max(("compute", "memory", "link"), key=lambda name: getattr(self, name))

    @property
    def seconds(self) -> float:
        """Least seconds, if everything else hides under the longest part."""
        return max(self.compute, self.memory, self.link)


@dataclass(frozen=True)
class Received:
    """Bytes that a device receives in a named part."""

    part: str
    inside: float
    between: float


def parts(counts: Counts, received: Iterable[Received], chip: Chip) -> tuple[Part, ...]:
    """The named parts of a program, in the order in which they are met."""
    inside: dict[str, float] = {}
    between: dict[str, float] = {}
    for x in received:
        inside[x.part] = inside.get(x.part, 0.0) + x.inside
        between[x.part] = between.get(x.part, 0.0) + x.between
    names = dict.fromkeys([*counts.flops, *inside])
    return tuple(
        part(
            name,
            counts.flops.get(name, 0.0),
            counts.bytes.get(name, 0.0),
            inside.get(name, 0.0),
            between.get(name, 0.0),
            chip,
        )
        for name in names
    )


def part(name: str, flops: float, nbytes: float, inside: float, between: float, chip: Chip) -> Part:
    """A part with its seconds on a chip."""
    memory = nbytes / chip.bandwidth if chip.bandwidth else 0.0
    link = inside / chip.inside + between / chip.between
    return Part(name, flops, nbytes, inside, between, flops / chip.flops, memory, link)


def together(name: str, several: Sequence[Part], chip: Chip) -> Part:
    """Several parts as one."""
    fields = ("flops", "bytes", "inside", "between")
    flops, nbytes, inside, between = (
        sum((getattr(x, field) for x in several), 0.0) for field in fields
    )
    return part(name, flops, nbytes, inside, between, chip)
