"""Which kernel to take, and why."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jaxtyping import Array

from .. import refusals
from ..mask.keywords import FIELDS, checked_spec, spec_of
from .blockwise import blockwise_attention
from .fused import KERNELS, fused_attention, why_not


@dataclass(frozen=True)
class KernelChoice:
    """A kernel, for `jax_seqpar.dot_product_attention(..., attention=choice.attention)`.

    Attributes:
      attention: `fused_attention` or `blockwise_attention`.
      name: "splash", "cuDNN" or "blockwise".
      reason: why, in one clause.
    """

    attention: Callable[..., Array]
    name: str
    reason: str


def choose_kernel(
    query: Any, key: Any, value: Any, *, platform: str | None = None, **keywords: Any
) -> KernelChoice:
    """The platform's fused kernel where it supports all that is asked, else the blockwise one.

    Looks at shapes, dtypes and Python values only, so the same call is decided the same way under
    `jax.jit`. Under Ulysses ask with the arrays of the whole sequence: the number of heads does not
    matter.

    Args:
      query, key, value: arrays, or `jax.ShapeDtypeStruct`s.
      platform: "tpu", "gpu" or "cpu"; if None, that of JAX's default backend.
      keywords: those that the attention will be called with; arrays or `jax.ShapeDtypeStruct`s.

    Raises:
      TypeError: for a keyword that the kernels do not have.
      ValueError: for what does not fit together.

    Example:
      choice = choose_kernel(query, key, value, is_causal=True, sinks=sinks)
      print(choice.name, choice.reason)
      out = choice.attention(query, key, value, is_causal=True, sinks=sinks)
    """
    unknown = keywords.keys() - FIELDS.keys()
    if unknown:
        raise TypeError(f"choose_kernel() got an unexpected keyword argument {min(unknown)!r}")
    refusals.check_arrays(query, key, value)
    rng = keywords.get("dropout_rng")

    def check(rng: Any) -> None:
        checked_spec(query.shape, key.shape, **keywords | {"dropout_rng": rng})

    # Only a traced key of no value tells its implementation.
    (partial(jax.eval_shape, check) if isinstance(rng, jax.ShapeDtypeStruct) else check)(rng)
    spec = spec_of(**keywords)
    if platform is not None:
        refusals.check_platform(platform, ("tpu", "gpu", "cpu"))
    on = platform or jax.default_backend()
    reason = why_not(query, key, value, spec, on)
    if reason is not None:
        return KernelChoice(blockwise_attention, "blockwise", reason)
    attention = fused_attention if platform is None else partial(fused_attention, platform=platform)
    name, _ = KERNELS[on]
    return KernelChoice(attention, name, f"{on}: {name} supports all that is asked")
