"""Strategy: how the devices of one mesh axis share the tokens of an attention."""

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array

from ..kernels import Kernel, Residual
from ..layout import AxisName, MeshAxes
from ..mask import Spec

Shape = tuple[int, ...]


@runtime_checkable
class Strategy(Protocol):
    """A function from the attention of one device to that of a mesh axis, for `jax.shard_map`.

    Values: frozen, hashable, equal by their options, so that they are part of a compiled program.
    """

    def heads_axes(self, tokens: MeshAxes) -> tuple[str, ...]:
        """Mesh axes of the tokens that shard arrays with a head axis, such as a bias, as well."""
        ...

    def pad_heads(self, spec: Spec, heads: int, kv_heads: int, degree: int, kernel: Kernel) -> Spec:
        """The Spec with the heads that are added so that the devices divide them.

        Args:
          heads, kv_heads: N and K of one tensor-parallel shard.
        """
        ...

    def kv_replicas(self, heads: int, kv_heads: int, degree: int, kernel: Kernel) -> int:
        """How many consecutive devices of the token axis have the same KV head."""
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
        return_residual: bool = False,
    ) -> tuple[Array, Residual | None]:
        """Attention over tokens that are sharded along a mesh axis.

        Args:
          kernel: the attention of one device.
          query, key, value: this device's tokens with all heads.
          spec: of the whole sequence; arrays with a head axis have all heads, or those of this
            device as `pad_heads` and `heads_axes` say.
          axis_name: the mesh axis (or axes) of the tokens.
          return_residual: whether the residual of each row is wanted, which may have to travel.

        Returns:
          This device's tokens of the output, all heads; and their residual.
        """
        ...

    def traffic(self, query: Shape, key: Shape, value: Shape, *, degree: int, itemsize: int) -> int:
        """Bytes that one device receives from others in a forward pass.

        Args:
          query, key, value: shapes of the global arrays.
          degree: devices that share the tokens.
          itemsize: bytes of one number.
        """
        ...


def check_strategy(strategy: Any) -> None:
    """Raises ValueError unless the strategy is one."""
    if not isinstance(strategy, Strategy) or isinstance(strategy, type):
        raise ValueError(
            f"strategy must be Ulysses(...) or AllGatherKV(), got {strategy!r}. Write "
            f"strategy=jax_seqpar.Ulysses()."
        )
