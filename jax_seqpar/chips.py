"""Chip: FLOP/s, memory and links of one device; a table of the chips that clouds rent out."""

from dataclasses import dataclass, replace
from typing import Any

from jax.sharding import Mesh

GiB = 1 << 30


@dataclass(frozen=True)
class Chip:
    """Speeds and memory of a chip, as its maker states them.

    Attributes:
      name: for tables; of a TPU that of its topologies, as in "v5e:2x4".
      flops: of products of 16-bit matrices, per second.
      inside: bytes per second from a neighbour of the same slice or host.
      between: bytes per second from a device of another slice or host.
      bandwidth: bytes per second of the memory; 0 where nobody asks.
      memory: bytes that a program may use on one device; 0 where it is not known.
      devices: JAX devices of a chip; the speeds are those of all together, `memory` is of one.
      axes: of a slice: chips lie in 2 or 3 dimensions; 0 for what is no TPU.
      host: bytes per second to the memory of its host, and as many back; 0 where no figure is
        published.
      source: where the figures are from.
    """

    name: str
    flops: float
    inside: float
    between: float
    bandwidth: float = 0.0
    memory: float = 0.0
    devices: int = 1
    axes: int = 0
    host: float = 0.0
    source: str = ""

    def __post_init__(self) -> None:
        for field in ("flops", "inside", "between"):
            if not getattr(self, field) > 0:
                raise ValueError(
                    f"{field} of a Chip must be positive, got {getattr(self, field)!r}. Write a "
                    f"number per second, as in Chip('H100', 989e12, 450e9, 50e9)."
                )

    @property
    def of_one_device(self) -> "Chip":
        """The same with a device's share of the speeds."""
        speeds = ("flops", "inside", "between", "bandwidth", "host")
        shares: Any = {x: getattr(self, x) / self.devices for x in speeds}
        return replace(self, devices=1, **shares)


TPU = "cloud.google.com/tpu/docs/{}, memory as libtpu 0.0.42.1 states it"
GPU = "NVIDIA's data sheet of the {}, dense, a network port for each GPU"
# PCIe of TPUs in one direction: jax-ml.github.io/scaling-book/tpus has 16 GB/s of v4, 32 of v6e,
# "typically" 15 of others, v5e in a worked example, and none of tpu7x. Of GPUs 16 lanes of PCIe:
# Gen4 of A100, Gen5 of H100 and H200 by their data sheets, of B200 by the descriptions of systems
# in MLPerf's inference results ("accelerator_host_interconnect").
PCIE4, PCIE5 = 32e9, 64e9

# By the beginning of `device_kind`, longer ones first. Links in one direction: of a TPU's links the
# one to a neighbour, between slices a chip's share of its host's network; of a GPU NVLink, between
# hosts a port of 400 Gb/s (200 for A100).
CHIPS = {
    "TPU v5 lite": Chip(
        "v5e", 197e12, 45e9, 3.1e9, 819e9, 15.75 * GiB, axes=2, host=15e9, source=TPU.format("v5e")
    ),
    "TPU v5": Chip(
        "v5p", 459e12, 90e9, 6.2e9, 2765e9, 95.74 * GiB, axes=3, host=15e9, source=TPU.format("v5p")
    ),
    "TPU v6": Chip(
        *("v6e", 918e12, 90e9, 12.5e9, 1638e9, 31.25 * GiB),
        axes=2,
        host=32e9,
        source=TPU.format("v6e"),
    ),
    "TPU v4": Chip(
        "v4", 275e12, 45e9, 6.2e9, 1228e9, 30.75 * GiB, axes=3, host=16e9, source=TPU.format("v4")
    ),
    "TPU7x": Chip(
        "tpu7x", 2307e12, 100e9, 12.5e9, 7380e9, 94.75 * GiB, 2, axes=3, source=TPU.format("tpu7x")
    ),
    "NVIDIA A100": Chip(
        *("A100", 312e12, 300e9, 25e9, 2039e9, 80e9),
        host=PCIE4,
        source=GPU.format("A100 80GB SXM"),
    ),
    "NVIDIA H100": Chip(
        "H100", 989e12, 450e9, 50e9, 3350e9, 80e9, host=PCIE5, source=GPU.format("H100 SXM")
    ),
    "NVIDIA H200": Chip(
        "H200", 989e12, 450e9, 50e9, 4800e9, 141e9, host=PCIE5, source=GPU.format("H200 SXM")
    ),
    "NVIDIA B200": Chip(
        "B200", 2250e12, 900e9, 50e9, 8000e9, 180e9, host=PCIE5, source=GPU.format("HGX B200")
    ),
}
CHIPS["TPU v5e"] = CHIPS["TPU v5 lite"]
# Any other: only the ratios matter, and a link between hosts is about eight times slower.
UNKNOWN = Chip("unknown chip", 100e12, 80e9, 10e9, 1000e9, source="orders of magnitude")


def chip_of(mesh: Any) -> Chip:
    """The chip of a mesh's devices; `UNKNOWN` for one that is in no table, and for CPUs."""
    if isinstance(mesh, Mesh):
        kind = mesh.devices.flat[0].device_kind
    else:
        kind = getattr(mesh.abstract_device, "device_kind", "")
    return chip_of_kind(kind)


def chip_of_kind(device_kind: str) -> Chip:
    """The chip whose `device_kind` begins like this one; `UNKNOWN` if none does."""
    names = sorted(CHIPS, key=len, reverse=True)
    return next((CHIPS[name] for name in names if device_kind.startswith(name)), UNKNOWN)


def kind_of_name(name: str) -> str | None:
    """The `device_kind` of a chip in the table, by the name that topologies have for it."""
    return next((kind for kind, chip in CHIPS.items() if chip.name.lower() == name.lower()), None)
