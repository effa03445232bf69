"""TokenOrder: which tokens of a sequence each device of the token axis holds."""

from dataclasses import dataclass, fields
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from .mask import AnyTokens, TokenList, Tokens


@dataclass(frozen=True)
class TokenOrder:
    """Order in which the tokens of a sequence are dealt to the devices, in equal shares.

    A value of `MeshLayout(order=)`: query, key, value and every other array with a token axis lie
    in this order, shard by shard. `numbers` is the whole definition.
    """

    def numbers(self, size: int, index: Any, degree: int) -> Any:
        """`[size]`, the number in the sequence of each token of a device, counted from 0.

        Args:
          size: tokens of a device.
          index: the device's place along the token axis; a Python integer (for a NumPy array) or a
            traced one.
          degree: devices along the axis.
        """
        raise NotImplementedError

    def multiple(self, degree: int) -> int:
        """The number of tokens of a sequence is a multiple of this number."""
        return degree

    def check(self, name: str, tokens: int, degree: int) -> None:
        """Raises ValueError unless so many tokens can be dealt to the devices."""
        if tokens % self.multiple(degree):
            multiple = self.multiple(degree)
            raise ValueError(
                f"{name} has {tokens} tokens, which is no multiple of {multiple}, as {self!r} "
                f"needs on {degree} devices. Pad them to {-(-tokens // multiple) * multiple} "
                f"before the order's reorder: x = jax_seqpar.pad_to_degree(..., degree={multiple}),"
                f" whose x.keywords hide the added tokens and need the order, too. Or write "
                f"MeshLayout(order=Contiguous())."
            )
        if type(self) not in (Contiguous, Zigzag, Striped) and tokens:
            size = tokens // degree
            dealt = np.concatenate([self.numbers(size, index, degree) for index in range(degree)])
            if not np.array_equal(np.sort(dealt), np.arange(tokens)):
                raise ValueError(
                    f"{self!r}.numbers deals {tokens} tokens to {degree} devices as {dealt[:8]} "
                    f"and so on: not each of 0 to {tokens - 1} once. Write numbers that do."
                )

    def tokens(self, size: int, index: Any, degree: int) -> AnyTokens:
        """The tokens of a device, for a kernel."""
        numbers = jnp.asarray(self.numbers(size, index, degree), jnp.int32)
        return TokenList(numbers, ascending=type(self) in (Zigzag, Striped))

    def permutation(self, tokens: int, degree: int) -> np.ndarray:
        """`[tokens]`: place i of an array in this order holds token `permutation[i]`.

        Raises:
          ValueError: unless `multiple(degree)` divides the number of tokens.
        """
        self.check("the array", tokens, degree)
        size = tokens // degree
        return np.concatenate([self.numbers(size, index, degree) for index in range(degree)])

    def inverse(self, tokens: int, degree: int) -> np.ndarray:
        """`[tokens]`: token i is at place `inverse[i]` of an array in this order."""
        return np.argsort(self.permutation(tokens, degree))

    def reorder(self, x: Shaped[Any, "..."], axis: int, degree: int) -> Shaped[Any, "..."]:
        """An array of the sequence, of NumPy or JAX, in this order; `restore` undoes it.

        JAX does not permute an axis that is sharded by its type: reorder before, on the host.
        """
        return x.take(self.permutation(x.shape[axis], degree), axis=axis)

    def restore(self, x: Shaped[Any, "..."], axis: int, degree: int) -> Shaped[Any, "..."]:
        """An array in this order as the sequence is; an axis of size 1 broadcasts."""
        if x.shape[axis] == 1:
            return x
        return x.take(self.inverse(x.shape[axis], degree), axis=axis)

    def grouped(self, size: int) -> "TokenOrder":
        """The order of groups of `size` neighbouring devices, each group seen as one device."""
        return self if size == 1 else _Grouped(self, size)


@dataclass(frozen=True)
class Contiguous(TokenOrder):
    """Device r of P holds the r-th part of the sequence. The default.

    The right order for windows and documents, as a ring takes the fewest rounds. With a causal mask
    the last device has twice the mean work.
    """

    def numbers(self, size: int, index: Any, degree: int) -> Any:
        return index * size + _arange(size, index)

    def tokens(self, size: int, index: Any, degree: int) -> AnyTokens:
        return Tokens(index * size, size)

    def reorder(self, x: Shaped[Any, "..."], axis: int, degree: int) -> Shaped[Any, "..."]:
        return x

    def restore(self, x: Shaped[Any, "..."], axis: int, degree: int) -> Shaped[Any, "..."]:
        return x

    def grouped(self, size: int) -> TokenOrder:
        return self


@dataclass(frozen=True)
class Zigzag(TokenOrder):
    """Device r of P holds parts r and 2P - 1 - r of 2P: with a causal mask all have the same work.

    As Megatron-LM and zigzag ring attention deal them. Windows and documents take a ring twice as
    many rounds.
    """

    def numbers(self, size: int, index: Any, degree: int) -> Any:
        half = _arange(size // 2, index)
        parts = (index * (size // 2) + half, (2 * degree - 1 - index) * (size // 2) + half)
        return (np if isinstance(index, int) else jnp).concatenate(parts)

    def multiple(self, degree: int) -> int:
        return 2 * degree


@dataclass(frozen=True)
class Striped(TokenOrder):
    """Device r of P holds tokens r, r + P, r + 2P and so on.

    Brandon et al. 2023, https://arxiv.org/abs/2311.09431. The load is balanced under every mask,
    but few blocks can be skipped (`examples/balance_orders.py` counts them).
    """

    def numbers(self, size: int, index: Any, degree: int) -> Any:
        return index + degree * _arange(size, index)


@dataclass(frozen=True)
class _Grouped(TokenOrder):
    order: TokenOrder
    size: int

    def numbers(self, size: int, index: Any, degree: int) -> Any:
        each, xp = size // self.size, np if isinstance(index, int) else jnp
        indices = [index * self.size + i for i in range(self.size)]
        return xp.concatenate([self.order.numbers(each, r, degree * self.size) for r in indices])

    def multiple(self, degree: int) -> int:
        return self.order.multiple(degree * self.size)


def _arange(size: int, index: Any) -> Any:
    return (np if isinstance(index, int) else jnp).arange(size, dtype=np.int32)


def check_order(order: Any) -> None:
    """Raises ValueError unless it is a TokenOrder, and its fields tell it from others."""
    if not isinstance(order, TokenOrder) or type(order) is TokenOrder:
        raise ValueError(
            f"order must be Contiguous(), Zigzag() or Striped(), got {order!r}. Write "
            f"MeshLayout(order=jax_seqpar.Zigzag())."
        )
    if isinstance(order, Contiguous) and type(order) is not Contiguous:
        raise ValueError(
            f"{type(order).__name__} is a subclass of Contiguous, which does not read `numbers`. "
            f"Write class {type(order).__name__}(TokenOrder)."
        )
    # A compiled program is used again for orders that are equal.
    if hidden := vars(order).keys() - {field.name for field in fields(order)}:
        raise ValueError(
            f"{type(order).__name__} has {sorted(hidden)}, by which two orders are not compared. "
            f"Make it a dataclass(frozen=True) with these fields."
        )
