"""Inputs of the operations of exact training, as NumPy arrays that every framework reads."""

import numpy as np


def numbers(shape: int | tuple[int, ...], seed: int, wide: bool = True) -> np.ndarray:
    """float32 of magnitudes around 1, or around 2^-20 to 2^20; a few are 0, -0 or subnormal."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape)
    if wide:
        x = x * 2.0 ** rng.integers(-20, 21, shape)
    special = np.array([0.0, -0.0, 1e-40, -1e-40, 2.0**-126, -(2.0**-149)])
    x = np.where(rng.random(shape) < 0.03, rng.choice(special, shape), x)
    return x.astype(np.float32)


def rows(shape: tuple[int, int], seed: int) -> np.ndarray:
    """float32 rows whose magnitudes differ by up to 2^20 either way, as tokens do, and one of 0."""
    rng = np.random.default_rng(seed)
    scale = 2.0 ** rng.integers(-20, 21, (shape[0], 1))
    x = numbers(shape, seed, wide=False) * scale
    x[shape[0] // 2] = 0
    return x.astype(np.float32)


def tails(count: int, seed: int) -> np.ndarray:
    """float64 of random low bits, some on the middle of two float32, from 2^-160 to 2^127."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**52, count) | rng.integers(1023 - 160, 1023 + 127, count) << 52
    bits = np.where(rng.random(count) < 0.3, bits & ~0x1FFFFFFF | 0x10000000, bits)
    near = rng.integers(-1, 2, count) * (rng.random(count) < 0.2)
    bits = bits + near | rng.integers(0, 2, count) << 63
    return np.concatenate((bits.view(np.float64), [0.0, -0.0, 2.0**-126, 2.0**-126 * (1 - 2**-53)]))
