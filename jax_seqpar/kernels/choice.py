"""Which kernel to take, and why."""

import inspect
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax

from .._checks import check_arrays, check_platform
from ..mask import Attention, Spec
from ..mask.checks import check_spec
from ..mask.keywords import spec_of_keywords
from .blockwise import Blockwise
from .fused import KERNELS, Fused
from .kernel import Kernel


@dataclass(frozen=True)
class KernelChoice:
    """A kernel, for `jax_seqpar.dot_product_attention(..., kernel=choice.kernel)`.

    Attributes:
      kernel: a `Fused` or a `Blockwise`.
      name: "splash", "cuDNN" or "blockwise".
      reason: why, in one clause.
    """

    kernel: Kernel
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
      keywords: those that the attention will be called with; of arrays or `jax.ShapeDtypeStruct`s.

    Raises:
      TypeError: for a keyword that the kernels do not have.
      ValueError: for what does not fit together.

    Example:
      choice = choose_kernel(query, key, value, is_causal=True, logits=Logits(sinks=sinks))
      print(choice.name, choice.reason)
      out = choice.kernel(query, key, value, is_causal=True, logits=Logits(sinks=sinks))
    """
    known = inspect.signature(Attention.__call__).parameters
    taken = [name for name in known if name not in ("self", "options", "return_residual")]
    unknown = keywords.keys() - set(taken)
    if unknown:
        raise TypeError(
            f"choose_kernel() got an unexpected keyword argument {min(unknown)!r}. Use "
            f"{', '.join(taken)}."
        )
    check_arrays(query, key, value)
    spec = spec_of_keywords(**keywords)
    rng = spec.dropout.rng

    def check(rng: Any) -> None:
        dropout = replace(spec.dropout, rng=rng)
        check_spec(query.shape, key.shape, replace(spec, dropout=dropout))

    # Only a traced key of no value tells its implementation.
    (partial(jax.eval_shape, check) if isinstance(rng, jax.ShapeDtypeStruct) else check)(rng)
    if platform is not None:
        check_platform(platform, ("tpu", "gpu", "cpu"))
    return choose(query, key, value, spec, platform)


def choose(query: Any, key: Any, value: Any, spec: Spec, platform: str | None) -> KernelChoice:
    """`choose_kernel` of a Spec that has been checked."""
    on = platform or jax.default_backend()
    fused = Fused(platform)
    reason = fused.why_not(query, key, value, spec)
    if reason is not None:
        return KernelChoice(Blockwise(), "blockwise", reason)
    name, _ = KERNELS[on]
    return KernelChoice(fused, name, f"{on}: {name} supports all that is asked")
