"""Questions about the arithmetic of exact attention, for an implementation of its operations.

The questions are data: inputs, and answers found without the backend by Python integers and NumPy.
"""

import numpy as np

from .. import arithmetic
from .check import Check, compare, compare_hash
from .integer_answers import (
    gradient_sum,
    integers,
    on_grid,
    python_integers,
    scaled,
    weighted_sum,
)
from .operations import Operations
from .training_questions import TRAINING_QUESTIONS

# float32 bits of x and of e^x: the inputs whose results come nearest to a rounding boundary, of all
# in [-87.3, -2^-26]. The first leaves 1.27 units of float64, the next 2.42.
EXP_HARD_CASES = {
    0xC16912CD: 0x34FD331B,
    0xBBF0EDF1: 0x3F7E1FE9,
    0xBAE0E25C: 0x3F7F8FA7,
    0xB3000000: 0x3F800000,
    0xBC2A461A: 0x3F7D5A6E,
    0xC0781533: 0x3CA9CCB8,
    0xBBB70EE8: 0x3F7E92E8,
    0xC13D6631: 0x36F28E33,
    0xBCB8F40F: 0x3F7A48F4,
}
# SHA-256 of output, dq, dk and dv of `_attention_inputs`: the same on every machine.
ATTENTION_HASH = "e09aa4293c015d0474d991be76db25f52de2da5478f827086955f7064e855ab6"
# SHA-256 of the capped `soft_cap_logits` and their slopes, and of the weights that dropout keeps,
# which the tests derive from Python integers.
SOFT_CAP_HASH = "ba7537bbae57ffa972528913286a4b3d7cb65500877bc52dcb04b07c9757ecf8"
DROPOUT_HASH = "af021af07c00d706887628f9e6ac04be31f6deb1ceb1669cb3b6315aa6e85f34"
SOFT_CAP = 30.0
DROPOUT_KEY = np.array([0x9E3779B9, 0x243F6A88], np.uint32)
DROPOUT_RATE = 0.6  # above one half, so that a comparison of signed words is wrong
DROPOUT_SHAPE = (2, 3, 16, 24)  # B, N, T, S


def ask(operations: Operations) -> tuple[Check, ...]:
    """Every question, put to one implementation."""
    return tuple(check(operations) for check in _QUESTIONS)


def _exp_hard_cases(ask: Operations) -> Check:
    x, expected = (
        np.array(bits, np.uint32).view(np.float32)
        for bits in zip(*EXP_HARD_CASES.items(), strict=True)
    )
    return compare("exp: the hardest cases", ask.exp(x), expected)


def _exp_sample(ask: Operations) -> Check:
    """Sample of exp; NumPy's exp of float64 has an error below the 1.27 units that matter."""
    bits = np.linspace(0xB2800000, 0xC2A00000, 1 << 20).astype(np.uint32)  # -2^-26 to -80
    x = bits.view(np.float32)
    return compare(
        "exp: a million others", ask.exp(x), np.exp(x.astype(np.float64)).astype(np.float32)
    )


def _exp_ends(ask: Operations) -> Check:
    x = np.array([0.0, -0.0, -(2.0**-149), -80.0, -80.00001, -104.0, -np.inf], np.float32)
    tail = np.exp(np.float64(-80.0)).astype(np.float32)
    return compare("exp: its ends", ask.exp(x), np.array([1, 1, 1, tail, 0, 0, 0], np.float32))


def _dots(ask: Operations) -> Check:
    """Dot products of parallel rows, whose sums reach the Cauchy-Schwarz bound, and of others."""
    got, expected = [], []
    for channels in (2, 64, 512):
        a, b = (integers((16, channels), 36, seed) for seed in (1, 2))
        # The norm of such a row is 1% below a power of two, and its N the exponent of that.
        share = 0.99 if channels.bit_length() % 2 else 0.7
        for x in (a, b):
            x[:4] = np.array([1, -1, 1, -1])[:, None] * (int(share * 2**36) + x[:4] % 1024)
            x[8:, ::3] >>= 12
        got.append(ask.dot(a.astype(np.float64), b.astype(np.float64)))
        left, left_unit = on_grid(python_integers(a), arithmetic.LEFT_BITS)
        right, right_unit = on_grid(python_integers(b), arithmetic.RIGHT_BITS)
        expected.append(scaled(left @ right.T, left_unit + right_unit.T))
    return compare("dot: the bit budget at its edge", np.stack(got), np.stack(expected))


def _weighted_sums(ask: Operations) -> Check:
    """The tokens of one float64 sum."""
    return _compare_sums("weighted sum: the bit budget at its edge", ask, arithmetic.BLOCK)


def _long_weighted_sums(ask: Operations) -> Check:
    """Sums above 2^53, which one float64 would round more than once."""
    return _compare_sums("weighted sum: more than one float64 holds", ask, 5 * arithmetic.BLOCK + 3)


def _compare_sums(name: str, ask: Operations, tokens: int) -> Check:
    """Answers for rows of weights that are all large, all but one small, and of many sizes.

    A weight has 29 bits in the first row, 37 in the second and 31 to 33 in the third. The channels
    have the largest sums, large odd ones, the lowest ones, and values that are rounded.
    """
    weights, x = np.abs(integers((3, tokens), 24, 3)), integers((tokens, 4), 24, 4)
    weights[0] = (1 << 24) - 1 - (weights[0] >> 14)
    weights[1] >>= 13
    weights[1, 100] = 0.65 * 2**24
    weights[2] >>= np.arange(tokens) % 23
    x[:, 0], x[:, 1], x[:, 2] = (1 << 24) - 1, (1 << 24) - 300, 1 - (1 << 24)
    x[:, :3] <<= 12
    x[::16] >>= np.arange(len(x[::16]))[:, None] % 9 + 4
    got = ask.weighted_sum(weights.astype(np.float32) * np.float32(2.0**-24), x.astype(np.float32))
    expected = weighted_sum(python_integers(weights), python_integers(x), unit=-24)
    return compare(name, got, expected)


def _gradient_sums(ask: Operations) -> Check:
    """Blocks of the most bits, one that is not full, and an anchor as near as it may be."""
    tokens = 2 * arithmetic.BLOCK + 5
    d, x = integers((4, tokens), 40, 5), integers((tokens, 3), 24, 6)
    d[0], d[1] = (1 << 40) - 1, (1 << 40) - 1 - np.abs(d[1] >> 10)
    d[1, arithmetic.BLOCK : 2 * arithmetic.BLOCK] *= -1  # so that what is left shows every bit
    d[3] >>= np.arange(tokens) // 20  # so that no two blocks have one unit
    x[:, 0], x[:, 1] = (1 << 24) - 1, (1 << 24) - 1 - np.abs(x[:, 1] >> 12)
    x[:, :2] <<= 12
    x[1::16] >>= np.arange(len(x[1::16]))[:, None] % 9 + 4
    anchors = np.array([[76], [76], [82], [102]], np.int32)
    got = ask.gradient_sum(d.astype(np.float64), x.astype(np.float32), anchors)
    expected = gradient_sum(*map(python_integers, (d, x, anchors)))
    return compare("gradient sum: blocks and slices", got, expected)


def _products64(ask: Operations) -> Check:
    a, b = integers((512, 64), 23, 5), integers((64, 2048), 23, 6)
    got = ask.matmul(a.astype(np.float64), b.astype(np.float64))
    return compare("matrix product: float64", got, (a @ b).astype(np.float64))


def _products8(ask: Operations) -> Check:
    a, b = integers((512, 1024), 7, 7), integers((1024, 256), 7, 8)
    got = ask.matmul(a.astype(np.int8), b.astype(np.int8))
    return compare("matrix product: int8", got, (a @ b).astype(np.int32))


def _flushes(ask: Operations) -> Check:
    x = np.array([0, 1, 0x007FFFFF, 0x00800000, 0x00800001, 0x3F800001], np.uint32).view(np.float32)
    kept = np.array([0, 0, 0, 1, 1, 1])
    x, kept = np.concatenate([x, -x]), np.concatenate([kept, kept])
    return compare("flush: subnormals are 0", ask.flush(x) + 0.0, x.astype(np.float64) * kept + 0.0)


def _roundings(ask: Operations) -> Check:
    """Rounding to float32: ties, both ends of the range, and the least normal numbers."""
    one = 1 + np.array([1, 3, 1 + 2.0**-20, 3 - 2.0**-20]) * 2.0**-24
    x = np.concatenate([one, one * 2.0**-126, one * 2.0**127])
    odd = np.array([0.0, 2.0**-126 - 2.0**-170, 2.0**-149, 2.0**128 - 2.0**103, np.inf])
    rounded = np.array([0, 0, 0, np.inf, np.inf], np.float32)
    expected = np.concatenate([x.astype(np.float32), -x.astype(np.float32), rounded])
    got = ask.round32(np.concatenate([x, -x, odd]))
    return compare("round32: ties and ends", got, expected)


def _widenings(ask: Operations) -> Check:
    """Conversions to float32 and back, which a compiler may elide."""
    x = integers((1 << 12,), 50, 10).astype(np.float64)
    return compare(
        "round32: widened again", ask.widened(x), x.astype(np.float32).astype(np.float64)
    )


def _outputs(ask: Operations) -> Check:
    nans = np.array([0x7FF8000000000000, 0xFFF8000000000000, 0x7FF0000000000001], np.uint64)
    x = np.concatenate([nans.view(np.float64), [-0.0, 0.0, -(2.0**-127), -1.0, -np.inf]])
    expected = np.array([0x7FC00000] * 3 + [0, 0, 0, 0xBF800000, 0xFF800000], np.uint32)
    return compare("out: one NaN, no -0", ask.out(x), expected.view(np.float32))


def _narrowings(ask: Operations) -> Check:
    """Rounding to 16 bits by way of float32: ties, ends, subnormals and NaNs.

    The second number is above a tie of bfloat16, and a tie once it is a float32; the fifth is the
    same for float16.
    """
    bits = {  # of float64: of bfloat16, of float16
        0x3FF0100000000000: (0x3F80, 0x3C04),  # 1 + 2^-8
        0x3FF0100000001000: (0x3F80, 0x3C04),  # 1 + 2^-8 + 2^-40
        0x3FF0300000000000: (0x3F82, 0x3C0C),  # 1 + 3 * 2^-8
        0x3FF0020000000000: (0x3F80, 0x3C00),  # 1 + 2^-11
        0x3FF0020000001000: (0x3F80, 0x3C00),  # 1 + 2^-11 + 2^-40
        0x3FF0060000000000: (0x3F80, 0x3C02),  # 1 + 3 * 2^-11
        0x47EFEFFFE0000000: (0x7F7F, 0x7C00),  # one float32 below 2^128 - 2^119
        0x47EFF00000000000: (0x7F80, 0x7C00),  # 2^128 - 2^119
        0x40EFFDFFE0000000: (0x4780, 0x7BFF),  # one float32 below 65520
        0x40EFFE0000000000: (0x4780, 0x7C00),  # 65520
        0x3E60000000000000: (0x3300, 0x0000),  # 2^-25
        0x3E78000000000000: (0x33C0, 0x0002),  # 3 * 2^-25
        0x3810000000000000: (0x0080, 0x0000),  # 2^-126
        0x380FFFFFFFFFFFFF: (0x0000, 0x0000),
        0xBE50000000000000: (0xB280, 0x0000),  # -2^-26
        0x8000000000000000: (0x0000, 0x0000),  # -0
        0x7FF0000000000000: (0x7F80, 0x7C00),
        0x7FF8000000000000: (0x7FC0, 0x7E00),
        0xFFF8000000000000: (0x7FC0, 0x7E00),
        0x7FF0000000000001: (0x7FC0, 0x7E00),
    }
    x = np.array(list(bits), np.uint64).view(np.float64)
    got = [y.view(np.uint16) for y in ask.narrowed(x)]
    return compare("out: 16 bits", np.stack(got), np.array(list(bits.values()), np.uint16).T)


def _reciprocals(ask: Operations) -> Check:
    x = np.abs(integers((1 << 16,), 50, 9)).astype(np.float64) + 1
    return compare("division: float64", ask.reciprocal(x), 1 / x)


def _soft_caps(ask: Operations) -> Check:
    arrays = ask.soft_cap(soft_cap_logits())
    return compare_hash("soft cap and its slope", arrays, SOFT_CAP_HASH)


def soft_cap_logits() -> np.ndarray:
    """Logits of both signs, from two caps down to 2^-14 of a cap."""
    n = integers((256,), 23, 13).astype(np.float64)
    return n * SOFT_CAP * 2.0 ** (-22.0 - np.arange(256) % 16)


def _dropouts(ask: Operations) -> Check:
    return compare_hash("dropout", [ask.dropout(DROPOUT_KEY)], DROPOUT_HASH)


def _attention(ask: Operations) -> Check:
    arrays = ask.attention(*_attention_inputs())
    return compare_hash("attention and its gradients", arrays, ATTENTION_HASH)


def _attention_inputs() -> tuple[np.ndarray, ...]:
    """Query, key, value and grad; grouped; outliers, and small numbers that the grids round."""
    shapes = ((1, 40, 4, 24), (1, 40, 2, 24), (1, 40, 2, 24), (1, 40, 4, 24))
    arrays = [integers(s, 23, i).astype(np.float32) * 2.0**-21 for i, s in enumerate(shapes)]
    for x in arrays:
        x[:, ::13] *= 8
        x[:, 1::5] *= 2.0**-12
        x[..., 3::7] *= 2.0**-10
    return tuple(arrays)


_QUESTIONS = (
    _exp_hard_cases,
    _exp_sample,
    _exp_ends,
    _dots,
    _weighted_sums,
    _long_weighted_sums,
    _gradient_sums,
    _products64,
    _products8,
    _flushes,
    _roundings,
    _widenings,
    _outputs,
    _narrowings,
    _reciprocals,
    _soft_caps,
    _dropouts,
    _attention,
    *TRAINING_QUESTIONS,
)
