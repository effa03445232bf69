"""Kernels that run for each feature on a platform, and why a faster one does not."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import ShapeDtypeStruct

from ..kernels import choose_kernel
from ..mask import Dropout, Logits, Mask
from .finding import in_one_line

B, S, N, H = 1, 4096, 8, 64
DTYPES = (jnp.bfloat16, jnp.float32)


@dataclass(frozen=True)
class Choices:
    """The kernels for one feature, in 16 and in 32 bits, and why those, once or by dtype."""

    feature: str
    kernels: tuple[str, str]
    reason: str


def features() -> dict[str, tuple[int, dict[str, Any]]]:
    """Number of KV heads and keywords of an attention `[1, 4096, 8, 64]`, by name of a feature."""
    causal = Mask(is_causal=True)
    per_head: Any = ShapeDtypeStruct((N,), jnp.float32)
    documents = ShapeDtypeStruct((B, S), jnp.int32)
    dropout = Dropout(0.1, jax.eval_shape(jax.random.key, 0))
    return {
        "no mask": (N, {}),
        "causal": (N, {"mask": causal}),
        "window": (N, {"mask": Mask(is_causal=True, local_window_size=(1023, 0))}),
        "documents": (N, {"mask": Mask(is_causal=True, segment_ids=documents)}),
        "ALiBi": (N, {"mask": causal, "logits": Logits(alibi_slopes=per_head)}),
        "sinks": (N, {"mask": causal, "logits": Logits(sinks=per_head)}),
        "dropout": (N, {"mask": causal, "dropout": dropout}),
        "dense mask": (N, {"mask": ShapeDtypeStruct((B, 1, S, S), jnp.bool_)}),
        "grouped queries": (N // 4, {"mask": causal}),
    }


def choices(platform: str) -> list[Choices]:
    """Kernels that `choose_kernel` takes for each feature on "cpu", "gpu" or "tpu"."""
    rows = []
    for feature, (kv_heads, keywords) in features().items():
        found = [_choice(platform, dtype, kv_heads, keywords) for dtype in DTYPES]
        (name_16, reason_16), (name_32, reason_32) = found
        reason = reason_16
        if reason_16 != reason_32:
            reason = f"of 16 bits: {reason_16}; of 32 bits: {reason_32}"
        rows.append(Choices(feature, (name_16, name_32), f"{reason}."))
    return rows


def _choice(platform: str, dtype: Any, kv_heads: int, keywords: dict[str, Any]) -> tuple[str, str]:
    query, key = (ShapeDtypeStruct((B, S, heads, H), dtype) for heads in (N, kv_heads))
    try:
        choice = choose_kernel(query, key, key, platform=platform, **keywords)
    except Exception as error:
        return "none", in_one_line(error)
    return choice.name, choice.reason.removeprefix(f"{platform}: ")
