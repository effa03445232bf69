"""Exact attention in Python integers and fractions, from `jax_seqpar/exact/SPEC.md`.

No floating-point sum, product or exponential: a float is a `Fraction`, and every rounding of the
specification is a call of `round64`, `round32` or `round_to`. Arrays below hold `Fraction` or `int`
objects, so that numpy moves them about and Python does the arithmetic. For finite cases: NaN,
infinity and overflow raise NotImplementedError, but for a bias or a sink of -inf.

The bounds that make each step of float64 exact (the table "Why each step is exact") are assertions,
so an oracle that finishes has also checked the specification on its inputs.
"""

from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import cache
from math import ceil as ceil_of_number
from math import isqrt, prod
from math import trunc as trunc_of_number
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

LEAST = -300
LEAST_NORMAL = Fraction(1, 2**126)
EXACT = 2**53  # float64 holds every integer up to here
BLOCK = 256
NUMERATOR_BITS = 41
FARTHEST = 2**29
WORD = 2**32
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


def normal_power(exponent: Any) -> Any:
    """2^exponent, asserted to be a normal float64."""
    assert all(-1022 <= e <= 1023 for e in np.ravel(exponent))
    return power(exponent)


@elementwise
def rint(x: Fraction) -> int:
    """The nearest integer, half to even."""
    return round(x)


@elementwise
def ceil(x: Fraction) -> int:
    return ceil_of_number(x)


@elementwise
def trunc(x: Fraction) -> int:
    return trunc_of_number(x)


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
    rounded = round_to(x, 53)
    assert rounded == 0 or -1021 <= magnitude(rounded) <= 1024, (
        "beyond the normal numbers of float64"
    )
    return rounded


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


def integers(x: np.ndarray, exponent: Any) -> np.ndarray:
    """rint(x 2^exponent)."""
    return rint(x * normal_power(exponent))


def norm(x: np.ndarray) -> np.ndarray:
    """N of each row of `[..., H]`: `[..., 1]`."""
    e = exponents(x, axis=-1)
    squares = ceil(np.abs(x) * normal_power(12 - e)) ** 2
    t = 256 + np.sum(squares, axis=-1, keepdims=True)
    assert np.all(t <= x.shape[-1] * 2**24 + 256)
    n = e - 12 + (exponents(t, axis=-1) + 1) // 2
    assert np.all(np.sum(x * x, axis=-1, keepdims=True) < power(2 * n))
    return n


def dot(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Every row of `[M, H]` with every row of `[L, H]`: `[M, L]`."""
    n_x, n_y = norm(x), norm(y)
    integers_x, integers_y = integers(x, 33 - n_x), integers(y, 34 - n_y).T
    high = rint(integers_x * Fraction(1, 2**15))
    low = integers_x - high * 2**15
    sums = round64(products(high, integers_y) * 2**15 + products(low, integers_y))
    return sums * normal_power(n_x - 33) * normal_power(n_y.T - 34)


def products(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The matrix product of integers, every partial sum of which float64 holds in any order."""
    assert np.all(np.abs(a) @ np.abs(b) <= EXACT)
    return a @ b


def token(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The exponent of each row of `[M, H]`, `[M, 1]`, and its two digits, `[M, H]` each."""
    e = exponents(x, axis=1)
    g = integers(x, 32 - e)
    high = rint(g * Fraction(1, 2**16))
    low = g - high * 2**16
    assert np.all(np.abs(high) <= 2**16)
    assert np.all(np.abs(low) <= 2**15)
    return e, high, low


def blocks(tokens: int, size: int) -> Iterator[slice]:
    """Consecutive tokens, `size` at a time; the last block is what is left."""
    for start in range(0, tokens, size):
        yield slice(start, start + size)


def weighted_sum(p: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The sums of the output before the reciprocal: (S1 2^16 + S0) 2^(E - b - 32).

    Args:
      p: weights `[M, S]`, before the factor 2^e of a token, and 0 where a weight is dropped.
      x: tokens `[S, V]`.

    Returns:
      `[M, V]`.
    """
    assert np.all(p >= 0)
    e, high, low = token(x)
    w = p * normal_power(e.T)
    largest = exponents(w, axis=1)
    t = 1 + np.sum(ceil(w * normal_power(12 - largest)), axis=1, keepdims=True)
    assert np.all(t <= 2**33 + 1)
    bits = np.maximum(29, 49 - exponents(t, axis=1))
    weights = integers(w, bits - largest)
    assert np.all((bits == 29) | (np.sum(weights, axis=1, keepdims=True) <= 2**37))
    sums = []
    for digits in (high, low):
        exact = np.full((len(p), x.shape[1]), 0, object)
        for keys in blocks(len(x), BLOCK):
            exact = exact + products(weights[:, keys], digits[keys])
        assert np.all(np.abs(exact) <= 2**66)
        sums.append(round64(exact))
    return round64(sums[0] * 2**16 + sums[1]) * normal_power(largest - bits - 32)


def block_slices(
    d: np.ndarray, x: np.ndarray, anchor: np.ndarray, block: int
) -> tuple[np.ndarray, np.ndarray]:
    """B(d, x) summed over the blocks of tokens: the integers n1 and n2, `[M, H]` each.

    Args:
      d: `[M, tokens]`.
      x: `[tokens, H]`.
      anchor: the A of each row of `d`, `[M, 1]`.
      block: the number of tokens that share a unit, at most 256.
    """
    assert block <= BLOCK
    e, high, low = token(x)
    d = d * normal_power(e.T)
    n1 = n2 = all_n1 = all_n2 = np.full((len(d), x.shape[1]), 0, object)
    for tokens in blocks(len(x), block):
        u = exponents(d[:, tokens], axis=1)
        rounded = integers(d[:, tokens], 29 - u)
        for digits, exponent in ((high, u - 45), (low, u - 61)):
            sums = products(rounded, digits[tokens]) * normal_power(exponent)
            y = sums * normal_power(31 - anchor)
            first = rint(y)
            second = rint((y - first) * 2**39)
            n1, n2 = n1 + first, n2 + second
            all_n1, all_n2 = all_n1 + np.abs(first), all_n2 + np.abs(second)
    # Also of the magnitudes: no partial sum, in whatever order, is above.
    assert np.all(all_n1 <= EXACT)
    assert np.all(all_n2 <= EXACT)
    return n1, n2


def value_of_slices(n1: np.ndarray, n2: np.ndarray, anchor: np.ndarray) -> np.ndarray:
    """value(n1, n2, A) of the specification."""
    assert np.all(np.abs(n1) <= EXACT)
    assert np.all(np.abs(n2) <= EXACT)
    return round64(n1 + n2 * Fraction(1, 2**39)) * normal_power(anchor - 31)


def gradient_sum(d: np.ndarray, x: np.ndarray, anchor: np.ndarray, block: int) -> np.ndarray:
    """The value of `block_slices`, of which these are the arguments: `[M, H]`."""
    return value_of_slices(*block_slices(d, x, anchor, block), anchor)


def exp_bounds(x: Fraction) -> tuple[Fraction, Fraction]:
    """Bounds below and above e^x, for x <= 0: one over the series of e^-x, in units of 2^-160.

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
    """Hyperbolic tangent of a float32 u, with t = exp(-2 |u|)."""
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


def threefry(key: tuple[int, int], counter: tuple[int, int]) -> tuple[int, int]:
    """Threefry2x32 of 20 rounds: after every fourth the next words of the key are added."""
    parity = key[0] ^ key[1] ^ 0x1BD11BDA
    x, y = ((c + k) % WORD for c, k in zip(counter, key, strict=True))
    for turn in range(20):
        x = (x + y) % WORD
        left = (13, 15, 26, 6, 17, 29, 16, 24)[turn % 8]
        y = (y * 2**left % WORD + y // 2 ** (32 - left)) ^ x
        if turn % 4 == 3:
            added = turn // 4 + 1
            words = (*key, parity)
            x = (x + words[added % 3]) % WORD
            y = (y + words[(added + 1) % 3] + added) % WORD
    return x, y


def is_kept(shape: tuple[int, ...], limit: int, rng: np.ndarray | None) -> np.ndarray:
    """Whether dropout keeps the weight: boolean, `[B, N, T, S]`."""
    if rng is None:
        assert limit == 0
        return np.ones(shape, bool)
    key = int(rng[0]), int(rng[1])
    kept = np.empty(shape, bool)
    for b, n in np.ndindex(shape[:2]):
        of_head = threefry(key, (b, n))
        for place in np.ndindex(shape[2:]):
            kept[(b, n, *place)] = threefry(of_head, place)[0] >= limit
    return kept


def places(
    query: np.ndarray, key: np.ndarray, offset: int, positions: Any
) -> tuple[np.ndarray, np.ndarray]:
    """The positions of queries and keys, Python integers `[B, 1, T, 1]` and `[B, 1, 1, S]`."""
    (B, T), S = query.shape[:2], key.shape[1]
    if positions is None:
        positions = np.tile(np.arange(T) + offset, (B, 1)), np.tile(np.arange(S), (B, 1))
    pair = positions if isinstance(positions, tuple) else (positions, positions)
    of_query, of_key = (elementwise(int)(x) for x in pair)
    return of_query[:, None, :, None], of_key[:, None, None, :]


def attends(
    query_places: np.ndarray,
    key_places: np.ndarray,
    is_causal: bool,
    local_window_size: int | tuple[int, int] | None,
) -> np.ndarray:
    """Mask `[B, 1, T, S]` of causality and window, by places."""
    ahead = key_places - query_places
    allowed = np.ones(ahead.shape, bool)
    if is_causal:
        allowed &= ahead <= 0
    if local_window_size is not None:
        window = local_window_size
        left, right = window if isinstance(window, tuple) else (window, window)
        allowed &= (-left <= ahead) & (ahead <= right)
    return allowed


def partners(
    query: np.ndarray,
    key: np.ndarray,
    segment_ids: tuple[np.ndarray, np.ndarray] | None,
    query_seq_lengths: np.ndarray | None,
    key_value_seq_lengths: np.ndarray | None,
) -> np.ndarray:
    """Mask `[B, T, S]` of segments and lengths."""
    allowed = np.ones((*query.shape[:2], key.shape[1]), bool)
    for b in range(len(allowed)):
        if segment_ids is not None:
            of_query, of_key = segment_ids
            allowed[b] = np.equal.outer(of_query[b], of_key[b])
        if query_seq_lengths is not None:
            allowed[b, int(query_seq_lengths[b]) :] = False
        if key_value_seq_lengths is not None:
            allowed[b, :, int(key_value_seq_lengths[b]) :] = False
    return allowed


class Rows(NamedTuple):
    """One KV head and all the queries that read it, one query head after the other: M = N / K * T.

    query: q_i scale, `[M, H]`
    key: `[S, H]`
    value: `[S, V]`
    bias, allowed, kept: `[M, S]`
    distance: `[M, S]`, slope: `[M, 1]`, of ALiBi
    sink: `[M]`, None where there is none
    grad: `[M, V]` or None
    """

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    bias: np.ndarray
    allowed: np.ndarray
    kept: np.ndarray
    distance: np.ndarray
    slope: np.ndarray
    sink: np.ndarray
    grad: np.ndarray | None


class Options(NamedTuple):
    """Numbers for all heads; the gain is the c of dropout, the block that of the gradients."""

    scale: Fraction
    cap: Fraction | None
    gain: Fraction
    tokens: int
    block: int


class Forward(NamedTuple):
    """out `[M, V]`, the weights p before dropout, r `[M, 1]` and, if capped, the slope.

    Weights and slope are `[M, S]`.
    """

    out: np.ndarray
    weights: np.ndarray
    reciprocal: np.ndarray
    slope: np.ndarray | None


def logits(rows: Rows, cap: Fraction | None) -> tuple[np.ndarray, np.ndarray | None]:
    """z in float32 and the slope of the soft cap or None, `[M, S]` each.

    Where a row may not attend, z is of no meaning, and it is not that of query and key: they may be
    anything there, and their product overflow.
    """
    z: Any = dot(rows.query, rows.key) * rows.allowed
    slope: Any = None
    if cap is not None:
        z, slope = np.frompyfunc(lambda x: soft_cap(x, cap), 1, 2)(z)
    z = round64(z + rows.bias)
    return round32(round64(z - rows.slope * np.minimum(rows.distance, FARTHEST))), slope


def softmax_numerator(
    z: np.ndarray, allowed: np.ndarray, sink: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """p: `[M, S]`, 0 where a row may not attend; and that of the sink, `[M, 1]`."""
    p = np.full(z.shape, Fraction(0), dtype=object)
    of_sink = np.full((len(z), 1), Fraction(0), dtype=object)
    for row in np.flatnonzero(allowed.any(axis=1)):
        keys = np.flatnonzero(allowed[row])
        sinks = [] if sink[row] is None else [sink[row]]
        largest = max([*z[row, keys], *sinks])
        for key in keys:
            p[row, key] = exp(round32(z[row, key] - largest))
        for number in sinks:
            of_sink[row, 0] = exp(round32(number - largest))
    return p, of_sink


def forward(rows: Rows, options: Options) -> Forward:
    z, slope = logits(rows, options.cap)
    p, of_sink = softmax_numerator(z, rows.allowed, rows.sink)
    of_keys = np.sum(integers(p, NUMERATOR_BITS), axis=1, keepdims=True)
    total = of_keys + integers(of_sink, NUMERATOR_BITS)
    assert np.all(total <= 2**62)
    r = elementwise(reciprocal)(total)
    sums = weighted_sum(p * rows.kept, rows.value)
    return Forward(round32(round64(sums * round64(r * options.gain))), p, r, slope)


def reciprocal(total: int) -> Fraction:
    """r of the sum L; 0 for a row without a key, the only one whose sum is 0."""
    return round64(2**NUMERATOR_BITS / round64(Fraction(total))) if total else Fraction(0)


def backward(
    rows: Rows, grad: np.ndarray, saved: Forward, options: Options
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """dq `[M, H]`, dk `[S, H]` and dv `[S, V]`, in float32, and the ds of a bias, `[M, S]`."""
    dp = round64(dot(grad, rows.value) * options.gain) * rows.kept
    pairs = zip(grad[:, None], saved.out[:, None], strict=True)
    d = np.concatenate([dot(grad_i, out_i) for grad_i, out_i in pairs])
    w = round64(saved.weights * saved.reciprocal)
    of_bias = ds = round64(w * round64(dp - d))
    if saved.slope is not None:
        ds = round64(ds * saved.slope)
    w_of_value = round64(saved.weights * round64(saved.reciprocal * options.gain)) * rows.kept

    of_key, of_query, of_grad = (exponents(x, axis=1) for x in (rows.key, rows.query, grad))
    of_dp = np.maximum(norm(rows.value).T, norm(saved.out)) + norm(grad)
    room = headroom(options.gain)
    anchor_q = largest_allowed(1 + room + of_dp + of_key.T, rows.allowed, axis=1)
    anchor_k = largest_allowed(1 + room + of_dp + of_query, rows.allowed, axis=0)
    anchor_v = largest_allowed(room + of_grad, rows.allowed, axis=0)
    for terms, anchor in (
        (ds * power(of_key.T), anchor_q),
        (ds * power(of_query), anchor_k),
        (w_of_value * power(of_grad), anchor_v),
    ):
        # The bound of n1, and room for a few roundings to float64.
        assert np.all(np.abs(terms) <= power(anchor) * w * (1 + power(-48)))

    dq = gradient_sum(ds, rows.key, anchor_q, options.block)
    dk = sum_over_queries(ds, rows.query, anchor_k.T, options)
    dv = sum_over_queries(w_of_value, grad, anchor_v.T, options)
    return round32(round64(dq * options.scale)), round32(dk), round32(dv), of_bias * rows.allowed


def bias_gradient(ds: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """dbias in float32, of a bias of a shape that broadcasts to that of `ds`."""
    gradient = np.empty(shape, object)
    assert prod(ds.shape) <= 2**27 * gradient.size
    for entry in np.ndindex(shape):
        own = tuple(slice(None) if n == 1 else i for i, n in zip(entry, shape, strict=True))
        gradient[entry] = round32(sum_of_digits(np.ravel(ds[own])))
    return gradient


def sum_of_digits(ds: np.ndarray) -> Fraction:
    """Three digits of every number in base 2^26, below G, added up and put together."""
    G = -(-int(exponents(ds, axis=0)[0]) // 26) * 26
    total, left = Fraction(0), ds * normal_power(26 - G)
    for _ in range(3):
        digits = trunc(left)
        assert np.all(np.abs(digits) < 2**26)
        assert np.sum(np.abs(digits)) <= EXACT
        total = round64(total * 2**26 + np.sum(digits))
        left = (left - digits) * 2**26
    return total * normal_power(G - 78)


def headroom(gain: Fraction) -> int:
    """The smallest integer n with c <= 2^n."""
    return next(n for n in range(33) if gain <= 2**n)


def largest_allowed(x: np.ndarray, allowed: np.ndarray, axis: int) -> np.ndarray:
    """The maximum over the pairs that may attend along an axis, which stays with length 1.

    It is 0 where there is no such pair, and every term of that gradient.
    """
    of_pairs = np.where(allowed, x, -(2**20))
    largest = np.max(of_pairs, axis=axis, keepdims=True)
    return np.where(allowed.any(axis=axis, keepdims=True), largest, 0)


def sum_over_queries(
    d: np.ndarray, x: np.ndarray, anchor: np.ndarray, options: Options
) -> np.ndarray:
    """The gradient of each key, from the blocks of every query head: `[S, H]`.

    Args:
      d: `[M, S]`.
      x: `[M, H]`.
      anchor: `[S, 1]`.
    """
    n1 = n2 = np.full((d.shape[1], x.shape[1]), 0, object)
    for head in blocks(len(d), options.tokens):
        of_head = block_slices(d[head].T, x[head], anchor, options.block)
        n1, n2 = n1 + of_head[0], n2 + of_head[1]
    return value_of_slices(n1, n2, anchor)


def default_scale(channels: int) -> Fraction:
    """The float32 nearest to 1 / sqrt(H); cut at 2^-200 first, which no rounding to 24 bits sees.

    (1 / sqrt(H) is irrational, a power of two, or a rational with an endless binary expansion.)
    """
    return round_to(Fraction(isqrt(2**400 // channels), 2**200), 24)


def nearest32(x: float) -> Fraction:
    return round_into(Fraction(float(x)), np.dtype(np.float32))


def store(x: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """Float32 numbers as an array of a dtype; what rounds to 0 is +0."""
    return elementwise(lambda n: float(round_into(n, dtype)))(x).astype(np.float64).astype(dtype)


def attention(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    *,
    bias: np.ndarray | None = None,
    allowed: np.ndarray | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    local_window_size: int | tuple[int, int] | None = None,
    query_offset: int = 0,
    positions: np.ndarray | tuple[np.ndarray, np.ndarray] | None = None,
    segment_ids: tuple[np.ndarray, np.ndarray] | None = None,
    query_seq_lengths: np.ndarray | None = None,
    key_value_seq_lengths: np.ndarray | None = None,
    logits_soft_cap: float | None = None,
    alibi_slopes: np.ndarray | None = None,
    sinks: np.ndarray | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: np.ndarray | None = None,
    grad: np.ndarray | None = None,
    block: int = BLOCK,
) -> dict[str, np.ndarray]:
    """The bits that every implementation of exact attention must have.

    Args:
      query: `[B, T, N, H]`, float32, float16 or bfloat16.
      key: `[B, S, K, H]`; query head n reads KV head `n // (N / K)`.
      value: `[B, S, K, V]`.
      bias: each axis that of `[B, N, T, S]` or 1.
      allowed: boolean, broadcastable to `[B, N, T, S]`: masks of any other kind.
      is_causal, local_window_size: by position.
      query_offset: the position of the first query.
      positions: integers `[B, S]`, or a pair `[B, T]`, `[B, S]`.
      segment_ids: `[B, T]` and `[B, S]`.
      query_seq_lengths, key_value_seq_lengths: `[B]`, by number.
      alibi_slopes, sinks: `[N]`; a sink of -inf is none.
      dropout_rng: the two words of the key.
      grad: of the output, `[B, T, N, V]`.
      block: the number of queries and of keys in a block of the backward pass.

    Returns:
      "forward" and, with a gradient, "dq", "dk" and "dv", in the dtype of the query, and of a bias
      "dbias", in that of the bias.
    """
    (B, T, N, H), (S, K) = query.shape, key.shape[1:3]
    logits_shape = (B, N, T, S)
    limit = rint(Fraction(dropout_rate) * WORD)
    options = Options(
        scale=default_scale(H) if scale is None else nearest32(scale),
        cap=None if logits_soft_cap is None else nearest32(logits_soft_cap),
        gain=round64(Fraction(WORD, WORD - limit)),
        tokens=T,
        block=block,
    )
    at = places(query, key, query_offset, positions)
    by_place = attends(*at, is_causal, local_window_size)
    pairs = partners(query, key, segment_ids, query_seq_lengths, key_value_seq_lengths)
    by_place = by_place & pairs[:, None]
    of_logits = {
        "bias": np.float32(0) if bias is None else bias,
        "allowed": by_place if allowed is None else by_place & allowed,
        "kept": is_kept(logits_shape, limit, dropout_rng),
        "distance": abs(at[0] - at[1]),
    }
    of_logits = {name: np.broadcast_to(x, logits_shape) for name, x in of_logits.items()}
    slopes = np.zeros(N, np.float32) if alibi_slopes is None else alibi_slopes
    sinks = np.full(N, -np.inf, np.float32) if sinks is None else sinks

    names = ("forward",) if grad is None else ("forward", "dq", "dk", "dv")
    shapes = ((B, T, N, value.shape[3]), query.shape, key.shape, value.shape)
    results = {n: np.empty(s, query.dtype) for n, s in zip(names, shapes, strict=False)}
    groups = N // K
    of_bias = np.empty(logits_shape, object)
    for batch, head in np.ndindex(B, K):
        readers = slice(head * groups, (head + 1) * groups)
        ours, theirs = (batch, slice(None), readers), (batch, slice(None), head)
        rows = gather(
            query[ours],
            key[theirs],
            value[theirs],
            {name: x[batch, readers] for name, x in of_logits.items()},
            slopes[readers],
            sinks[readers],
            None if grad is None else grad[ours],
            options.scale,
        )
        places_of_results = (ours, ours, theirs, theirs)
        found = one_head(rows, options)
        if grad is not None:
            *found, ds = found
            of_bias[batch, readers] = ds.reshape(groups, T, S)
        for name, place, exact in zip(names, places_of_results, found, strict=False):
            stored = store(exact, query.dtype)
            if place is ours:
                stored = np.swapaxes(stored.reshape(groups, T, -1), 0, 1)
            results[name][place] = stored
    if bias is not None and grad is not None:
        results["dbias"] = store(bias_gradient(of_bias, bias.shape), bias.dtype)
    return results


def gather(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    of_logits: dict[str, np.ndarray],
    slopes: np.ndarray,
    sinks: np.ndarray,
    grad: np.ndarray | None,
    scale: Fraction,
) -> Rows:
    """Operands of one KV head as fractions, the rows in the order `[N / K, T]`.

    Args:
      query: `[T, N / K, H]`.
      key: `[S, H]`.
      value: `[S, V]`.
      of_logits: bias, allowed, kept and distance, `[N / K, T, S]`; a bias where the row may not
        attend is not read.
      slopes, sinks: `[N / K]`.
      grad: `[T, N / K, V]`.
    """
    tokens, groups, _ = query.shape
    by_key = {name: x.reshape(groups * tokens, len(key)) for name, x in of_logits.items()}
    added = by_key["bias"]
    live = by_key["allowed"] & ~np.isneginf(added)

    def of_rows(x: np.ndarray) -> np.ndarray:
        return read(np.swapaxes(x, 0, 1).reshape(groups * tokens, -1))

    scaled = of_rows(query) * scale
    assert np.all(scaled == round64(scaled))
    return Rows(
        query=scaled,
        key=read(key),
        value=read(value),
        bias=read(np.where(live, added, np.zeros_like(added))),
        allowed=live,
        kept=by_key["kept"],
        distance=by_key["distance"],
        slope=read(np.repeat(slopes, tokens)[:, None]),
        sink=elementwise(read_sink)(np.repeat(sinks, tokens)),
        grad=None if grad is None else of_rows(grad),
    )


def read_sink(x: Any) -> Fraction | None:
    return None if float(x) == -np.inf else read(x)


def one_head(rows: Rows, options: Options) -> tuple[np.ndarray, ...]:
    """The output `[M, V]` and, with a gradient, dq, dk, dv and the ds of a bias."""
    saved = forward(rows, options)
    if rows.grad is None:
        return (saved.out,)
    return (saved.out, *backward(rows, rows.grad, saved, options))
