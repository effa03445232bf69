"""Machine: slices of a topology, what one device of them is, and their mesh with or without one."""

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import combinations
from typing import Any

import jax
import numpy as np
from jax.experimental.mesh_utils import create_hybrid_device_mesh
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh

from .._checks import check_count
from ..chips import UNKNOWN, Chip, chip_of_kind, kind_of_name
from .gpu_targets import gpu_target
from .topology import devices, missing_compiler, platform_of

Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Machine:
    """Slices of a TPU, or hosts of GPUs, of one topology.

    Args:
      topology: as for `jax_seqpar.plan.devices`.
      slices: of that topology, joined by the slower network.
      mesh: size of each mesh axis by name, major to minor.

    Raises:
      ValueError: for a topology that cannot be, or a mesh of another number of devices.
    """

    topology: str
    slices: int
    mesh: Sizes

    def __post_init__(self) -> None:
        check_count("slices", self.slices)
        sizes = dict(self.mesh)
        for name, size in sizes.items():
            check_count(f"mesh axis {name!r}", size)
        count = devices_of_slice(self.topology) * self.slices
        if math.prod(sizes.values()) != count:
            raise ValueError(
                f"mesh {sizes} does not have the {count} devices of {self.slices} x "
                f"{self.topology!r}. Write sizes whose product is {count}."
            )

    @property
    def platform(self) -> str:
        return platform_of(self.topology)

    @property
    def missing(self) -> str | None:
        """Message that the compiler of the topology is missing; None if it is installed."""
        return missing_compiler(self.topology)

    @property
    def count(self) -> int:
        return math.prod(self.mesh.values())

    @property
    def chip(self) -> Chip:
        """Chip of one JAX device of the machine."""
        return chip_of_kind(device_kind(self.topology)).of_one_device

    @property
    def between(self) -> dict[str, int]:
        """Number of slices that each mesh axis spans: the major axes span the slices first."""
        left, found = self.slices, {}
        for name, size in self.mesh.items():
            found[name] = math.gcd(size, left)
            left //= found[name]
        return found

    def devices(self) -> Mesh:
        """The mesh of its devices, as `jax.make_mesh` has it; of several slices the hybrid one."""
        between = self.between if self.platform != "cpu" else dict.fromkeys(self.mesh, 1)
        return _mesh(self.topology, self.slices, tuple(self.mesh.items()), tuple(between.values()))

    @property
    def without_devices(self) -> AbstractMesh:
        """The mesh for tracing where the compiler is missing: it tells its platform."""
        device = AbstractDevice(device_kind(self.topology), 1, self.platform)
        names, sizes = tuple(self.mesh), tuple(self.mesh.values())
        types = (AxisType.Auto,) * len(names)
        return AbstractMesh(sizes, names, types, abstract_device=device)

    @property
    def links(self) -> Mesh:
        """The mesh of devices that tell their slice, for `choose_strategy`; nothing runs on it."""
        kind, each = device_kind(self.topology), self.count // self.slices
        absent = [AbsentDevice(i, self.platform, kind, i // each) for i in range(self.count)]
        between = tuple(self.between.values())
        inside = tuple(n // m for n, m in zip(self.mesh.values(), between, strict=True))
        # Slices first, then each axis gets its part of them: [m0, m1, n0, n1] -> [m0, n0, m1, n1].
        grid, axes = np.array(absent).reshape(between + inside), range(len(between))
        grid = grid.transpose([i for axis in axes for i in (axis, axis + len(between))])
        return Mesh(grid.reshape(tuple(self.mesh.values())), tuple(self.mesh))

    def entered(self) -> AbstractContextManager[Any]:
        """The context to trace and compile in."""
        if self.missing is None:
            return jax.set_mesh(self.devices())
        return jax.sharding.use_abstract_mesh(self.without_devices)

    @cached_property
    def groups(self) -> dict[frozenset[frozenset[int]], tuple[str, ...]]:
        """Mesh axes by the groups of devices that differ along them alone, fewest axes first."""
        found = _groups(self.mesh)
        if self.slices > 1:
            # libtpu writes the program of one slice, whose devices it numbers from 0.
            inside = {name: n // self.between[name] for name, n in self.mesh.items()}
            found = {**_groups({k: n for k, n in inside.items() if n > 1}), **found}
        return found

    def far(self, axes: tuple[str, ...]) -> float:
        """The part of what a device receives along mesh axes that is from other slices."""
        if axes == ():  # of devices that no axes describe
            axes = tuple(self.mesh)
        size = math.prod(self.mesh[name] for name in axes)
        near = size // math.prod(self.between[name] for name in axes)
        return (size - near) / max(size - 1, 1)


def _groups(mesh: Sizes) -> dict[frozenset[frozenset[int]], tuple[str, ...]]:
    numbers, found = np.arange(math.prod(mesh.values())).reshape(tuple(mesh.values())), {}
    for many in range(1, len(mesh) + 1):
        for axes in combinations(range(len(mesh)), many):
            moved = np.moveaxis(numbers, axes, range(-many, 0))
            rows = moved.reshape(-1, math.prod(moved.shape[-many:]))
            key = frozenset(frozenset(map(int, row)) for row in rows)
            found.setdefault(key, tuple(list(mesh)[i] for i in axes))
    return found


@dataclass(frozen=True)
class AbsentDevice:
    """Stand-in for a device of an absent machine, with the attributes `choose_strategy` reads."""

    id: int
    platform: str
    device_kind: str
    slice_index: int
    process_index: int = 0


@cache
def _mesh(
    topology: str, slices: int, sizes: tuple[tuple[str, int], ...], between: tuple[int, ...]
) -> Mesh:
    """Mesh of a topology, kept, as two descriptions of a topology have unequal devices."""
    found = devices(topology, slices)
    names, shape = zip(*sizes, strict=True)
    types = (AxisType.Auto,) * len(names)
    if math.prod(between) == 1:
        return jax.make_mesh(shape, names, types, devices=found)
    inside = tuple(n // m for n, m in zip(shape, between, strict=True))
    return Mesh(create_hybrid_device_mesh(inside, between, found), names, axis_types=types)


def device_kind(topology: str) -> str:
    """The `device_kind` of a topology's devices, "cpu" for "cpu".

    Raises:
      ValueError: for a chip that is not in the table.
    """
    if platform_of(topology) == "cpu":
        return "cpu"
    name = topology.partition(":")[0]
    if platform_of(topology) == "gpu":
        name = gpu_target(topology).name
    kind = kind_of_name(name)
    if kind is None:
        raise ValueError(
            f"topology {topology!r} is of a chip {name!r} that the table in jax_seqpar/chips.py "
            f"lacks. Write v4, v5e, v5p, v6e, tpu7x or h100."
        )
    return kind


def devices_of_slice(topology: str) -> int:
    """Number of JAX devices of a slice.

    Raises:
      ValueError: for an unknown topology, or one of other dimensions than the chip's slices.
    """
    _, _, sizes = topology.rpartition(":")
    chips = [int(n) for n in sizes.split("x")] if platform_of(topology) else []
    chip = chip_of_kind(device_kind(topology))
    if chip is not UNKNOWN and chip.axes not in (0, len(chips)):
        raise ValueError(
            f"topology {topology!r} has {len(chips)} dimensions, but slices of {chip.name} have "
            f"{chip.axes}. Write {chip.name}:{'x'.join(['2', '4', '4'][: chip.axes])}, or other "
            f"sizes."
        )
    return math.prod(chips) * chip.devices
