"""Choice of a strategy for one attention on one mesh, by a table of costs, with the reason."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ..chips import Chip, chip_of
from ..device_order import place_of as _place
from ..kernels import Kernel, choice
from ..kernels.choice import checked_spec
from ..kernels.function_kernel import as_kernel
from ..mask import Spec
from ..mesh import AnyMesh, find_mesh, platform_of
from ..mesh_layout import MeshLayout, axes_size, check_division, check_is_layout, check_mesh, names
from .all_gather import AllGatherKV
from .cost import EFFICIENCY, ON_GPU, Cost, Group, Layer, cost_of
from .hybrid import Hybrid
from .ring import Ring
from .strategy import Shape, Strategy
from .ulysses import Ulysses


@dataclass(frozen=True)
class Candidate:
    """A strategy, with its cost or the reason why it cannot be taken.

    Attributes:
      kernel: the name of the kernel that it would have.
      cost: of one layer; None where there is a reason against it.
      why_not: that reason.
    """

    strategy: Strategy
    kernel: str = ""
    cost: Cost | None = None
    why_not: str | None = None


@dataclass(frozen=True)
class StrategyChoice:
    """A strategy, for `jax_seqpar.dot_product_attention(..., strategy=choice.strategy)`.

    `print(choice)` shows the table of all candidates and the reason.

    Attributes:
      strategy: the one that takes the least time.
      reason: why, in one sentence.
      candidates: all of them, the fastest first, those that cannot be taken last.
      chip: whose speeds were assumed.
    """

    strategy: Strategy
    reason: str
    candidates: tuple[Candidate, ...]
    chip: Chip

    def __str__(self) -> str:
        head = ("strategy", "kernel", "MB near", "MB far", "peak MB", "attend ms", "wait ms")
        rows = [head, *(_cells(candidate) for candidate in self.candidates)]
        widths = [max(len(row[i]) for row in rows if len(row) == len(head)) for i in range(7)]
        lines = [
            "  ".join(
                cell.ljust(width) if i < 2 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            if len(row) == len(head)
            else f"{row[0].ljust(widths[0])}  {row[1]}"
            for row in rows
        ]
        return "\n".join([*lines, f"{self.chip.name}: {self.reason}"])


def choose_strategy(
    query: Any,
    key: Any,
    value: Any,
    *,
    layout: MeshLayout = MeshLayout(),
    kernel: Any = None,
    gradients: bool = True,
    return_residual: bool = False,
    chip: Chip | None = None,
    **keywords: Any,
) -> StrategyChoice:
    """The strategy that takes the least time for one attention, by formula.

    Of each candidate it counts the bytes that a device receives, within a slice or host and from
    others (`Strategy.traffic`), those that it holds at most (`Strategy.memory`; compiled programs
    confirm both), the work of the slowest device, and the transfers under which no attention runs:
    all of Ulysses' and of an all-gather, those of a ring that take longer than the attention of a
    round. Within a slice of TPUs a bidirectional ring is a candidate, too, from three devices on.
    Seconds are for the ranking: they come from data sheets. Compile the best two with
    `jax_seqpar.plan` before a long run.

    Masks that are arrays and documents are counted as if they allowed everything: a ring finds at
    run time how many rounds documents need.

    Args:
      query, key, value: global arrays, or `jax.ShapeDtypeStruct`s.
      layout: as for the call. With two mesh axes of tokens hybrids are candidates.
      kernel, return_residual: as for the call; a kernel of None is each strategy's own choice.
      gradients: whether the backward pass counts.
      chip: the speeds to assume; None looks up the devices of the mesh.
      keywords: those that the attention will be called with.

    Raises:
      TypeError: for a keyword that the attention does not have.
      ValueError: for arrays and options that do not fit together, a layout without tokens, a mesh
        that lacks its axes, or if no strategy fits.

    Example:
      choice = choose_strategy(query, key, value, layout=layout, is_causal=True)
      print(choice)
      attend = partial(dot_product_attention, layout=layout, strategy=choice.strategy)
    """
    check_is_layout(layout)
    spec = checked_spec("choose_strategy", query, key, value, keywords)
    mesh = find_mesh(layout.mesh, query)
    check_mesh(layout, mesh.shape, ())
    check_division(query.shape, key.shape, layout, mesh.shape)
    call = Call(query, key, value, spec, mesh, layout, kernel, return_residual)
    return choose(call, gradients=gradients, chip=chip)


@dataclass(frozen=True)
class Call:
    """A call of the attention, checked, of which the strategy is open.

    Attributes:
      query, key, value: of the whole sequence; shapes and dtypes matter.
      kernel: that of the call; None is each strategy's own choice.
      check_vma: as for `jax_seqpar.kernels.choice.choose`.
    """

    query: Any
    key: Any
    value: Any
    spec: Spec
    mesh: AnyMesh
    layout: MeshLayout
    kernel: Any = None
    return_residual: bool = False
    check_vma: bool = False

    @property
    def strategies(self) -> Iterator[Strategy]:
        yield from (Ulysses(), AllGatherKV(), Ring())
        if len(names(self.layout.tokens)) == 2:
            yield from (Hybrid(Ring()), Hybrid(AllGatherKV()))

    def kernel_of(self, strategy: Strategy) -> tuple[Kernel, str | None]:
        """The kernel that the strategy would have, and why it cannot have it."""
        kernel, spec = self.kernel_for(strategy), self.spec_for(strategy)
        if spec.held_keys is not None and kernel.attends_in_turns:
            spec = self.spec  # it visits the keys of all devices
        elif spec.held_keys is not None and not kernel.gives_parts:
            return kernel, f"{kernel!r} does not attend to a part of the keys"
        return kernel, kernel.why_not(self.query, self.key, self.value, spec)

    def kernel_for(self, strategy: Strategy) -> Kernel:
        """The kernel that is asked for, or the one that suits what the strategy gives it."""
        if self.kernel is not None:
            return as_kernel(self.kernel)
        return choice.choose(
            self.query,
            self.key,
            self.value,
            self.spec_for(strategy),
            platform_of(self.mesh),
            residual=self.return_residual,
            check_vma=self.check_vma,
        ).kernel

    def spec_for(self, strategy: Strategy) -> Spec:
        """The Spec for a kernel, with the tokens of the first device.

        These stand for any device's: kernels read whether they are a run, a list or all tokens.
        """
        layout = self.layout
        if layout.tokens is None or strategy.sees_all_tokens:
            return self.spec
        axes, order = names(layout.tokens), layout.order
        if isinstance(strategy, Hybrid):
            axes, order = axes[:1], order.grouped(axes_size(axes[1:], self.mesh.shape))
        degree = axes_size(axes, self.mesh.shape)

        def held(x: Any) -> Any:
            # By shapes alone, as this is asked at each call.
            return jax.eval_shape(partial(order.tokens, x.shape[1] // degree, 0, degree))

        keys = None if strategy.sees_all_keys else held(self.key)
        return replace(self.spec, held_queries=held(self.query), held_keys=keys)

    def layer(self, gradients: bool) -> Layer:
        """Layer with the shapes that one device of the batch and head axes has."""
        layout, mesh = self.layout, self.mesh
        batch, heads = (axes_size(axes, mesh.shape) for axes in (layout.batch, layout.heads))

        def part(x: Any) -> Shape:
            B, tokens, N, H = x.shape
            return (max(B // batch, 1), tokens, max(N // heads, 1), H)

        parts = part(self.query), part(self.key), part(self.value)
        size = np.dtype(self.query.dtype).itemsize
        return Layer(*parts, size, self.spec.mask, layout.order, gradients)


def choose(call: Call, gradients: bool = True, chip: Chip | None = None) -> StrategyChoice:
    """`choose_strategy` of a checked call."""
    if call.layout.tokens is None:
        raise ValueError(
            f"{call.layout!r} shards no tokens, so there is no strategy to choose. Name the mesh "
            f"axis in MeshLayout(tokens=)."
        )
    chip = chip or chip_of(call.mesh)
    group, layer = _group(call.layout, call.mesh), call.layer(gradients)
    efficiencies = ON_GPU if platform_of(call.mesh) == "gpu" else EFFICIENCY
    able: list[Candidate] = []
    unable: list[Candidate] = []
    strategies = [*call.strategies]
    if chip.axes and group.all_near == group.degree > 2:
        strategies.append(Ring(bidirectional=True))  # a link from each of two neighbours
    for strategy in strategies:
        kernel, why_not = call.kernel_of(strategy)
        if why_not is not None:
            unable.append(Candidate(strategy, why_not=why_not))
            continue
        own = replace(layer, kernel=kernel)
        efficiency = efficiencies.get(kernel.name, efficiencies[""])
        able.append(
            Candidate(strategy, kernel.name, cost_of(strategy, own, group, chip, efficiency))
        )
    if not able:
        reasons = "; ".join(f"{x.strategy!r}: {x.why_not}" for x in unable)
        raise ValueError(
            f"no strategy fits kernel={call.kernel!r}: {reasons}. Write "
            f"kernel=jax_seqpar.Blockwise()."
        )
    # Of equals the first, which is Ulysses; sums of other orders differ by less than a picosecond.
    able.sort(key=lambda x: round(x.cost.seconds, 12) if x.cost else 0.0)
    return StrategyChoice(able[0].strategy, _reason(able, group), (*able, *unable), chip)


def _group(layout: MeshLayout, mesh: AnyMesh) -> Group:
    """The sizes of the token axes, and how many devices along each share a slice or host."""
    axes = names(layout.tokens)
    sizes = tuple(mesh.shape[name] for name in axes)
    if not isinstance(mesh, Mesh):
        return Group(sizes, sizes)  # an abstract mesh does not tell
    near = []
    for name in axes:
        line = np.moveaxis(mesh.devices, mesh.axis_names.index(name), 0)
        line = line.reshape(len(line), -1)[:, 0]
        places = [_place(device) for device in line]
        near.append(max(places.count(place) for place in places))
    return Group(sizes, tuple(near))


def _cells(candidate: Candidate) -> tuple[str, ...]:
    cost = candidate.cost
    if cost is None:
        return (repr(candidate.strategy), f"no: {candidate.why_not}")
    megabytes = (f"{x / 1e6:,.1f}" for x in (cost.inside, cost.between, cost.memory))
    milliseconds = (f"{1e3 * x:,.2f}" for x in (cost.attention, cost.waiting))
    return (repr(candidate.strategy), candidate.kernel, *megabytes, *milliseconds)


def _reason(able: list[Candidate], group: Group) -> str:
    """Why the first is the first, in one sentence, and what could be better laid out."""
    best, cost = able[0], able[0].cost
    assert cost is not None
    reason = f"{best.strategy!r} takes {1e3 * cost.seconds:,.2f} ms a layer"
    if len(able) > 1:
        second = able[1].cost
        assert second is not None
        less = "attention" if cost.waiting > second.waiting else "waiting"
        reason += f", {able[1].strategy!r} {1e3 * second.seconds:,.2f} ms, with more {less}"
    return reason + _hint(group) + "."


def _hint(group: Group) -> str:
    """Hint for a better order of mesh axes over slices or hosts; empty if the order is good."""
    near, size = group.near[-1], group.sizes[-1]
    if near == size:
        return ""
    if len(group.sizes) == 1:
        return (
            f". The token axis crosses slices or hosts: {near} of its {size} devices are of one. "
            f"As two mesh axes, the last within one, it could have a Hybrid"
        )
    return (
        f". The last token axis crosses slices or hosts: {near} of its {size} devices are of one. "
        f"Ulysses of a Hybrid works along it, so name an axis within one last"
    )
