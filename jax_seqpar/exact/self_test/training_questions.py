"""Questions about the arithmetic of exact training beside attention, with answers by integers."""

import numpy as np

from ..engines import TERMS_OF_TEN, TERMS_OF_TWO
from ..matmul import OPERAND_BITS
from .check import Check, compare, compare_hash
from .integer_answers import integers, product, python_integers, sine_and_cosine
from .operations import Operations

# float32 bits of x and of ln x: of all in (1, 2^21] the results nearest to a rounding boundary,
# 0.19, 0.73, 1.73 and 5.5 units of float64 from it. Of the first every float64 logarithm is wrong.
LOG_HARD_CASES = {
    0x41178FEB: 0x400FE5E7,
    0x4665A9A6: 0x41198725,
    0x464D5B2B: 0x4117BCF1,
    0x3FD364D7: 0x3F006EF3,
}
# The hardest of all mantissas, 1.41 units of float64 from a boundary.
ROOT_HARD_CASE = 0x403A18E3, 0x3F16209E
# float32 bits of x, of Phi(x) and of phi(x): of the first six Phi comes nearest to a boundary,
# 0.03, 0.03, 1.37, 2.58, 3.99 and 4.37 units of float64 from it; of the others phi does, 1.12, 2.98
# and 3.78.
NORMAL_HARD_CASES = {
    0x33A06C99: (0x3F000001, 0x3ECC422A),
    0xB3206C99: (0x3EFFFFFF, 0x3ECC422A),
    0xBE7CD341: (0x3ECE138E, 0x3EC6206B),
    0xBB7FD5FA: (0x3EFF33E0, 0x3ECC41C4),
    0xBC48F2C9: (0x3EFD7EAE, 0x3ECC3E3B),
    0x3B762C8B: (0x3F006235, 0x3ECC41CB),
    0x3E48A98A: (0x3F13E2C5, 0x3EC85FC4),
    0x3FE7ABD7: (0x3F770033, 0x3D9ED138),
    0x40B3FD0E: (0x3F800000, 0x33673EEB),
}
# SHA-256 of Phi and then phi of `normal_sample`, found with the 64 bits of x87's long double.
NORMAL_HASH = "45319aaa1c8813604b57b70a7740af678e02f30bf940e920f9f1f21d1469aa7b"
ANGLE_BITS = 24


def _roundings(ask: Operations) -> Check:
    """Ties, both ends of the range, and many in between."""
    one = 1 + np.array([1, 3, 1 + 2.0**-20, 3 - 2.0**-20]) * 2.0**-24
    x = np.concatenate([one, one * 2.0**-126, one * 2.0**127, integers((4096,), 50, 20) * 1.0])
    odd = np.array([0.0, -0.0, 2.0**-126 - 2.0**-170, 2.0**-149, 2.0**128 - 2.0**103, np.inf])
    rounded = np.array([0, 0, 0, 0, np.inf, np.inf], np.float32)
    expected = np.concatenate([x.astype(np.float32), -x.astype(np.float32), rounded])
    return compare("R: ties and ends", ask.rounded(np.concatenate([x, -x, odd])), expected)


def _chains(ask: Operations) -> Check:
    """Chains of products and sums, whose rounding between the two a compiler may leave out."""
    a, b, c = (integers((1 << 12,), 24, seed).astype(np.float32) for seed in (21, 22, 23))
    c *= np.float32(2.0**22)
    return compare("R: between a product and a sum", ask.chained(a, b, c), a * b + c)


def _logarithms(ask: Operations) -> Check:
    x, expected = _of_bits(LOG_HARD_CASES)
    return compare("log: the hardest cases", ask.log(x), expected)


def _log_sample(ask: Operations) -> Check:
    """Sample of log; NumPy's log of float64 is right for all but the first of the hardest cases."""
    bits = np.linspace(0x3F800000, 0x4A000000, 1 << 20).astype(np.uint32)  # 1 to 2^21
    x = bits[~np.isin(bits, list(LOG_HARD_CASES))].view(np.float32)
    x = x[: (1 << 20) - len(LOG_HARD_CASES)]  # one number of answers for every sample
    expected = np.log(x.astype(np.float64)).astype(np.float32)
    return compare("log: a million others", ask.log(x), expected)


def _reciprocal_roots(ask: Operations) -> Check:
    """Reciprocal roots; NumPy's root and quotient are the nearest float64, within 1.41 units."""
    hard, expected = _of_bits(dict([ROOT_HARD_CASE]))
    bits = np.linspace(0x00800000, 0x7F7FFFFF, 1 << 20).astype(np.uint32)
    x = bits.view(np.float32)
    others = (1 / np.sqrt(x.astype(np.float64))).astype(np.float32)
    got = ask.reciprocal_root(np.concatenate([hard, x]))
    return compare("rsqrt: the hardest case and a million", got, np.concatenate([expected, others]))


def _normal_hard_cases(ask: Operations) -> Check:
    x = np.array([*NORMAL_HARD_CASES], np.uint32).view(np.float32)
    expected = np.array([*NORMAL_HARD_CASES.values()], np.uint32).T.view(np.float32)
    return compare("Phi and phi: the hardest cases", np.stack(ask.normal(x)), expected)


def _normal_sample(ask: Operations) -> Check:
    return compare_hash("Phi and phi: a million others", ask.normal(normal_sample()), NORMAL_HASH)


def normal_sample() -> np.ndarray:
    """Numbers of both signs, from 2^-27 to 13.4, where Phi and phi are 0."""
    x = np.linspace(0x32000000, 0x41560000, 1 << 19).astype(np.uint32).view(np.float32)
    return np.concatenate([x, -x])


def _sines(ask: Operations) -> Check:
    """Angles around every eighth of a turn, and others."""
    eighths = np.arange(9)[:, None] * (1 << ANGLE_BITS - 3) + np.arange(-20, 21)
    others = np.abs(integers((512,), ANGLE_BITS, 24))
    angles = np.concatenate([eighths.ravel(), others]) % (1 << ANGLE_BITS)
    expected = [sine_and_cosine(int(angle), ANGLE_BITS) for angle in angles]
    # No result is nearer than 129 units of float64 to a boundary.
    exact = np.array(expected).T.astype(np.float32)
    return compare("sin and cos: tables of angles", np.stack(ask.sines(angles)), exact)


def _integer_sums(ask: Operations) -> Check:
    """Sums of 62 bits, in which float64 would lose the last ones."""
    x = integers((8, 4096), 50, 25)
    x[0], x[1] = (1 << 50) - 1, 1 - (1 << 50)
    expected = python_integers(x).sum(axis=1).astype(np.int64)
    return compare("sums of int64", ask.sums(x), expected)


def _products(ask: Operations) -> Check:
    """Matrix products of the most terms that the fewest products of an engine have room for."""
    return _compare_products("mm: the bit budget at its edge", ask, TERMS_OF_TEN)


def _long_products(ask: Operations) -> Check:
    """Matrix products of more terms, for which an engine takes more products, or several sums."""
    return _compare_products("mm: more terms than that", ask, TERMS_OF_TWO + 3)


def _compare_products(name: str, ask: Operations, terms: int) -> Check:
    """Answers for the largest numbers, for numbers of many sizes, and for cancelling ones.

    The product of the second row of a and the first column of b is one unit, left of a sum that
    grows to 64 bits, so that a rounding on the way shows. An answer is wrong if any engine's is.
    """
    a, b = (integers((4, terms), 24, seed) for seed in (26, 27))
    half = terms // 2
    for x in (a, b):
        x[0] = (1 << 24) - 1
        x[1, :half] = (1 << 24) - 1 - (np.abs(x[1, :half]) >> 10)
        x[1, half:] = -np.append(x[1, :half], 0)
        x[1, half] += 1
        x <<= 20
        x[3] >>= np.arange(x.shape[1]) % 20
    expected = product(python_integers(a), python_integers(b.T), OPERAND_BITS).astype(np.float32)
    engines = ask.products(a.astype(np.float32), b.T.astype(np.float32))
    wrong = [compare("", got, expected) for got in engines]
    return Check(name, max(check.wrong for check in wrong), expected.size)


TRAINING_QUESTIONS = (
    _roundings,
    _chains,
    _logarithms,
    _log_sample,
    _reciprocal_roots,
    _normal_hard_cases,
    _normal_sample,
    _sines,
    _integer_sums,
    _products,
    _long_products,
)


def _of_bits(cases: dict[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Arguments and results from their bits."""
    x, y = (np.array(bits, np.uint32).view(np.float32) for bits in zip(*cases.items(), strict=True))
    return x, y
