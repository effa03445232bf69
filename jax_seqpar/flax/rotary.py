"""Rotary position embedding, right at every position of a long sequence."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from .checks import check_array, check_floats, check_integers

# 1 / (2 pi) in units of 2^-256.
_INVERSE_TURN = 0x28BE60DB9391054A7F09D5F47D4D377036D8A5664F10E4107F9458EAF7AEF158


@dataclass(frozen=True)
class Rotary:
    """Turns pairs of channels by an angle that grows with the token's position.

    Channel pair i turns by `position * theta^(-2i / R)` radians, of R channels that turn. An angle
    in float32 is wrong by 0.03 radians at position 10^6; here it is counted in parts of a turn, in
    integers, and wrong by at most 2^-30 of a turn (2^-29 for positions of 64 bits), 10^-8 radians,
    with the frequencies in float64.

    Args:
      theta: the base.
      interleaved: pairs are channels (2i, 2i + 1), as in RoFormer and GPT-J; otherwise
        (i, i + R/2), as in GPT-NeoX and the Llama of `transformers`.
      fraction: of the channels, those that turn: the first R = fraction * H; the rest stay.
      frequencies: R/2 of them, in radians per token, in place of those of theta: for scaled
        variants (linear, NTK, YaRN, LongRoPE, Llama 3).
      attention_factor: multiplies cosine and sine, so the channels that turn, of query and key
        alike: YaRN's and LongRoPE's temperature, `attention_scaling` in `transformers`, where both
        come from `ROPE_INIT_FUNCTIONS[rope_type](config)`.

    Source: Su et al. 2021, https://arxiv.org/abs/2104.09864.
    """

    theta: float = 10_000.0
    interleaved: bool = False
    fraction: float = 1.0
    frequencies: tuple[float, ...] | None = None
    attention_factor: float = 1.0

    def __call__(
        self, x: Float[Array, "B T N H"], positions: Integer[Array | np.ndarray, "#B T"]
    ) -> Float[Array, "B T N H"]:
        """x, turned.

        Args:
          x: query or key; computed in float32, returned in its own dtype.
          positions: of its tokens, in the whole sequence or document, whatever the sharding; of
            any integer dtype, negative ones included.

        Raises:
          ValueError: for an odd number of channels, frequencies of another number or not finite, an
            attention_factor that is not a positive number, and positions of floats.
        """
        check_rotated(x, positions)
        R = int(self.fraction * x.shape[-1])
        check_rotary(R, x.shape[-1], self.fraction, self.frequencies)
        check_attention_factor(self.attention_factor)
        angles = _angles(positions, self._frequencies(R))[:, :, None]
        cos, sin = (f(angles) * jnp.float32(self.attention_factor) for f in (jnp.cos, jnp.sin))
        turning, rest = x[..., :R], x[..., R:]
        if self.interleaved:
            a, b = turning[..., 0::2], turning[..., 1::2]
        else:
            a, b = turning[..., : R // 2], turning[..., R // 2 :]
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        turned = (a * cos - b * sin, b * cos + a * sin)
        if self.interleaved:
            out = jnp.stack(turned, axis=-1).reshape(turning.shape)
        else:
            out = jnp.concatenate(turned, axis=-1)
        return jnp.concatenate([out.astype(x.dtype), rest], axis=-1)

    def _frequencies(self, channels: int) -> np.ndarray:
        if self.frequencies is not None:
            return np.asarray(self.frequencies, np.float64)
        return self.theta ** (-np.arange(0, channels, 2, dtype=np.float64) / channels)


def _angles(
    positions: Integer[Array | np.ndarray, "B T"], frequencies: np.ndarray
) -> Float[Array, "B T R2"]:
    """`positions * frequencies` modulo a turn, in radians from -pi to pi."""
    # JAX without 64 bits would cut positions of NumPy.
    xp: Any = np if isinstance(positions, np.ndarray) else jnp
    bits = 64 if positions.dtype.itemsize == 8 else 32
    p = positions.astype(f"uint{bits}")  # modulo 2^bits, from a narrow signed dtype, too
    is_negative = positions < 0
    # 0 - p and not abs(), which the most negative number of a dtype does not have.
    p = xp.where(is_negative, xp.zeros_like(p) - p, p)
    turns = jnp.zeros((), jnp.uint32)
    for shift in range(0, bits, 16):
        digit = (p >> shift).astype(jnp.uint32) & 0xFFFF
        high, low = (jnp.asarray(word)[None, None] for word in _turns(frequencies, shift))
        # 2^-32 of a turn. Whole turns overflow, and are meant to.
        turns = turns + digit[:, :, None] * high + ((digit[:, :, None] * low) >> 16)
    angles = turns.astype(jnp.int32).astype(jnp.float32) * jnp.float32(2 * math.pi / 2**32)
    return jnp.where(is_negative[:, :, None], -angles, angles)


def _turns(frequencies: np.ndarray, shift: int) -> tuple[np.ndarray, np.ndarray]:
    """`2^shift * frequencies / (2 pi)` modulo 1: its first 32 bits after the point, the next 16.

    In Python's integers: the product with a float64 of 1 / (2 pi) would be wrong by 2^-53.
    """
    high, low = [], []
    for frequency in frequencies:
        numerator, denominator = float(frequency).as_integer_ratio()
        fraction = ((numerator * _INVERSE_TURN << shift + 48) // (denominator << 256)) % 2**48
        high.append(fraction >> 16)
        low.append(fraction & 0xFFFF)
    return np.asarray(high, np.uint32), np.asarray(low, np.uint32)


def check_rotary(
    turning: int, head_dim: int, fraction: float, frequencies: Sequence[float] | None
) -> None:
    """Raises ValueError unless the rotated channels come in pairs, with a frequency for each."""
    if not 0 < fraction <= 1 or turning % 2 or turning == 0:
        raise ValueError(
            f"Rotary turns an even number of the H = {head_dim} channels, got fraction = "
            f"{fraction}, which is {turning}. Use an even H, or a fraction that gives pairs."
        )
    if frequencies is not None and len(frequencies) != turning // 2:
        raise ValueError(
            f"Rotary needs a frequency for each of the {turning // 2} pairs of channels, got "
            f"{len(frequencies)}. Give {turning // 2} frequencies, or another fraction than "
            f"{fraction}."
        )
    if frequencies is not None and not all(math.isfinite(f) for f in frequencies):
        raise ValueError(
            f"Rotary needs finite frequencies, in radians per token, got {frequencies}. Write 0.0 "
            f"for a pair that does not turn."
        )


def check_attention_factor(factor: Any) -> None:
    """Raises ValueError unless cosine and sine can be multiplied by the factor."""
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < math.inf:
        raise ValueError(
            f"attention_factor must be a positive Python number, got {factor!r}. Write 1.0 for a "
            f"rotary embedding without one, float(...) of a number that is an array."
        )


def check_rotated(x: Any, positions: Any) -> None:
    """Raises ValueError unless x is `[B, T, N, H]` and positions are `[B, T]` or `[1, T]` of it."""
    check_floats("x", x)
    check_array("positions", positions)
    check_integers("positions", positions)
    if len(x.shape) != 4 or positions.shape not in ((1, x.shape[1]), tuple(x.shape[:2])):
        raise ValueError(
            f"x must be [B, T, N, H] and positions [B, T] or [1, T] of its tokens, got shapes "
            f"{tuple(x.shape)} and {tuple(positions.shape)}. Write positions[None] of one row."
        )
