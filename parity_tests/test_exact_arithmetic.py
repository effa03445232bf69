"""Exact attention's small pieces, each by itself in both frameworks, against Python integers."""

import math
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import integer_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_seqpar.exact import arithmetic, elementary, exact_dot
from jax_seqpar.exact.self_test.questions import EXP_HARD_CASES
from torch_ref.exact import arithmetic as reference

LEAST = -300  # the floor of an exponent
NOT_A_NUMBER = math.inf  # as an exponent, whatever a framework writes for it
NAN_BITS = (0x7FF8 << 48, (0xFFF8 << 48) + 1, (0x7FF0 << 48) + 1, (1 << 63) - 1, (1 << 64) - 1)
NANS = np.array(NAN_BITS, np.uint64).view(np.float64)


class Pieces(NamedTuple):
    """Pieces of exact attention in one framework, from and to NumPy arrays.

    Attributes:
      exponent: `(x, axis)`, as float64 with infinity for "not a number".
      power: of float64 exponents of that kind.
      norm: of rows, as float64 with infinity for "not a number".
      flush: of float32, to float64.
      round32, out: of float64, to float32.
      dot: `(x, y)`, of float32 or float64.
      token: of rows, to the exponents and the two digits.
      weighted_sum: `(weights, x, tile)`, `[M, S]` and `[S, V]`; a tile is the tokens of one sum.
      joined_sum: of integers up to 2^53 along axis 0, rounded once.
      gradient_sum: `(d, x, anchor, block)`, `[M, S]`, `[S, H]` and `[M, 1]`.
      exp: of float32.
      soft_cap: `(z, cap)`, to the capped logits and the slope.
    """

    exponent: Callable[..., np.ndarray]
    power: Callable[..., np.ndarray]
    norm: Callable[..., np.ndarray]
    flush: Callable[..., np.ndarray]
    round32: Callable[..., np.ndarray]
    out: Callable[..., np.ndarray]
    dot: Callable[..., np.ndarray]
    token: Callable[..., tuple[np.ndarray, np.ndarray, np.ndarray]]
    weighted_sum: Callable[..., np.ndarray]
    joined_sum: Callable[..., np.ndarray]
    gradient_sum: Callable[..., np.ndarray]
    exp: Callable[..., np.ndarray]
    soft_cap: Callable[..., tuple[np.ndarray, np.ndarray]]


def in_jax(function: Callable[..., Any]) -> Callable[..., Any]:
    """Function of JAX, compiled, in 64 bits. Arguments other than arrays are static."""

    @partial(jax.jit, static_argnums=1)
    def compiled(arrays, others):
        return function(*arrays, *others)

    def call(*arguments: Any) -> Any:
        arrays = tuple(x for x in arguments if isinstance(x, np.ndarray))
        with jax.enable_x64(True):
            return jax.tree.map(np.asarray, compiled(arrays, arguments[len(arrays) :]))

    return call


def in_torch(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        arrays = (torch.from_numpy(x) if isinstance(x, np.ndarray) else x for x in arguments)
        return jax.tree.map(lambda x: x.numpy(), function(*arrays))

    return call


def jax_float(e):
    return jnp.where(e == arithmetic.NOT_A_NUMBER, NOT_A_NUMBER, e.astype(jnp.float64))


def jax_integers(e):
    """Exponents as `jax_seqpar.exact` has them, int32."""
    number = jnp.clip(e, -arithmetic.NOT_A_NUMBER, arithmetic.NOT_A_NUMBER)
    return number.astype(jnp.int32)


def jax_token(x):
    e, digits = arithmetic.token_digits(x)
    return jax_float(e), *jnp.split(digits, 2, axis=-1)


def torch_weighted_sum(weights, x, tile):
    with mock.patch.object(reference, "TILE", tile):
        return reference.weighted_sum(weights.double(), reference.flush(x))


def torch_joined_sum(parts):
    """Sum of the forward pass, with one token in each of its products."""
    with mock.patch.object(reference, "TILE", 1):
        return reference._integer_product(torch.ones(1, len(parts)).double(), parts)[0]


def torch_capped(z, cap):
    tanh, slope = reference.tanh_and_slope(z, cap)
    return cap * tanh, slope


PIECES = {
    "jax": Pieces(
        exponent=in_jax(lambda x, axis: jax_float(arithmetic.exponent(x, axis))),
        power=in_jax(lambda e: arithmetic.power_of_two(jax_integers(e))),
        norm=in_jax(lambda x: jax_float(arithmetic.norm(x))),
        flush=in_jax(arithmetic.flush),
        round32=in_jax(arithmetic.round32),
        out=in_jax(arithmetic.out),
        dot=in_jax(arithmetic.exact_dot),
        token=in_jax(jax_token),
        weighted_sum=in_jax(arithmetic.weighted_sum),
        joined_sum=in_jax(lambda x: arithmetic.joined(arithmetic.halves(x).sum(axis=1))),
        gradient_sum=in_jax(
            lambda d, x, anchor, block: arithmetic.gradient_sum(d, x, jax_integers(anchor), block)
        ),
        exp=in_jax(elementary.exp),
        soft_cap=in_jax(
            lambda z, cap: (elementary.soft_cap(z, cap), elementary.soft_cap_slope(z, cap))
        ),
    ),
    "torch": Pieces(
        exponent=in_torch(reference.exponent),
        power=in_torch(reference.power),
        norm=in_torch(reference.norm),
        flush=in_torch(reference.flush),
        round32=in_torch(lambda x: reference.round32(x).float()),
        out=in_torch(reference.out),
        dot=in_torch(lambda x, y: reference.dot(reference.flush(x), reference.flush(y))),
        token=in_torch(reference.token),
        weighted_sum=in_torch(torch_weighted_sum),
        joined_sum=in_torch(torch_joined_sum),
        gradient_sum=in_torch(
            lambda d, x, anchor, block: reference.gradient_sum(d, reference.flush(x), anchor, block)
        ),
        exp=in_torch(lambda x: reference.exp(x.double()).float()),
        soft_cap=in_torch(torch_capped),
    ),
}

in_both = pytest.mark.parametrize("of", PIECES.values(), ids=PIECES)
few = settings(max_examples=20, derandomize=True)
seeds = st.integers(0, 1 << 32)


def same_bits(got: np.ndarray, expected: np.ndarray) -> None:
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    unsigned = f"u{got.itemsize}"
    got, expected = (np.ascontiguousarray(x).view(unsigned) for x in (got, expected))
    np.testing.assert_array_equal(got, expected)


fractions = oracle.elementwise(lambda number: Fraction(float(number)))


exact = oracle.elementwise(Fraction)


def equals(got: np.ndarray, exact: np.ndarray) -> None:
    """Asserts equal numbers; a zero may have either sign."""
    assert got.shape == exact.shape
    assert (fractions(got) == exact).all()


def magnitudes() -> np.ndarray:
    """Every power of two of float64 and its neighbours, both signs."""
    powers = np.ldexp(1.0, np.arange(-1074, 1024))
    x = np.concatenate([powers, np.nextafter(powers, 0), np.nextafter(powers, np.inf)])
    x = x[x != 0]
    return np.concatenate([x, -x])


def scattered(rng: np.random.Generator, shape: tuple[int, ...], spread: int) -> np.ndarray:
    """Normal float64 of 53 random bits, magnitudes 2^-spread to 2^spread."""
    return rng.uniform(-1, 1, shape) * 2.0 ** rng.integers(-spread, spread + 1, shape)


@in_both
def test_exponent_of_every_magnitude(of):
    x = magnitudes()
    expected = [max(oracle.magnitude(Fraction(float(n))), LEAST) for n in x]
    same_bits(of.exponent(x[:, None], 1)[:, 0], np.array(expected, np.float64))


@in_both
def test_exponent_of_what_has_none(of):
    x = np.array([[0, -0.0], [0, 2.0**-301], [1, np.inf], [-np.inf, 0], [np.nan, 1], [NANS[1], 1]])
    expected = np.array([LEAST, LEAST] + 4 * [NOT_A_NUMBER], np.float64)
    same_bits(of.exponent(x, 1)[:, 0], expected)


@in_both
@few
@given(seed=seeds, axis=st.sampled_from((0, 1)))
def test_exponent_is_that_of_the_largest(of, seed, axis):
    x = scattered(np.random.default_rng(seed), (5, 7), 500)
    same_bits(of.exponent(x, axis), oracle.exponents(fractions(x), axis).astype(np.float64))


@in_both
def test_powers_of_two(of):
    n = np.arange(-1022.0, 1023.0)
    equals(of.power(n), np.array([Fraction(2) ** int(e) for e in n], object))
    not_numbers = np.array([NOT_A_NUMBER, -NOT_A_NUMBER])
    assert np.isnan(of.power(not_numbers)).all()


def test_powers_of_two_have_an_end_in_jax():
    n = np.array([-1023, 1024, -5000, 5000, *((1 << 20) + np.arange(-30, 31))], np.float64)
    assert np.isnan(PIECES["jax"].power(n)).all()


@pytest.mark.parametrize("name", ("jax", "torch"))
def test_the_largest_power_of_two(name):
    equals(PIECES[name].power(np.array([1023.0])), np.array([Fraction(2) ** 1023], object))


@in_both
@few
@given(seed=seeds, channels=st.sampled_from((1, 3, 64, 512)), spread=st.sampled_from((0, 3, 120)))
def test_norm_against_fractions(of, seed, channels, spread):
    x = scattered(np.random.default_rng(seed), (8, channels), spread)
    x[0] = 0
    same_bits(of.norm(x), oracle.norm(fractions(x)).astype(np.float64))


def squares(total: int) -> list[int]:
    """Numbers up to 4096 whose squares add up to a total, the largest first."""
    found = []
    while total:
        found.append(min(math.isqrt(total), 1 << 12))
        total -= found[-1] ** 2
    return found


@in_both
@pytest.mark.parametrize("bits", (24, 25, 26, 27, 32))
def test_norm_at_the_edges_of_its_sum(of, bits):
    """Norms whose sum t is a power of two, and one less."""
    for t in ((1 << bits) - 1, 1 << bits):
        # A magnitude of half a unit less has the same ceiling.
        x = np.array([squares(t - 256)]) - 0.5
        assert 2048 <= x.max() < 4096
        same_bits(of.norm(x), np.array([[(t.bit_length() + 1) // 2]], np.float64))
        assert of.norm(x) == oracle.norm(fractions(x))


@in_both
def test_norm_of_what_has_none(of):
    x = np.array([[0.0, -0.0], [1, np.inf], [np.nan, 1], [2.0**-400, 0], [2.0**-301, 0]])
    expected = np.array([-307, NOT_A_NUMBER, NOT_A_NUMBER, -307, -300], np.float64)
    same_bits(of.norm(x)[:, 0], expected)


def row_product(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The specification's dot, of what is left of float32 or float64 rows after flushing."""
    return oracle.dot(oracle.read(x), oracle.read(y))


@in_both
@few
@given(
    seed=seeds,
    channels=st.sampled_from((1, 3, 64, 65, 128, 512)),
    spread=st.sampled_from((0, 3, 30, 120)),
)
def test_dot_against_fractions(of, seed, channels, spread):
    rng = np.random.default_rng(seed)
    x, y = (scattered(rng, (n, channels), spread).astype(np.float32) for n in (3, 2))
    x[0] *= np.float32(2.0**-100)
    x[1] = 0
    y[1, ::2] = np.array(5, np.uint32).view(np.float32)  # a subnormal, so 0
    equals(of.dot(x, y), row_product(x, y))


def edge(channels: int) -> int:
    """A number of which so many channels have the norm 2^33 but for a hundredth, and N = 33."""
    return int(0.99 * 2**33 / math.sqrt(channels))


@in_both
@pytest.mark.parametrize("channels", (1, 2, 64, 100, 128, 512))
def test_dot_of_rows_along_one_another(of, channels):
    """Dot products of parallel rows of odd numbers, whose sums reach the Cauchy-Schwarz bound.

    Low digits are ties, and as large as they may be where the high ones cancel one another, so that
    every bit of their sum is seen: one bit more in them would be too many.
    """
    rng = np.random.default_rng(channels)
    x = edge(channels) - rng.integers(0, 1 << 12, (5, channels))
    odd = 2 * rng.integers(0, 4, channels) + 1
    low = np.stack([np.full(channels, 1 << 14), (1 << 14) - odd, odd - (1 << 14), (1 << 15) - odd])
    x[1:] = (x[1:] >> 16) << 16
    x[2:, ::2] *= -1
    x[1:] += low
    assert (oracle.norm(fractions(x)) == 33).all()
    y = 2 * x + rng.integers(0, 2, (5, channels))
    x[1], y[2] = -x[1], -y[2]
    equals(of.dot(x.astype(np.float64), y.astype(np.float64)), oracle.dot(exact(x), exact(y)))


@in_both
def test_what_is_no_number_stays_in_its_row(of):
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal((3, 8), np.float32) for _ in range(2))
    x[0, 3], x[1, 5] = np.nan, np.inf
    got = of.dot(x, y)
    assert np.isnan(got[:2]).all()
    equals(got[2:], row_product(x[2:], y))


@in_both
@few
@given(seed=seeds, spread=st.sampled_from((0, 10, 60)))
def test_no_bit_of_dot_depends_on_the_order(of, seed, spread):
    rng = np.random.default_rng(seed)
    x, y = (scattered(rng, (3, 100), spread).astype(np.float32) for _ in range(2))
    order = rng.permutation(100)
    same_bits(of.dot(x[:, order], y[:, order]), of.dot(x, y))


def tokens_of(rng: np.random.Generator, shape: tuple[int, int], spread: int) -> np.ndarray:
    """Float32 tokens of many magnitudes, their channels of two."""
    x = scattered(rng, shape, 0) * 2.0 ** rng.integers(-spread, spread + 1, (shape[0], 1))
    x[:, 1::2] *= 2.0**-11
    return x.astype(np.float32)


@in_both
@few
@given(seed=seeds, spread=st.sampled_from((0, 3, 110)))
def test_token_against_fractions(of, seed, spread):
    x = tokens_of(np.random.default_rng(seed), (9, 6), spread).astype(np.float64)
    x[4] = 0
    for got, expected in zip(of.token(x), oracle.token(fractions(x)), strict=True):
        equals(got, expected)


@in_both
def test_digits_at_their_ends(of):
    """Digits at their largest, ties between two of them, and numbers that round to 2^32."""
    ends = [65535, 65536, 32768, 3 * 32768, 5 * 32768, (1 << 32) - 32768, (1 << 32) - 32769]
    x = np.array([[2.0**32 - 1, n] for n in ends] + [[2.0**32 - 0.5, 0.5], [2.0**32 - 0.75, 1.5]])
    x = np.concatenate([x, -x])
    e, high, low = of.token(x)
    for got, expected in zip((e, high, low), oracle.token(fractions(x)), strict=True):
        equals(got, expected)
    assert (np.abs(high).max(), np.abs(low).max()) == (2.0**16, 2.0**15)


@in_both
def test_token_without_an_exponent(of):
    x = np.array([[1, np.nan, 3], [np.inf, 1, 2], [1, 2, 4], [0, 0, 0]])
    e, high, low = of.token(x)
    np.testing.assert_array_equal(e[:, 0], [NOT_A_NUMBER, NOT_A_NUMBER, 3, LEAST])
    np.testing.assert_array_equal(high[[0, 1, 3]], np.zeros((3, 3)))
    np.testing.assert_array_equal(low, np.zeros((4, 3)))


def weights_of(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Rows of float32 in [0, 1]: alike, of many sizes, and almost all 0."""
    weights = rng.uniform(0, 1, shape)
    weights[1] *= 2.0 ** -rng.integers(0, 30, shape[1])
    weights[2] *= rng.random(shape[1]) < 0.1
    weights[2, 0] = 1
    return weights.astype(np.float32)


def sum_of_fractions(weights: np.ndarray, x: np.ndarray) -> np.ndarray:
    return oracle.weighted_sum(fractions(weights), oracle.read(x))


def row_bits(weights: np.ndarray) -> int:
    """The b of a row of weights whose tokens have the exponent 0."""
    e = oracle.magnitude(max(fractions(weights)))
    t = 1 + sum(math.ceil(w * 2**12 / Fraction(2) ** e) for w in fractions(weights))
    return max(29, 49 - t.bit_length())


@in_both
@few
@given(seed=seeds, spread=st.sampled_from((0, 3, 110)))
def test_weighted_sum_against_fractions(of, seed, spread):
    rng = np.random.default_rng(seed)
    weights, x = weights_of(rng, (4, 50)), tokens_of(rng, (50, 3), spread)
    weights[3] = 0
    x[7], x[8, 0] = 0, np.array(5, np.uint32).view(np.float32)  # a subnormal, so 0
    equals(of.weighted_sum(weights, x, 256), sum_of_fractions(weights, x))


@in_both
def test_a_weight_has_29_to_37_bits(of):
    """Bits of a row's weights, by the number of large weights; and beside a power of two.

    Each row has eight small weights, which are rounded to the b bits of the row.
    """
    rng = np.random.default_rng(0)
    rows = np.zeros((12, 264), np.float32)
    for n in range(9):
        rows[n, : 1 << n] = 0.99
    # The sum t of these three rows is 4096, 4095 and 4097.
    rows[9:, 0] = np.array([4086.3, 4085.3, 4087.3]) / 4096
    rows[:, 256:] = rng.uniform(1, 2, 8) * 2.0**-20
    assert [row_bits(row) for row in rows] == [37, 36, 35, 34, 33, 32, 31, 30, 29, 36, 37, 36]
    x = tokens_of(rng, (264, 3), 0)
    x /= 2 * np.abs(x).max(1, keepdims=True)  # the exponent is 0
    x[:, 0] = 0.5 + np.abs(x[:, 1])
    equals(of.weighted_sum(rows, x, 256), sum_of_fractions(rows, x))


def many_keys() -> tuple[np.ndarray, np.ndarray]:
    """Weights and tokens with sums of the most bits, above what float64 holds exactly."""
    rng = np.random.default_rng(2)
    weights = (1 - rng.integers(1, 1 << 12, (3, 600)) * 2.0**-24).astype(np.float32)
    weights[1] = 2.0**-20 * weights[1]
    weights[1, 301] = 0.8
    weights[2] *= (2.0 ** -(np.arange(600) % 23)).astype(np.float32)
    x = np.ones((600, 3)) - rng.integers(1, 1 << 12, (600, 3)) * 2.0**-24
    x[:, 1] *= -1
    x[:, 2] *= 2.0**-13
    x[5::31] *= 2.0**-7
    return weights, x.astype(np.float32)


@in_both
def test_weighted_sum_of_many_keys(of):
    """Weighted sums of more than 256 keys, and above 2^53."""
    weights, x = many_keys()
    assert 600 * 2**29 * 2**16 > 2**54
    equals(of.weighted_sum(weights, x, 256), sum_of_fractions(weights, x))


@in_both
@pytest.mark.parametrize("tile", (64, 150, 255))
def test_no_bit_of_weighted_sum_depends_on_tiles_or_the_order(of, tile):
    weights, x = many_keys()
    order = np.random.default_rng(tile).permutation(600)
    got = of.weighted_sum(weights[:, order], x[order], tile)
    same_bits(got, of.weighted_sum(weights, x, 256))


@in_both
def test_a_token_of_weight_0_does_nothing(of):
    """A token of weight 0 changes no bit, with any value and at any place."""
    rng = np.random.default_rng(3)
    weights, x = weights_of(rng, (3, 40)), tokens_of(rng, (40, 4), 5)
    expected = of.weighted_sum(weights, x, 256)
    garbage = np.full((6, 4), 3e38, np.float32)
    garbage[1, 2], garbage[2], garbage[3, 0] = np.nan, -np.inf, 1e-45
    places = [0, 3, 17, 17, 40, 40]
    weights, x = np.insert(weights, places, 0, axis=1), np.insert(x, places, garbage, axis=0)
    same_bits(of.weighted_sum(weights, x, 256), expected)


@in_both
def test_tokens_of_zeros_are_counted(of):
    """Tokens of zeros make the weights of the others coarser, by their number."""
    rng = np.random.default_rng(4)
    weights, x = np.full((1, 64), 2.0**-9, np.float32), np.zeros((64, 2), np.float32)
    weights[0, :2], x[:2] = (0.9, 0.0123), tokens_of(rng, (2, 2), 0)
    got = of.weighted_sum(weights, x, 256)
    equals(got, sum_of_fractions(weights, x))
    equals(of.weighted_sum(weights[:, 2:], x[2:], 256), np.array([[0, 0]], object))


@in_both
@pytest.mark.parametrize("seed", range(3))
def test_a_sum_of_the_most_tokens(of, seed):
    """Sums of 2^21 tokens, 256 to a part, up to 2^66."""
    rng = np.random.default_rng(seed)
    parts = rng.integers(1 << 52, 1 << 53, (1 << 13, 4))
    parts[:, 0], parts[:, 1] = 1 << 53, (1 << 53) - 1
    parts[:, 2] *= rng.choice((-1, 1), len(parts))
    # Upper bits that cancel one another, and lower ones whose sum is 2^56 before it is nearly 0.
    parts[:, 3] = (0x155555555555 - rng.integers(0, 1 << 20, len(parts))) * 2
    parts[:, 3] += (-1) ** np.arange(len(parts)) << 51
    parts[len(parts) // 2 :, 3] *= -1
    parts[0, 3] += 1
    expected = np.array([oracle.round64(exact(column).sum()) for column in parts.T], object)
    equals(of.joined_sum(parts.astype(np.float64)), expected)


def gradient_of_fractions(
    d: np.ndarray, x: np.ndarray, anchor: np.ndarray, block: int
) -> np.ndarray:
    anchors = oracle.elementwise(int)(anchor)
    return oracle.gradient_sum(fractions(d), oracle.read(x), anchors, block)


def anchors_of(d: np.ndarray, x: np.ndarray, farther: int = 0) -> np.ndarray:
    """The least anchors of rows, or some that much farther."""
    largest = np.abs(d[:, :, None] * x.astype(np.float64)).max((1, 2))
    return np.frexp(largest)[1].astype(np.float64)[:, None] + farther


@in_both
@few
@given(
    seed=seeds,
    spread=st.sampled_from((0, 3, 50)),
    farther=st.sampled_from((0, 1, 19, 45)),
    block=st.sampled_from((7, 10, 32)),
)
def test_gradient_sum_against_fractions(of, seed, spread, farther, block):
    rng = np.random.default_rng(seed)
    d, x = scattered(rng, (3, 30), spread), tokens_of(rng, (30, 4), spread)
    d[:, 10:20] *= 2.0**-12
    d[2], d[1, ::3], x[5] = 0, 0, 0
    anchor = anchors_of(d, x, farther)
    got = of.gradient_sum(d, x, anchor, block)
    equals(got, gradient_of_fractions(d, x, anchor, block))


def full_blocks() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two blocks of the most bits, and a part of one; the units of the last row are three."""
    rng = np.random.default_rng(5)
    d = 1 - rng.integers(0, 1 << 24, (3, 520)) * 2.0**-36
    d[0] = 1 - 2.0**-31  # rounded to 2^29 units
    d[1, 256:512] *= -1
    d[2, 256:] *= 2.0**-20
    d[2, 512:] *= 2.0**-20
    x = np.ones((520, 3)) - rng.integers(1, 1 << 12, (520, 3)) * 2.0**-24
    x[:, 0] = 1 - 2.0**-24
    x[:, 2] *= rng.choice((-1, 1), 520) * 2.0**-14
    return d, x.astype(np.float32), np.array([[0.0], [0.0], [13.0]])


@in_both
def test_gradient_sum_of_full_blocks(of):
    """The sum of the high digits is 2^53 in the first row."""
    d, x, anchor = full_blocks()
    equals(of.gradient_sum(d, x, anchor, 256), gradient_of_fractions(d, x, anchor, 256))


@in_both
def test_no_bit_of_gradient_sum_depends_on_the_order_within_a_block(of):
    """Gradient sums depend on which tokens share a block, not on the order of tokens or blocks."""
    rng = np.random.default_rng(6)
    d, x, anchor = full_blocks()
    d, x = d[:, :512], x[:512]
    expected = of.gradient_sum(d, x, anchor, 256)
    order = np.concatenate([256 + rng.permutation(256), rng.permutation(256)])
    same_bits(of.gradient_sum(d[:, order], x[order], anchor, 256), expected)
    order = rng.permutation(512)
    others = of.gradient_sum(d[:, order], x[order], anchor, 256)
    assert (others[2] != expected[2]).any()
    assert np.allclose(others, expected, rtol=1e-6, atol=1e-6)


@in_both
@pytest.mark.parametrize(("anchor", "least"), ((-913, 0), (-230, 0), (555, 2.0**550)))
def test_anchors_at_their_ends(of, anchor, least):
    """The lowest anchor is one of zeros, as an exponent is at least -300."""
    rng = np.random.default_rng(7)
    d, x = np.zeros((1, 20)), tokens_of(rng, (20, 2), 2)
    if anchor > -900:
        d = np.ldexp(rng.uniform(-1, 1, (1, 20)), anchor - 2)
    got = of.gradient_sum(d, x, np.array([[float(anchor)]]), 8)
    equals(got, gradient_of_fractions(d, x, np.array([[anchor]]), 8))
    assert np.abs(got).max() >= least


@in_both
def test_gradient_sum_of_what_is_no_number(of):
    """A token counts only where d is not 0, and makes its row NaN by the anchor."""
    rng = np.random.default_rng(8)
    d, x = scattered(rng, (3, 20), 2), tokens_of(rng, (20, 3), 2)
    anchor = anchors_of(d, x)
    d[0, [4, 13]] = 0
    expected = gradient_of_fractions(d[:1], x, anchor[:1], 8)
    x[4, 1], x[13] = np.nan, np.inf
    anchor[1:] = NOT_A_NUMBER
    got = of.gradient_sum(d, x, anchor, 8)
    equals(got[:1], expected)
    assert np.isnan(got[1:]).all()


def test_the_constants():
    assert arithmetic.BLOCK == reference.BLOCK == reference.TILE == oracle.BLOCK == 256
    assert arithmetic.LEAST_EXPONENT == LEAST == oracle.LEAST


def finite32(x: Fraction) -> float:
    """The specification's round32, but that overflow is infinite."""
    try:
        return float(oracle.round32(x))
    except NotImplementedError:
        return math.copysign(math.inf, x)


def rounding_cases() -> np.ndarray:
    """Ties to both sides at both ends of the range, subnormals, and every power of two."""
    ulps = np.array([0.5, 1, 1.5, 2, 2.5, 0.5 + 2.0**-20, 1.5 - 2.0**-20])
    ties = np.concatenate([np.ldexp(1 + ulps * 2.0**-23, e) for e in (-127, -126, 0, 126, 127)])
    least, largest = 2.0**-126, (2 - 2.0**-23) * 2.0**127
    ends = [least * (1 - 2.0**-50), 2.0**-149, largest, largest + 2.0**102, largest + 2.0**103]
    below = np.nextafter([least, largest + 2.0**103], 0)
    x = np.concatenate([ties, ends, below, np.abs(magnitudes())])
    return np.concatenate([x, -x])


@in_both
def test_roundings_at_their_edges(of):
    x = rounding_cases()
    expected = np.array([finite32(Fraction(float(n))) for n in x], np.float32)
    assert np.isinf(expected).any()
    assert (expected == 0).any()
    same_bits(of.round32(x), expected)
    same_bits(of.out(x), expected)
    same_bits(of.out(np.array([-0.0, 0.0])), np.zeros(2, np.float32))


@in_both
@few
@given(seed=seeds)
def test_roundings_of_random_numbers(of, seed):
    x = scattered(np.random.default_rng(seed), (200,), 125)
    expected = np.array([finite32(Fraction(float(n))) for n in x], np.float32)
    same_bits(of.round32(x), expected)
    same_bits(of.out(x), expected)


@in_both
def test_out_has_one_nan(of):
    expected = np.full(len(NANS), 0x7FC00000, np.uint32).view(np.float32)
    same_bits(of.out(NANS), expected)
    infinite = np.array([np.inf, -np.inf])
    for rounded in (of.round32, of.out):
        same_bits(rounded(infinite), infinite.astype(np.float32))
    assert np.isnan(of.round32(NANS)).all()


@pytest.mark.parametrize(("dtype", "quiet"), (("bfloat16", 0x7FC0), ("float16", 0x7E00)))
def test_16_bits_have_one_nan(dtype, quiet):
    nans = np.array([0x7FC00000, 0xFFC12345, 0x7F800001, 0x7FFFFFFF], np.uint32).view(np.float32)
    narrowed = jax.jit(partial(arithmetic.narrowed, dtype=jnp.dtype(dtype)))
    assert (np.asarray(narrowed(nans)).view(np.uint16) == quiet).all()
    others = np.array([0.0, 1 + 2.0**-8, -(2.0**-20), 3e38, -np.inf, np.inf], np.float32)
    with np.errstate(over="ignore"):
        same_bits(np.asarray(narrowed(others)), others.astype(jnp.dtype(dtype)))


@in_both
def test_flush(of):
    bits = np.array([0, 1, 0x007FFFFF, 0x00800000, 0x00800001, 0x7F7FFFFF, 0x7F800000], np.uint32)
    x = bits.view(np.float32)
    kept = np.where(bits < 0x00800000, 0, x).astype(np.float64)
    for sign in (1, -1):
        np.testing.assert_array_equal(of.flush(np.float32(sign) * x), sign * kept)


@in_both
def test_exp_of_the_hard_cases(of):
    x, expected = (
        np.array(bits, np.uint32).view(np.float32)
        for bits in zip(*EXP_HARD_CASES.items(), strict=True)
    )
    same_bits(of.exp(x), expected)
    equals(expected, np.array([oracle.exp(Fraction(float(n))) for n in x], object))


@in_both
def test_exp_of_a_sample(of):
    """Exponentials of numbers uniform in magnitude, as most float32 are, and uniform in value."""
    rng = np.random.default_rng(0)
    x = np.concatenate([-(2.0 ** rng.uniform(-30, math.log2(85), 300)), -rng.uniform(0, 85, 300)])
    x = x.astype(np.float32)
    equals(of.exp(x), np.array([oracle.exp(Fraction(float(n))) for n in x], object))


@in_both
def test_exp_at_its_ends(of):
    below = np.nextafter(np.float32(-80), np.float32(-100))
    x = np.array([0, -0.0, -(2.0**-149), -80, below, -104, -np.inf], np.float32)
    last = float(oracle.exp(Fraction(-80)))
    same_bits(of.exp(x), np.array([1, 1, 1, last, 0, 0, 0], np.float32))
    assert np.isnan(of.exp(np.array([np.nan], np.float32))).all()


def logits(seed: int, cap: float) -> np.ndarray:
    """Products of two float32, as `s * scale` is, up to 60 caps; many of them small."""
    rng = np.random.default_rng(seed)
    s = rng.choice((-1, 1), 64) * 2.0 ** rng.uniform(-30, 6, 64) * cap
    return s.astype(np.float32).astype(np.float64) * float(np.float32(0.7))


@in_both
@few
@given(seed=seeds, cap=st.sampled_from((50.0, 1.0, 30.0, float(np.float32(0.3)))))
def test_soft_cap_against_fractions(of, seed, cap):
    z = np.append(logits(seed, cap), [0, cap / 2, -cap / 2])
    capped, slope = of.soft_cap(z, cap)
    exact = [oracle.soft_cap(Fraction(float(n)), Fraction(cap)) for n in z]
    for got, expected in zip((capped, slope), zip(*exact, strict=True), strict=True):
        equals(got, np.array(expected, object))


@in_both
def test_soft_cap_is_a_tanh(of):
    """The soft cap is the tanh of its float32 argument u.

    t is off by 2^-24 of itself, which moves tanh by 2t / (1 - t^2) of that: at most 0.86, as
    |u| >= 1/2. The result is rounded by another 2^-24 at most: together less than 2^-23.
    The slope moves by (1 - t) / (1 + t) < 1 of t's error.
    """
    u = np.concatenate([logits(seed, 1.0) for seed in range(200)]).astype(np.float32)
    u = u.astype(np.float64)
    tanh, slope = of.soft_cap(u, 1.0)
    assert (np.abs(tanh / np.tanh(u) - 1) <= 2.0**-23).all()
    # exp(-2 |u|) is 0 from here on.
    u, slope = u[np.abs(u) <= 40], slope[np.abs(u) <= 40]
    assert (np.abs(slope * np.cosh(u) ** 2 - 1) <= 2.0**-23).all()


@in_both
def test_soft_cap_at_its_ends(of):
    capped, slope = of.soft_cap(np.array([np.inf, -np.inf, 1e30, np.nan]), 30.0)
    np.testing.assert_array_equal(capped, [30, -30, 30, np.nan])
    np.testing.assert_array_equal(slope, [0, 0, 0, np.nan])


def test_float64_is_switched_on_for_the_public_functions():
    """Public functions called without any scope of 64 bits compute in float64."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((5, 64)).astype(np.float32) for _ in range(2))
    dots = jax.jit(exact_dot)(a, b)
    assert dots.dtype == jnp.float64
    assert np.abs(np.asarray(dots) - a.astype(np.float64) @ b.T.astype(np.float64)).max() < 1e-7
    ones, anchor = jnp.ones((3, 2)), jnp.full((3, 1), 5)
    weighted = jax.jit(arithmetic.weighted_sum)(ones, ones[:2])
    gradient = jax.jit(arithmetic.gradient_sum)(ones, ones[:2], anchor)
    for sums in (weighted, gradient):
        assert sums.dtype == jnp.float64
        assert np.array_equal(sums, np.full((3, 2), 2.0))
