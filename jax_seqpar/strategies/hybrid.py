"""Hybrid: one strategy between groups of devices, Ulysses within each group."""

from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Array

from .._checks import axis_size
from ..kernels import Kernel, Residual, blockwise_attention
from ..mask import Spec
from ..mesh_layout import AxisName, MeshAxes, names
from ..order import Contiguous, TokenOrder
from .all_gather import AllGatherKV
from .ring import Ring
from .strategy import Axes, Degree, Shape, Strategy, array_bytes, check_traffic, output
from .ulysses import Ulysses, head_plan


@dataclass(frozen=True)
class Hybrid:
    """Ulysses over the last mesh axis of the tokens, around another strategy over the first.

    `MeshLayout(tokens=("outer", "inner"))`: Ulysses exchanges heads for tokens over "inner", which
    belongs on the fastest links; the tokens of the group then attend to those of the other groups
    over "outer", with a part of the KV heads each. Where a group's devices divide the K KV heads, a
    device receives between R groups K R / (N + K) of what Ulysses over both axes receives there,
    forward. Fang and Zhao 2024, https://arxiv.org/abs/2405.07719.

    Args:
      outer: over the first axis: `Ring()` or `AllGatherKV()`.
      inner: over the last axis.
    """

    outer: Strategy = Ring()
    inner: Ulysses = Ulysses()

    sees_all_tokens = False

    def __post_init__(self) -> None:
        if not isinstance(self.outer, Ring | AllGatherKV) or not isinstance(self.inner, Ulysses):
            raise ValueError(
                f"Hybrid takes Ring() or AllGatherKV() as outer, Ulysses(...) as inner, got "
                f"{self.outer!r} and {self.inner!r}. Write Hybrid(Ring(), Ulysses())."
            )

    @property
    def sees_all_keys(self) -> bool:
        return self.outer.sees_all_keys

    def heads_axes(self, tokens: MeshAxes) -> tuple[str, ...]:
        return () if tokens is None else self.inner.heads_axes(_two_axes(tokens)[1])

    def pad_heads(self, spec: Spec, heads: int, kv_heads: int, axes: Axes, kernel: Kernel) -> Spec:
        _, inner = _two_axes(tuple(axes))
        return self.inner.pad_heads(spec, heads, kv_heads, {inner: axes[inner]}, kernel)

    def __call__(
        self,
        kernel: Kernel,
        query: Array,
        key: Array,
        value: Array,
        spec: Spec,
        *,
        axis_name: AxisName,
        order: TokenOrder = Contiguous(),
        return_residual: bool = False,
    ) -> tuple[Array, Residual | None]:
        outer, inner = _two_axes(axis_name)
        group = order.grouped(axis_size(inner))
        between = _OuterAttention(kernel, self.outer, outer, group)
        # The tokens of a group, in the order of its devices: to Ulysses they are a whole sequence.
        asked = {"axis_name": inner, "return_residual": return_residual}
        return self.inner(between, query, key, value, spec, **asked)

    def traffic(
        self,
        query: Shape,
        key: Shape,
        value: Shape,
        *,
        degree: Degree,
        itemsize: int,
        kernel: Kernel = blockwise_attention,
    ) -> int:
        options: Any = {"degree": degree, "itemsize": itemsize, "kernel": kernel}
        return sum(self.traffic_by_axis(query, key, value, **options))

    def traffic_by_axis(
        self,
        query: Shape,
        key: Shape,
        value: Shape,
        *,
        degree: Degree,
        itemsize: int,
        kernel: Kernel = blockwise_attention,
    ) -> tuple[int, int]:
        """Bytes that a device receives over the outer and over the inner axis; see `traffic`.

        Args:
          degree: (devices of the outer axis, devices of the inner one).
        """
        options: Any = {"itemsize": itemsize, "kernel": kernel}
        of_group, of_device = self.divide(query, key, value, degree=degree, kernel=kernel)
        R, U = _two_sizes(degree)
        return (
            self.outer.traffic(*of_device, degree=R, **options),
            self.inner.traffic(*of_group, degree=U, **options),
        )

    def memory(
        self,
        query: Shape,
        key: Shape,
        value: Shape,
        *,
        degree: Degree,
        itemsize: int,
        gradients: bool = False,
        kernel: Kernel = blockwise_attention,
    ) -> int:
        """Bytes that the outer strategy holds, for one device's heads and all tokens of its group.

        A ring comes back to the queries and the gradient of the output, which are exchanged arrays
        here; an all-gather has these two in the layout of the kernel in any case.
        """
        _, (q, k, v) = self.divide(query, key, value, degree=degree, kernel=kernel)
        R, _ = _two_sizes(degree)
        options: Any = {"itemsize": itemsize, "gradients": gradients, "kernel": kernel}
        held = self.outer.memory(q, k, v, degree=R, **options)
        if gradients and isinstance(self.outer, Ring):
            held += array_bytes(q, output(q, v), itemsize=itemsize) // R
        return held

    def divide(
        self, query: Shape, key: Shape, value: Shape, *, degree: Degree, kernel: Kernel
    ) -> tuple[tuple[Shape, ...], tuple[Shape, ...]]:
        """Shapes of query, key and value that Ulysses shares within a group, and the outer strategy
        between groups: all heads of the group's tokens, and all tokens of one device's heads."""
        check_traffic(query, key, degree)
        R, U = _two_sizes(degree)
        plan = head_plan(query[2], key[2], U, kernel)
        heads = (plan.query_heads // U, *[plan.sent_kv_heads // U] * 2)
        shapes = query, key, value
        return (
            tuple((B, tokens // R, N, H) for B, tokens, N, H in shapes),
            tuple((B, tokens, n, H) for (B, tokens, _, H), n in zip(shapes, heads, strict=True)),
        )


@dataclass(frozen=True)
class _OuterAttention(Kernel):
    """The outer strategy around a kernel, as a kernel: the attention of one device of a group.

    Attributes:
      order: which tokens each group holds, in the order in which its devices have them.
    """

    kernel: Kernel
    strategy: Strategy
    axis_name: AxisName
    order: TokenOrder

    @property
    def sums_exactly(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.kernel.sums_exactly

    @property
    def gives_residual(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.kernel.gives_residual

    @property
    def needs_a_key(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.kernel.needs_a_key

    @property
    def check_vma(self) -> bool:
        return self.kernel.check_vma

    def attend(
        self, query: Array, key: Array, value: Array, spec: Spec
    ) -> tuple[Array, Residual | None]:
        return self.strategy(
            self.kernel,
            query,
            key,
            value,
            spec,
            axis_name=self.axis_name,
            order=self.order,
            return_residual=self.gives_residual,
        )

    def sharing(self, axes: Any) -> "_OuterAttention":
        return replace(self, kernel=self.kernel.sharing(axes))


def _two_axes(tokens: MeshAxes) -> tuple[str, str]:
    """The outer and the inner mesh axis."""
    axes = names(tokens)
    if len(axes) != 2:
        raise ValueError(
            f"Hybrid() works on two mesh axes of the tokens, got tokens = {tokens!r}. Write "
            f'MeshLayout(tokens=("outer", "inner")), or strategy=jax_seqpar.Ulysses().'
        )
    return axes


def _two_sizes(degree: Degree) -> tuple[int, int]:
    """Devices along the outer and along the inner axis."""
    if not isinstance(degree, tuple) or len(degree) != 2:
        raise ValueError(
            f"Hybrid() works on two mesh axes, got degree = {degree!r}. Write degree=(outer, "
            f"inner), as (2, 4)."
        )
    return degree
