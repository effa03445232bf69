"""Strategy: how the devices of one mesh axis share the tokens of an attention."""

import math
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array

from .._checks import check_count
from ..kernels import Kernel, Residual, blockwise_attention
from ..mask import Spec
from ..mesh_layout import AxisName, MeshAxes, MeshLayout
from ..order import Contiguous, TokenOrder

Shape = tuple[int, ...]
Degree = int | tuple[int, ...]
# Mesh axes of the tokens, major to minor, with their sizes.
Axes = Mapping[str, int]


@runtime_checkable
class Strategy(Protocol):
    """A function from the attention of one device to that of a mesh axis, for `jax.shard_map`.

    Values: frozen, hashable, equal by their options, so that they are part of a compiled program.

    Attributes:
      sees_all_tokens: whether the kernel is given every query and key of the sequence.
      sees_all_keys: whether it is given every key.
    """

    @property
    def sees_all_tokens(self) -> bool: ...
    @property
    def sees_all_keys(self) -> bool: ...

    def heads_axes(self, tokens: MeshAxes) -> tuple[str, ...]:
        """Mesh axes of the tokens that shard arrays with a head axis, such as a bias, as well."""
        ...

    def pad_heads(self, spec: Spec, heads: int, kv_heads: int, axes: Axes, kernel: Kernel) -> Spec:
        """The Spec with the heads that are added so that the devices divide them.

        Args:
          heads, kv_heads: N and K of one tensor-parallel shard.
          axes: the mesh axes of the tokens, major to minor.
        """
        ...

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
        """Attention over tokens that are sharded along a mesh axis.

        Args:
          kernel: the attention of one device.
          query, key, value: this device's tokens with all heads.
          spec: of the whole sequence; arrays with a head axis have all heads, or those of this
            device as `pad_heads` and `heads_axes` say.
          axis_name: the mesh axis (or axes) of the tokens.
          order: which tokens each of its devices holds.
          return_residual: whether the residual of each row is wanted, which may have to travel.

        Returns:
          This device's tokens of the output, all heads; and their residual.
        """
        ...

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
        """Bytes that one device receives from others in a forward pass.

        Args:
          query, key, value: shapes of the global arrays; where other mesh axes share batch or
            heads, of one of their devices' part.
          degree: devices that share the tokens, which they divide; of several mesh axes the sizes,
            major to minor.
          itemsize: bytes of one number.
          kernel: the attention of one device, by which Ulysses plans how often it sends a KV head;
            `Exact()` is given other copies than the rest (`plan_heads(may_copy=False)`).

        Raises:
          ValueError: for tokens that the degree does not divide.
        """
        ...

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
        """Bytes that one device holds at most, besides query, key, value and the output's gradient.

        By formula, of the arrays that are there at one time, results included, and of
        `Kernel.workspace`. `parity_tests/test_strategies_memory.py` has what compilers add and
        save. A mask that makes rounds of a ring needless may save more.

        Args:
          query, key, value, degree, itemsize, kernel: as in `traffic`.
          gradients: whether the backward pass follows.
        """
        ...


class KeepsQueries:
    """Base of strategies whose devices keep their queries and receive the other devices' keys."""

    def heads_axes(self, tokens: MeshAxes) -> tuple[str, ...]:
        return ()

    def pad_heads(self, spec: Spec, heads: int, kv_heads: int, axes: Axes, kernel: Kernel) -> Spec:
        return spec


def bytes_of_others(key: Shape, value: Shape, degree: int, itemsize: int) -> int:
    """Bytes of all keys and values but those that a device has itself."""
    return array_bytes(key, value, itemsize=itemsize) * (degree - 1) // degree


def array_bytes(*shapes: Shape, itemsize: int) -> int:
    """Bytes of arrays of these shapes."""
    return sum(math.prod(shape) for shape in shapes) * itemsize


def share(shape: Shape, tokens: int, heads: int) -> Shape:
    """The shape of an array of so many tokens and heads."""
    B, _, _, H = shape
    return (B, tokens, heads, H)


def output(query: Shape, value: Shape) -> Shape:
    """The shape of an attention's output."""
    return (*query[:3], value[3])


def check_traffic(query: Shape, key: Shape, degree: Degree) -> int:
    """The number of devices; raises ValueError unless they divide the tokens."""
    sizes = degree if isinstance(degree, tuple) else (degree,)
    for size in sizes:
        check_count("degree", size)
    degree = math.prod(sizes)
    for name, tokens in (("query", query[1]), ("key", key[1])):
        if tokens % degree:
            raise ValueError(
                f"{name} has {tokens} tokens, which degree = {degree} does not divide. Give "
                f"{-(-tokens // degree) * degree}, as jax_seqpar.pad_to_degree pads them."
            )
    return degree


def check_strategy(strategy: Any) -> None:
    """Raises ValueError unless the strategy is one, or "auto"."""
    if isinstance(strategy, str) and strategy == "auto":
        return
    is_class = isinstance(strategy, type)
    if not isinstance(strategy, Strategy) or is_class:
        got = f"the class {strategy.__name__}" if is_class else repr(strategy)
        raise ValueError(
            f"strategy must be Ulysses(...), AllGatherKV(), Ring(), Hybrid(...) or 'auto', got "
            f"{got}. Write strategy=jax_seqpar.{_meant(strategy)}()."
        )


def _meant(strategy: Any) -> str:
    """The strategy that a class or a string names, such as "all_gather"; else the default."""
    word = strategy.__name__ if isinstance(strategy, type) else str(strategy)
    letters = "".join(c for c in word.lower() if c.isalnum())
    for name in ("AllGatherKV", "Ring", "Hybrid"):
        if letters and name.lower().startswith(letters):
            return name
    return "Ulysses"


def check_has_tokens(strategy: Strategy, layout: MeshLayout) -> None:
    """Raises ValueError for options of a strategy where no tokens are sharded."""
    if layout.tokens is None and strategy != type(strategy)():
        raise ValueError(
            f"{strategy!r} has no reshard to work on: {layout!r} shards no tokens. Leave it out, "
            f"or name the mesh axis in MeshLayout(tokens=)."
        )
