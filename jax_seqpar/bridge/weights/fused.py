"""Fused tensors, such as one of query, key and value: split into their parts, and joined."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..._extras import require_torch
from ..._text import listed
from .arrange import arranged, check_dense, refuse
from .mapping import (
    AnyLine,
    Entry,
    Fused,
    Map,
    Side,
    numbers_in,
)


def split(
    tensors: Mapping[str, Any], mapping: Sequence[AnyLine], sizes: Mapping[str, int]
) -> dict[str, Any]:
    """The tensors with the parts in place of each fused one, as views of it."""
    split, problems = {}, []
    for name, x in tensors.items():
        line = next((f for f in _fused(mapping) if numbers_in(f.torch, name) is not None), None)
        if line is None:
            split[name] = x
            continue
        others = [f for f in mapping if f is not line and numbers_in(f.torch, name) is not None]
        if others:
            lines = " and ".join(map(str, (line, *others)))
            problems.append(f"{name} is in several lines: {lines}. Keep one line for each name.")
            continue
        check_dense({name: x}, require_torch())
        x, problem = arranged(x, *_whole(line, name, sizes))
        problems += problem
        if not problem:
            parts = x.split(_part_sizes(line, sizes), dim=line.axes.index("parts"))
            named = {f"{name}[{i}]": part for i, part in enumerate(parts)}
            if taken := sorted(named.keys() & tensors.keys()):
                problems.append(
                    f"{listed(taken)} is a part of {name} by {line}, and a tensor of the "
                    f"state_dict. Take it out, or name the parts by lines of their own."
                )
            split |= named
    refuse("The tensors do not fit the mapping", problems)
    return split


def joined(
    state: dict[str, Any], mapping: Sequence[AnyLine], sizes: Mapping[str, int], torch: Any
) -> dict[str, Any]:
    """The inverse of `split`."""
    problems = []
    for line in _fused(mapping):
        for first in [x for x in state if numbers_in(f"{line.torch}[0]", x) is not None]:
            name = first.removesuffix("[0]")
            parts = [state.pop(f"{name}[{i}]") for i in range(len(line.parts))]
            place = line.axes.index("parts")
            forms = {(*x.shape[:place], *x.shape[place + 1 :], x.dtype) for x in parts}
            if len(forms) > 1:
                shapes = [f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}" for x in parts]
                problems.append(
                    f"the parts of {name} differ in more than their axis {place}: "
                    f"{listed(shapes)}. Make them of one dtype and of equal other axes."
                )
                continue
            if name in state:
                problems.append(
                    f"{name} is written twice: by {line} and by another line. Keep one line for "
                    f"each name."
                )
                continue
            entry, _, named = _whole(line, name, sizes)
            state[name], problem = arranged(torch.cat(parts, place), entry, "flax", named)
            problems += problem
    refuse("The arrays do not fit the mapping", problems)
    return state


def _fused(mapping: Sequence[AnyLine]) -> list[Fused]:
    return [line for line in mapping if isinstance(line, Fused)]


def _part_sizes(line: Fused, sizes: Mapping[str, int]) -> list[int]:
    return [1 if part == "1" else sizes[part] for part in line.parts]


def _whole(line: Fused, name: str, sizes: Mapping[str, int]) -> tuple[Entry, Side, dict[str, int]]:
    """Entry, side and sizes that rearrange a fused tensor to have the parts as a separate axis."""
    pattern = f"{line.pattern.split('->')[0].strip()} -> {' '.join(line.axes)}"
    entry = Entry(name, name, Map(name, name, pattern), ())
    return entry, "torch", dict(sizes) | {"parts": sum(_part_sizes(line, sizes))}
