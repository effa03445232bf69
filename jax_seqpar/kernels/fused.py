"""The platform's own kernels: splash attention on TPUs, cuDNN on NVIDIA GPUs."""

from typing import Any

import jax
from jaxtyping import Array, Bool, Float, Integer

from .. import refusals
from ..mask import PerToken, Spec, Window, describe
from ..mask.tokens import varying_axes
from . import cudnn, splash

KERNELS = {"tpu": ("splash", splash.why_not), "gpu": ("cuDNN", cudnn.why_not)}


def fused_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    *,
    bias: Float[Array, "..."] | None = None,
    mask: Bool[Array, "..."] | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    query_offset: int = 0,
    positions: PerToken | None = None,
    query_seq_lengths: Integer[Array, "B"] | None = None,
    key_value_seq_lengths: Integer[Array, "B"] | None = None,
    local_window_size: Window | None = None,
    segment_ids: PerToken | None = None,
    alibi_slopes: Float[Array, "N"] | None = None,
    logits_soft_cap: float | None = None,
    sinks: Float[Array, "N"] | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: Any = None,
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
      bias, mask, ...: as `jax_seqpar.mask` says.
      platform: "tpu", "gpu" or "cpu", which has no such kernel; if None, that of JAX's default
        backend.
      interpret: run the TPU's kernel on any platform, slowly, for tests.

    Returns:
      The attention output, of the query's dtype, 0 for a query that may attend to no key.

    Raises:
      ValueError: for what does not fit together, and what the platform's kernel does not support.
    """
    spec = describe(
        query,
        key,
        value,
        bias=bias,
        mask=mask,
        scale=scale,
        is_causal=is_causal,
        query_offset=query_offset,
        positions=positions,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size,
        segment_ids=segment_ids,
        alibi_slopes=alibi_slopes,
        logits_soft_cap=logits_soft_cap,
        sinks=sinks,
        dropout_rate=dropout_rate,
        dropout_rng=dropout_rng,
    )
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
