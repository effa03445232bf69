"""Every float32 whose exp a softmax can need: JAX, PyTorch and NumPy round each alike. Minutes.

The results that float64 leaves nearest to a rounding boundary are collected on the way: they must
be the hard cases of the certificate, in its order, and those that Python integers confirm.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from integer_oracle import exp_bounds, magnitude, power, round_to
from rich.progress import track

from jax_seqpar.exact import elementary
from jax_seqpar.exact.self_test.questions import EXP_HARD_CASES
from torch_ref.exact import arithmetic as reference

CHUNK = 1 << 22
# float32 bits, which grow with the magnitude: -2^-26, -80 and -87.3.
FIRST, LEAST_ARGUMENT, LAST = (int(np.float32(x).view("u4")) for x in (-(2.0**-26), -80, -87.3))
TIE = 1 << 28  # of the 29 bits that float64 has beyond float32
NEAR = 32  # units of float64 from a tie; no library errs by so many
NOTHING = np.array([], np.uint32)

Library = Callable[[np.ndarray], np.ndarray]


def in_jax(function: Callable[[jax.Array], jax.Array]) -> Library:
    compiled = jax.jit(function)

    def call(x: np.ndarray) -> np.ndarray:
        with jax.enable_x64(True):
            return np.asarray(compiled(x))

    return call


def in_torch(function: Callable[[torch.Tensor], torch.Tensor]) -> Library:
    def call(x: np.ndarray) -> np.ndarray:
        return function(torch.from_numpy(x).double()).float().numpy()

    return call


# What is defined as 0 below -80, and the float64 exp that it is made of, which has no such end.
EXPS = {"jax": in_jax(elementary.exp), "torch": in_torch(reference.exp)}
RAW_EXPS = {
    "jax": in_jax(lambda x: jnp.exp(x.astype(jnp.float64)).astype(jnp.float32)),
    "torch": in_torch(torch.exp),
}


def chunks() -> Iterator[tuple[np.ndarray, dict[str, Library]]]:
    """The bits of every float32 from -2^-26 down to -87.3, cut at -80; and whom to ask."""
    for first, last, exps in (
        (FIRST, LEAST_ARGUMENT, EXPS),
        (LEAST_ARGUMENT + 1, LAST, RAW_EXPS),
    ):
        for start in range(first, last + 1, CHUNK):
            yield np.arange(start, min(start + CHUNK, last + 1), dtype=np.uint32), exps


def count_differences(
    bits: np.ndarray, exps: dict[str, Library], counts: Counter[str]
) -> np.ndarray:
    """Adds to counts how many results differ between two libraries; returns the nearest to a tie.

    NumPy's tell how near.
    """
    x = bits.view(np.float32)
    wide = np.exp(x.astype(np.float64))
    ours, theirs, third = (
        y.view(np.uint32) for y in (exps["jax"](x), exps["torch"](x), wide.astype(np.float32))
    )
    counts["values"] += len(bits)
    counts["JAX is not PyTorch"] += int(np.count_nonzero(ours != theirs))
    counts["JAX is not NumPy"] += int(np.count_nonzero(ours != third))
    beyond = wide.view(np.int64) & (2 * TIE - 1)
    return bits[np.abs(beyond - TIE) < NEAR]


def distance_to_tie(bits: int) -> Fraction:
    """Distance of e^x from the nearest middle of two float32, in units of its float64."""
    below, _ = exp_bounds(fraction(bits))
    units = below * power(53 - magnitude(below))
    return abs(units % (2 * TIE) - TIE)


def fraction(bits: int) -> Fraction:
    """The number that a float32 is."""
    return Fraction(float(np.uint32(bits).view(np.float32)))


def correctly_rounded(bits: int) -> int:
    """The bits of the float32 nearest to e^x, by Python integers."""
    below, above = (round_to(bound, 24) for bound in exp_bounds(fraction(bits)))
    assert below == above
    return int(np.float32(float(below)).view(np.uint32))


@pytest.mark.slow
def test_every_float32(capsys):
    counts, near = Counter[str](), [NOTHING]
    total = -(-(LEAST_ARGUMENT - FIRST + 1) // CHUNK) + 1
    with capsys.disabled():
        for bits, exps in track(chunks(), "exp of every float32", total):
            near.append(count_differences(bits, exps, counts))
        print(f"\n{dict(counts)}")
    assert counts == {"values": LAST - FIRST + 1, "JAX is not PyTorch": 0, "JAX is not NumPy": 0}

    hardest = sorted(map(int, np.concatenate(near)), key=distance_to_tie)
    assert hardest[: len(EXP_HARD_CASES)] == list(EXP_HARD_CASES)
    # Of every other, NumPy's float64 is further from a tie than it errs.
    for bits in hardest:
        x = np.array([bits], np.uint32).view(np.float32)
        assert int(RAW_EXPS["jax"](x).view(np.uint32)[0]) == correctly_rounded(bits)
    with capsys.disabled():
        print("nearest to a tie:", [f"{float(distance_to_tie(x)):.2f}" for x in hardest])


@pytest.mark.slow
def test_below_80_it_is_0():
    x = np.arange(LEAST_ARGUMENT + 1, LAST + 1, dtype=np.uint32).view(np.float32)
    assert all(not exp(x).view(np.uint32).any() for exp in EXPS.values())
