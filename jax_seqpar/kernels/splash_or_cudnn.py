"""The platform's own kernels: splash attention on TPUs, cuDNN on NVIDIA GPUs."""

import math
from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array, Float

from .._checks import check_flag, check_platform, got
from ..mask import Spec
from ..varying_axes import varying_axes
from . import cudnn, splash, splash_parts
from .kernel import Kernel
from .parts import Part
from .softmax_residual import Residual

KERNELS = {"tpu": ("splash", splash.why_not), "gpu": ("cuDNN", cudnn.why_not)}


@dataclass(frozen=True)
class Fused(Kernel):
    """`softmax(query . key * scale) . value`, by the platform's fastest kernel.

    Memory linear in the tokens; the first reverse-mode derivative only. What the kernel lacks is
    refused: `choose_kernel` says beforehand, and takes another attention instead.

    | | TPU, splash | NVIDIA GPU, cuDNN |
    |---|---|---|
    | dtypes | bfloat16, float32 | bfloat16, float16 |
    | H, V | up to 1024 (float32: 512) | H = V, 8, 16 ... 256 (128 before Hopper) |
    | `scale`, `is_causal`, lengths, T != S | yes | yes |
    | `local_window_size` | yes | `(left, 0)` or causal, T = S, without lengths of keys |
    | `query_offset`, `segment_ids`, `logits_soft_cap`, `sinks` | yes | no |
    | `bias`, `mask`, `positions`, `alibi_slopes`, dropout | no | no |

    Splash skips the blocks that causality and windows rule out, of up to 2^19 causal tokens, or
    2^20 in bfloat16 with H and V up to 128, there without dq; of longer ones it computes all. It
    rounds the scaled query to its dtype, and its products of float32 are those of the TPU's default
    precision. It attends to a part of the keys for a ring, in float32; cuDNN, whose output has 16
    bits, does not. Inside `jax.shard_map` it needs `check_vma=False`. Both kernels recompute the
    weights for the gradient from the log of the sum of exp, one float32 number: at logits of 1e5
    its steps are 1/128, and weights are off by up to 0.4 %. Those of `blockwise_attention` are not.

    Args:
      platform: "tpu", "gpu" or "cpu", which has no such kernel; if None, that of JAX's default
        backend.
      interpret: run the TPU's kernel on any platform, slowly, for tests.
    """

    platform: str | None = None
    interpret: bool = False

    def __post_init__(self) -> None:
        check_flag("interpret", self.interpret)
        if self.platform is not None:
            check_platform(self.platform, ("tpu", "gpu", "cpu"))
        if self.interpret and self.platform not in (None, "tpu"):
            raise ValueError(
                f"interpret=True runs the TPU's kernel on any platform, got "
                f"platform={self.platform!r}, too. Leave one of them out."
            )

    # Neither kernel says what a row without a key is.
    needs_a_key = True

    @property
    def name(self) -> str:
        return KERNELS[self._platform][0] if self._platform in KERNELS else "fused"

    @property
    def gives_parts(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._platform == "tpu"

    @property
    def check_vma(self) -> bool:
        return self._platform != "tpu"

    @property
    def _platform(self) -> str:
        return "tpu" if self.interpret else self.platform or jax.default_backend()

    def attend(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B S K H"],
        value: Float[Array, "B S K V"],
        spec: Spec,
    ) -> tuple[Array, None]:
        self._check(query, key, value, spec)
        if self._platform == "gpu":
            return cudnn.cudnn_attention(query, key, value, spec), None
        out = splash.splash_attention(query, key, value, spec, interpret=self.interpret)
        return out, None

    def attend_part(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B S K H"],
        value: Float[Array, "B S K V"],
        spec: Spec,
    ) -> Part:
        self._check(query, key, value, spec, part=True)
        return splash_parts.attend_part(query, key, value, spec, interpret=self.interpret)

    def part_gradients(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B S K H"],
        value: Float[Array, "B S K V"],
        spec: Spec,
        D: Float[Array, "B T N"],
        residual: Residual,
        out_gradient: Float[Array, "B T N V"],
    ) -> tuple[Array, Array, Array, dict[str, Array]]:
        self._check(query, key, value, spec, part=True)
        rows = D, residual, out_gradient
        return splash_parts.part_gradients(query, key, value, spec, *rows, interpret=self.interpret)

    def _check(
        self, query: Array, key: Array, value: Array, spec: Spec, *, part: bool = False
    ) -> None:
        """Raises ValueError for a call that the kernel cannot do."""
        reason = self.why_not(query, key, value, spec)
        if spec.held_keys is not None and not part:
            reason = "a part of the keys is attended to by attend_part"
        if reason is not None:
            raise ValueError(
                f"Fused cannot do this: {reason}. {got(query.shape, key.shape, value.shape)} "
                f"Write kernel=jax_seqpar.Blockwise(), which supports it, or take that of "
                f"jax_seqpar.choose_kernel(query, key, value, ...)."
            )
        if self._platform == "tpu" and (axes := varying_axes((query, key, value, spec))):
            raise ValueError(
                f"Fused on platform 'tpu' is a Pallas kernel, which does not state how its output "
                f"varies over the mesh axes {sorted(axes)}. Write check_vma=False in the "
                f"jax.shard_map."
            )

    def workspace(
        self,
        query: tuple[int, ...],
        key: tuple[int, ...],
        value: tuple[int, ...],
        *,
        itemsize: int,
        gradients: bool,
    ) -> int:
        """A float32 number for each row: the positions of keys, or the log of the sums of heads.

        Splash has each number in all 128 lanes of a register.
        """
        B, T, N, _ = query
        lanes = 128 if self._platform == "tpu" else 1
        return 4 * lanes * (B * T * N if gradients else key[1])

    def part_workspace(
        self,
        query: tuple[int, ...],
        key: tuple[int, ...],
        value: tuple[int, ...],
        *,
        degree: int,
        itemsize: int,
        gradients: bool,
        directions: int = 1,
    ) -> int:
        """Splash has its operands heads first, and again in float32 those that `splash_parts`
        widens; positions and the log of the sums are in all 128 lanes of a register.
        """
        B, T, N, _ = query
        widened = (query, key, value) if gradients else (query,)
        bytes_wide = 4 if itemsize < 4 else 0
        operands = itemsize * sum(map(math.prod, (query, key, value)))
        return operands + bytes_wide * sum(map(math.prod, widened)) + 4 * 128 * (B * T * N + T)

    def why_not(self, query: Any, key: Any, value: Any, spec: Spec) -> str | None:
        if self._platform not in KERNELS:
            return f"{self._platform} has no fused kernel"
        _, reason_of = KERNELS[self._platform]
        reason = reason_of(query, key, value, spec)
        return None if reason is None else f"{self._platform}: {reason}"


fused_attention = Fused()
