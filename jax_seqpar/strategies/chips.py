"""Chip: how fast one device computes, and hears from others; a table of those that are rented."""

from dataclasses import dataclass
from typing import Any

from jax.sharding import Mesh


@dataclass(frozen=True)
class Chip:
    """Speeds of one device, for the ranking of strategies; orders of magnitude will do.

    Attributes:
      name: for the table.
      flops: of products of 16-bit matrices, per second.
      inside: bytes per second from a neighbour of the same slice or host.
      between: bytes per second from a device of another slice or host.
    """

    name: str
    flops: float
    inside: float
    between: float

    def __post_init__(self) -> None:
        for field in ("flops", "inside", "between"):
            if not getattr(self, field) > 0:
                raise ValueError(
                    f"{field} of a Chip must be positive, got {getattr(self, field)!r}. Write a "
                    f"number per second, as in Chip('H100', 989e12, 450e9, 50e9)."
                )


# By the beginning of `device_kind`, longer ones first. FLOP/s and links in one direction as in
# Google's pages on TPU versions and NVIDIA's data sheets; between hosts of GPUs a network port of
# 400 Gb/s for each (200 for A100), between slices of TPUs a chip's share of its host's network.
CHIPS = {
    "TPU v5 lite": Chip("v5e", 197e12, 45e9, 3.1e9),
    "TPU v5e": Chip("v5e", 197e12, 45e9, 3.1e9),
    "TPU v5": Chip("v5p", 459e12, 90e9, 6.2e9),
    "TPU v6": Chip("v6e", 918e12, 90e9, 12.5e9),
    "TPU v4": Chip("v4", 275e12, 45e9, 6.2e9),
    "NVIDIA A100": Chip("A100", 312e12, 300e9, 25e9),
    "NVIDIA H100": Chip("H100", 989e12, 450e9, 50e9),
    "NVIDIA H200": Chip("H200", 989e12, 450e9, 50e9),
    "NVIDIA B200": Chip("B200", 2250e12, 900e9, 50e9),
}
# Any other: only the ratios matter, and a link between hosts is about eight times slower.
UNKNOWN = Chip("unknown chip", 100e12, 80e9, 10e9)


def chip_of(mesh: Any) -> Chip:
    """The chip of a mesh's devices; `UNKNOWN` for one that is in no table, and for CPUs."""
    if isinstance(mesh, Mesh):
        kind = mesh.devices.flat[0].device_kind
    else:
        kind = getattr(mesh.abstract_device, "device_kind", "")
    return next((chip for name, chip in CHIPS.items() if kind.startswith(name)), UNKNOWN)
