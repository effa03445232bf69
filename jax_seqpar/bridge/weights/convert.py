"""Parameters from a PyTorch `state_dict` to a tree of JAX arrays and back, bit for bit.

A mapping (`mapping.py`) has a line for each kind of parameter: its names on both sides and, as an
einops pattern, what happens to the axes. Every tensor has to be accounted for, so that none is
forgotten, left at its initial value or transposed without a word.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ..._checks import check_count
from ..._extras import require_torch
from ..._text import count, listed
from ...compare.bits import compare_bits
from ...compare.numpy_conversion import check_leaf
from ..convert import to_jax, to_torch
from ..tensor_files import load_safetensors
from .arrange import arranged, axes, check_dense, misfits, refuse
from .fused import joined, split
from .mapping import (
    AnyLine,
    Entry,
    Fused,
    Line,
    Map,
    absent,
    absent_from,
    expanded,
    route,
    route_tied,
)
from .trees import leaves_by_path, nested, placed


def from_torch(
    state_dict: Mapping[str, Any] | str | Path,
    mapping: Sequence[AnyLine],
    *,
    sizes: Mapping[str, int] | None = None,
    like: Any = None,
) -> Any:
    """A tree of JAX arrays with the bits and dtypes of a PyTorch model's parameters.

    The arrays are copies, on JAX's default device unless `like` has shardings.

    Args:
      state_dict: tensors by name; or the path of safetensors, see `load_safetensors`.
      mapping: a line for every name.
      sizes: of axes in the patterns, like {"N": 8}: those that no shape tells.
      like: a tree whose leaves have a shape and a dtype, and may have a sharding: parameters,
        `jax.eval_shape(init, ...)`, `nnx.state(model, nnx.Param)`. The result has its containers
        and keys, and arrays are put where its shardings say. Without it only the mapping tells
        what is missing: a layer that lacks all its parameters is not missed.

    Returns:
      `like` with arrays as its leaves, or nested dicts. A dict whose keys are all numbers, as in
      "layers.0.kernel", has integers as keys, as those of `nnx.to_pure_dict` are.

    Raises:
      ValueError: names without a line or with several, paths written twice, missing or not in
        `like`, tied tensors that differ: all of them in one message. Then, in one message, shapes
        and dtypes that differ from those of `like`, and patterns that do not fit. Or a 64-bit
        dtype while JAX's x64 mode is off.
      TypeError: for anything but dense tensors and lines of a mapping, or a dtype that JAX does
        not have.

    Example:
      mapping = [
          Map("layers.{i}.q_proj.weight", "layers.{i}.query.kernel", "(N H) D -> D N H"),
          Map("embed.weight", "embed.embedding"),
          Tied("head.weight", to="embed.weight"),
          Ignored("rotary.inv_freq", "computed from the configuration"),
      ]
      params = from_torch(model.state_dict(), mapping, sizes={"N": 8})
    """
    torch = require_torch()
    lines = _checked(mapping, sizes or {})
    tensors = load_safetensors(state_dict) if isinstance(state_dict, str | Path) else state_dict
    if not isinstance(tensors, Mapping):
        raise TypeError(
            f"state_dict must be tensors by name or the path of safetensors, got "
            f"{type(tensors).__name__}. Of a module write model.state_dict()."
        )
    tensors = split(tensors, mapping, sizes or {})
    routes = route(tensors, lines, "torch")
    leaves, structure = leaves_by_path(like)
    _check_leaves(leaves)
    if like is None:
        problems = _missing(absent(routes.entries, lines, "torch"))
    else:
        problems = _against(leaves, routes.entries, lines)
    used = {*routes.tied, *(entry.torch for entry in routes.entries)}
    check_dense({name: x for name, x in tensors.items() if name in used}, torch)
    problems += _untied(tensors, routes.tied, routes.entries)
    refuse("The mapping does not carry the state_dict to the tree", routes.problems + problems)
    arrays = _converted(tensors, routes.entries, sizes or {}, leaves)
    if like is None:
        return nested(arrays)
    return structure.unflatten([placed(arrays[path], path, leaf) for path, leaf in leaves.items()])


def to_torch_state(
    params: Any, mapping: Sequence[AnyLine], *, sizes: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """A PyTorch `state_dict` with the bits and dtypes of a tree of arrays: `from_torch` backwards.

    Every tensor is a copy. Tied names are written too, as `load_state_dict` expects them; ignored
    names are not.

    Args:
      params: a tree of JAX arrays, as `from_torch` or `nnx.state(model, nnx.Param)` gives.
        An array on several devices is gathered on one.
      mapping, sizes: those of `from_torch`.

    Returns:
      tensors by name.

    Raises:
      ValueError: paths without a line or with several, names written twice or missing: all of
        them in one message. Then, in one message, patterns that do not fit. Or a tracer.
      TypeError: for anything but an array, or for a dtype that PyTorch does not have.

    Example:
      model.load_state_dict(to_torch_state(params, mapping, sizes={"N": 8}))
    """
    torch = require_torch()
    lines = _checked(mapping, sizes or {})
    leaves, _ = leaves_by_path(params)
    routes = route(leaves, lines, "flax")
    ties = route_tied(routes.entries, lines)
    problems = routes.problems + ties.problems
    problems += _missing(absent(routes.entries, lines, "flax"))
    refuse("The mapping does not carry the tree to a state_dict", problems)
    state, problems = {}, []
    for entry in routes.entries:
        x = _tensor(leaves[entry.flax], entry.flax)
        x, problem = arranged(x, entry, "flax", sizes or {})
        problems += problem
        # A copy: PyTorch may write in place, and JAX must not see it.
        state[entry.torch] = x.clone(memory_format=torch.contiguous_format)
    refuse("The arrays do not fit the mapping", problems)
    state |= {name: state[to].clone() for name, to in ties.tied.items()}
    return joined(state, mapping, sizes or {}, torch)


def _converted(
    tensors: Mapping[str, Any],
    entries: Sequence[Entry],
    sizes: Mapping[str, int],
    leaves: dict[str, Any],
) -> dict[str, jax.Array]:
    """Arrays by path, on JAX's default device, with the shapes and dtypes of the leaves."""
    ready, problems = {}, []
    for entry in entries:
        tensor = tensors[entry.torch].detach()
        x, problem = arranged(tensor, entry, "torch", sizes)
        if not problem and entry.flax in leaves:
            problem = misfits(tensor, x, entry, leaves[entry.flax])
        problems += problem
        ready[entry] = x
    refuse("The tensors do not fit the tree", problems)
    arrays = {}
    for entry, x in ready.items():
        # By name: an error of to_jax names the key.
        shared = to_jax({entry.torch: x})[entry.torch]
        # A copy: an optimizer of PyTorch writes in place, and JAX must not see it. It is made of
        # a NumPy array, which commits it to no device, so it may join arrays spread over a mesh.
        arrays[entry.flax] = jnp.array(np.asarray(shared), copy=True)
    return arrays


def _tensor(x: Any, path: str) -> Any:
    check_leaf(x, f"array at [{path!r}]")
    # DLPack carries one device.
    if isinstance(x, jax.Array) and not isinstance(x, Tracer) and len(x.devices()) > 1:
        x = jax.device_put(x, min(x.devices(), key=lambda device: device.id))
    return to_torch({path: x})[path]


def _checked(mapping: Sequence[AnyLine], sizes: Mapping[str, int]) -> list[Line]:
    """The lines, with a line for each part of a fused one; raises ValueError unless sizes fit."""
    if not isinstance(mapping, Sequence) or not all(isinstance(x, AnyLine) for x in mapping):
        raise TypeError(
            f"mapping must be a sequence of Map, Fused, Tied and Ignored, got {mapping!r}. "
            f'Write [Map("name", "path")].'
        )
    for axis, size in sizes.items():
        check_count(f"sizes[{axis!r}]", size)
    lines = expanded(mapping)
    patterns = [line.pattern for line in lines if isinstance(line, Map) and line.pattern]
    named = set().union(*map(axes, patterns))
    if unused := sorted(sizes.keys() - named):
        raise ValueError(
            f"{count(unused, 'size')} of no axis in the patterns: {listed(unused)}. "
            f"The patterns have {listed(sorted(named)) or 'no axes'}. Leave the other sizes out."
        )
    parts = {part for line in mapping if isinstance(line, Fused) for part in line.parts}
    if unknown := sorted(parts - sizes.keys() - {"1"}):
        raise ValueError(
            f"{count(unknown, 'size')} of parts and not told: {listed(unknown)}. "
            f"Write sizes={{{unknown[0]!r}: ...}}."
        )
    return lines


def _check_leaves(leaves: dict[str, Any]) -> None:
    wrong = [
        path for path, x in leaves.items() if not (hasattr(x, "shape") and hasattr(x, "dtype"))
    ]
    if wrong:
        raise TypeError(
            f"like has no shape or dtype at {listed(wrong)}. "
            f"Write jax.eval_shape(init, ...), or nnx.state(model, nnx.Param)."
        )


def _missing(names: Sequence[str]) -> list[str]:
    if not names:
        return []
    return [
        f"{count(names, 'name')} missing: {listed(names)}. Take out the lines of what the model "
        f"does not have; where depths differ, write {{i}} in some lines and {{j}} in the others."
    ]


def _against(
    leaves: dict[str, Any], entries: Sequence[Entry], mapping: Sequence[Line]
) -> list[str]:
    """Problems: paths of a tree that no entry writes, and entries whose path the tree lacks."""
    problems = []
    if missing := absent_from(leaves.keys(), entries, mapping):
        problems.append(
            f"{count(missing, 'path')} missing: {listed(missing)}. Add a Map where there is none, "
            f"or take them out of like."
        )
    if extra := [f"{e.flax} ({e.torch})" for e in entries if e.flax not in leaves]:
        problems.append(
            f"{count(extra, 'path')} not in like: {listed(extra)}. Write the tree's own paths, "
            f"or make the model have them."
        )
    return problems


def _untied(
    tensors: Mapping[str, Any], tied: dict[str, str], entries: Sequence[Entry]
) -> list[str]:
    """Problems: tied names whose numbers would be lost."""
    problems, carried = [], {entry.torch for entry in entries}
    if alone := [f"{name} (to {to})" for name, to in tied.items() if to not in carried]:
        problems.append(
            f"{count(alone, 'name')} tied to what is missing or has no Map: {listed(alone)}. "
            f"Write Map(name, path, pattern) for them."
        )
    for name, to in tied.items():
        if to in carried:
            (report,) = compare_bits({name: tensors[name]}, {name: tensors[to]}).leaves
            if not report.equal:
                problems.append(
                    f"{name} is not tied to {to}: {report}\n  Write Map({name!r}, path, pattern)."
                )
    return problems
