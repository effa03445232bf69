"""Sizes as people write them: 128K tokens, 1M; a mesh, as data=2,seq=8."""

import re
from dataclasses import replace

from ..mesh_layout import MeshLayout

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def size_of(text: str) -> int:
    """The number that is meant: "128K" is 131072.

    Raises:
      ValueError: for anything else.
    """
    found = re.fullmatch(r"(\d+)([KMG]?)", str(text).strip().upper())
    if found is None or int(found[1]) == 0:
        raise ValueError(f"{text!r} is no size. Write a number as 4096, 128K or 1M.")
    return int(found[1]) * UNITS[found[2]]


def tokens_as_text(tokens: int) -> str:
    """131072 as "128K"."""
    for unit in ("G", "M", "K"):
        if tokens % UNITS[unit] == 0:
            return f"{tokens // UNITS[unit]}{unit}"
    return str(tokens)


def mesh_of(text: str) -> dict[str, int]:
    """The mesh axes of "data=2,seq=8".

    Raises:
      ValueError: for anything else.
    """
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(re.fullmatch(r"\w+", name) and size.isdigit() for name, _, size in pairs):
        raise ValueError(f"{text!r} is no mesh. Write its axes and their sizes as data=2,seq=8.")
    sizes = {name: int(size) for name, _, size in pairs}
    if len(sizes) < len(pairs):
        raise ValueError(f"{text!r} names an axis twice. Write each once, as data=2,seq=8.")
    return sizes


def mesh_as_text(mesh: dict[str, int]) -> str:
    """The mesh as it is given: data=2,seq=8."""
    return ",".join(f"{name}={size}" for name, size in mesh.items())


def layout_of(mesh: dict[str, int]) -> MeshLayout:
    """The layout of axes by their names: data is the batch, tensor the heads, others the tokens."""
    rest = tuple(name for name in mesh if name not in ("data", "tensor"))
    layout = MeshLayout(tokens=rest[0] if len(rest) == 1 else rest or None)
    layout = replace(layout, batch="data" if "data" in mesh else None)
    return replace(layout, heads="tensor" if "tensor" in mesh else None)
