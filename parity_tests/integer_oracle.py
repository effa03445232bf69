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
    """Who may attend by its place: `[B, 1, T, S]`."""
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
    """Who may attend by its segment and its number: `[B, T, S]`."""
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
    """One KV head and all the queries that read it, M = T * (N / K) rows.

    query: `[M, H]`
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
    """Numbers for all heads; the gain is the c of dropout."""

    scale: Fraction
    cap: Fraction | None
    gain: Fraction


class Forward(NamedTuple):
    """out `[M, H]`, the weights p `[M, S]`, r `[M, 1]` and, if capped, the slope `[M, S]`."""

    out: np.ndarray
    weights: np.ndarray
    reciprocal: np.ndarray
    slope: np.ndarray | None


def logits(rows: Rows, options: Options) -> tuple[np.ndarray, np.ndarray | None]:
    """z as if every key were allowed, and the slope of the soft cap or None: `[M, S]` each."""
    z: Any = round32(dot(rows.query, rows.key)) * options.scale
    slope: Any = None
    cap = options.cap
    if cap is not None:
        z, slope = np.frompyfunc(lambda x: soft_cap(x, cap), 1, 2)(z)
    z = round64(z + rows.bias)
    return round64(z - rows.slope * np.minimum(rows.distance, FARTHEST)), slope


def softmax_numerator(
    z: np.ndarray, allowed: np.ndarray, sink: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """p: `[M, S]`, 0 where a row may not attend; and that of the sink, `[M, 1]`."""
    p = np.full(z.shape, Fraction(0), dtype=object)
    of_sink = np.full((len(z), 1), Fraction(0), dtype=object)
    for row in range(len(z)):
        keys = np.flatnonzero(allowed[row])
        sinks = [] if sink[row] is None else [sink[row]]
        largest = max([*z[row, keys], *sinks], default=Fraction(0))
        for key in keys:
            p[row, key] = exp(round32(round64(z[row, key] - largest)))
        for number in sinks:
            of_sink[row, 0] = exp(round32(round64(number - largest)))
    return p, of_sink


def forward(rows: Rows, options: Options) -> Forward:
    z, slope = logits(rows, options)
    p, of_sink = softmax_numerator(z, rows.allowed, rows.sink)
    integers = rint(p * 2**WEIGHT_BITS)
    total = np.sum(integers, axis=1, keepdims=True) + rint(of_sink * 2**WEIGHT_BITS)
    r = elementwise(lambda n: round64(Fraction(1, n)) if n else Fraction(0))(total)
    e = exponents(rows.value, axis=0)
    kept = integers * rows.kept
    sums = contract(kept, grid(rows.value, e, TOKEN_BITS)) * power(e - TOKEN_BITS)
    return Forward(round32(round64(sums * round64(r * options.gain))), p, r, slope)


def backward(
    rows: Rows, grad: np.ndarray, saved: Forward, options: Options
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """dq `[M, H]`, dk `[S, H]` and dv `[S, V]`, in float32."""
    dp = round64(dot(grad, rows.value) * options.gain) * rows.kept
    d = dot(grad, saved.out).diagonal()[:, None]
    w = round64(saved.weights * (saved.reciprocal * 2**WEIGHT_BITS))
    ds = round64(w * round64(dp - d))
    if saved.slope is not None:
        ds = round64(ds * saved.slope)
    dq = round64(token_sum(ds, 1, rows.key) * options.scale)
    dk = round64(token_sum(ds, 0, rows.query) * options.scale)
    grown = round64(saved.reciprocal * options.gain) * 2**WEIGHT_BITS
    w = round64(saved.weights * grown) * rows.kept
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
) -> dict[str, np.ndarray]:
    """The bits that every implementation of exact attention must have.

    Args:
      query: `[B, T, N, H]`, float32, float16 or bfloat16.
      key: `[B, S, K, H]`; query head n reads KV head `n // (N / K)`.
      value: `[B, S, K, V]`.
      bias: broadcastable to `[B, N, T, S]`.
      allowed: boolean, broadcastable to `[B, N, T, S]`: masks of any other kind.
      is_causal, local_window_size: by position.
      query_offset: the position of the first query.
      positions: integers `[B, S]`, or a pair `[B, T]`, `[B, S]`.
      segment_ids: `[B, T]` and `[B, S]`.
      query_seq_lengths, key_value_seq_lengths: `[B]`, by number.
      alibi_slopes, sinks: `[N]`; a sink of -inf is none.
      dropout_rng: the two words of the key.
      grad: of the output, `[B, T, N, V]`.

    Returns:
      "forward" and, with a gradient, "dq", "dk" and "dv", in the dtype of the query.
    """
    (B, T, N, H), (S, K) = query.shape, key.shape[1:3]
    logits_shape = (B, N, T, S)
    limit = rint(Fraction(dropout_rate) * WORD)
    options = Options(
        scale=default_scale(H) if scale is None else nearest32(scale),
        cap=None if logits_soft_cap is None else nearest32(logits_soft_cap),
        gain=round64(Fraction(WORD, WORD - limit)),
    )
    at = places(query, key, query_offset, positions)
    by_place = attends(*at, is_causal, local_window_size)
    pairs = partners(query, key, segment_ids, query_seq_lengths, key_value_seq_lengths)
    is_read = np.any(pairs, axis=1)[:, :, None, None]
    key, value = (np.where(is_read, x, np.zeros_like(x)) for x in (key, value))
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
        )
        places_of_results = (ours, ours, theirs, theirs)
        for name, place, exact in zip(
            names, places_of_results, one_head(rows, options), strict=False
        ):
            target = results[name][place]
            target[...] = store(exact, query.dtype).reshape(target.shape)
    return results


def gather(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    of_logits: dict[str, np.ndarray],
    slopes: np.ndarray,
    sinks: np.ndarray,
    grad: np.ndarray | None,
) -> Rows:
    """Read one KV head, the rows in the order `[T, N / K]`.

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
    by_key = {
        name: np.swapaxes(x, 0, 1).reshape(tokens * groups, len(key))
        for name, x in of_logits.items()
    }
    added = by_key["bias"]
    live = by_key["allowed"] & ~np.isneginf(added)
    has_key = live.any(1, keepdims=True)

    def of_rows(x: np.ndarray) -> np.ndarray:
        """Those without a key to attend to count as 0: their output and dq, and in dk and dv."""
        return read(np.where(has_key, x.reshape(tokens * groups, -1), np.zeros((), x.dtype)))

    return Rows(
        query=of_rows(query),
        key=read(key),
        value=read(value),
        bias=read(np.where(live, added, np.zeros_like(added))),
        allowed=live,
        kept=by_key["kept"],
        distance=by_key["distance"],
        slope=read(np.tile(slopes, tokens)[:, None]),
        sink=elementwise(read_sink)(np.tile(sinks, tokens)),
        grad=None if grad is None else of_rows(grad),
    )


def read_sink(x: Any) -> Fraction | None:
    return None if float(x) == -np.inf else read(x)


def one_head(rows: Rows, options: Options) -> tuple[np.ndarray, ...]:
    """The output `[M, V]` and, with a gradient, dq, dk and dv, in float32."""
    saved = forward(rows, options)
    if rows.grad is None:
        return (saved.out,)
    return (saved.out, *backward(rows, rows.grad, saved, options))
