"""Kernel: the attention of one device, as a value that holds the options of its implementation."""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float

from .._checks import check_flag
from ..mask import Spec, keyword_form
from ..mask.keywords import canonical
from ..mesh_layout import AxisName
from .parts import Part
from .softmax_residual import Residual

# The gradients of an attention are five matrix products for the two of its output.
GRADIENT_PRODUCTS = 2.5


class Turn(NamedTuple):
    """One visit to the keys of all devices, as a ring makes it.

    Attributes:
      sent: bytes that travel for a key of one KV head.
      added: bytes of the sums for that key, which travel with it.
      work: FLOPs of the turn, as a part of those of the forward pass.
    """

    sent: int
    added: int
    work: float


@runtime_checkable
class Turns(Protocol):
    """The keys of several devices, one device's after another: what a ring gives a kernel.

    Hashable, so that it is part of a compiled program.

    Attributes:
      degree: how many devices' keys there are.
    """

    @property
    def degree(self) -> int: ...

    def turn(
        self,
        visit: Callable[..., tuple[Any, Any]],
        held: Any,
        spec: Spec,
        nothing: Any,
        meet: Any,
        nothing_added: Any = None,
        join: Callable[[Any, Any], Any] = ...,
    ) -> tuple[Any, Any]:
        """Visits the keys of every device once, in some order.

        Args:
          visit: `(held, spec) -> (found, added)`, with the `held` of one device and the Spec whose
            `held_keys` are its keys. `found` is the result of this device's queries for these
            keys, `added` their sums for the keys; None where nothing is added.
          held: a tree of arrays of this device's keys, which travels from device to device.
          spec: with the queries of this device.
          nothing: what the queries find in no key.
          meet: puts together what is found in different keys, in no order: `jnp.add` or
            `jnp.maximum`, or a tree of these with one for each part of `found`.
          nothing_added: as `added` before anything is added, of this device's keys.
          join: as `meet`, of what is added.

        Returns:
          What the queries find in all keys, and what all devices' queries add to this one's keys.
        """
        ...


def together(meet: Any, a: Any, b: Any) -> Any:
    """Two trees put together by `meet`: one function, or a tree with one for each part of them."""
    return jax.tree.map(lambda function, x, y: jax.tree.map(function, x, y), meet, a, b)


class Kernel:
    """One device's attention: `attend` computes it, and the rest says what it can do.

    A subclass is a frozen dataclass of options, equal by value, so that it is part of a compiled
    program. It knows neither strategies nor meshes. Called by itself it has the keywords of
    `jax_seqpar.mask.AttentionFunction`.

    Attributes:
      sums_exactly: whether the devices that share a KV head add up its gradients inside the kernel,
        without rounding (`sharing` tells it which these are). Otherwise they are added outside.
      gives_residual: whether `attend` returns one.
      gives_parts: whether it attends to a part of the keys, and differentiates that, in float32:
        `attend_part` and `part_gradients`.
      attends_in_turns: whether it visits the keys of several devices as often as it has to:
        `attend_in_turns`.
      check_vma: whether JAX can check how its arrays vary over the mesh, as `jax.shard_map` does.
        A Pallas kernel does not state how its output varies.
      needs_a_key: whether a row without a key to attend to may be NaN, so that a query head that a
        strategy adds must attend to something: its gradient is added to that of the KV head.
    """

    sums_exactly: ClassVar[bool] = False
    gives_residual: ClassVar[bool] = False
    gives_parts: ClassVar[bool] = False
    attends_in_turns: ClassVar[bool] = False
    needs_a_key: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """Name of the kernel in tables and reasons, like "blockwise"."""
        return type(self).__name__.lower()

    @property
    def check_vma(self) -> bool:
        return True

    @property
    def block(self) -> int:
        """Number of consecutive tokens, counted from the first of the sequence, that stay together.

        An array that holds a part of the queries or of the keys holds whole blocks, one after
        another in any order.
        """
        return 1

    def attend(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B S K H"],
        value: Float[Array, "B S K V"],
        spec: Spec,
    ) -> tuple[Array, Residual | None]:
        """The output `[B, T, N, V]`, of the query's dtype, and the residual of each row.

        Args:
          spec: checked. `spec.held_queries` and `spec.held_keys` say which tokens the arrays hold.
        """
        raise NotImplementedError

    def attend_part(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B S K H"],
        value: Float[Array, "B S K V"],
        spec: Spec,
    ) -> Part:
        """The attention to the keys of `spec.held_keys`, in float32, of a kernel that gives parts.

        Args:
          spec: without sinks, which the caller adds to the merged parts. `held_keys` may be traced:
            a run or a list of tokens, of one kind in all rounds.
        """
        raise NotImplementedError

    def part_gradients(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B S K H"],
        value: Float[Array, "B S K V"],
        spec: Spec,
        D: Float[Array, "B T N"],
        residual: Residual,
        out_gradient: Float[Array, "B T N V"],
    ) -> tuple[Array, Array, Array, dict[str, Array]]:
        """Gradients by the keys of `spec.held_keys` alone, in the dtype of the sums.

        Args:
          D: sum of each row's weights times their gradients, of all keys.
          residual: of all keys.

        Returns:
          `[B, T, N, H]`, `[B, S, K, H]`, `[B, S, K, V]`, and those of bias and slopes by name.
        """
        raise NotImplementedError

    def attend_in_turns(
        self,
        turns: Turns,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B S K H"],
        value: Float[Array, "B S K V"],
        spec: Spec,
    ) -> Float[Array, "B T N V"]:
        """`attend` to the keys of all devices, of a kernel that attends in turns.

        Args:
          key, value: this device's.
          spec: `spec.held_queries` says which queries these are.
        """
        raise NotImplementedError

    def turns(
        self, head_dim: int, value_dim: int, itemsize: int
    ) -> tuple[tuple[Turn, ...], tuple[Turn, ...]]:
        """The visits of a ring, for the output and for the gradients; sums are in float32."""
        channels = head_dim + value_dim
        sent, added = channels * itemsize, channels * max(4, itemsize)
        return (Turn(sent, 0, 1.0),), (Turn(sent, added, GRADIENT_PRODUCTS),)

    def why_not(self, query: Any, key: Any, value: Any, spec: Spec) -> str | None:
        """Why the kernel cannot do what is asked, None if it can; one clause, no full stop.

        Args:
          query, key, value: anything with a shape and a dtype.
          spec: of such arrays, too.
        """
        return None

    def workspace(
        self,
        query: tuple[int, ...],
        key: tuple[int, ...],
        value: tuple[int, ...],
        *,
        itemsize: int,
        gradients: bool,
    ) -> int:
        """Bytes that the kernel holds besides operands and results, by formula.

        0 of a kernel that does not say. For `Strategy.memory`.

        Args:
          query, key, value: shapes of the kernel's operands.
          gradients: whether the backward pass follows.
        """
        return 0

    def part_workspace(
        self,
        query: tuple[int, ...],
        key: tuple[int, ...],
        value: tuple[int, ...],
        *,
        degree: int,
        itemsize: int,
        gradients: bool,
        directions: int = 1,
    ) -> int:
        """`workspace` of `attend_part` and `part_gradients`, or of turns, for a ring.

        Args:
          degree: devices of the ring.
          directions: from which keys come in one round; their parts are one after the other.
        """
        return self.workspace(query, key, value, itemsize=itemsize, gradients=gradients)

    def sharing_traffic(
        self, key: tuple[int, ...], value: tuple[int, ...], devices: int, of: int
    ) -> int:
        """Bytes that a device receives inside the kernel for the gradients of shared KV heads.

        0 of a kernel whose gradients are added up outside.

        Args:
          key, value: shapes of what the kernel is given.
          devices: that have the same KV heads, see `sharing`.
          of: devices along the mesh axis.
        """
        return 0

    def sharing(
        self,
        axes: tuple[tuple[AxisName, int], ...],
    ) -> "Kernel":
        """The kernel, told which devices have the same KV heads as this one.

        A strategy calls it before `attend`. A kernel whose sums round returns itself: the gradients
        of a shared head are added up outside.

        Args:
          axes: a mesh axis (or axes), and how many consecutive devices along it share a KV head:
            `(("seq", 2),)` where pairs of neighbours along "seq" do.
        """
        return self

    @keyword_form
    def __call__(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B S K H"],
        value: Float[Array, "B S K V"],
        spec: Spec,
        *,
        return_residual: bool = False,
    ) -> Any:
        """Attention of arrays on one device."""
        check_residual(self, value, return_residual)
        spec = canonical(spec, query, key, value)
        out, residual = self.attend(query, key, value, spec)
        if not return_residual:
            return out
        assert residual is not None
        return out, residual.lse


def check_residual(kernel: Kernel, value: Any, return_residual: Any) -> None:
    """Raises ValueError for a residual of a kernel without one, or of values without channels."""
    check_flag("return_residual", return_residual)
    if return_residual and not kernel.gives_residual:
        raise ValueError(
            f"return_residual=True: {kernel!r} does not return the log of its sums. Write "
            f"kernel=jax_seqpar.Blockwise()."
        )
    if return_residual and value.shape[3] == 0:
        raise ValueError(
            f"return_residual=True of a value without channels, {value.shape}. Give it one channel."
        )


def check_local_output(out: Any, query: Any, value: Any) -> None:
    """Raises ValueError unless the kernel's output is `[B, T, N, V]`, which the reshard needs."""
    expected = (*query.shape[:3], value.shape[3])
    if not hasattr(out, "shape"):
        raise ValueError(
            f"kernel returned {type(out).__name__}, expected one array [B, T, N, V]. Return the "
            f"output alone."
        )
    if out.shape != expected:
        raise ValueError(
            f"kernel returned shape {out.shape}, expected {expected} = [B, T, N, V], the axes "
            f"of query and value it was given. Transpose the output of a kernel that puts heads "
            f"first."
        )
    if out.dtype != query.dtype:
        raise ValueError(
            f"kernel returned dtype {out.dtype}, expected the query's {query.dtype}. "
            f"Write .astype(query.dtype) at its end."
        )
