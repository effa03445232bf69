"""Exact training in Python integers, fractions and decimals, one function for each operation.

NumPy arrays go in and come out: float32, which every function reads without subnormals and -0.
Inside, a float is a `Fraction` and a sum an integer; the only roundings are those of the
definition, to float32 (`R`) and to float64 (`round64`). For `+ - * /` and the roots `R` is of the
number itself and not of its float64: the definition says that they are the same. Finite cases
only: an overflow raises NotImplementedError.
"""

import decimal
from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from math import isqrt
from typing import Any

import ml_dtypes
import numpy as np
from integer_oracle import (
    elementwise,
    exponents,
    integers,
    normal_power,
    power,
    read,
    rint,
    round32,
    round64,
    round_to,
    threefry,
)

BITS = 24
TOTAL_BITS = 32
SUM_BITS = 32
DIGITS = 80
Array = np.ndarray
# Fractions that are float32 numbers; `round32` rounds to such, 0 below 2^-126.
R = round32


def out(x: Array) -> Array:
    """float32, of numbers that are float32 already."""
    return np.asarray(x, dtype=float).astype(np.float32)


# `np.where` of Python objects.
choose: Any = np.frompyfunc(lambda condition, a, b: a if condition else b, 3, 1)


def constant(x: float) -> Fraction:
    """The float32 nearest to x, as a fraction."""
    return Fraction(float(np.float32(x)))


def round_float64(x: Array) -> Array:
    """R of float64 numbers."""
    return out(R(elementwise(lambda number: Fraction(float(number)))(x)))


def bfloat16(x: Array) -> Array:
    """The nearest bfloat16 of each float32."""
    return round_bfloat16(read(x)).astype(float).astype(ml_dtypes.bfloat16)


@elementwise
def round_bfloat16(x: Fraction) -> Fraction:
    """The nearest number of 8 bits."""
    return round_to(x, 8)


def add(a: Array, b: Array) -> Array:
    """`a (+) b`."""
    return out(R(read(a) + read(b)))


def subtract(a: Array, b: Array) -> Array:
    """`a (-) b`."""
    return out(R(read(a) - read(b)))


def multiply(a: Array, b: Array) -> Array:
    """`a (*) b`."""
    return out(R(read(a) * read(b)))


def divide(a: Array, b: Array) -> Array:
    """`a (/) b`."""
    return out(R(read(a) / read(b)))


def square_root(x: Array) -> Array:
    """The nearest float32 of the square root."""
    return out(root32(read(x)))


def rsqrt(x: Array) -> Array:
    """The nearest float32 of `x^(-1/2)`."""
    return out(root32(1 / read(x)))


def log(x: Array) -> Array:
    """The nearest float32 of the natural logarithm."""
    return out(log32(read(x)))


def exp(x: Array) -> Array:
    """The nearest float32 of `e^x` for x up to 0; 0 below -80."""
    return out(exp32(read(x)))


@elementwise
def root32(x: Fraction) -> Fraction:
    """The nearest float32 of the square root: R of it, cut after 100 bits and half of one."""
    if x == 0:
        return x
    shift = 100 + max(0, x.denominator.bit_length() - x.numerator.bit_length())
    scaled = x.numerator * 4**shift // x.denominator
    root = isqrt(scaled)
    is_exact = root * root * x.denominator == x.numerator * 4**shift
    return R(Fraction(2 * root + (not is_exact), 2 * 2**shift))


@elementwise
@cache
def log32(x: Fraction) -> Fraction:
    """`log` of one fraction."""
    with decimal.localcontext(prec=DIGITS):
        return R(Fraction((decimal.Decimal(x.numerator) / x.denominator).ln()))


@elementwise
@cache
def exp32(x: Fraction) -> Fraction:
    """`exp` of one fraction."""
    assert x <= 0
    if x < -80:
        return Fraction(0)
    with decimal.localcontext(prec=DIGITS):
        return R(Fraction((decimal.Decimal(x.numerator) / x.denominator).exp()))


@elementwise
@cache
def cdf32(x: Fraction) -> Fraction:
    """The normal distribution function: 1/2 and the density times `x + x^3 / 3 + x^5 / 15 + ...`.

    For x = -13 the two cancel to 2^-126; 120 digits leave enough.
    """
    if abs(x) > 14:
        return Fraction(x > 0)
    with decimal.localcontext(prec=120):
        number = decimal.Decimal(x.numerator) / x.denominator
        term, sum_, n = number, decimal.Decimal(0), 1
        while abs(term) > decimal.Decimal("1e-110"):
            sum_ += term
            n += 2
            term = term * number * number / n
        return R(Fraction(1, 2) + Fraction(sum_ * density(number)))


@elementwise
@cache
def pdf32(x: Fraction) -> Fraction:
    """The nearest float32 of the normal density."""
    with decimal.localcontext(prec=DIGITS):
        return R(Fraction(density(decimal.Decimal(x.numerator) / x.denominator)))


def density(x: decimal.Decimal) -> decimal.Decimal:
    """Density of the normal distribution, in the precision of the context."""
    circle = decimal.Decimal(2 * pi().numerator) / pi().denominator
    return (-x * x / 2).exp() / circle.sqrt()


def normal_cdf(x: Array) -> Array:
    """The normal distribution function of float32."""
    return out(cdf32(read(x)))


def normal_pdf(x: Array) -> Array:
    """The normal density of float32."""
    return out(pdf32(read(x)))


def gelu(x: Array) -> Array:
    """`R(x Phi(x))`."""
    x = read(x)
    return out(R(x * cdf32(x)))


def gelu_backward(x: Array, dy: Array) -> Array:
    """The gradient of x."""
    x = read(x)
    return out(R(read(dy) * R(round64(cdf32(x) + x * pdf32(x)))))


def total(x: Array, axis: int) -> Array:
    """Sum of float32 along an axis, which the result lacks."""
    return out(sum32(read(x), axis))


def sum32(x: Array, axis: int) -> Array:
    """`total` of fractions; the axis stays, with length 1, where it is the last."""
    e = exponents(x, axis)
    sums = np.sum(integers(x, TOTAL_BITS - e), axis=axis, keepdims=True)
    return np.squeeze(R(round64(sums) * normal_power(e - TOTAL_BITS)), axis)


def mm(a: Array, b: Array) -> Array:
    """`[M, K]` with `[K, N]`."""
    return out(product32(read(a), read(b)))


def product32(a: Array, b: Array) -> Array:
    """`mm` of fractions."""
    ea, eb = exponents(a, 1), exponents(b, 0)
    S = integers(a, BITS - ea) @ integers(b, BITS - eb)
    return R(round64(S) * normal_power(ea + eb - 2 * BITS))


def weight_gradient(x: Array, dy: Array) -> Array:
    """`mmT`: `[T, I]` with `[T, O]`, balanced by token."""
    x, dy = read(x), read(dy)
    c = (exponents(x, 1) - exponents(dy, 1)) // 2
    return out(product32((x * power(-c)).T, dy * power(c)))


def linears_backward(
    x: Array, weights: Sequence[Array], dys: Sequence[Array]
) -> tuple[Array, list[Array]]:
    """dx and dW of `y = x W` for several W, x `[T, I]` and W `[I, O]`."""
    dx, *others = (product32(read(dy), read(w).T) for w, dy in zip(weights, dys, strict=True))
    for other in others:
        dx = R(dx + other)
    return out(dx), [weight_gradient(x, dy) for dy in dys]


def norm_parts(x: Array, eps: float) -> tuple[Array, Array]:
    """n `[T, D]` and r `[T, 1]` of fractions x."""
    s = sum32(R(x * x), 1)[:, None]
    r = root32(1 / R(R(s / x.shape[1]) + constant(eps)))
    return R(x * r), r


def rms_norm(x: Array, gamma: Array, eps: float) -> Array:
    """RMSNorm of `[T, D]`."""
    n, _ = norm_parts(read(x), eps)
    return out(R(n * read(gamma)))


def rms_norm_backward(x: Array, gamma: Array, eps: float, dy: Array) -> tuple[Array, Array]:
    """dx `[T, D]` and dgamma `[D]`."""
    n, r = norm_parts(read(x), eps)
    dy = read(dy)
    dgamma = sum32(R(dy * n), 0)
    dn = R(dy * read(gamma))
    c = R(sum32(R(dn * n), 1)[:, None] / n.shape[1])
    return out(R(R(round64(dn - n * c)) * r)), out(dgamma)


def layer_norm(x: Array, gamma: Array, beta: Array, eps: float) -> Array:
    """LayerNorm of `[T, D]`."""
    n, _ = norm_parts(centred(read(x)), eps)
    return out(R(round64(n * read(gamma) + read(beta))))


def centred(x: Array) -> Array:
    """Rows of fractions, less their means."""
    return R(x - R(sum32(x, 1)[:, None] / x.shape[1]))


def layer_norm_backward(
    x: Array, gamma: Array, eps: float, dy: Array
) -> tuple[Array, Array, Array]:
    """dx `[T, D]`, dgamma and dbeta `[D]`."""
    n, r = norm_parts(centred(read(x)), eps)
    dy = read(dy)
    dgamma, dbeta = sum32(R(dy * n), 0), sum32(dy, 0)
    dn = R(dy * read(gamma))
    c = R(sum32(R(dn * n), 1)[:, None] / n.shape[1])
    return out(R(R(round64(centred(dn) - n * c)) * r)), out(dgamma), out(dbeta)


@cache
def pi() -> Fraction:
    """Pi by Machin's formula, 16 atan(1/5) - 4 atan(1/239), in units of 2^-400."""

    def arctangent(n: int) -> int:
        sum_, term, k = 0, 2**400 // n, 0
        while term:
            sum_ += (-1) ** k * (term // (2 * k + 1))
            term, k = term // n**2, k + 1
        return sum_

    return Fraction(16 * arctangent(5) - 4 * arctangent(239), 2**400)


def frequencies(channels: int, theta: int) -> list[int]:
    """`floor(theta^(-2i / R) / 2 pi * 2^64)` of an integer theta: by a root of integers.

    `theta^(-2i / R)` is the R-th root of `theta^(-2i)`, found in units of 2^-200 by bisection.
    """
    found = []
    for i in range(channels // 2):
        low, high = 0, 2**200
        while high - low > 1:
            middle = (low + high) // 2
            is_below = middle**channels * theta ** (2 * i) <= 2 ** (200 * channels)
            low, high = (middle, high) if is_below else (low, middle)
        # For i = 0 the root is 1 itself, and the bisection ends a unit below it.
        found.append(int(Fraction(low + (i == 0), 2**200) / (2 * pi()) * 2**64))
    return found


def rotary_tables(positions: Array, channels: int, theta: int) -> tuple[Array, Array]:
    """Cosines and sines `[..., R / 2]` of integer positions."""
    of_channel = np.array(frequencies(channels, theta), dtype=object)
    turns = positions.astype(object)[..., None] * of_channel % 2**64
    angles = (turns + 2**39) // 2**40 % 2**24
    return out(cosine(angles)), out(sine(angles))


@elementwise
def sine(angle: int) -> Fraction:
    """The nearest float32 of the sine of so many 2^-24 turns."""
    return R(taylor(angle, first=1))


@elementwise
def cosine(angle: int) -> Fraction:
    """The nearest float32 of the cosine of so many 2^-24 turns."""
    return R(taylor(angle, first=0))


@cache
def taylor(angle: int, first: int) -> Fraction:
    """The sum of every second term of the exponential series, with alternating signs, from x^0 or
    x^1 on, in units of 2^-150; 0 at the multiples of a quarter turn where the function is.
    """
    if (2 * angle - (1 - first) * 2**23) % 2**24 == 0:
        return Fraction(0)
    unit = 2**150
    x = int(2 * pi() * angle * unit) // 2**24
    term, sum_, n = (x if first else unit), 0, first
    while term:
        sum_ += term
        term = -term * x // unit * x // unit // ((n + 1) * (n + 2)) if abs(term) > 1 else 0
        n += 2
    return Fraction(sum_, unit)


def rotary(x: Array, cos: Array, sin: Array) -> Array:
    """`[..., H]` with tables `[..., R / 2]`: channel i is paired with `i + R / 2`."""
    half = cos.shape[-1]
    x, cos, sin = read(x), read(cos), read(sin)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = R(round64(a * cos - b * sin)), R(round64(b * cos + a * sin))
    return out(np.concatenate((*turned, rest), axis=-1))


def logistic(g: Array) -> tuple[Array, Array]:
    """sig and rest of fractions."""
    t = exp32(-np.abs(g))
    d = R(1 + t)
    is_positive = g >= 0
    return R(choose(is_positive, 1, t) / d), R(choose(is_positive, t, 1) / d)


def swiglu(gate: Array, up: Array) -> Array:
    """`(gate (*) sig) (*) up`, sig the logistic function of gate."""
    g = read(gate)
    sig, _ = logistic(g)
    return out(R(R(g * sig) * read(up)))


def swiglu_backward(gate: Array, up: Array, dh: Array) -> tuple[Array, Array]:
    """The gradients of gate and up."""
    g, u, dh = read(gate), read(up), read(dh)
    sig, rest = logistic(g)
    slope = R(sig * R(round64(1 + g * rest)))
    return out(R(R(dh * u) * slope)), out(R(dh * R(g * sig)))


def embedding_backward(ids: Array, dx: Array, rows: int) -> Array:
    """ids `[T]` and dx `[T, D]` to the gradient of the table `[rows, D]`."""
    dx = read(dx)
    e = exponents(dx, 0)
    T = integers(dx, TOTAL_BITS - e)
    sums = np.full((rows, dx.shape[1]), 0, dtype=object)
    for token, row in enumerate(ids):
        sums[row] += T[token]
    return out(R(round64(sums) * normal_power(e - TOTAL_BITS)))


def cross_entropy(
    logits: Array,
    labels: Array,
    z_loss: float,
    ignore_index: int,
    count: int,
    label_smoothing: float = 0.0,
) -> tuple[np.float32, Array]:
    """The mean over `count` labels, and the gradient of the logits `[T, V]`; labels `[T]`."""
    z, c, V = read(logits), constant(z_loss), logits.shape[1]
    e, k = constant(label_smoothing), constant(1 - label_smoothing)
    largest = np.max(z, axis=1, keepdims=True)
    x = R(z - largest)
    p = exp32(x)
    L = np.sum(rint(p * 2**SUM_BITS), axis=1, keepdims=True)
    denominator = R(L * Fraction(1, 2**SUM_BITS))
    log_l = log32(denominator)
    lse = R(largest + log_l)
    counts = labels != ignore_index
    is_label = (np.arange(z.shape[1]) == labels[:, None]) * 1
    m = R(sum32(x, 1) / V)
    loss = R(log_l[:, 0] - R(round64(k * np.sum(x * is_label, axis=1) + e * m)))
    loss = R(loss + R(c * R(lse * lse)[:, 0]))
    losses = choose(counts, loss, Fraction(0))
    w = R(p * R(1 / denominator))
    w = R(w * R(round64(1 + 2 * c * lse)))
    q = R(R(e / V) + is_label * k)
    dz = R(R(w - q) * R(Fraction(1, count)))
    mean = R(sum32(losses, 0) / count)
    return np.float32(float(mean)), out(choose(counts[:, None], dz, Fraction(0)))


def clip(gradients: Sequence[Array], largest: float) -> tuple[list[Array], np.float32]:
    """The gradients after clipping, and the norm before it."""
    squares = []
    for g in map(read, gradients):
        rows = sum32(R(g * g), g.ndim - 1)
        squares.append(sum32(np.ravel(np.array(rows, dtype=object)), 0))
    norm = root32(sum32(np.array([x[()] for x in map(np.asarray, squares)], dtype=object), 0))
    factor = R(constant(largest) / norm) if norm > constant(largest) else Fraction(1)
    return [out(R(read(g) * factor)) for g in gradients], np.float32(float(norm))


def adamw(w: Array, m: Array, v: Array, g: Array, numbers: dict[str, float]) -> tuple[Array, ...]:
    """The new w, m and v; numbers by the names of the definition, lr to wd."""
    n = {name: constant(x) for name, x in numbers.items()}
    w, m, v, g = map(read, (w, m, v, g))
    m = R(round64(n["b1"] * m + n["c1"] * g))
    v = R(round64(n["b2"] * v + n["c2"] * R(g * g)))
    u = R(R(m * n["k1"]) / R(root32(R(v * n["k2"])) + n["eps"]))
    return out(moved(w, u, n["lr"], n["wd"])), out(m), out(v)


def moved(w: Array, u: Array, lr: Fraction, wd: Fraction) -> Array:
    """The weights after an update u."""
    return R(round64(w + R(round64(-lr * R(round64(u + wd * w))))))


def sgd(w: Array, m: Array, g: Array, lr: float, mu: float, wd: float) -> tuple[Array, Array]:
    """The new w and m."""
    w, m, g = map(read, (w, m, g))
    m = R(round64(constant(mu) * m + g))
    return out(moved(w, m, constant(lr), constant(wd))), out(m)


def adamw_numbers(step: int, lr: float, b1: float, b2: float, eps: float, wd: float) -> Any:
    """The numbers of a step by name: float64 products, sums and quotients, then float32."""
    powers = []
    for b in map(Fraction, (b1, b2)):
        of_step = Fraction(1)
        for _ in range(step):
            of_step = round64(of_step * b)
        powers.append(round64(1 / round64(1 - of_step)))
    given = {"lr": lr, "b1": b1, "b2": b2, "eps": eps, "wd": wd}
    given |= {"c1": 1 - Fraction(b1), "c2": 1 - Fraction(b2), "k1": powers[0], "k2": powers[1]}
    return {name: float(R(round64(Fraction(x)))) for name, x in given.items()}


def dropout(
    x: Array, rate: float, rng: tuple[int, int], first_sequence: int, first_token: int
) -> Array:
    """`[B, S, D]`; the first numbers are those of x in the whole batch."""
    limit = round(rate * 2**32)
    c = R(Fraction(2**32, 2**32 - limit))
    kept = np.empty(x.shape, bool)
    for b in range(x.shape[0]):
        key = threefry(rng, (b + first_sequence, 0))
        for s, d in np.ndindex(x.shape[1:]):
            kept[b, s, d] = threefry(key, (s + first_token, d))[0] >= limit
    return out(choose(kept, R(read(x) * c), Fraction(0)))
