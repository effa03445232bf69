"""The platform's own kernels: splash attention on TPUs, cuDNN on NVIDIA GPUs."""

from typing import Any

import jax
from jaxtyping import Array, Float

from .. import refusals
from ..mask import Spec, keyword_form
from ..mask.tokens import varying_axes
from . import cudnn, splash

KERNELS = {"tpu": ("splash", splash.why_not), "gpu": ("cuDNN", cudnn.why_not)}


@keyword_form
def fused_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    spec: Spec,
    *,
    platform: str | None = None,
    interpret: bool = False,
) -> Float[Array, "B T N V"]:
    """`softmax(query . key * scale) . value`, on one device, by the platform's fastest kernel.

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
    precision. Inside `jax.shard_map` it needs `check_vma=False`. Both kernels recompute the weights
    for the gradient from the log of the sum of exp, one float32 number: at logits of 1e5 its
    steps are 1/128, and weights are off by up to 0.4 %. Those of `blockwise_attention` are not.

    Args:
      query, key, value: of one floating dtype; K divides N.
      bias, mask, ...: as in `jax_seqpar.mask.Attention`.
      platform: "tpu", "gpu" or "cpu", which has no such kernel; if None, that of JAX's default
        backend.
      interpret: run the TPU's kernel on any platform, slowly, for tests.

    Returns:
      The attention output, of the query's dtype, 0 for a query that may attend to no key.

    Raises:
      ValueError: for what does not fit together, and what the platform's kernel does not support.
    """
    refusals.check_interpret(platform, interpret)
    if platform is not None:
        refusals.check_platform(platform, ("tpu", "gpu", "cpu"))
    platform = "tpu" if interpret else platform or jax.default_backend()
    reason = why_not(query, key, value, spec, platform)
    if reason is not None:
        raise refusals.no_fused(reason, query.shape, key.shape, value.shape)
    if platform == "gpu":
        return cudnn.cudnn_attention(query, key, value, spec)
    if varying_axes((query, key, value, spec)):
        raise refusals.varies_under_pallas()
    return splash.splash_attention(query, key, value, spec, interpret=interpret)


def why_not(query: Any, key: Any, value: Any, spec: Spec, platform: str) -> str | None:
    """Why a platform's kernel cannot do what is asked, None if it can; one clause, no full stop.

    Args:
      query, key, value: anything with a shape and a dtype.
      spec: of such arrays, too.
    """
    if platform not in KERNELS:
        return f"{platform} has no fused kernel"
    _, reason_of = KERNELS[platform]
    reason = reason_of(query, key, value, spec)
    return None if reason is None else f"{platform}: {reason}"
