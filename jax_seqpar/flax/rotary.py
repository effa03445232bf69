"""Rotary position embedding, right at every position of a long sequence."""

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from . import refusals


@dataclass(frozen=True)
class Rotary:
    """Turns pairs of channels by an angle that grows with the token's position.

    Channel pair i turns by `position * theta^(-2i / R)` radians, of R channels that turn. An angle
    in float32 is wrong by 0.03 radians at position 10^6; here it is counted in parts of a turn, in
    integers, and wrong by at most 2^-30 + position * 2^-53 of a turn, 10^-6 radians at 2^30.

    Args:
      theta: the base.
      interleaved: pairs are channels (2i, 2i + 1), as in RoFormer and GPT-J; otherwise
        (i, i + R/2), as in GPT-NeoX and the Llama of `transformers`.
      fraction: of the channels, those that turn: the first R = fraction * H; the rest stay.
      frequencies: R/2 of them, in radians per token, in place of those of theta: for scaled
        variants (linear, NTK, YaRN, Llama 3).

    Source: Su et al. 2021, https://arxiv.org/abs/2104.09864.
    """

    theta: float = 10_000.0
    interleaved: bool = False
    fraction: float = 1.0
    frequencies: tuple[float, ...] | None = None

    def __call__(
        self, x: Float[Array, "B T N H"], positions: Int[Array, "#B T"]
    ) -> Float[Array, "B T N H"]:
        """x, turned.

        Args:
          x: query or key; computed in float32, returned in its own dtype.
          positions: of its tokens, in the whole sequence or document, whatever the sharding.

        Raises:
          ValueError: for an odd number of channels, or of frequencies that does not fit.
        """
        R = int(self.fraction * x.shape[-1])
        refusals.check_integers("positions", positions)
        refusals.check_rotary(R, x.shape[-1], self.fraction, self.frequencies)
        angles = _angles(positions, self._frequencies(R))[:, :, None]
        cos, sin = jnp.cos(angles), jnp.sin(angles)
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


def _angles(positions: Int[Array, "B T"], frequencies: np.ndarray) -> Float[Array, "B T R2"]:
    """`positions * frequencies` modulo a turn, in radians from -pi to pi."""
    turns = np.mod(frequencies / (2 * math.pi), 1.0)
    # 64 bits after the point, as 32, 16 and 16; of a float64 below 1 the first 53 are right.
    parts, words = turns, []
    for bits in (32, 16, 16):
        parts = parts * 2.0**bits
        words.append(np.floor(parts))
        parts = parts - words[-1]
    f0, f1, f2 = (jnp.asarray(word[None, None], jnp.uint32) for word in words)
    p: UInt32[Array, "B T 1"] = jnp.abs(positions).astype(jnp.uint32)[:, :, None]
    high, low = p >> 16, p & 0xFFFF
    # Whole turns overflow, and are meant to; of the rest what reaches the first 32 bits is kept.
    parts = p * f0 + high * f1 + ((high * f2) >> 16) + ((low * f1) >> 16)
    angles = parts.astype(jnp.int32).astype(jnp.float32) * jnp.float32(2 * math.pi / 2**32)
    return jnp.where((positions < 0)[:, :, None], -angles, angles)
