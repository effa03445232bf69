"""Sharding of an attention's arrays: the mesh axes of batch, tokens and heads."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from ._checks import Shape
from .order import Contiguous, TokenOrder, check_order

AxisName = str | tuple[str, ...]
MeshAxes = AxisName | None


@dataclass(frozen=True)
class MeshLayout:
    """Names the mesh axes that shard the batch, the tokens and the heads of `[B, S, N, H]`.

    Each field is the name of a mesh axis, a tuple of names (major to minor), or None where that
    array axis is not sharded. Hashable, so it can be a static argument of `jax.jit`.

        MeshLayout()                                          [B, S@seq, N, H]
        MeshLayout(batch="data")                              [B@data, S@seq, N, H]
        MeshLayout(batch=("data", "fsdp"), heads="tensor")    [B@(data,fsdp), S@seq, N@tensor, H]
        MeshLayout(tokens=None, heads="tensor")               [B, S, N@tensor, H]

    Args:
      tokens: axis or axes of the sequence-parallel group; its size is the degree.
      batch: axis or axes of data parallelism.
      heads: axis or axes of tensor parallelism.
      order: which tokens each device of that group holds; the arrays lie in this order.
      mesh: the mesh; if None, that of `jax.set_mesh`, otherwise the one that the arrays are
        sharded over.
      check_vma: of `jax.shard_map`: whether JAX checks how arrays vary over the mesh. It cannot
        under `jax.vmap(spmd_axis_name=)`, for which the axes should be Auto (JAX 0.10.2). Without
        it JAX divides the gradient of the output by the size of each mesh axis that nothing names,
        and adds as many up: roundings that cost exact attention the bits of its gradients. Name
        every axis of the mesh, or make a mesh without the others.
    """

    tokens: MeshAxes = "seq"
    batch: MeshAxes = None
    heads: MeshAxes = None
    order: TokenOrder = Contiguous()
    mesh: Mesh | AbstractMesh | None = None
    check_vma: bool = True

    def __post_init__(self) -> None:
        for field in ("tokens", "batch", "heads"):
            mesh_axes = getattr(self, field)
            if not (mesh_axes is None or isinstance(mesh_axes, str)):
                # A list would make the layout unhashable.
                object.__setattr__(self, field, tuple(mesh_axes))
        check_order(self.order)

    @property
    def partition_spec(self) -> PartitionSpec:
        """PartitionSpec of query, key, value and output: `[B@batch, S@tokens, N@heads, H]`."""
        return PartitionSpec(self.batch, self.tokens, self.heads, None)

    @property
    def token_spec(self) -> PartitionSpec:
        """PartitionSpec of per-token arrays: `[B@batch, S@tokens, ...]`."""
        return PartitionSpec(self.batch, self.tokens)

    @property
    def axis_names(self) -> tuple[str, ...]:
        """Every mesh axis named, in the order batch, tokens, heads."""
        return (*names(self.batch), *names(self.tokens), *names(self.heads))

    def on(self, mesh: Mesh | AbstractMesh | None) -> "MeshLayout":
        """The same layout of another mesh."""
        return replace(self, mesh=mesh)

    def __repr__(self) -> str:
        axes = {"tokens": self.tokens, "batch": self.batch, "heads": self.heads}
        given = [f"{name}={x!r}" for name, x in axes.items() if name == "tokens" or x is not None]
        if self.order != Contiguous():
            given.append(f"order={self.order!r}")
        return f"MeshLayout({', '.join(given)})"

    def __str__(self) -> str:
        def label(axis: str, mesh_axes: MeshAxes) -> str:
            sharded = names(mesh_axes)
            if not sharded:
                return axis
            return f"{axis}@{sharded[0] if len(sharded) == 1 else '(' + ','.join(sharded) + ')'}"

        return f"[{label('B', self.batch)}, {label('S', self.tokens)}, {label('N', self.heads)}, H]"


def names(mesh_axes: MeshAxes) -> tuple[str, ...]:
    """The mesh axes as a tuple: `None -> ()`, `"seq" -> ("seq",)`."""
    if mesh_axes is None:
        return ()
    return (mesh_axes,) if isinstance(mesh_axes, str) else tuple(mesh_axes)


def axes_size(mesh_axes: MeshAxes, mesh_shape: Mapping[str, int]) -> int:
    """Number of devices that share an array axis: the product of its mesh axes, 1 for None."""
    return math.prod(mesh_shape[name] for name in names(mesh_axes))


def check_is_layout(layout: Any) -> None:
    """Raises ValueError unless it is a MeshLayout."""
    if not isinstance(layout, MeshLayout):
        tokens = repr(layout) if isinstance(layout, str) else "..."
        raise ValueError(
            f"layout must be a MeshLayout, got {layout!r}. Write MeshLayout(tokens={tokens})."
        )


def check_mesh(layout: MeshLayout, mesh_shape: Mapping[str, int], manual: Sequence[str]) -> None:
    """Raises ValueError unless the layout names axes of the mesh, each once, none manual."""
    for axis in layout.axis_names:
        if axis not in mesh_shape:
            raise ValueError(
                f"{layout!r} names axis {axis!r}, which the mesh does not have: its axes are "
                f"{dict(mesh_shape)}. Name its axes in MeshLayout(tokens=, batch=, heads=)."
            )
        if axis in manual:
            raise ValueError(
                f"mesh axis {axis!r} is already manual: this is inside a jax.shard_map, where "
                f"arrays are per-device. Leave {axis!r} out of the MeshLayout."
            )
    twice = [a for a in layout.axis_names if layout.axis_names.count(a) > 1]
    if twice:
        raise ValueError(
            f"{layout!r} uses mesh axis {twice[0]!r} for more than one array axis. "
            f"A mesh axis shards one of batch, tokens and heads: name {twice[0]!r} once."
        )


def check_division(
    query: Shape, key: Shape, layout: MeshLayout, mesh_shape: Mapping[str, int]
) -> None:
    """Raises ValueError unless the mesh axes divide batch, tokens and heads."""
    got = f"Got query {query}, key {key}."

    def divide(
        tensor: str, size_name: str, size: int, field: str, mesh_axes: Any, advice: str
    ) -> None:
        parts = axes_size(mesh_axes, mesh_shape)
        if size % parts:
            price = " (no sequence parallelism)" if field == "tokens" else ""
            raise ValueError(
                f"{tensor} {size_name} = {size} is not divisible by the {parts} devices of mesh "
                f"axis {mesh_axes!r}. {got} {advice.format(-(-size // parts) * parts)} "
                f"Or write MeshLayout({field}=None), which leaves it whole{price}."
            )

    B, T, N, _ = query
    S, K = key[1:3]
    degree = axes_size(layout.tokens, mesh_shape)
    # Without the keywords of the padding its tokens would be attended to.
    pad = (
        f"Write x = jax_seqpar.pad_to_degree(query, key, value, degree={degree}), which pads to "
        f"{{}}, with mask=, bias= and logits= there where the call has them; then call with "
        f"x.query, x.key, x.value, **x.keywords, and write x.unpad(out)."
    )
    divide("query", "batch B", B, "batch", layout.batch, "Pad to {} and cut the output.")
    for name, size_name, tokens in (("query", "tokens T", T), ("key", "tokens S", S)):
        if layout.order == Contiguous():
            divide(name, size_name, tokens, "tokens", layout.tokens, pad)
        elif layout.tokens is not None:
            layout.order.check(name, tokens, degree)
    divide("query", "heads N", N, "heads", layout.heads, "Use a mesh axis whose size divides it.")
    tensor_parallel = axes_size(layout.heads, mesh_shape)
    if K % tensor_parallel and tensor_parallel % K:
        raise ValueError(
            f"KV heads K = {K} neither is divisible by nor divides the {tensor_parallel} devices "
            f"of mesh axis {layout.heads!r}. {got} Use jnp.repeat(key, {N // K}, axis=2), and "
            f"value alike, or MeshLayout(heads=None)."
        )


def check_sharding(name: str, spec: Iterable[Any], layout: MeshLayout) -> None:
    """Raises ValueError for an array sharded, by its type, over an axis that the layout lacks.

    Such an array would be gathered first: right numbers, at the price of the parallelism.
    """
    fields = ("batch", "tokens", "heads")
    for field, mesh_axes in zip(fields, spec, strict=False):
        for axis in names(mesh_axes):
            if axis not in layout.axis_names:
                raise ValueError(
                    f"{name} is sharded over mesh axis {axis!r}, which {layout!r} does not name, "
                    f"so it would be gathered first. Write MeshLayout(..., {field}={axis!r})."
                )
