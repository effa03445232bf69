"""Engines of exact products against Python integers, at the edge of what each has room for."""

import inspect
import re
from fractions import Fraction
from functools import partial
from typing import Any

import exact_training_oracle as oracle
import integer_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from exact_training_inputs import numbers, rows
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from jax_seqpar.compare import compare_bits
from jax_seqpar.exact import engines, fixed_point
from jax_seqpar.exact.engines import float64_products, int8_products
from jax_seqpar.exact.matmul import balanced_matmul, matmul
from jax_seqpar.plan import devices, missing_compiler
from torch_ref.exact import matmul as torch_matmul
from torch_ref.exact.arithmetic import flush

ENGINES = {"by platform": None, "float64": float64_products, "int8": int8_products}
by_every_engine = pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
MILLION = 1 << 20
LARGEST = (1 << 24) - 1  # of an operand of 24 bits


def eager(a: Any, b: Any, engine: Any) -> Any:
    with jax.enable_x64(True):
        return matmul("MK,KN->MN", a, b, engine=engine)


jitted = jax.jit(eager, static_argnums=2)


def product(a: np.ndarray, b: np.ndarray, engine: Any, multiply: Any = jitted) -> np.ndarray:
    return np.asarray(multiply(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), engine))


def of_integers(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The product of integers of 24 bits, the largest in each row of a and column of b.

    By sums of int64, which has room for 2^27 terms of one half of b.
    """
    high, low = ((a @ half).astype(object) for half in (b >> 12, b & 4095))
    S = high * 4096 + low
    return oracle.out(oracle.R(integer_oracle.round64(integer_oracle.elementwise(Fraction)(S))))


@by_every_engine
def test_products_are_those_of_python_integers(engine):
    """Products equal integers with subnormals, -0 and 2^-20 to 2^20 in a row, and across rows."""
    for a, b in (
        (numbers((12, 70), 11), numbers((70, 13), 12)),
        (rows((12, 70), 13), rows((13, 70), 14).T),
    ):
        # Among them results that are subnormal, and near the largest float32.
        for scale in (0, -65, 38):
            x, y = (np.ldexp(z, scale).astype(np.float32) for z in (a, b))
            assert compare_bits(product(x, y, engine), oracle.mm(x, y)).equal
    x, dy = rows((60, 9), 19), rows((60, 8), 20)
    with jax.enable_x64(True):
        got = balanced_matmul("TI,TO->IO", jnp.asarray(x), jnp.asarray(dy), engine=engine)
    assert compare_bits(np.asarray(got), oracle.weight_gradient(x, dy)).equal


def test_eager_products_are_the_same():
    a, b = numbers((12, 70), 11), numbers((70, 13), 12)
    assert compare_bits(product(a, b, None, eager), oracle.mm(a, b)).equal


@by_every_engine
def test_a_nan_or_an_infinity_reaches_its_row_and_its_column(engine):
    a, b = numbers((12, 70), 21), numbers((70, 13), 22)
    clean = product(a, b, float64_products)
    a[2, 3], a[4, 69], b[0, 5] = np.nan, np.inf, -np.inf
    got = product(a, b, engine)
    reached = np.zeros(got.shape, bool)
    reached[[2, 4]] = reached[:, 5] = True
    assert np.array_equal(np.isnan(got), reached)
    assert np.array_equal(got[~reached], clean[~reached])
    # A token with one is one altogether, as in PyTorch.
    x, dy = rows((60, 9), 23), rows((60, 8), 24)
    x[3, 2] = np.nan
    with jax.enable_x64(True):
        got = balanced_matmul("TI,TO->IO", jnp.asarray(x), jnp.asarray(dy), engine=engine)
    theirs = torch_matmul.mmT(*(flush(torch.from_numpy(z)) for z in (x, dy)))
    assert np.isnan(np.asarray(got)).all()
    assert theirs.isnan().all()


# The last terms that a number of products has room for, the first that need more, and a million.
EDGES = [
    *(("float64", K) for K in (engines.TERMS_OF_TWO, engines.TERMS_OF_TWO + 1, MILLION)),
    *(("int8", K) for K in (engines.TERMS_OF_TEN, engines.TERMS_OF_TEN + 1, MILLION)),
]


def longest(K: int) -> tuple[np.ndarray, np.ndarray]:
    """Integers of 24 bits whose products, and whose digits' products, add up to as much as can be.

    The last column cancels what the last row makes of it, so that every rounding is seen.
    """
    # Of 4 digits of 7 bits the lower ones are -64 each, of 5 of 5 bits -16.
    of_seven = -sum(64 << 7 * k for k in range(3)) - (7 << 21)
    of_five = -sum(16 << 5 * k for k in range(4)) - (15 << 20)
    rng, half = np.random.default_rng(K), K // 2
    noise = np.tile(LARGEST - rng.integers(0, 1 << 12, half), 2)
    # The lower of two digits of 13 bits is near 2^12.
    up = 1500 * 8192 + 4000 + rng.integers(0, 90, half)
    ends = np.array([LARGEST], int)[: K % 2]
    constant = [np.full(K, x) for x in (LARGEST, of_seven, of_five)]
    a = np.stack([*constant, np.concatenate([noise, ends])])
    b = np.stack([*constant, np.concatenate([up, -up, ends])], axis=1)
    b[-1, -1] += -1 if K % 2 else 1
    return a, b


@pytest.mark.parametrize(("name", "K"), EDGES)
def test_the_longest_sums_of_the_largest_integers(name, K):
    a, b = longest(K)
    assert compare_bits(product(a, b, ENGINES[name]), of_integers(a, b)).equal


def test_pytorch_has_the_same_million_terms():
    """PyTorch multiplies pieces of int64, in the place of narrower digits, with the same bits."""
    a, b = longest(MILLION)
    got = torch_matmul.mm(*(torch.from_numpy(x).double() for x in (a, b)))
    assert compare_bits(got.numpy(), of_integers(a, b)).equal


def most(digits: list[np.ndarray]) -> int:
    return max(int(np.abs(digit).max()) for digit in digits)


def test_every_sum_of_digits_has_room():
    """Digits of every seventh operand and of both ends fit, with the most terms of each count."""
    operands = np.append(np.arange(-(1 << 24), 1 << 24, 7, dtype=np.int32), np.int32(1 << 24))
    split: dict[Any, list[np.ndarray]] = {}
    for count in (2, *engines.DIGITS_BY_TERMS):
        digits, bits = engines._digits(jnp.asarray(operands), count)
        split[count] = [np.asarray(digit) for digit in digits]
        assert np.array_equal(sum(x << bits * k for k, x in enumerate(split[count])), operands)
    two, four = split[2], split[4]
    pairs = [four[i] + four[k] for i, k in ((0, 1), (2, 3), (0, 2), (1, 3))]
    assert all(x.min() >= -128 and x.max() <= 127 for x in pairs)
    split |= {"sum": [*two, two[0] + two[1]], "pairs": pairs}
    found: dict[Any, int] = {name: most(digits) for name, digits in split.items()}
    assert (1 << 24) * found[2] * engines.TERMS_OF_TWO <= 1 << 53
    assert found["sum"] ** 2 * engines.MOST_TERMS <= 1 << 53
    assert found["pairs"] ** 2 * engines.TERMS_OF_TEN < 1 << 31
    for count, terms in engines.DIGITS_BY_TERMS.items():
        assert found[count] ** 2 * terms < 1 << 31
    assert max(engines.DIGITS_BY_TERMS.values()) == engines.MOST_TERMS


def test_sums_are_rounded_to_53_bits_and_to_24():
    """Rounding at the middle of two float32 and of two float64, near it, and at float32's ends."""
    rng = np.random.default_rng(7)
    S = [int(x) << 13 for x in rng.integers(1, 1 << 62, 500)]
    S = [x >> int(shift) for x, shift in zip(S, rng.integers(0, 74, 500), strict=True)]
    # 24 bits, then those of a half, and what is around it by units of 2^21 of 53 bits.
    for head in rng.integers(1 << 23, 1 << 24, 1500).tolist():
        units, rest = (int(rng.integers(-n, n + 1)) for n in (3, 1))
        S.append((head << 51) + (1 << 50) + (units << 21) + rest)
    S += [0, 1, (1 << 54) - 1, *((1 << 75) - (1 << k) for k in (0, 20, 21, 22, 49, 50, 51))]
    S = [x * int(sign) for x, sign in zip(S, rng.choice([-1, 1], len(S)), strict=True)]
    lengths = np.array([abs(x).bit_length() for x in S])
    n = rng.integers(-40, 40, len(S))
    n[::3] = rng.integers(-128, -124, len(n[::3])) - lengths[::3]  # around 2^-126
    n[-12:] = -126 - lengths[-12:]
    n[1::9] = 127 - lengths[1::9]
    exact = [
        oracle.R(integer_oracle.round64(Fraction(x)) * integer_oracle.power(int(k)))
        for x, k in zip(S, n, strict=True)
    ]
    with jax.enable_x64(True):
        high = jnp.asarray([x >> 32 for x in S])
        low = jnp.asarray([x & fixed_point.WORD for x in S])
        got = fixed_point.nearest(high, low, jnp.asarray(n, jnp.int32))
        beyond = fixed_point.nearest(high, low, jnp.asarray(200 - lengths, jnp.int32))
    assert compare_bits(np.asarray(got), oracle.out(np.array(exact, object))).equal
    infinite = [np.copysign(np.inf, x) if x else 0.0 for x in S]
    assert np.array_equal(np.asarray(beyond), infinite)


@pytest.mark.parametrize("engine", (float64_products, int8_products), ids=("float64", "int8"))
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["Auto", "Explicit"])
def test_a_long_sum_over_a_mesh(kind, engine):
    """Sums over eight devices, each with a part of the tokens, add up exact partial sums."""
    a, b = longest(1 << 18)
    mesh = jax.make_mesh((2, 4), ("data", "seq"), (kind,) * 2)
    spread = NamedSharding(mesh, PartitionSpec("data", "seq"))
    whole = NamedSharding(mesh, PartitionSpec(None, None))
    x, dy = (jax.device_put(z.astype(np.float32).reshape(2, 1 << 17, -1), spread) for z in (a.T, b))

    @jax.jit
    def gradient(x: Any, dy: Any) -> Any:
        with jax.enable_x64(True):
            return matmul("BTI,BTO->IO", x, dy, engine=engine, out_sharding=whole)

    with jax.set_mesh(mesh):
        got = gradient(x, dy)
    assert compare_bits(np.asarray(got), of_integers(a, b)).equal


MUTATIONS = {
    "two products for any number of terms": ("TERMS_OF_TWO", 1 << 27, "float64", MILLION),
    "ten products for 2^18 terms": ("TERMS_OF_TEN", 1 << 18, "int8", 1 << 18),
    "four digits for any number of terms": ("DIGITS_BY_TERMS", {4: 1 << 27}, "int8", MILLION),
    "ten products for one term more": ("TERMS_OF_TEN", 1 << 17, "int8", 1 << 17),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutations_are_caught(mutation, monkeypatch):
    attribute, wrong, name, K = MUTATIONS[mutation]
    monkeypatch.setattr(engines, attribute, wrong)
    a, b = longest(K)
    assert not compare_bits(product(a, b, ENGINES[name]), of_integers(a, b)).equal


def test_too_many_terms_are_refused(unchecked_shapes):
    shape = jax.ShapeDtypeStruct((1, 1 << 27), jnp.float32)
    multiply = partial(matmul, "MK,NK->MN")
    with jax.enable_x64(True):
        with pytest.raises(
            ValueError, match=r"fewer than 2\^27 terms in a sum, got 134217728 along"
        ):
            jax.eval_shape(multiply, shape, shape)
        fewer = jax.ShapeDtypeStruct((1, (1 << 27) - 1), jnp.float32)
        assert jax.eval_shape(multiply, fewer, fewer).shape == (1, 1)


MISSING = missing_compiler("v5e:2x4")


@pytest.mark.tpu_aot
@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
@pytest.mark.parametrize("topology", ("v5e:2x4", "v6e:2x4"))
def test_a_tpu_multiplies_digits_of_8_bits(topology):
    """A TPU's program has ten products of int8 to int32, and no float64, which TPUs lack."""
    there = SingleDeviceSharding(devices(topology)[0])
    operand = jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=there)

    def multiply(a: Any, b: Any) -> Any:
        with jax.enable_x64(True):
            return matmul("MK,KN->MN", a, b)

    text = jax.jit(multiply).lower(operand, operand).compile().as_text()
    assert text is not None
    assert products(text) == [("s32", "s8", "s8")] * 10
    assert not re.search(r"\bf64\[", text)


def products(text: str) -> list[tuple[str, str, str]]:
    """The dtypes of each product of a compiled program, and of its two operands."""
    found = []
    for computation in text.split("\n\n"):
        dtypes = dict(re.findall(r"%([\w.-]+) = (\w+)\[", computation))
        for dtype, a, b in re.findall(
            r"= (\w+)\[\S* convolution\(%([\w.-]+), %([\w.-]+)\)", computation
        ):
            found.append((dtype, dtypes[a], dtypes[b]))
    return found


@pytest.mark.parametrize("dtype", (jnp.int32, jnp.bfloat16, jnp.float64))
def test_operands_of_another_dtype_are_refused(dtype):
    """Operands of another dtype raise: bits of int32 would pass for subnormals, and give 0.

    The check of types is off, which tests have and users do not.
    """
    with jax.enable_x64(True):
        x, w = jnp.ones((2, 3), dtype), jnp.ones((3, 4), jnp.float32)
        for operands in ((x, w), (w.T, x.T)):
            for product in map(inspect.unwrap, (matmul, balanced_matmul)):
                with pytest.raises(ValueError, match=r"must be float32, got .* Write x.astype"):
                    product("MK,KN->MN", *operands)
