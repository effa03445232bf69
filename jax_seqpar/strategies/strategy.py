"""Strategy: how the devices of one mesh axis share the tokens of an attention."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array

from ..layout import AxisName
from ..mask import Spec

Shape = tuple[int, ...]


@runtime_checkable
class Strategy(Protocol):
    """A function from the attention of one device to that of a mesh axis, for `jax.shard_map`.

    Values: frozen, hashable, equal by their options, so that they are part of a compiled program.
    """

    def heads_axes(self, tokens: Any) -> tuple[str, ...]:
        """Mesh axes of the tokens that shard arrays with a head axis, such as a bias, as well."""
        ...

    def pad_heads(self, spec: Spec, heads: int, kv_heads: int, degree: int, kernel: Any) -> Spec:
        """The Spec with as many heads as are sharded, N of each tensor-parallel shard given."""
        ...

    def kv_replicas(self, heads: int, kv_heads: int, degree: int, kernel: Any) -> int:
        """How many consecutive devices of the token axis have the same KV head."""
        ...

    def __call__(
        self,
        kernel: Callable[..., Array],
        query: Array,
        key: Array,
        value: Array,
        spec: Spec,
        *,
        axis_name: AxisName,
    ) -> Array:
        """Attention over tokens that are sharded along a mesh axis.

        Args:
          kernel: the attention of one device.
          query, key, value: this device's tokens with all heads.
          spec: of the whole sequence; arrays with a head axis as `pad_heads` and `heads_axes` say.
          axis_name: the mesh axis (or axes) of the tokens.

        Returns:
          This device's tokens of the output, all heads.
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
