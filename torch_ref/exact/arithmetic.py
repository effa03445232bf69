"""The arithmetic of exact attention in PyTorch: roundings, exponents, and sums without rounding.

Written from `jax_seqpar/exact/SPEC.md`. Arithmetic is float64. Integers are float64 too, and a
float32 is a float64 of that value.
"""

import math

import torch
from torch import Tensor

# Tokens whose gradients share a unit: part of the definition, so that another number gives other
# bits. A product over them is exact: 256 x 2^29 x 2^16 = 2^53.
BLOCK = 256
# Keys of one product of the forward pass, at most 256 for the same reason. It changes no bit.
TILE = 256
# Bits of a weight in the sums of the gradients, and the fewest in those of the forward pass.
WEIGHT_BITS = 29
# The bits of the weights of a row together, where a weight has more than `WEIGHT_BITS`.
ROW_BITS = 37

SMALLEST_NORMAL = 2.0**-126  # of float32

Slices = tuple[Tensor, Tensor]


def flush(x: Tensor) -> Tensor:
    """x in float64, with subnormals of float32 and -0 as +0."""
    x = x.double()
    return torch.where(x.abs() < SMALLEST_NORMAL, 0.0, x)


def round32(x: Tensor) -> Tensor:
    return flush(x).float().double()


def out(x: Tensor) -> Tensor:
    """x rounded to float32, with subnormals and -0 as +0."""
    return narrow(flush(x), torch.float32)


def narrow(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x rounded to a dtype, every NaN as the one NaN that `out` allows."""
    x = x.to(dtype)
    return x.masked_fill(x.isnan(), math.nan).masked_fill(x == 0, 0.0)


def nearest32(x: float) -> float:
    return torch.tensor(x, dtype=torch.float32).item()


def check_finite(name: str, x: float, usual: float, least: float = 0.0) -> None:
    """Raises ValueError unless a number is finite in float32, and at least `least`."""
    if not (least <= x and math.isfinite(nearest32(x))):
        raise ValueError(
            f"{name} must be finite in float32 and at least {least}, got {x!r}. Write {usual}."
        )


def check_decay_rate(name: str, x: float, usual: float) -> None:
    """Raises ValueError unless the decay rate of a moment is from 0 to below 1, in float32.

    At 1 the correction of the moment, `1 / (1 - rate^t)`, is infinite.
    """
    if not 0 <= nearest32(x) < 1:
        raise ValueError(f"{name} must be from 0 to below 1 in float32, got {x!r}. Write {usual}.")


def exponent(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """`E` along one axis or more, which stay, with size 1; infinity stands for "not a number".

    Infinity wins a maximum, also one over processes, and every sum, as the definition asks.
    """
    # The maximum of a NaN is one; the exponent field of a NaN or infinity is full.
    field = x.abs().amax(dim, keepdim=True).view(torch.int64) >> 52 & 0x7FF
    e = (field - 1022).clamp(min=-300).double()
    return torch.where(field == 0x7FF, math.inf, e)


def power(e: Tensor) -> Tensor:
    """`2^e` from its bits, for integers in `[-1022, 1023]`; NaN of an infinity."""
    is_number = e.isfinite()
    bits = torch.where(is_number, e, 0.0).long() + 1023 << 52
    return torch.where(is_number, bits.view(torch.float64), math.nan)


def norm(x: Tensor) -> Tensor:
    """`N` of the rows along the last axis, which stays, with size 1; infinity as in `exponent`."""
    e = exponent(x, dim=-1)
    t = 256 + torch.ceil(x.abs() * power(12 - e)).square().sum(dim=-1, keepdim=True)
    return e - 12 + torch.ceil(exponent(t, dim=-1) / 2)


def dot(x: Tensor, y: Tensor) -> Tensor:
    """The products of rows of x with rows of y: `[..., M, H]`, `[..., L, H]` to `[..., M, L]`."""
    nx, ny = norm(x), norm(y)
    # Half to even, as rint.
    X, Y = torch.round(x * power(33 - nx)), torch.round(y * power(34 - ny)).mT
    hi, lo = _digits(X, 15)
    sums = (hi @ Y) * 2.0**15 + lo @ Y
    return sums * power(nx - 33) * power(ny - 34).mT


def token(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The exponent of each row of channels, `[..., 1]`, and its two digits of 16 bits."""
    e = exponent(x, dim=-1)
    g = torch.where(e == math.inf, 0.0, torch.round(x * power(32 - e)))
    return e, *_digits(g, 16)


def _digits(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The integers hi and lo of `x = hi 2^bits + lo`, with lo as near to 0 as it can be."""
    hi = torch.round(x * 2.0**-bits)
    return hi, x - hi * 2.0**bits


def weighted_sum(w: Tensor, x: Tensor) -> Tensor:
    """The sum over tokens in the forward pass, before it is multiplied by `r c`.

    Args:
      w: `[M, S]`, the weights `p`, at least 0; 0 for the tokens that a row may not attend to.
      x: `[S, V]`, the tokens.

    Returns:
      `[M, V]`.
    """
    e, hi, lo = token(x)
    w = _shifted(w, e)
    E = exponent(w, dim=-1)
    t = 1 + torch.ceil(w * power(12 - E)).sum(dim=-1, keepdim=True)
    b = (ROW_BITS + 12 - exponent(t, dim=-1)).clamp(min=WEIGHT_BITS)
    P = torch.round(w * power(b - E))
    # Side by side: one product of matrices is faster than two.
    S1, S0 = _integer_product(P, torch.cat((hi, lo), dim=-1)).chunk(2, dim=-1)
    return (S1 * 2.0**16 + S0) * power(E - b - 32)


def _shifted(w: Tensor, e: Tensor) -> Tensor:
    """`w 2^e`, for weights `[M, tokens]` and exponents `[tokens, 1]`.

    A weight of 0 stays 0 also where e is not a number: NaN in a token that a row may not attend to
    must not reach the row. Where it may, the row is NaN by its `r` or by its anchor.
    """
    shifted = w * power(e).mT
    return shifted if e.isfinite().all() else torch.where(w == 0, 0.0, shifted)


def _integer_product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of integers, rounded once if at all, where products of `TILE` tokens are exact.

    A sum can reach 2^66, more than float64 or int64 hold, so that it is added up in two parts.
    """
    high = low = torch.zeros((), dtype=torch.float64, device=a.device)
    for x, y in zip(a.split(TILE, dim=1), b.split(TILE, dim=0), strict=True):
        part_high, part_low = _digits(x @ y, 20)
        high, low = high + part_high, low + part_low
    return high * 2.0**20 + low


def gradient_sum(d: Tensor, x: Tensor, anchor: Tensor, block: int | None = None) -> Tensor:
    """The sum over the tokens of all blocks of `d x`; for arguments see `gradient_slices`."""
    return value(gradient_slices(d, x, anchor, block), anchor)


def gradient_slices(d: Tensor, x: Tensor, anchor: Tensor, block: int | None = None) -> Slices:
    """The sum of `B(d, x)` over blocks, in slices, which may be added to those of other tokens.

    Args:
      d: `[M, tokens]`, 0 for the tokens that a row has no part in.
      x: `[tokens, H]`.
      anchor: `A`, `[M, 1]`.
      block: tokens that share a unit, `BLOCK` if None.

    Returns:
      Two integers, each `[M, H]`, NaN where the sum is.
    """
    block = block or BLOCK
    e, hi, lo = token(x)
    d, digits = _shifted(d, e), torch.cat((hi, lo), dim=-1)
    n1 = n2 = torch.zeros(len(d), x.shape[-1], dtype=torch.float64, device=d.device)
    for part, its_digits in zip(d.split(block, dim=1), digits.split(block, dim=0), strict=True):
        u = exponent(part, dim=1)
        P = torch.round(part * power(WEIGHT_BITS - u))
        high, low = (P @ its_digits).chunk(2, dim=-1)
        for R in (high * power(u - 45), low * power(u - 61)):
            m1, m2 = _slices(R, anchor)
            n1, n2 = n1 + m1, n2 + m2
    return n1, n2


def _slices(R: Tensor, anchor: Tensor) -> Slices:
    y = R * power(31 - anchor)
    n1 = torch.round(y)
    return n1, torch.round((y - n1) * 2.0**39)


def value(slices: Slices, anchor: Tensor) -> Tensor:
    """The value of slices, rounded once."""
    n1, n2 = slices
    return (n1 + n2 * 2.0**-39) * power(anchor - 31)


def sum_of_digits(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The sums `dbias` of ds, before `out`, for a bias of a shape that broadcasts to that of x."""
    dims = (0, *(dim for dim, size in enumerate((1, *shape)) if size == 1 and dim > 0))
    y = x[None]
    G = 26 * torch.ceil(exponent(y, dims) / 26)
    y = y * power(26 - G)
    total = torch.zeros_like(G)
    for _ in range(3):
        d = torch.trunc(y)
        total = total * 2.0**26 + d.sum(dims, keepdim=True)
        y = (y - d) * 2.0**26
    return (total * power(G - 78))[0]


def exp(x: Tensor) -> Tensor:
    """Correctly rounded: float64 errs by less than any float32 is from a tie of its result."""
    return torch.where(x < -80, 0.0, torch.exp(x).float().double())


def tanh_and_slope(z: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """`tanh(z / cap)`, a float32, and its derivative in `z / cap`."""
    u = round32(z * (1 / cap))
    size = u.abs()
    t = exp(-2 * size)

    square = size * size
    denominator = torch.full_like(u, 11)
    for odd in (9, 7, 5, 3, 1):
        denominator = odd + square / denominator
    f = torch.where(size < 0.5, size / denominator, (1 - t) / (1 + t))

    g = 1 / (1 + t)
    return torch.copysign(round32(f), u), 4 * t * g * g
