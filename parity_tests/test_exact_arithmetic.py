"""Exact attention's small pieces, each by itself in both frameworks, against Python integers."""

import math
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple

import integer_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_seqpar.exact import arithmetic, contract, elementary, exact_dot
from jax_seqpar.exact.certificate import EXP_HARD_CASES
from torch_ref import exact as reference

TOKENS = 2048
NOT_A_NUMBER = math.inf  # as an exponent, whatever a framework writes for it
NANS = np.array([0x7FF8000000000000, 0xFFF8000000000001, 0x7FF0000000000001], "u8").view("f8")


class Pieces(NamedTuple):
    """One framework's, from and to NumPy arrays.

    Attributes:
      exponent: `(x, axis)`, as float64 with infinity for "not a number".
      power: of float64 exponents of that kind.
      grid: `(x, exponents, bits)`.
      flush: of float32, to float64.
      round32, out: of float64, to float32.
      dot: `(x, y)`, of float32 or float64.
      contract: `(a, b, limit)`, `[M, S]` and `[S, H]`.
      exp: of float32.
      soft_cap: `(z, cap)`, to the capped logits and the slope.
    """

    exponent: Callable[..., np.ndarray]
    power: Callable[..., np.ndarray]
    grid: Callable[..., np.ndarray]
    flush: Callable[..., np.ndarray]
    round32: Callable[..., np.ndarray]
    out: Callable[..., np.ndarray]
    dot: Callable[..., np.ndarray]
    contract: Callable[..., np.ndarray]
    exp: Callable[..., np.ndarray]
    soft_cap: Callable[..., tuple[np.ndarray, np.ndarray]]


def in_jax(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled, in 64 bits. Arguments that are no arrays are static."""

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


def jax_exponent(x, axis):
    e = arithmetic.exponent(x, axis)
    return jnp.where(e == arithmetic.NOT_A_NUMBER, NOT_A_NUMBER, e.astype(jnp.float64))


def jax_integers(e):
    """As the exponents of `jax_seqpar.exact` are."""
    number = jnp.clip(e, -arithmetic.NOT_A_NUMBER, arithmetic.NOT_A_NUMBER)
    return number.astype(jnp.int64)


def torch_capped(z, cap):
    tanh, slope = reference.tanh_and_slope(z, cap)
    return cap * tanh, slope


PIECES = {
    "jax": Pieces(
        exponent=in_jax(jax_exponent),
        power=in_jax(lambda e: arithmetic.power_of_two(jax_integers(e))),
        grid=in_jax(lambda x, e, bits: arithmetic.grid(x, jax_integers(e), bits)),
        flush=in_jax(arithmetic.flush),
        round32=in_jax(arithmetic.round32),
        out=in_jax(arithmetic.out),
        dot=in_jax(arithmetic.exact_dot),
        contract=in_jax(lambda a, b, limit: arithmetic.contract(jnp.matrix_transpose(a), b, limit)),
        exp=in_jax(elementary.exp),
        soft_cap=in_jax(
            lambda z, cap: (elementary.soft_cap(z, cap), elementary.soft_cap_slope(z, cap))
        ),
    ),
    "torch": Pieces(
        exponent=in_torch(reference.exponent),
        power=in_torch(reference.power),
        grid=in_torch(reference.grid),
        flush=in_torch(reference.flush),
        round32=in_torch(lambda x: reference.round32(x).float()),
        out=in_torch(reference.out),
        dot=in_torch(lambda x, y: reference.dot(reference.flush(x), reference.flush(y))),
        contract=in_torch(lambda a, b, limit: reference.contract(a, b, limit=limit)),
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


def equals(got: np.ndarray, exact: np.ndarray) -> None:
    """A zero may have either sign."""
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
    expected = [max(oracle.magnitude(Fraction(float(n))), -400) for n in x]
    same_bits(of.exponent(x[:, None], 1)[:, 0], np.array(expected, np.float64))


@in_both
def test_exponent_of_what_has_none(of):
    x = np.array([[0, -0.0], [0, 2.0**-401], [1, np.inf], [-np.inf, 0], [np.nan, 1], [NANS[1], 1]])
    expected = np.array([-400, -400] + 4 * [NOT_A_NUMBER], np.float64)
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
@pytest.mark.parametrize("bits", (22, 23, 30))
@pytest.mark.parametrize("e", (-400, -3, 0, 127, 1024))
def test_grid_rounds_half_to_even(of, bits, e):
    halves = np.arange(-9, 10) / 2
    x = np.concatenate([halves, np.nextafter(halves, np.inf), np.nextafter(halves, -np.inf)])
    expected = [round(Fraction(float(n))) for n in x]
    assert expected[:4] == [-4, -4, -4, -3]  # of -4.5, -4, -3.5 and -3
    # A power of two moves the tie and its neighbours to any unit.
    got = of.grid(np.ldexp(x, e - bits), np.full(x.shape, float(e)), bits)
    equals(got, np.array(expected, object))


@in_both
@few
@given(seed=seeds, bits=st.sampled_from((22, 23, 30)))
def test_grid_against_fractions(of, seed, bits):
    x = scattered(np.random.default_rng(seed), (64, 3), 450)
    e = of.exponent(x, 1)
    got = of.grid(x, e, bits)
    equals(got, oracle.grid(fractions(x), oracle.exponents(fractions(x), 1), bits))
    assert (np.abs(got) <= 2.0**bits).all()


@in_both
def test_grid_without_an_exponent(of):
    assert np.isnan(of.grid(np.array([0.0, 1.0]), np.array(2 * [NOT_A_NUMBER]), 22)).all()


def test_right_bits_are_as_many_as_fit():
    """Beside the 15 bits of a left digit; those of float32 and of a weight are enough, though."""
    for channels in range(1, 4097):
        log2 = next(n for n in range(13) if 1 << n >= channels)
        bits = arithmetic.right_bits(channels)
        assert bits == min(32, 38 - log2)
        assert channels << (15 + bits) <= 1 << 53
        assert bits == 32 or channels << (15 + bits + 1) > 1 << 53


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
    y[1, ::2] = np.array(5, np.uint32).view(np.float32)  # a subnormal, so 0
    equals(of.dot(x, y), row_product(x, y))


@in_both
@pytest.mark.parametrize("channels", (1, 2, 64, 100, 128, 512))
def test_dot_of_the_largest_operands(of, channels):
    """Every digit at its largest, and the sum over all the channels at its 53 bits."""
    right = (1 << arithmetic.right_bits(channels)) - 1
    # The high digit 2^15 with the low ones -1 and -2^15, and the low digit 2^15.
    left = (1 << 31) - np.array([1, 1 << 15, 3 << 15])
    x, y = (np.outer(n, np.ones(channels)) for n in (left, [right, -right]))
    equals(of.dot(x, y), row_product(x, y))


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


def weighted_sum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The specification's contract, its sums in Python integers."""
    integers = oracle.elementwise(int)
    return oracle.contract(integers(a), integers(b))


@st.composite
def operands(draw, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """A row of weights and a column: random integers, many of them at the ends of their range."""
    rng = np.random.default_rng(draw(seeds))
    end = 1 << 32
    weights, values = (rng.integers(-end, end + 1, tokens) for _ in range(2))
    # Between two digits, twice.
    ties = rng.integers(-(1 << 10), 1 << 10, tokens) * (1 << 22) + (1 << 21) + (1 << 10)
    values = rng.choice([values, ties, np.full(tokens, end)], axis=0)[None]
    weights = rng.choice([weights, np.full(tokens, end), np.full(tokens, -end)], axis=0)[None]
    return weights.astype(np.float64), values.T.astype(np.float64)


@in_both
@few
@given(pair=operands(60), limit=st.sampled_from((7, 59, 60)))
def test_contract_against_integers(of, pair, limit):
    """Beyond a limit the sums are int64."""
    equals(of.contract(*pair, limit), weighted_sum(*pair))


@in_both
def test_contract_of_matrices(of):
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-(2**32), 2**32, s).astype(np.float64) for s in ((3, 50), (50, 4)))
    for limit in (50, 16):
        equals(of.contract(a, b, limit), weighted_sum(a, b))


@in_both
@pytest.mark.parametrize("limit", (TOKENS, 9))
@few
@given(pair=operands(60), seed=seeds)
def test_no_bit_of_contract_depends_on_the_order(of, limit, pair, seed):
    (a, b), order = pair, np.random.default_rng(seed).permutation(60)
    same_bits(of.contract(a[:, order], b[order], limit), of.contract(a, b, limit))


@in_both
@pytest.mark.parametrize("weight", (2.0**32, 2.0**32 - 1))
@pytest.mark.parametrize("value", (2.0**32, 1 - 2.0**32, 2.0**32 - 2.0**21 - 2.0**10))
def test_the_budget_of_contract_is_enough(of, weight, value):
    """The last value has the digits 1023, 1024 and -1024, each sum of which is up to 2^53."""
    a, b = np.full((1, TOKENS), weight), np.full((TOKENS, 1), value)
    equals(of.contract(a, b, TOKENS), weighted_sum(a, b))


@in_both
@pytest.mark.parametrize("more", (1, 2, 8))
def test_the_budget_of_contract_is_spent(of, more):
    """One token more makes a sum that float64 lacks, and two one that its additions miss."""
    a, b = np.zeros((1, TOKENS * (1 + more))), np.full((TOKENS * (1 + more), 1), 2.0**22)
    a[0, :TOKENS], b[:TOKENS] = 2.0**32, 2.0**32
    a[0, TOKENS::TOKENS] = 1  # one in each of the following pieces, so that these must be int64
    highest_digit = [int(x) * int(y) >> 22 for x, y in zip(a[0], b[:, 0], strict=True)]
    true_sum, sequential = sum(highest_digit), np.cumsum(highest_digit, dtype=np.float64)[-1]
    assert true_sum == 2**53 + more != int(sequential)
    equals(of.contract(a, b, TOKENS), weighted_sum(a, b))


@in_both
def test_the_most_tokens(of):
    """The sum of the highest digits is 2^63 - 2^42. One token more, and int64 has no room."""
    tokens = (1 << 21) - 1
    a, b = np.full((1, tokens), 2.0**32), np.full((tokens, 1), 2.0**32)
    # Powers of two are exact beyond 2^53, so that there need not be a thousand pieces.
    assert of.contract(a, b, 1 << 19).item() == tokens * 2**64


def test_the_limits():
    assert arithmetic.CONTRACT_TOKENS == reference.EXACT_TOKENS == TOKENS


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
    expected = np.full(3, 0x7FC00000, np.uint32).view(np.float32)
    same_bits(of.out(NANS), expected)
    infinite = np.array([np.inf, -np.inf])
    same_bits(of.out(infinite), infinite.astype(np.float32))
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
    """Alike in magnitude, which is where most float32 are, and alike in value."""
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
    """Of the float32 u, that it takes as its argument.

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
    """Called as a user does, without any scope."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((5, 64)).astype(np.float32) for _ in range(2))
    dots = exact_dot(jnp.asarray(a), jnp.asarray(b))
    assert dots.dtype == jnp.float64
    assert np.abs(np.asarray(dots) - a.astype(np.float64) @ b.T.astype(np.float64)).max() < 1e-7
    ones = jnp.ones((3, 2))
    assert contract(ones, ones).dtype == jnp.float64
    assert np.array_equal(contract(ones, ones), np.full((2, 2), 3.0))
