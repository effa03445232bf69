"""Tensors rearranged by the einops pattern of a line, with the reason where that fails."""

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..._extras import require
from ...compare.numpy_conversion import check_leaf
from .mapping import (
    Entry,
    Side,
)


def arranged(x: Any, entry: Entry, source: Side, sizes: Mapping[str, int]) -> tuple[Any, list[str]]:
    """The tensor with its axes as the other side has them, and the problem if they do not fit."""
    pattern = entry.line.pattern
    if pattern is None:
        return x, []
    einops = require("einops")
    if source == "flax":
        pattern = " -> ".join(side.strip() for side in reversed(pattern.split("->")))
    named = {name: size for name, size in sizes.items() if name in axes(pattern)}
    try:
        return einops.rearrange(x, pattern, **named), []
    except einops.EinopsError as error:
        reason = str(error).strip().splitlines()[-1].strip(" .")
        name = entry.torch if source == "torch" else entry.flax
        return x, [
            f'{name} {list(x.shape)} does not fit "{pattern}" with sizes {named}: {reason}. '
            f"Write a pattern of its {x.ndim} axes, and the sizes that its shape does not tell."
        ]


def misfits(tensor: Any, x: Any, entry: Entry, leaf: Any) -> list[str]:
    """Differences of shape and dtype between an arranged tensor and the leaf it is to replace."""
    pattern, problems = entry.line.pattern, []
    if (got := tuple(x.shape)) != (wanted := tuple(leaf.shape)):
        by = f'by "{pattern}"' if pattern else "without a pattern"
        fitting = " or ".join(itertools.islice(_fitting(tuple(tensor.shape), wanted), 3))
        instead = f"Of these shapes is {fitting}" if fitting else "No pattern joins these shapes"
        problems.append(
            f"{entry.torch} {list(tensor.shape)} becomes {list(got)} {by}, but {entry.flax} is "
            f"{list(wanted)}. {instead}; or make the model of other sizes."
        )
    if (dtype := str(x.dtype).removeprefix("torch.")) != str(leaf.dtype):
        problems.append(
            f"{entry.torch} is {dtype}, but {entry.flax} is {leaf.dtype}. Nothing is rounded "
            f"without a word: cast the tensor, or make the model of {dtype}."
        )
    return problems


def _fitting(torch: tuple[int, ...], flax: tuple[int, ...]) -> Iterator[str]:
    """Patterns between two shapes: each axis of the one is a product of axes of the other."""
    whole, parts = sorted((torch, flax), key=len)
    letters = "abcdefgh"[: len(parts)]
    if len(parts) > 6 or math.prod(whole) != math.prod(parts):
        return
    for places in itertools.product(range(len(whole)), repeat=len(parts)):
        groups = [[i for i, place in enumerate(places) if place == k] for k in range(len(whole))]
        sizes = tuple(math.prod(parts[i] for i in group) for group in groups)
        if sizes == whole and all(groups):
            names = ("".join(letters[i] for i in group) for group in groups)
            joined = " ".join(x if len(x) == 1 else f"({' '.join(x)})" for x in names)
            sides = (joined, " ".join(letters))
            yield '"{} -> {}"'.format(*(sides if whole is torch else sides[::-1]))


def axes(pattern: str) -> set[str]:
    """The names of the axes in an einops pattern."""
    return set(re.findall(r"[A-Za-z_]\w*", pattern))


def check_dense(tensors: Mapping[str, Any], torch: Any) -> None:
    """Raises TypeError unless every tensor is a dense one of PyTorch, with data."""
    for name, x in tensors.items():
        if not isinstance(x, torch.Tensor):
            raise TypeError(
                f"{name} must be a PyTorch tensor, got {type(x).__name__}. "
                f"Write torch.as_tensor(x), or Ignored({name!r}, reason)."
            )
        check_leaf(x, name)


def refuse(what: str, problems: Sequence[str]) -> None:
    """Raises ValueError that lists the problems, at most ten of them, if there are any."""
    if problems:
        more = f"\n- and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ValueError("\n- ".join([f"{what}:", *problems[:10]]) + more)
