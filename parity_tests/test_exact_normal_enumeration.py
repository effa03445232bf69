"""Phi and phi of every float32 from 2^-27 to 14: JAX, PyTorch and x87's long double round alike.

Every float32 takes minutes and is marked slow; a part of them is asked always. The long double has
64 bits: 11 more than the float64 of both versions. Its C program also says how near to the middle
of two float32 a result is: of all, the nearest must be the hard cases that the code has.
"""

import hashlib
import platform
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import torch
from rich.progress import track

from jax_seqpar.exact import normal
from jax_seqpar.exact.self_test.training_questions import NORMAL_HASH, normal_sample
from torch_ref.exact import normal as reference

CHUNK = 1 << 20
FIRST, END = 0x32000000, 0x41600000  # float32 bits of 2^-27 and of 14.0
NEAR = 3.0  # units of float64 from the middle of two float32

# Standard input: float32. Output: of each, Phi, phi and how near each is to a middle, float32.
LONG_DOUBLE = r"""
#include <math.h>
#include <stdio.h>

static float near(long double p) {
  int e;
  if (p < 0x1p-126L || p == 1) return INFINITY;
  frexp((double)p, &e);
  long double units = ldexpl(p, 53 - e), middle = 1L << 28;
  return fabsl(fmodl(units, 2 * middle) - middle);
}

int main(void) {
  float x, out[4];
  while (fread(&x, 4, 1, stdin) == 1) {
    long double cdf = 0.5L * erfcl(-(long double)x * 0.707106781186547524400844L);
    long double pdf = expl(-(long double)x * x / 2) * 0.398942280401432677939946L;
    out[0] = cdf < 0x1p-126L ? 0 : cdf, out[1] = pdf < 0x1p-126L ? 0 : pdf;
    out[2] = near(cdf), out[3] = near(pdf);
    fwrite(out, 4, 4, stdout);
  }
}
"""

Ask = Callable[[np.ndarray], np.ndarray]


@pytest.fixture(scope="module")
def long_double(tmp_path_factory) -> Ask:
    """Function of float32 `[N]`, to Phi, phi and how near each is to a middle, `[4, N]`."""
    compiler = shutil.which("cc")
    if compiler is None or platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("needs a C compiler, and x87's long double of 64 bits")
    program: Path = tmp_path_factory.mktemp("normal") / "long_double"
    command = [compiler, "-O2", "-x", "c", "-", "-o", program, "-lm"]
    subprocess.run(command, input=LONG_DOUBLE, text=True, check=True)

    def ask(x: np.ndarray) -> np.ndarray:
        out = subprocess.run([program], input=x.tobytes(), capture_output=True, check=True).stdout
        return np.frombuffer(out, np.float32).reshape(-1, 4).T

    return ask


@jax.jit
def in_jax(x: jax.Array) -> jax.Array:
    return jnp.stack([normal.normal_cdf(x), normal.normal_pdf(x)])


def in_torch(x: np.ndarray) -> np.ndarray:
    given = torch.from_numpy(x)
    return torch.stack([reference.normal_cdf(given), reference.normal_pdf(given)]).numpy()


def chunks(step: int) -> Iterator[np.ndarray]:
    """float32 of both signs, of every step-th bits."""
    for start in range(FIRST, END, CHUNK * step):
        x = np.arange(start, min(start + CHUNK * step, END), step, dtype=np.uint32)
        yield x.view(np.float32)
        yield -x.view(np.float32)


def differences(x: np.ndarray, long_double: Ask) -> tuple[Counter[str], dict[int, float]]:
    """How many bits differ, and the x near to a middle: whose Phi is, and of x > 0, whose phi."""
    *truth, near_cdf, near_pdf = long_double(x)
    right = np.stack(truth).view(np.uint32)
    with jax.enable_x64(True):
        ours = np.asarray(in_jax(x)).view(np.uint32)
    theirs = in_torch(x).view(np.uint32)
    counts = Counter(
        {
            "values": x.size,
            "JAX is not x87": np.count_nonzero(ours != right),
            "PyTorch is not x87": np.count_nonzero(theirs != right),
        }
    )
    nearest = np.minimum(near_cdf, np.where(x > 0, near_pdf, np.inf))
    where = np.flatnonzero(nearest < NEAR)
    bits = x.view(np.uint32)
    return counts, {int(bits[i]): float(nearest[i]) for i in where}


def total_of(step: int, long_double: Ask) -> tuple[Counter[str], dict[int, float]]:
    counts, near = Counter[str](), dict[int, float]()
    total = 2 * -(-(END - FIRST) // (CHUNK * step))
    for x in track(chunks(step), "Phi and phi", total, disable=step > 1):
        more, hard = differences(x, long_double)
        counts.update(more)
        near |= hard
    return counts, near


def test_every_few_hundredth_float32(long_double):
    counts, _ = total_of(509, long_double)
    values = 2 * -(-(END - FIRST) // 509)
    assert counts == {"values": values, "JAX is not x87": 0, "PyTorch is not x87": 0}


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_float32(long_double, capsys):
    with capsys.disabled():
        counts, near = total_of(1, long_double)
        print(f"\n{dict(counts)}", {hex(x): round(d, 2) for x, d in near.items()})
    values = 2 * (END - FIRST)
    assert counts == {"values": values, "JAX is not x87": 0, "PyTorch is not x87": 0}
    # The last is right in both versions.
    assert near.keys() == normal.HARD_CDF.keys() | normal.HARD_PDF.keys() | {0x3FE7ABD7}


def test_hard_cases_are_those_of_the_long_double(long_double):
    for cases, row in ((normal.HARD_CDF, 0), (normal.HARD_PDF, 1)):
        x = np.array([*cases], np.uint32).view(np.float32)
        answers = long_double(x)
        assert answers[row].view(np.uint32).tolist() == [*cases.values()]
        assert (answers[row + 2] < NEAR).all()


def test_the_hash_of_the_certificate(long_double):
    answers = long_double(normal_sample())[:2]
    assert hashlib.sha256(np.ascontiguousarray(answers).tobytes()).hexdigest() == NORMAL_HASH


def test_the_coefficients_are_those_of_the_polynomial():
    """Polynomial through the values at Chebyshev nodes, in 120 bits."""
    with mpmath.workprec(120):
        number, last = len(normal.COEFFICIENTS), mpmath.mpf(13.3)

        def slow(t):
            a = 4 * (1 + t) / (1 - t)
            tail = mpmath.erfc(a / mpmath.sqrt(2)) / 2
            return tail * mpmath.exp(a * a / 2) * (1 + mpmath.mpf("1.25") * a)

        top = (last - 4) / (last + 4)
        angles = [mpmath.pi * (2 * j + 1) / (2 * number) for j in range(number)]
        nodes = [((top + 1) * mpmath.cos(angle) + (top - 1)) / 2 for angle in angles]
        powers = mpmath.matrix([[t**j for j in range(number)] for t in nodes])
        found = mpmath.lu_solve(powers, mpmath.matrix([slow(t) for t in nodes]))
    assert tuple(float(c) for c in found) == normal.COEFFICIENTS
