"""Products of matrices whose sums are integers.

A row of the left factor and a column of the right one lie on grids of `BITS` bits below their
largest number. The sum of the products of these integers has no rounding and so no order.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .arithmetic import exponent, power
from .rounding import R
from .sums import add_up, grid, meet

# b0 of the definition, bits of a factor: 24 is the first number that is as accurate as float32.
BITS = 24
# Bits of the lower of two digits of the right factor. Each digit times 24 bits is a product of 36
# bits, of which float64 adds up 2^17 without rounding.
LOW_BITS = 12
PIECE = 2**17
# Where the sum of the higher digits, of 36 bits, would leave int64.
TOO_MANY_TERMS = 2**27


def mm(a: Tensor, b: Tensor, group: Any = None) -> Tensor:
    """`a b`, the exact sum of the products of integers, rounded to float64 and to float32.

    Args:
      a: `[M, K]`, float64, without subnormals of float32.
      b: `[K, N]`, the same.
      group: the ranks that hold the rest of K.

    Returns:
      `[M, N]`, float32: `R(RN64(sum A B) 2^(E(a) + E(b) - 2 BITS))`.

    Raises:
      ValueError: 2^27 terms, all ranks together.
    """
    _check_terms(a.shape[1], group)
    ea, eb = meet(exponent(a, 1), group), meet(exponent(b, 0), group)
    A, B = grid(a, ea, BITS), grid(b, eb, BITS)
    high = torch.round(B * 2.0**-LOW_BITS)
    low = B - high * 2.0**LOW_BITS
    S = _joined(*(add_up(_integer_product(A, digit), group) for digit in (high, low)))
    return R(S * power(ea + eb - 2 * BITS))


def mmT(x: Tensor, dy: Tensor, group: Any = None) -> Tensor:  # noqa: N802
    """`x^T dy`, the gradient of a weight: the sum over the tokens of all ranks, balanced first.

    Args:
      x: `[T, I]`, the activations, as in `mm`.
      dy: `[T, O]`, their gradients.
      group: the ranks that hold the other tokens.

    Returns:
      `[I, O]`, float32.
    """
    x, dy = balance(x, dy)
    return mm(x.T, dy, group)


def balance(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """`x_t 2^-c` and `dy_t 2^c`, exact, with `c = floor((E(x_t) - E(dy_t)) / 2)` of a token.

    The product of the two stays, and the two get magnitudes alike: a token of large activations
    and small gradients then leaves the others their bits.
    """
    c = torch.floor((exponent(x, 1) - exponent(dy, 1)) / 2)
    return x * power(-c), dy * power(c)


def _integer_product(A: Tensor, B: Tensor) -> Tensor:
    """`A B` as int64, where float64 holds every sum of `PIECE` terms."""
    pieces = zip(A.split(PIECE, 1), B.split(PIECE, 0), strict=True)
    return torch.stack([(x @ y).long() for x, y in pieces]).sum(0)


def _joined(high: Tensor, low: Tensor) -> Tensor:
    """`high 2^12 + low` of int64, a number of 75 bits at most, rounded once to float64."""
    carried, low = high + (low >> LOW_BITS), low & (1 << LOW_BITS) - 1
    # Two numbers that float64 holds, and one rounding in their sum.
    rest = (carried & 0x7FF) << LOW_BITS | low
    return (carried >> 11).double() * 2.0 ** (11 + LOW_BITS) + rest.double()


def _check_terms(K: int, group: Any) -> None:
    ranks = 1 if group is None else dist.get_world_size(group)
    if K * ranks >= TOO_MANY_TERMS:
        raise ValueError(
            f"Exact products have room for fewer than {TOO_MANY_TERMS} terms. Got {K} on each of "
            f"{ranks} ranks. Split the batch and accumulate gradients: call step with several."
        )
