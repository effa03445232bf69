"""Exact attention in Python integers and fractions, from the docstring of `jax_seqpar.exact`.

No floating-point sum, product or exponential: a float is a `Fraction`, and every rounding of the
specification is a call of `round64`, `round32` or `round_to`. Arrays below hold `Fraction` or `int`
objects, so that numpy moves them about and Python does the arithmetic. For finite cases: NaN,
infinity and overflow raise NotImplementedError, but for a bias of -inf, which masks.
"""

from collections.abc import Callable
from fractions import Fraction
from functools import cache
from math import isqrt
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

LEAST = -400
LEAST_NORMAL = Fraction(1, 2**126)
CHANNEL_BITS = 31
WEIGHT_BITS = 32
TOKEN_BITS = 32
DIGIT_BITS = 11
EXACT_TOKENS = 2048
# Of a dtype: its significant bits, the exponent of its finest step, and that of its overflow.
FORMATS = {
    np.dtype(np.float32): (24, -149, 128),
    np.dtype(np.float16): (11, -24, 16),
    np.dtype(ml_dtypes.bfloat16): (8, -133, 128),
}


def elementwise(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The function over an array of objects; of a scalar, a scalar."""
    return np.frompyfunc(function, 1, 1)


def magnitude(x: Fraction) -> int:
    """The smallest e with |x| < 2^e, of a number that is not 0."""
    least = abs(x.numerator).bit_length() - x.denominator.bit_length()
    return least if abs(x) < power(least) else least + 1


@elementwise
@cache
def power(exponent: int) -> Fraction:
    return Fraction(2) ** exponent


@elementwise
def rint(x: Fraction) -> int:
    """The nearest integer, half to even."""
    return round(x)


def round_to(x: Fraction, bits: int, finest: int | None = None) -> Fraction:
    """`x` to so many significant bits, half to even.

    Args:
      finest: the exponent of the finest step, where there are subnormals; unbounded if None.
    """
    if x == 0:
        return Fraction(0)
    step = magnitude(x) - bits
    if finest is not None:
        step = max(step, finest)
    return rint(x * power(-step)) * power(step)


def round_into(x: Fraction, dtype: np.dtype[Any]) -> Fraction:
    """`x` to the nearest number of a dtype of FORMATS."""
    bits, finest, overflow = FORMATS[dtype]
    rounded = round_to(x, bits, finest)
    if abs(rounded) >= power(overflow):
        raise NotImplementedError(f"{float(x)} is beyond {dtype}")
    return rounded


def flush(x: Fraction) -> Fraction:
    return Fraction(0) if abs(x) < LEAST_NORMAL else x


@elementwise
def round64(x: Fraction) -> Fraction:
    return round_to(x, 53)


@elementwise
def round32(x: Fraction) -> Fraction:
    return round_into(flush(x), np.dtype(np.float32))


@elementwise
def read(x: Any) -> Fraction:
    """One float of any dtype, flushed."""
    number = float(x)
    if not np.isfinite(number):
        raise NotImplementedError(f"{number} in an input")
    return flush(Fraction(number))


def exponents(x: np.ndarray, axis: int) -> np.ndarray:
    """E along an axis, which stays with length 1."""
    largest = np.max(np.abs(x), axis=axis, keepdims=True, initial=0)
    return elementwise(lambda top: max(magnitude(top), LEAST) if top else LEAST)(largest)


def grid(x: np.ndarray, exponent: np.ndarray, bits: int) -> np.ndarray:
    """The integers rint(x * 2^(bits - exponent))."""
    integers = rint(x * power(bits - exponent))
    assert all(abs(integer) <= 2**bits for integer in integers.flat)
    return integers


def dot(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Every row of `[T, H]` with every row of `[S, H]`: `[T, S]`."""
    bits = min(32, 38 - (x.shape[1] - 1).bit_length())
    e_x, e_y = exponents(x, axis=1), exponents(y, axis=1)
    integers_x, integers_y = grid(x, e_x, CHANNEL_BITS), grid(y, e_y, bits).T
    high = rint(integers_x * Fraction(1, 2**16))
    low = integers_x - high * 2**16
    sums = round64(unrounded(high @ integers_y) * 2**16 + unrounded(low @ integers_y))
    return sums * power(e_x - CHANNEL_BITS) * power(e_y.T - bits)


def unrounded(sums: np.ndarray) -> np.ndarray:
    """The same integers: float64 holds them."""
    assert all(abs(integer) <= 2**53 for integer in sums.flat)
    return sums


def contract(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Integers `[M, S]` and `[S, H]` summed over the tokens S: `[M, H]`."""
    digit = 2**DIGIT_BITS
    b2 = rint(b * Fraction(1, digit**2))
    rest = b - b2 * digit**2
    b1 = rint(rest * Fraction(1, digit))
    b0 = rest - b1 * digit
    # Sums of more tokens are int64, and rounded to float64.
    finish = unrounded if len(b) <= EXACT_TOKENS else round64
    s2, s1, s0 = (finish(a @ b_i) for b_i in (b2, b1, b0))
    return round64(round64(s2 * digit + s1) * digit + s0)


def token_sum(a: np.ndarray, over: int, b: np.ndarray) -> np.ndarray:
    """The gradients' contract(grid(a), grid(b)) with its two powers of two, which are exact.

    Args:
      a: `[rows, keys]`, summed over axis `over`.
      b: `[that axis of a, H]`.

    Returns:
      `[the other axis of a, H]`.
    """
    e_a, e_b = exponents(a, axis=over), exponents(b, axis=0)
    integers = grid(a, e_a, TOKEN_BITS)
    if over == 0:
        integers, e_a = integers.T, e_a.T
    sums = contract(integers, grid(b, e_b, TOKEN_BITS))
    return sums * power(e_a - TOKEN_BITS) * power(e_b - TOKEN_BITS)


def exp_bounds(x: Fraction) -> tuple[Fraction, Fraction]:
    """Below and above e^x, for x <= 0: one over the series of e^-x, in units of 2^-160.

    The lower terms are rounded down and the upper ones up. After the last, n >= -2x, each term is
    at most half of the one before: together they are at most the last.
    """
    top, bottom = -x.numerator, x.denominator
    unit = low = high = low_term = high_term = 1 << 160
    n = 0
    while high_term > 1 or n * bottom < 2 * top:
        n += 1
        low_term = low_term * top // (n * bottom)
        high_term = -(-high_term * top // (n * bottom))
        low, high = low + low_term, high + high_term
    return Fraction(unit, high + high_term), Fraction(unit, low)


@cache
def exp(x: Fraction) -> Fraction:
    """The float32 nearest to e^x, of a float32 x <= 0; 0 for x < -80."""
    assert x <= 0
    if x < -80:
        return Fraction(0)
    below, above = (round_to(bound, 24) for bound in exp_bounds(x))
    assert below == above, f"e^{float(x)} is too near to the middle of two float32"
    return below


def tanh(u: Fraction, t: Fraction) -> Fraction:
    """Of a float32 u, with t = exp(-2 |u|)."""
    small = abs(u) < Fraction(1, 2)
    size = small_tanh(abs(u)) if small else round64(round64(1 - t) / round64(1 + t))
    return round32(-size if u < 0 else size)


def small_tanh(u: Fraction) -> Fraction:
    """The continued fraction, from its innermost term outwards."""
    square = u * u
    tail = round64(square / 11)
    for odd in (9, 7, 5, 3):
        tail = round64(square / round64(odd + tail))
    return round64(u / round64(1 + tail))


def soft_cap(z: Fraction, cap: Fraction) -> tuple[Fraction, Fraction]:
    """The capped logit and its slope."""
    u = round32(round64(z * round64(1 / cap)))
    t = exp(-2 * abs(u))
    g = round64(1 / round64(1 + t))
    return cap * tanh(u, t), round64(round64(4 * t * g) * g)


class Rows(NamedTuple):
    """One KV head and all the queries that read it, M = T * (N / K) rows.

    query, grad: `[M, H]`; grad may be None
    key, value: `[S, H]`
    bias, allowed: `[M, S]`
    """

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    bias: np.ndarray
    allowed: np.ndarray
    grad: np.ndarray | None


class Forward(NamedTuple):
    """out `[M, H]`, the weights p `[M, S]`, r `[M, 1]` and, if capped, the slope `[M, S]`."""

    out: np.ndarray
    weights: np.ndarray
    reciprocal: np.ndarray
    slope: np.ndarray | None


def logits(
    rows: Rows, scale: Fraction, cap: Fraction | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """z as if every key were allowed, and the slope of the soft cap or None: `[M, S]` each."""
    z: Any = round32(dot(rows.query, rows.key)) * scale
    slope: Any = None
    if cap is not None:
        z, slope = np.frompyfunc(lambda x: soft_cap(x, cap), 1, 2)(z)
    return round64(z + rows.bias), slope


def softmax_numerator(z: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """p: `[M, S]`, 0 where a row may not attend."""
    p = np.full(z.shape, Fraction(0), dtype=object)
    for row in range(len(z)):
        keys = np.flatnonzero(allowed[row])
        largest = max(z[row, keys], default=Fraction(0))
        for key in keys:
            p[row, key] = exp(round32(round64(z[row, key] - largest)))
    return p


def forward(rows: Rows, scale: Fraction, cap: Fraction | None) -> Forward:
    z, slope = logits(rows, scale, cap)
    p = softmax_numerator(z, rows.allowed)
    integers = rint(p * 2**WEIGHT_BITS)
    total = np.sum(integers, axis=1, keepdims=True)
    r = elementwise(lambda n: round64(Fraction(1, n)) if n else Fraction(0))(total)
    e = exponents(rows.value, axis=0)
    sums = contract(integers, grid(rows.value, e, TOKEN_BITS)) * power(e - TOKEN_BITS)
    return Forward(round32(round64(sums * r)), p, r, slope)


def backward(
    rows: Rows, grad: np.ndarray, saved: Forward, scale: Fraction
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """dq `[M, H]`, dk and dv `[S, H]`, in float32."""
    dp = dot(grad, rows.value)
    d = dot(grad, saved.out).diagonal()[:, None]
    w = round64(saved.weights * (saved.reciprocal * 2**WEIGHT_BITS))
    ds = round64(w * round64(dp - d))
    if saved.slope is not None:
        ds = round64(ds * saved.slope)
    dq = round64(token_sum(ds, 1, rows.key) * scale)
    dk = round64(token_sum(ds, 0, rows.query) * scale)
    return round32(dq), round32(dk), round32(token_sum(w, 0, grad))


def default_scale(channels: int) -> Fraction:
    """The float32 nearest to 1 / sqrt(H); cut at 2^-200 first, which no rounding to 24 bits sees.

    (1 / sqrt(H) is irrational, a power of two, or a rational with an endless binary expansion.)
    """
    return round_to(Fraction(isqrt(2**400 // channels), 2**200), 24)


def nearest32(x: float) -> Fraction:
    return round_into(Fraction(float(x)), np.dtype(np.float32))


def store(x: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """Float32 numbers as an array of a dtype, with the -0 of a negative number that rounds to 0."""

    def number(exact: Fraction) -> float:
        rounded = float(round_into(exact, dtype))
        return -0.0 if exact < 0 and rounded == 0 else rounded

    return elementwise(number)(x).astype(np.float64).astype(dtype)


def attention(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    *,
    bias: np.ndarray | None = None,
    allowed: np.ndarray | None = None,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    grad: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """The bits that every implementation of exact attention must have.

    Args:
      query: `[B, T, N, H]`, float32, float16 or bfloat16.
      key, value: `[B, S, K, H]`; query head n reads KV head `n // (N / K)`.
      bias: broadcastable to `[B, N, T, S]`.
      allowed: boolean, broadcastable to `[B, N, T, S]`.
      grad: of the output, `[B, T, N, H]`.

    Returns:
      "forward" and, with a gradient, "dq", "dk" and "dv", in the dtype of the query.
    """
    factor = default_scale(query.shape[3]) if scale is None else nearest32(scale)
    cap = None if logits_soft_cap is None else nearest32(logits_soft_cap)
    names = ("forward",) if grad is None else ("forward", "dq", "dk", "dv")
    shapes = (query.shape, query.shape, key.shape, value.shape)
    results = {n: np.empty(s, query.dtype) for n, s in zip(names, shapes, strict=False)}
    groups = query.shape[2] // key.shape[2]
    logits_shape = (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
    bias = np.broadcast_to(np.float32(0) if bias is None else bias, logits_shape)
    allowed = np.broadcast_to(np.bool_(True) if allowed is None else allowed, logits_shape)
    for batch, head in np.ndindex(key.shape[0], key.shape[2]):
        readers = slice(head * groups, (head + 1) * groups)
        ours, theirs = (batch, slice(None), readers), (batch, slice(None), head)
        masks = bias[batch, readers], allowed[batch, readers]
        given = None if grad is None else grad[ours]
        rows = gather(query[ours], key[theirs], value[theirs], *masks, given)
        places = (ours, ours, theirs, theirs)
        for name, place, exact in zip(names, places, one_head(rows, factor, cap), strict=False):
            target = results[name][place]
            target[...] = store(exact, query.dtype).reshape(target.shape)
    return results


def gather(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    bias: np.ndarray,
    allowed: np.ndarray,
    grad: np.ndarray | None,
) -> Rows:
    """Read one KV head, the rows in the order `[T, N / K]`.

    Args:
      query, grad: `[T, N / K, H]`.
      key, value: `[S, H]`.
      bias, allowed: `[N / K, T, S]`; a bias where the row may not attend is not read.
    """
    tokens, groups, channels = query.shape
    by_row, by_key = (tokens * groups, channels), (tokens * groups, len(key))
    added, live = (np.swapaxes(x, 0, 1).reshape(by_key) for x in (bias, allowed))
    live = live & ~np.isneginf(added)
    return Rows(
        read(query.reshape(by_row)),
        read(key),
        read(value),
        read(np.where(live, added, np.zeros_like(added))),
        live,
        None if grad is None else read(grad.reshape(by_row)),
    )


def one_head(rows: Rows, scale: Fraction, cap: Fraction | None) -> tuple[np.ndarray, ...]:
    """The output `[M, H]` and, with a gradient, dq, dk and dv, in float32."""
    saved = forward(rows, scale, cap)
    if rows.grad is None:
        return (saved.out,)
    return (saved.out, *backward(rows, rows.grad, saved, scale))
