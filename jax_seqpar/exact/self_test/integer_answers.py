"""The sums of exact attention by Python integers, which no backend rounds.

Arrays hold Python integers (of dtype object); numbers are so many times a power of two.
"""

import math

import numpy as np

from .. import arithmetic

# Bits after the point of the series of sine and cosine, and pi with so many.
POINT = 128
PI = 0x3243F6A8885A308D313198A2E03707344


def on_grid(x: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows so many bits below their norms, as integers, and the exponents of their units."""
    unit = norm(x) - bits
    return rint(x, -unit), unit


def norm(x: np.ndarray) -> np.ndarray:
    """N of each row: the power of two above its Euclidean length, as an exponent."""
    e = exponent(x, axis=1)
    magnitudes = ceil(np.abs(x), arithmetic.NORM_BITS - e)
    squares = 256 + np.sum(magnitudes * magnitudes, axis=1, keepdims=True)
    return e - arithmetic.NORM_BITS + (exponent(squares, axis=1) + 1) // 2


def weighted_sum(weights: np.ndarray, x: np.ndarray, unit: int) -> np.ndarray:
    """The sum over tokens of weight times token, where weights are so many times 2^unit."""
    e, digits = token(x)
    weights = weights << e.T
    largest = exponent(weights, axis=1)
    counted = 1 + np.sum(ceil(weights, arithmetic.NORM_BITS - largest), axis=1, keepdims=True)
    bits = arithmetic.ROW_BITS - exponent(counted, axis=1)
    bits = np.maximum(arithmetic.LEAST_WEIGHT_BITS, bits)
    weights = rint(weights, bits - largest)
    high, low = (scaled(weights @ digit, 0) for digit in digits)
    units = largest + unit - bits - arithmetic.VALUE_BITS
    return scaled(high * 2.0**arithmetic.VALUE_DIGIT_BITS + low, units)


def gradient_sum(d: np.ndarray, x: np.ndarray, anchors: np.ndarray) -> np.ndarray:
    """The sum over tokens of d times token, block by block, in two slices."""
    first_bits, second_bits = arithmetic.SLICE_BITS
    e, digits = token(x)
    d = d << e.T
    firsts = seconds = np.zeros((len(d), x.shape[1]), object)
    for start in range(0, len(x), arithmetic.BLOCK):
        own = slice(start, start + arithmetic.BLOCK)
        unit = exponent(d[:, own], axis=1)
        weights = rint(d[:, own], arithmetic.GRADIENT_BITS - unit)
        for digit, bits in zip(digits, (16, 32), strict=True):
            shift = unit - arithmetic.GRADIENT_BITS - bits + first_bits - anchors
            up, down = np.maximum(shift, 0), np.maximum(-shift, 0)
            total = (weights @ digit[own]) << up
            first = rint(total, -down)
            second = rint(total - (first << down), second_bits - down)
            firsts, seconds = firsts + first, seconds + second
    total = scaled(firsts, 0) + scaled(seconds, -second_bits)
    return scaled(total, anchors - first_bits)


def product(a: np.ndarray, b: np.ndarray, bits: int) -> np.ndarray:
    """`mm` of the specification: rows of a and columns of b so many bits below their largest."""
    e, f = exponent(a, axis=1), exponent(b, axis=0)
    return scaled(rint(a, bits - e) @ rint(b, bits - f), e + f - 2 * bits)


def sine_and_cosine(angle: int, bits: int) -> tuple[float, float]:
    """Sine and cosine of `angle` 2^-bits turns, below one, by series in 128-bit fixed point.

    The results are right to 96 bits: pi is rounded, and every term is.
    """
    x = (2 * PI * angle) >> bits
    sums, term = [0, 0], 1 << POINT
    for n in range(1, 80):
        sums[(n - 1) % 2] += term if (n - 1) % 4 < 2 else -term
        term = ((term * x) >> POINT) // n
    cosine, sine = (math.ldexp(x, -96) for x in rint(np.array(sums, object), 96 - POINT))
    return sine, cosine


def token(x: np.ndarray) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """The exponents of rows of channels, and their two digits."""
    e = exponent(x, axis=1)
    whole = rint(x, arithmetic.VALUE_BITS - e)
    high = rint(whole, -arithmetic.VALUE_DIGIT_BITS)
    return e, (high, whole - (high << arithmetic.VALUE_DIGIT_BITS))


def rint(n: np.ndarray, shift: int | np.ndarray) -> np.ndarray:
    """n 2^shift to the nearest integer, half to even."""
    shift = np.asarray(shift, object)
    n, down = n << np.maximum(shift, 0), np.maximum(-shift, 0)
    half = (1 << down) >> 1
    is_even = 1 - (n >> down & 1)
    return (n + half - is_even * (half > 0)) >> down


def ceil(n: np.ndarray, shift: int | np.ndarray) -> np.ndarray:
    """n 2^shift to the next integer above it."""
    shift = np.asarray(shift, object)
    return -(-(n << np.maximum(shift, 0)) >> np.maximum(-shift, 0))


def exponent(x: np.ndarray, axis: int) -> np.ndarray:
    """The smallest e with every |n| < 2^e along an axis of Python integers; the axis stays."""
    largest = np.abs(x).max(axis, keepdims=True)
    return np.vectorize(int.bit_length, "O")(largest)


def python_integers(x: np.ndarray) -> np.ndarray:
    """Integers that have no end: an array of Python's."""
    return x.astype(object)


def scaled(n: np.ndarray, exponent: np.ndarray | int) -> np.ndarray:
    """n 2^exponent in float64, n rounded to it first: once, half to even."""
    return np.ldexp(n.astype(np.float64), np.asarray(exponent, np.int32))


def integers(shape: tuple[int, ...], bits: int, seed: int) -> np.ndarray:
    """Scrambled int64 below 2^bits in magnitude: the same from every version of NumPy."""
    n = np.arange(1, int(np.prod(shape)) + 1, dtype=np.uint64) + np.uint64(seed << 32)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        n = (n ^ (n >> np.uint64(shift))) * np.uint64(factor)
    magnitude = (n >> np.uint64(64 - bits)).astype(np.int64)
    return np.where(n & np.uint64(1), -magnitude, magnitude).reshape(shape)
