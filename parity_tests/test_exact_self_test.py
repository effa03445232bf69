"""The certificate: no question is asked in vain.

`test_parity_command.py::test_this_machine_is_certified` asks both implementations all of them.

A sabotage is one operation done a little wrong, as a backend might. The questions that see it are
stated: fewer would be a hole, more would blame what works.
"""

from collections.abc import Callable
from dataclasses import fields, replace
from fractions import Fraction
from functools import cache, partial
from typing import Any

import integer_oracle
import jax
import numpy as np
import pytest
import torch
from scipy import special

from jax_seqpar.compare.numpy_conversion import numpy_to_torch
from jax_seqpar.exact import certify
from jax_seqpar.exact.self_test import certificate, questions
from jax_seqpar.exact.self_test.check import Check, sha256
from jax_seqpar.exact.self_test.jax_operations import jax_operations
from jax_seqpar.exact.self_test.operations import Operations
from jax_seqpar.kernels import dense_attention
from torch_ref.dropout import head_keys, limit, threefry2x32

Operation = Callable[..., Any]

HARD, SAMPLE, ENDS = "exp: the hardest cases", "exp: a million others", "exp: its ends"
DOT = "dot: the bit budget at its edge"
WEIGHTED = "weighted sum: the bit budget at its edge"
LONG = "weighted sum: more than one float64 holds"
GRADIENT = "gradient sum: blocks and slices"
FLOAT64, INT8 = "matrix product: float64", "matrix product: int8"
FLUSH, ROUND32 = "flush: subnormals are 0", "round32: ties and ends"
WIDENED = "round32: widened again"
OUT, NARROWED, DIVISION = "out: one NaN, no -0", "out: 16 bits", "division: float64"
SOFT_CAP, DROPOUT = "soft cap and its slope", "dropout"
ATTENTION = "attention and its gradients"
TIES, CHAIN = "R: ties and ends", "R: between a product and a sum"
LOG, LOG_SAMPLE = "log: the hardest cases", "log: a million others"
NORMAL, NORMAL_SAMPLE = "Phi and phi: the hardest cases", "Phi and phi: a million others"
ROOT, SINES = "rsqrt: the hardest case and a million", "sin and cos: tables of angles"
SUMS, MM = "sums of int64", "mm: the bit budget at its edge"
LONG_MM = "mm: more terms than that"

LEAST_NORMAL = np.float32(2.0**-126)


def answer(where: Operation, wrong: Operation) -> Callable[[Operation], Operation]:
    """A sabotage: the wrong answer for the elements that `where` picks by input and answer."""

    def sabotage(right: Operation) -> Operation:
        def answered(x: np.ndarray) -> np.ndarray:
            y = right(x)
            return np.where(where(x, y), wrong(x, y), y).astype(y.dtype)

        return answered

    return sabotage


def in_place_of(wrong: Operation) -> Callable[[Operation], Operation]:
    """A sabotage that asks the right operation nothing."""
    return lambda right: wrong


def everywhere(x: np.ndarray, y: np.ndarray) -> bool:
    return True


def one_up(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The next number."""
    return np.nextafter(y, y.dtype.type(np.inf))


def narrow(x: np.ndarray) -> np.ndarray:
    """float32, and infinite beyond it."""
    with np.errstate(over="ignore", invalid="ignore"):
        return x.astype(np.float32)


def tf32(x: np.ndarray) -> np.ndarray:
    """float32 with 10 bits after the point, half to even."""
    bits = x.astype(np.float32).view(np.uint32)
    bits = bits + np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


def exp32(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.exp(x)


def exp64(units: float, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Exponential of a float64 library that is `units` units in the last place off."""
    return np.exp(x.astype(np.float64)) * (1 + units * 2.0**-53)


def dot32(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a.astype(np.float32) @ b.T.astype(np.float32)).astype(np.float64)


def dot_of_tf32(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return tf32(a).astype(np.float64) @ tf32(b).T.astype(np.float64)


def dot64(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Sums of float64, from the last channel to the first, that have to round."""
    return a[:, ::-1] @ b[:, ::-1].T


def exponents(x: np.ndarray, axis: int) -> np.ndarray:
    """E of finite float64 that are not all 0."""
    return np.frexp(np.abs(x).max(axis, keepdims=True))[1]


def norms(x: np.ndarray) -> np.ndarray:
    """N of rows."""
    e = exponents(x, 1)
    squares = 256 + np.sum(np.ceil(np.ldexp(np.abs(x), 12 - e)) ** 2, axis=1, keepdims=True)
    return e - 12 + (exponents(squares, 1) + 1) // 2


def two_digits(x: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    high = np.rint(np.ldexp(x, -bits))
    return high, x - np.ldexp(high, bits)


def dot_of(
    a: np.ndarray,
    b: np.ndarray,
    *,
    norm: Operation = norms,
    left_bits: int = 33,
    right_bits: int = 34,
    digit_bits: int = 15,
    low: float = 1.0,
    product: Operation = np.matmul,
) -> np.ndarray:
    """The dot of the specification in NumPy, of which a sabotage changes one argument.

    Args:
      low: a factor of the lower digit.
      product: of matrices of integers.
    """
    left, right = left_bits - norm(a), right_bits - norm(b).T
    x, y = np.rint(np.ldexp(a, left)), np.rint(np.ldexp(b.T, right))
    high_digit, low_digit = two_digits(x, digit_bits)
    sums = np.ldexp(product(high_digit, y), digit_bits) + low * product(low_digit, y)
    return np.ldexp(sums, -left - right)


def last_channel_lost(right: Operation) -> Operation:
    """A kernel that cuts off what does not fill a tile of 8."""
    return lambda a, b: right(a[:, :-1], b[:, :-1]) if a.shape[1] > 8 else right(a, b)


def product_of(dtype: type, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """A product with sums of a dtype, one token after another."""
    terms = a.astype(dtype)[:, :, None] * b.astype(dtype)
    return np.cumsum(terms, axis=1, dtype=dtype)[:, -1].astype(np.float64)


def product_of_bits(bits: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """A product whose sums have room for fewer bits than a float64."""
    sums = a @ b
    unit = np.ldexp(1.0, np.maximum(np.frexp(sums)[1] - bits, 0))
    return np.rint(sums / unit) * unit


def rounded_once(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The product of integers below 2^63, rounded to float64."""
    return (a.astype(np.int64) @ b.astype(np.int64)).astype(np.float64)


def weight_bits(w: np.ndarray) -> np.ndarray:
    """b of rows of weights."""
    counted = np.ceil(np.ldexp(w, 12 - exponents(w, 1))).sum(1, keepdims=True)
    return np.maximum(29, 49 - exponents(1 + counted, 1))


def weighted_sum_of(
    weights: np.ndarray,
    x: np.ndarray,
    *,
    bits: Operation = weight_bits,
    value_bits: int = 32,
    low: float = 1.0,
    product: Operation = rounded_once,
) -> np.ndarray:
    """The weighted sum of the specification in NumPy, of which a sabotage changes one argument."""
    weights, x = weights.astype(np.float64), x.astype(np.float64)
    e = exponents(x, 1)
    w = np.ldexp(weights, e.T)
    unit = bits(w) - exponents(w, 1)
    digits = two_digits(np.rint(np.ldexp(x, value_bits - e)), 16)
    high_sum, low_sum = (product(np.rint(np.ldexp(w, unit)), digit) for digit in digits)
    return np.ldexp(high_sum * 2.0**16 + low * low_sum, -unit - value_bits)


def tile_by_tile(weights: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The sum of weighted sums of 256 tokens, each with the unit that these tokens find."""
    tiles = range(0, len(x), 256)
    sums = [weighted_sum_of(weights[:, i : i + 256], x[i : i + 256]) for i in tiles]
    return np.sum(sums, axis=0)


def gradient_sum_of(
    d: np.ndarray,
    x: np.ndarray,
    anchor: np.ndarray,
    *,
    block: int = 256,
    unit_of_all: bool = False,
    bits: int = 29,
    low: float = 1.0,
    slice_bits: tuple[int, int] = (31, 39),
    second: float = 1.0,
    between: Operation = lambda sums: sums,
    product: Operation = np.matmul,
) -> np.ndarray:
    """The gradient sum of the specification in NumPy, of which a sabotage changes one argument.

    Args:
      low, second: factors of the lower digit and of the second slice.
      between: what happens to the sums of a block before they are cut into slices.
    """
    x = x.astype(np.float64)
    e = exponents(x, 1)
    scaled = np.ldexp(d, e.T)
    digits = two_digits(np.rint(np.ldexp(x, 32 - e)), 16)
    firsts, seconds = np.zeros((2, len(d), x.shape[1]))
    for start in range(0, len(x), block):
        own = slice(start, start + block)
        unit = exponents(scaled if unit_of_all else scaled[:, own], 1) - bits
        weights = np.rint(np.ldexp(scaled[:, own], -unit))
        for digit, factor, shift in zip(digits, (1.0, low), (16, 32), strict=True):
            sums = between(np.ldexp(product(weights, digit[own]), unit - shift))
            y = np.ldexp(factor * sums, slice_bits[0] - anchor)
            first = np.rint(y)
            firsts += first
            seconds += second * np.rint(np.ldexp(y - first, slice_bits[1]))
    return np.ldexp(firsts + np.ldexp(seconds, -slice_bits[1]), anchor - slice_bits[0])


def only_for(dtype: type, wrong: Operation) -> Callable[[Operation], Operation]:
    """A matrix product that is wrong for one dtype."""
    return lambda right: lambda a, b: wrong(a, b) if a.dtype == dtype else right(a, b)


def product32(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a.astype(np.float32) @ b.astype(np.float32)).astype(np.float64)


def product_of_two_floats(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """float64 by a pair of float32, with sums of float32: what emulation might be."""
    high_a, high_b = a.astype(np.float32), b.astype(np.float32)
    low_a, low_b = (a - high_a).astype(np.float32), (b - high_b).astype(np.float32)
    parts = (high_a @ high_b, high_a @ low_b, low_a @ high_b)
    return np.sum(np.stack(parts).astype(np.float64), axis=0)


def product8(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a.astype(np.float64) @ b.astype(np.float64)).astype(np.int32)


def product_saturating(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Sums that stop at the ends of int16."""
    return np.clip(product8(a, b), -(1 << 15), (1 << 15) - 1).astype(np.int32)


def product_wrapping(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return product8(a, b).astype(np.int16).astype(np.int32)


def product_bfloat16(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """A result that has been a bfloat16."""
    return product8(a, b).astype(jax.numpy.bfloat16).astype(np.int32)


def truncated(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.where(np.abs(y) > np.abs(x), np.nextafter(y, np.float32(0)), y)


def half_away(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The tie that went to the even neighbour below goes up."""
    with np.errstate(over="ignore", invalid="ignore"):
        up = one_up(x, y)
        tied = x == (y.astype(np.float64) + up.astype(np.float64)) / 2
    return np.where(tied, up, y)


def reciprocal_by_newton(x: np.ndarray) -> np.ndarray:
    """A float32 guess and two steps: right but for the last bit of some."""
    y = (1 / x.astype(np.float32)).astype(np.float64)
    for _ in range(2):
        y = y * (2 - x * y)
    return y


def to_16_bits(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both roundings right, but without the flushing and the one NaN of `out`."""
    x = narrow(x)
    with np.errstate(over="ignore"):
        return x.astype(jax.numpy.bfloat16), x.astype(np.float16)


def to_16_bits_at_once(right: Operation) -> Operation:
    """float16 without the rounding to float32 between."""

    def at_once(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        bfloat16, float16 = right(x)
        with np.errstate(over="ignore"):
            return bfloat16, np.where(np.isnan(x) | (x == 0), float16, x.astype(np.float16))

    return at_once


def truncated_to_bfloat16(right: Operation) -> Operation:
    def truncate(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        bfloat16, float16 = right(x)
        cut = (narrow(x).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
        return np.where(np.isnan(x), bfloat16, cut.view(jax.numpy.bfloat16)), float16

    return truncate


def subnormals_of_float16_flushed(right: Operation) -> Operation:
    def flushed(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        bfloat16, float16 = right(x)
        return bfloat16, np.where(np.abs(float16) < 2.0**-14, np.float16(0), float16)

    return flushed


def soft_cap32(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Soft cap by a tanh of float32, as a library has it."""
    tanh = np.tanh((z / questions.SOFT_CAP).astype(np.float32)).astype(np.float64)
    return questions.SOFT_CAP * tanh, 1 - tanh**2


def an_ulp_of_one(output: int) -> Callable[[Operation], Operation]:
    """One element of one output, the next float64."""

    def sabotage(right: Operation) -> Operation:
        def moved(x: np.ndarray) -> tuple[np.ndarray, ...]:
            results = [y.copy() for y in right(x)]
            results[output][100] = np.nextafter(results[output][100], np.inf)
            return tuple(results)

        return moved

    return sabotage


def kept_of_words(compare: Operation) -> Callable[[Operation], Operation]:
    """Dropout by PyTorch's words and another comparison with the limit."""

    def kept(key: np.ndarray) -> np.ndarray:
        B, N, T, S = questions.DROPOUT_SHAPE
        keys = head_keys(numpy_to_torch(key), B, N)[:, :, None, None]
        counter = (torch.arange(T)[:, None], torch.arange(S))
        words = threefry2x32((keys[..., 0], keys[..., 1]), counter)
        return compare(*(x.numpy().astype(np.uint32) for x in words), limit(questions.DROPOUT_RATE))

    return in_place_of(kept)


def of_signed_words(word: np.ndarray, other: np.ndarray, limit: int) -> np.ndarray:
    return word.astype(np.int32) >= np.uint32(limit).astype(np.int32)


def of_the_other_word(word: np.ndarray, other: np.ndarray, limit: int) -> np.ndarray:
    return other >= limit


def of_a_float32(word: np.ndarray, other: np.ndarray, limit: int) -> np.ndarray:
    """The first 8 bits of a word, as a share of 1."""
    return (word >> np.uint32(24)) / np.float32(256) >= limit / 2.0**32


def one_weight_dropped(right: Operation) -> Operation:
    def dropped(key: np.ndarray) -> np.ndarray:
        kept = right(key).copy()
        kept.ravel()[np.flatnonzero(kept)[-1]] = False
        return kept

    return dropped


def one_bit(output: int) -> Callable[[Operation], Operation]:
    """The last bit of one element of one output flipped."""

    def sabotage(right: Operation) -> Operation:
        def attention(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
            results = [x.copy() for x in right(*arrays)]
            results[output].view(np.uint32)[-1, -1, -1, -1] ^= 1
            return tuple(results)

        return attention

    return sabotage


def gradients_swapped(right: Operation) -> Operation:
    def attention(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        out, dq, dk, dv = right(*arrays)
        return out, dq, dv, dk

    return attention


def plain_attention(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    *operands, grad = arrays
    attend = jax.jit(partial(dense_attention, is_causal=True))
    out, pull = jax.vjp(attend, *operands)
    return tuple(map(np.asarray, (out, *pull(grad))))


def bits64(x: np.ndarray) -> np.ndarray:
    """The sign, quiet bit and payload of a float64 NaN, where float32 has them."""
    bits = x.view(np.uint64)
    sign = (bits >> np.uint64(63)) << np.uint64(31)
    payload = (bits >> np.uint64(29)) & np.uint64(0x7FFFFF)
    return (sign | np.uint64(0x7FC00000) | payload).astype(np.uint32).view(np.float32)


def log_of(dtype: type) -> Callable[[Operation], Operation]:
    """A library's logarithm, rounded to float32."""
    return in_place_of(lambda x: np.log(x.astype(dtype)).astype(np.float32))


def root_of(dtype: type, units: float) -> Callable[[Operation], Operation]:
    """Two roundings of a dtype, and so many units of float64 off."""
    return in_place_of(
        lambda x: ((1 / np.sqrt(x.astype(dtype))) * (1 + units * 2.0**-53)).astype(np.float32)
    )


def normal_of(dtype: type) -> Callable[[Operation], Operation]:
    """Phi and phi by an error function of a dtype."""

    def both(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        z = x.astype(dtype)
        density = np.exp(-z * z / 2) / dtype((2 * np.pi) ** 0.5)
        with np.errstate(under="ignore"):
            narrow = [
                y.astype(np.float32) for y in (special.erfc(-z * dtype(0.5**0.5)) / 2, density)
            ]
        first, second = (np.where(y < np.float32(2.0**-126), np.float32(0), y) for y in narrow)
        return first, second

    return in_place_of(both)


def sines_of(dtype: type, late: int = 0) -> Callable[[Operation], Operation]:
    """Sines and cosines by the angle in radians, over a whole turn."""

    def sines(angles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        radians = ((angles + late) * (2 * np.pi / 2**24)).astype(dtype)
        return np.sin(radians).astype(np.float32), np.cos(radians).astype(np.float32)

    return in_place_of(sines)


def engine_of(product: Operation, digit_bits: int) -> Callable[[Operation], Operation]:
    """One more engine of `mm`, which adds up products of digits in its own way."""

    def engine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        e, f = exponents(a, 1), exponents(b, 0)
        x, y = (np.rint(np.ldexp(z.astype(float), 24 - s)) for z, s in ((a, e), (b, f)))
        high, low = two_digits(y, digit_bits)
        sums = np.ldexp(product(x, high), digit_bits) + product(x, low)
        return np.ldexp(sums, e + f - 48).astype(np.float32)

    return lambda right: lambda a, b: (*right(a, b), engine(a, b))


def with_sign(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.copysign(y, x).astype(np.float32)


# By name: the operation, what is done to it, and the questions that it gets wrong.
SABOTAGES: dict[str, tuple[str, Callable[[Operation], Operation], set[str]]] = {
    "exp one ulp off at the hardest case": (
        "exp",
        answer(lambda x, y: x.view(np.uint32) == 0xC16912CD, one_up),
        {HARD},
    ),
    # Two units high are right everywhere: what is nearest to a boundary is above it.
    "exp two units of float64 low": (
        "exp",
        answer(lambda x, y: x >= -80, partial(exp64, -2)),
        {HARD},
    ),
    "exp of float32": ("exp", answer(lambda x, y: x >= -79, exp32), {HARD, SAMPLE}),
    "exp of float32 for small results": (
        "exp",
        answer(lambda x, y: (x >= -79) & (x < -20), exp32),
        {SAMPLE},
    ),
    "exp goes on below -80": ("exp", answer(everywhere, partial(exp64, 0)), {ENDS}),
    "exp ends at -80 itself": (
        "exp",
        answer(lambda x, y: x <= -80, lambda x, y: 0),
        {ENDS, SAMPLE},
    ),
    "exp of -inf is NaN": ("exp", answer(lambda x, y: np.isinf(x), lambda x, y: np.nan), {ENDS}),
    "exp of 0 is less than 1": (
        "exp",
        answer(lambda x, y: x == 0, lambda x, y: np.nextafter(y, np.float32(0))),
        {ENDS},
    ),
    "dot of float32": ("dot", in_place_of(dot32), {DOT}),
    "dot of TF32": ("dot", in_place_of(dot_of_tf32), {DOT}),
    "dot in one product": ("dot", in_place_of(dot64), {DOT}),
    **{
        f"dot {how}": ("dot", in_place_of(partial(dot_of, **changed)), {DOT})
        for how, changed in {
            "with one bit fewer on the left": {"left_bits": 32},
            "with one bit fewer on the right": {"right_bits": 33},
            "with one digit": {"digit_bits": 0},
            "without the low digit": {"low": 0.0},
            "with sums of float32": {"product": partial(product_of, np.float32)},
            "with room for sums of 51 bits": {"product": partial(product_of_bits, 51)},
            "with a norm one too small": {"norm": lambda x: norms(x) - 1},
            "with exponents in place of norms": {"norm": lambda x: exponents(x, 1)},
        }.items()
    },
    "dot without the last channel": ("dot", last_channel_lost, {DOT}),
    "weighted sum in one product": ("weighted_sum", in_place_of(np.matmul), {WEIGHTED, LONG}),
    **{
        f"weighted sum {how}": (
            "weighted_sum",
            in_place_of(partial(weighted_sum_of, **changed)),
            {WEIGHTED, LONG},
        )
        for how, changed in {
            "with 29 bits for every weight": {"bits": lambda w: np.full((len(w), 1), 29)},
            "with one bit fewer for a weight": {"bits": lambda w: weight_bits(w) - 1},
            "with one bit fewer for a value": {"value_bits": 31},
            "without the low digits": {"low": 0.0},
            "with sums of float32": {"product": partial(product_of, np.float32)},
        }.items()
    },
    "weighted sum with room for sums of 52 bits": (
        "weighted_sum",
        in_place_of(partial(weighted_sum_of, product=partial(product_of_bits, 52))),
        {WEIGHTED, LONG},
    ),
    "weighted sum with one float64 sum of all tokens": (
        "weighted_sum",
        in_place_of(partial(weighted_sum_of, product=partial(product_of, np.float64))),
        {LONG},
    ),
    "weighted sum with a unit for each tile": ("weighted_sum", in_place_of(tile_by_tile), {LONG}),
    "weighted sum without the last token": (
        "weighted_sum",
        in_place_of(lambda weights, x: weighted_sum_of(weights[:, :-1], x[:-1])),
        {WEIGHTED, LONG},
    ),
    "gradient sum in one product": (
        "gradient_sum",
        in_place_of(lambda d, x, anchor: d @ x.astype(np.float64)),
        {GRADIENT},
    ),
    **{
        f"gradient sum {how}": (
            "gradient_sum",
            in_place_of(partial(gradient_sum_of, **changed)),
            {GRADIENT},
        )
        for how, changed in {
            "with one unit for all blocks": {"unit_of_all": True},
            "with blocks of 128": {"block": 128},
            "with one bit fewer": {"bits": 28},
            "without the low digits": {"low": 0.0},
            "with one slice only": {"second": 0.0},
            "with one bit more in the first slice": {"slice_bits": (32, 39)},
            "with one bit fewer in the second slice": {"slice_bits": (31, 38)},
            "with room for sums of 52 bits": {"product": partial(product_of_bits, 52)},
            "rounded to float32 in between": {"between": lambda x: narrow(x).astype(np.float64)},
            "with sums of float32": {"product": partial(product_of, np.float32)},
        }.items()
    },
    "gradient sum without the last token": (
        "gradient_sum",
        in_place_of(lambda d, x, anchor: gradient_sum_of(d[:, :-1], x[:-1], anchor)),
        {GRADIENT},
    ),
    "float64 by float32": ("matmul", only_for(np.float64, product32), {FLOAT64}),
    "float64 by pairs of float32": (
        "matmul",
        only_for(np.float64, product_of_two_floats),
        {FLOAT64},
    ),
    "int8 saturates to int16": ("matmul", only_for(np.int8, product_saturating), {INT8}),
    "int8 wraps in int16": ("matmul", only_for(np.int8, product_wrapping), {INT8}),
    "int8 by way of bfloat16": ("matmul", only_for(np.int8, product_bfloat16), {INT8}),
    "flush keeps subnormals": ("flush", answer(everywhere, lambda x, y: x), {FLUSH}),
    "flush takes the smallest normal, too": (
        "flush",
        answer(lambda x, y: np.abs(x) <= LEAST_NORMAL, lambda x, y: 0),
        {FLUSH},
    ),
    "flush by way of TF32": ("flush", answer(everywhere, lambda x, y: tf32(x)), {FLUSH}),
    "round32 truncates": ("round32", answer(everywhere, truncated), {ROUND32}),
    "round32 takes a tie away from 0": ("round32", answer(everywhere, half_away), {ROUND32}),
    "round32 rounds before it flushes": (
        "round32",
        answer(
            lambda x, y: np.abs(narrow(x)) == LEAST_NORMAL, lambda x, y: np.sign(x) * LEAST_NORMAL
        ),
        {ROUND32},
    ),
    "round32 keeps subnormals": ("round32", answer(everywhere, lambda x, y: narrow(x)), {ROUND32}),
    "round32 has no infinity": (
        "round32",
        answer(lambda x, y: np.isinf(y), lambda x, y: np.finfo(np.float32).max),
        {ROUND32},
    ),
    "round32 and back left out": ("widened", in_place_of(lambda x: x), {WIDENED}),
    "out keeps -0": (
        "out",
        answer(lambda x, y: (x == 0) & np.signbit(x), lambda x, y: np.float32(-0.0)),
        {OUT},
    ),
    "out flushes to -0": (
        "out",
        answer(lambda x, y: (x != 0) & (y == 0), with_sign),
        {OUT},
    ),
    "out keeps subnormals": (
        "out",
        answer(lambda x, y: (x != 0) & (y == 0), lambda x, y: narrow(x)),
        {OUT},
    ),
    "out keeps the payload of a NaN": (
        "out",
        answer(lambda x, y: np.isnan(x), lambda x, y: bits64(x)),
        {OUT},
    ),
    "out keeps the sign of a NaN": ("out", answer(lambda x, y: np.isnan(x), with_sign), {OUT}),
    "16 bits keep what a NaN holds": ("narrowed", in_place_of(to_16_bits), {NARROWED}),
    "16 bits are rounded once": ("narrowed", to_16_bits_at_once, {NARROWED}),
    "16 bits are cut off": ("narrowed", truncated_to_bfloat16, {NARROWED}),
    "float16 has no subnormals": ("narrowed", subnormals_of_float16_flushed, {NARROWED}),
    "soft cap of float32": ("soft_cap", in_place_of(soft_cap32), {SOFT_CAP}),
    "one ulp of a capped logit": ("soft_cap", an_ulp_of_one(0), {SOFT_CAP}),
    "one ulp of a slope": ("soft_cap", an_ulp_of_one(1), {SOFT_CAP}),
    "dropout by signed words": ("dropout", kept_of_words(of_signed_words), {DROPOUT}),
    "dropout by the second word": ("dropout", kept_of_words(of_the_other_word), {DROPOUT}),
    "dropout by a float": ("dropout", kept_of_words(of_a_float32), {DROPOUT}),
    "dropout drops one more": ("dropout", one_weight_dropped, {DROPOUT}),
    "1/x one ulp off": ("reciprocal", answer(everywhere, one_up), {DIVISION}),
    "1/x one ulp off for one x in 4096": (
        "reciprocal",
        answer(lambda x, y: x % 4096 == 1, one_up),
        {DIVISION},
    ),
    "1/x by Newton's steps": ("reciprocal", in_place_of(reciprocal_by_newton), {DIVISION}),
    "1/x of float32": ("reciprocal", answer(everywhere, lambda x, y: narrow(y)), {DIVISION}),
    **{
        f"one bit of {output}": ("attention", one_bit(index), {ATTENTION})
        for index, output in enumerate(("out", "dq", "dk", "dv"))
    },
    "dk and dv swapped": ("attention", gradients_swapped, {ATTENTION}),
    "attention that is not exact": ("attention", in_place_of(plain_attention), {ATTENTION}),
    "R truncates": ("rounded", answer(everywhere, truncated), {TIES}),
    "R takes a tie away from 0": ("rounded", answer(everywhere, half_away), {TIES}),
    "R keeps subnormals": ("rounded", answer(everywhere, lambda x, y: narrow(x)), {TIES}),
    "R keeps -0": (
        "rounded",
        answer(lambda x, y: (x == 0) & np.signbit(x), lambda x, y: np.float32(-0.0)),
        {TIES},
    ),
    "R left out before a sum": (
        "chained",
        in_place_of(lambda a, b, c: (a.astype(float) * b + c).astype(np.float32)),
        {CHAIN},
    ),
    "log of float64": ("log", log_of(np.float64), {LOG}),
    "log of float32": ("log", log_of(np.float32), {LOG, LOG_SAMPLE}),
    "log of its own result": (
        "log",
        answer(lambda x, y: x > 1e6, one_up),
        {LOG_SAMPLE},
    ),
    "rsqrt three units of 2^-53 off": ("reciprocal_root", root_of(np.float64, 3), {ROOT}),
    "rsqrt of float32": ("reciprocal_root", root_of(np.float32, 0), {ROOT}),
    "Phi of float64": ("normal", normal_of(np.float64), {NORMAL}),
    "Phi of float32": ("normal", normal_of(np.float32), {NORMAL, NORMAL_SAMPLE}),
    "sines of float32": ("sines", sines_of(np.float32), {SINES}),
    "sines of a whole turn": ("sines", sines_of(np.float64), {SINES}),
    "sines one angle late": ("sines", sines_of(np.float64, 1), {SINES}),
    "sums of float64": (
        "sums",
        in_place_of(lambda x: x.astype(float).sum(1).astype(np.int64)),
        {SUMS},
    ),
    "sums of int32": ("sums", in_place_of(lambda x: x.astype(np.int32).sum(1)), {SUMS}),
    "mm without digits": ("products", engine_of(np.matmul, 0), {MM, LONG_MM}),
    "mm with sums of float32": (
        "products",
        engine_of(partial(product_of, np.float32), 12),
        {MM, LONG_MM},
    ),
    "mm of the first 2^17 terms": (
        "products",
        engine_of(lambda a, b: a[:, : 1 << 17] @ b[: 1 << 17], 12),
        {LONG_MM},
    ),
}


@cache
def own_operations() -> Operations:
    """The operations of JAX, of which the longest is computed once for all sabotages."""
    right = jax_operations()
    found: dict[bytes, Any] = {}

    def products(a: np.ndarray, b: np.ndarray) -> Any:
        key = sha256([a, b]).encode()
        if key not in found:
            found[key] = right.products(a, b)
        return found[key]

    return replace(right, products=products)


@cache
def asked() -> list[tuple[Operation, set[str], Check]]:
    """Each question, the operations that it puts to work, and JAX's answer."""
    found = []
    for question in questions._QUESTIONS:
        used: set[str] = set()
        found.append((question, used, question(recorded(own_operations(), used))))
    return found


def recorded(operations: Operations, used: set[str]) -> Operations:
    """The same operations, which write down their names when they are used."""

    def record(name: str) -> Operation:
        def operation(*arrays: np.ndarray) -> Any:
            used.add(name)
            return getattr(operations, name)(*arrays)

        return operation

    return Operations(**{field.name: record(field.name) for field in fields(Operations)})


def ask_again(operations: Operations, changed: str) -> list[Check]:
    """Checks of `ask`; a question without the changed operation keeps its answer."""
    return [question(operations) if changed in used else check for question, used, check in asked()]


@pytest.fixture(autouse=True, scope="module")
def default_device():
    """The device that `certify` chooses, so that all tests share its compiled programs."""
    with jax.default_device(jax.devices()[0]):
        yield


def test_the_hashes_are_those_of_the_integers():
    cap, z = Fraction(questions.SOFT_CAP), questions.soft_cap_logits()
    capped = [integer_oracle.soft_cap(Fraction(float(x)), cap) for x in z]
    arrays = np.array(capped, object).T.astype(np.float64)
    assert np.array_equal(arrays.astype(object), np.array(capped, object).T)
    assert sha256(arrays) == questions.SOFT_CAP_HASH

    words = limit(questions.DROPOUT_RATE)
    kept = integer_oracle.is_kept(questions.DROPOUT_SHAPE, words, questions.DROPOUT_KEY)
    assert sha256([kept]) == questions.DROPOUT_HASH

    *operands, grad = questions._attention_inputs()
    results = integer_oracle.attention(*operands, grad=grad, is_causal=True)
    assert list(results) == ["forward", "dq", "dk", "dv"]
    assert sha256(results.values()) == questions.ATTENTION_HASH


def test_dropout_by_the_right_words_is_right():
    """Dropout by the right words is right, so a sabotage fails by its comparison alone."""
    kept = kept_of_words(lambda word, other, limit: word >= limit)(lambda key: key)
    right = own_operations().dropout(questions.DROPOUT_KEY)
    assert np.array_equal(kept(questions.DROPOUT_KEY), right)


def test_the_sums_without_a_sabotage_are_right():
    """Sums without a sabotage are right, so a sabotage fails by its changed argument alone."""
    sums = {"dot": dot_of, "weighted_sum": weighted_sum_of, "gradient_sum": gradient_sum_of}
    for name, operation in sums.items():
        checks = ask_again(replace(own_operations(), **{name: operation}), name)
        assert all(check.passed for check in checks)


def test_a_backend_that_is_not_there():
    with pytest.raises(RuntimeError, match="no_such_backend"):
        certify("no_such_backend")


@pytest.mark.parametrize(("name", "sabotage", "expected"), SABOTAGES.values(), ids=SABOTAGES)
def test_each_sabotage_is_caught(name, sabotage, expected):
    right = own_operations()
    checks = ask_again(replace(right, **{name: sabotage(getattr(right, name))}), name)
    assert {check.name for check in checks if not check.passed} == expected
    assert all(0 <= check.wrong <= check.total for check in checks)


def test_no_question_is_asked_in_vain():
    """Every question sees a sabotage, and every operation is asked for."""
    assert set.union(*(expected for *_, expected in SABOTAGES.values())) == {
        check.name for *_, check in asked()
    }
    assert set.union(*(used for _, used, _ in asked())) == {f.name for f in fields(Operations)}


def test_what_is_wrong_is_said(monkeypatch):
    """`certify` names the operations that a backend gets wrong."""
    right = own_operations()
    wrong = replace(right, flush=lambda x: x.astype(np.float64))
    monkeypatch.setattr(certificate, "jax_operations", lambda: wrong)
    few = (questions._flushes, questions._roundings)
    monkeypatch.setattr(questions, "_QUESTIONS", few)
    found = certify()
    assert not found.trusted
    assert [(check.name, check.passed) for check in found.checks] == [
        (FLUSH, False),
        (ROUND32, True),
    ]
    assert str(found).endswith(f": NOT TRUSTED, its bits may differ: {FLUSH} (4 of 12 wrong).")
