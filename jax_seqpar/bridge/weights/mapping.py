"""Mapping of names of a PyTorch `state_dict` to paths of a Flax tree, as data without arrays."""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from ..._text import count, listed

PLACEHOLDER = r"\{([A-Za-z_]\w*)\}"

Side = Literal["torch", "flax"]
Numbers = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Map:
    """One line of a mapping: a parameter that both sides have.

    Names may hold placeholders such as `{i}`, which stand for the number of a layer, an expert or
    the like. Lines with the same placeholders have the same numbers: write `{i}` in the lines of
    an encoder, and `{j}` in those of a decoder of another depth.

    Attributes:
      torch: the name in the `state_dict`, like "model.layers.{i}.self_attn.q_proj.weight".
      flax: the path in the tree, its keys joined by dots, like "layers.{i}.attention.query.kernel".
      pattern: einops, PyTorch's axes -> Flax's, like "(N H) D -> D N H"; None where the axes stay.

    Raises:
      ValueError: if the placeholders of the two sides differ, or the pattern has no two sides.

    Example:
      Map("layers.{i}.mlp.up.weight", "layers.{i}.up.kernel", "F D -> D F")
    """

    torch: str
    flax: str
    pattern: str | None = None

    def __post_init__(self) -> None:
        _check_placeholders(self, self.torch, self.flax)
        if self.pattern is not None and self.pattern.count("->") != 1:
            raise ValueError(
                f"{self} has no pattern with two sides. Write PyTorch's axes -> Flax's, as in "
                f'"(N H) D -> D N H", or None where the axes stay.'
            )


@dataclass(frozen=True)
class Tied:
    """One line of a mapping: another name of the same numbers, as of a head tied to an embedding.

    Attributes:
      torch: the name in the `state_dict`. It may be absent, as a safetensors file leaves it out;
        where it is present, its bits have to be those of `to`.
      to: the name in the `state_dict` of the parameter itself, which has a `Map`.

    Raises:
      ValueError: if the placeholders of the two names differ.

    Example:
      Tied("lm_head.weight", to="model.embed_tokens.weight")
    """

    torch: str
    to: str

    def __post_init__(self) -> None:
        _check_placeholders(self, self.torch, self.to)


@dataclass(frozen=True)
class Ignored:
    """One line of a mapping: a name that is not a parameter, such as a buffer of rotary angles.

    Attributes:
      torch: the name in the `state_dict`. It may be absent, and is not written on the way back.
      reason: why nothing is lost, for whoever reads the mapping.

    Example:
      Ignored("layers.{i}.rotary.inv_freq", "computed from the configuration")
    """

    torch: str
    reason: str

    def __post_init__(self) -> None:
        _check_placeholders(self, self.torch, self.torch)


@dataclass(frozen=True)
class Fused:
    """One line of a mapping: a tensor of PyTorch that is several parameters of the tree.

    They lie one after another along one axis of the tensor, which the pattern calls `parts`. For
    the rest of the mapping, and in messages, part 0 of "qkv.weight" is "qkv.weight[0]".

    Attributes:
      torch: the name in the `state_dict`.
      flax: the path in the tree of each part, in the order in which they lie in the tensor.
      pattern: einops, PyTorch's axes -> Flax's, with `parts` on both sides.
      parts: for each part, the name in `sizes` of its size along that axis, or "1".

    Raises:
      ValueError: if the placeholders of the names differ, the pattern has no `parts` on either
        side, or paths and parts are not as many.

    Example:
      paths = ("query.kernel", "key.kernel", "value.kernel")
      # All heads of the queries, then those of the keys, then those of the values, as in Phi-3.
      Fused("qkv_proj.weight", paths, "(parts H) D -> D parts H", parts=("N", "K", "K"))
      # Query, key and value of each head in turn, as in GPT-NeoX and BLOOM.
      Fused("query_key_value.weight", paths, "(N parts H) D -> D (N parts) H", parts=("1",) * 3)
      # Inputs first, as the Conv1D of GPT-2 has them.
      Fused("c_attn.weight", paths, "D (parts H) -> D parts H", parts=("N", "N", "N"))
    """

    torch: str
    flax: tuple[str, ...]
    pattern: str
    parts: tuple[str, ...]

    def __post_init__(self) -> None:
        for field in ("flax", "parts"):
            texts = getattr(self, field)
            if not isinstance(texts, tuple) or not all(isinstance(x, str) for x in texts):
                raise ValueError(
                    f"{field} must be a tuple of strings, got {texts!r} in {self}. "
                    f'Write {field}=("...", "...").'
                )
        if len(self.flax) != len(self.parts) or not self.parts:
            raise ValueError(
                f"{self} has {len(self.flax)} paths and {len(self.parts)} parts. Write as many."
            )
        sides = str(self.pattern).split("->")
        if [len(re.findall(r"\bparts\b", side)) for side in sides] != [1, 1]:
            raise ValueError(
                f"{self} must have the axis parts once on both sides of its pattern. Write "
                f'"(parts H) D -> D parts H".'
            )
        self.lines  # noqa: B018  Checks the names.

    @property
    def axes(self) -> list[str]:
        """Names of the tensor's axes, one by one, without parentheses."""
        return re.findall(r"\w+", self.pattern.split("->")[0])

    @property
    def lines(self) -> list[Map]:
        """A line for each part, once the tensor is split."""
        pattern = f"{' '.join(self.axes)} ->{self.pattern.split('->')[1]}"
        return [
            Map(f"{self.torch}[{i}]", path, re.sub(r"\bparts\b", part, pattern))
            for i, (path, part) in enumerate(zip(self.flax, self.parts, strict=True))
        ]


Line = Map | Tied | Ignored
AnyLine = Line | Fused


def expanded(mapping: Sequence[AnyLine]) -> list[Line]:
    """The lines with those of the parts in place of each `Fused`."""
    return [x for line in mapping for x in (line.lines if isinstance(line, Fused) else [line])]


@dataclass(frozen=True)
class Entry:
    """One parameter: its name on either side, and the line and the numbers that join them."""

    torch: str
    flax: str
    line: Map
    numbers: Numbers


@dataclass(frozen=True)
class Routes:
    """Resolved names: their entries; in `tied` each tied name's target; and the problems."""

    entries: list[Entry]
    tied: dict[str, str]
    problems: list[str]


def route(names: Iterable[str], mapping: Sequence[Line], side: Side) -> Routes:
    """Finds the line of each name: of the `state_dict` (side "torch"), or of the tree ("flax")."""
    lines = [line for line in mapping if side == "torch" or isinstance(line, Map)]
    hits = {name: [hit for line in lines if (hit := _hit(line, side, name))] for name in names}
    entries, tied = [], {}
    for line, numbers in (found[0] for found in hits.values() if found):
        if isinstance(line, Map):
            ends = (fill(line.torch, numbers), fill(line.flax, numbers))
            entries.append(Entry(*ends, line, numbers))
        elif isinstance(line, Tied):
            tied[fill(line.torch, numbers)] = fill(line.to, numbers)
    return Routes(entries, tied, _unclear(hits, side) + _twice(entries, side))


def route_tied(entries: Sequence[Entry], mapping: Sequence[Line]) -> Routes:
    """The tied names to write beside the entries' own, each with the name it is tied to."""
    tied, problems = {}, []
    for line in (line for line in mapping if isinstance(line, Tied)):
        found = {e.torch: n for e in entries if (n := numbers_in(line.to, e.torch)) is not None}
        names = {fill(line.torch, numbers): name for name, numbers in found.items()}
        if again := [name for name in names if name in tied]:
            problems.append(
                f"{count(again, 'name')} tied twice: {listed(again)}. Keep one of the lines."
            )
        tied |= names
        if not found:
            problems.append(f"{line} is tied to what no Map writes. Write to= the name of one.")
    twice = [name for name in tied if name in {entry.torch for entry in entries}]
    if twice:
        problems.append(
            f"{count(twice, 'name')} both tied and mapped: {listed(twice)}. Keep one of the lines."
        )
    return Routes([], tied, problems)


def absent(entries: Sequence[Entry], mapping: Sequence[Line], side: Side) -> list[str]:
    """The names, on one side, of entries that the others lead to expect.

    A line without placeholders has one; any other has those with whose numbers another line of
    the same placeholders has one.
    """
    found: dict[Map, set[Numbers]] = defaultdict(set)
    expected: dict[frozenset[str], set[Numbers]] = defaultdict(set, {frozenset(): {()}})
    for entry in entries:
        found[entry.line].add(entry.numbers)
        expected[_placeholders(entry.line.torch)].add(entry.numbers)
    names = []
    for line in (line for line in mapping if isinstance(line, Map)):
        template = line.torch if side == "torch" else line.flax
        numbers = expected[_placeholders(template)]
        # Nothing has these placeholders: the name as it is written says so.
        names += [fill(template, n) for n in sorted(numbers - found[line])] or (
            [] if numbers else [template]
        )
    return names


def absent_from(
    paths: Collection[str], entries: Sequence[Entry], mapping: Sequence[Line]
) -> list[str]:
    """Paths of a tree that no entry writes, each with the name to write it from."""
    written = {entry.flax for entry in entries}
    wanted = {entry.flax: entry.torch for entry in route(paths, mapping, "flax").entries}
    return [
        f"{path} ({wanted.get(path, 'which has no Map')})" for path in paths if path not in written
    ]


def numbers_in(template: str, name: str) -> Numbers | None:
    """The numbers at the placeholders of a template, None if the name does not fit it."""
    match = _regex(template).fullmatch(name)
    return match and tuple(sorted((key, int(value)) for key, value in match.groupdict().items()))


def fill(template: str, numbers: Numbers) -> str:
    """The template with numbers in place of its placeholders."""
    values = dict(numbers)
    return re.sub(PLACEHOLDER, lambda match: str(values[match[1]]), template)


def _hit(line: Line, side: Side, name: str) -> tuple[Line, Numbers] | None:
    template = line.flax if side == "flax" and isinstance(line, Map) else line.torch
    numbers = numbers_in(template, name)
    return None if numbers is None else (line, numbers)


def _unclear(hits: dict[str, list[tuple[Line, Numbers]]], side: Side) -> list[str]:
    problems = []
    if none := [name for name, found in hits.items() if not found]:
        instead = {
            "torch": "Map(name, path, pattern) for a parameter, Tied(name, to=...) for another "
            "name of one, Ignored(name, reason) for what is none",
            "flax": "Map(name, path, pattern), or take them out of the tree",
        }
        problems.append(
            f"{count(none, 'name')} without a line: {listed(none)}. Add {instead[side]}."
        )
    if several := [
        f"{name} ({' and '.join(str(line) for line, _ in found)})"
        for name, found in hits.items()
        if len(found) > 1
    ]:
        problems.append(
            f"{count(several, 'name')} in several lines: {listed(several)}. Keep one line for each."
        )
    return problems


def _twice(entries: Sequence[Entry], side: Side) -> list[str]:
    sources = defaultdict(list)
    for entry in entries:
        source, target = (entry.torch, entry.flax)[:: 1 if side == "torch" else -1]
        sources[target].append(source)
    twice = [f"{name} (from {listed(names)})" for name, names in sources.items() if names[1:]]
    if not twice:
        return []
    return [f"{count(twice, 'name')} written twice: {listed(twice)}. Let each line write another."]


def _check_placeholders(line: Line, a: str, b: str) -> None:
    for field, text in vars(line).items():
        if not isinstance(text, str) and not (field == "pattern" and text is None):
            raise ValueError(
                f'{field} must be a string, got {text!r} in {line}. Write {field}="...".'
            )
    if any(brace in re.sub(PLACEHOLDER, "", name) for name in (a, b) for brace in "{}"):
        raise ValueError(f"{line} has braces around no name. Write a placeholder like {{i}}.")
    if _placeholders(a) != _placeholders(b):
        raise ValueError(
            f"{line} has {_braced(a)} on one side and {_braced(b)} on the other. "
            f"Write the same placeholders in both names."
        )


def _braced(template: str) -> str:
    return ", ".join(f"{{{name}}}" for name in sorted(_placeholders(template))) or "no placeholder"


def _placeholders(template: str) -> frozenset[str]:
    return frozenset(re.findall(PLACEHOLDER, template))


@cache
def _regex(template: str) -> re.Pattern[str]:
    pattern, seen = "", set()
    # re.split puts the captured names at the odd places.
    for place, part in enumerate(re.split(PLACEHOLDER, template)):
        if place % 2 == 0:
            pattern += re.escape(part)
        else:
            # No zero in front, so that a number has one spelling and the way back is the same name.
            pattern += f"(?P={part})" if part in seen else f"(?P<{part}>0|[1-9][0-9]*)"
            seen.add(part)
    return re.compile(pattern)
