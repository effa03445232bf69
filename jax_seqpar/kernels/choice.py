"""Choice of a kernel for an attention on a platform, with the reason."""

import inspect
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax

from .._checks import check_platform
from ..mask import AttentionFunction, Mask, Spec
from ..mask.checks import check_call
from ..mask.keywords import from_keywords
from .blockwise import Blockwise
from .cudnn import compute_capability
from .kernel import Kernel
from .splash_or_cudnn import Fused
from .triton import Triton

# A100 and H100, with 163 KB of shared memory and more. Others have 99 KB, or were not tried.
ROOM_FOR_TRITON = ((8, 0), (9, 0))


@dataclass(frozen=True)
class KernelChoice:
    """A kernel, for `jax_seqpar.dot_product_attention(..., kernel=choice.kernel)`.

    Attributes:
      kernel: a `Fused`, a `Triton` or a `Blockwise`.
      name: "splash", "cuDNN", "triton" or "blockwise".
      reason: why, in one clause.
    """

    kernel: Kernel
    name: str
    reason: str


def choose_kernel(
    query: Any, key: Any, value: Any, *, platform: str | None = None, **keywords: Any
) -> KernelChoice:
    """The platform's fused kernel where it supports all that is asked, else the blockwise one.

    On a GPU cuDNN, then Triton, then the blockwise kernel.

    Looks at shapes, dtypes and Python values only, so the same call is decided the same way under
    `jax.jit`. Under Ulysses ask with the arrays of the whole sequence: the number of heads does not
    matter.

    Args:
      query, key, value: arrays, or `jax.ShapeDtypeStruct`s.
      platform: "tpu", "gpu" or "cpu"; if None, that of JAX's default backend.
      keywords: those that the attention will be called with; of arrays or `jax.ShapeDtypeStruct`s.

    Raises:
      TypeError: for a keyword that the kernels do not have.
      ValueError: for arrays and options that do not fit together.

    Example:
      choice = choose_kernel(query, key, value, is_causal=True, logits=Logits(sinks=sinks))
      print(choice.name, choice.reason)
      out = choice.kernel(query, key, value, is_causal=True, logits=Logits(sinks=sinks))
    """
    spec = checked_spec("choose_kernel", query, key, value, keywords)
    if platform is not None:
        check_platform(platform, ("tpu", "gpu", "cpu"))
    return choose(query, key, value, spec, platform)


def checked_spec(caller: str, query: Any, key: Any, value: Any, keywords: dict[str, Any]) -> Spec:
    """The Spec of an attention's keywords, of arrays or `jax.ShapeDtypeStruct`s.

    Args:
      caller: the function that was given them, for messages.

    Raises:
      TypeError: for a keyword that the attention does not have.
      ValueError: for arrays and options that do not fit together.
    """
    known = inspect.signature(AttentionFunction.__call__).parameters
    taken = [name for name in known if name not in ("self", "options", "return_residual")]
    unknown = keywords.keys() - set(taken)
    if unknown:
        raise TypeError(
            f"{caller}() got an unexpected keyword argument {min(unknown)!r}. Use "
            f"{', '.join(taken)}."
        )
    spec = from_keywords(**keywords)
    rng = spec.dropout.rng

    def check(rng: Any) -> None:
        dropout = replace(spec.dropout, rng=rng)
        check_call(query, key, value, replace(spec, dropout=dropout), shapes_suffice=True)

    # Only a traced key of no value tells its implementation.
    (partial(jax.eval_shape, check) if isinstance(rng, jax.ShapeDtypeStruct) else check)(rng)
    return spec


def choose(
    query: Any,
    key: Any,
    value: Any,
    spec: Spec,
    platform: str | None,
    *,
    residual: bool = False,
    check_vma: bool = False,
) -> KernelChoice:
    """`choose_kernel` of a Spec that has been checked, with the tokens that a strategy gives it.

    Args:
      residual: whether the log of the sums is wanted, which no kernel of a platform returns.
      check_vma: whether the caller's `jax.shard_map` checks how arrays vary, of which a Pallas
        kernel states nothing.
    """
    on = platform or jax.default_backend()
    fused, triton = Fused(platform), Triton(platform=platform)
    reason = fused.why_not(query, key, value, spec)
    if reason is None and residual:
        reason = f"{on}: return_residual is not supported by {fused.name}"
    # Without `held_keys` the kernel's error says what to write instead.
    if reason is None and check_vma and not fused.check_vma and spec.held_keys is not None:
        reason = f"{on}: a jax.shard_map that checks types is not supported by {fused.name}"
    if reason is None:
        return KernelChoice(fused, fused.name, f"{on}: {fused.name} supports all that is asked")
    takes_triton = not check_vma and _has_room_for_triton()
    if takes_triton and triton.why_not(query, key, value, spec) is None:
        return KernelChoice(triton, triton.name, f"{reason}; Triton supports all that is asked")
    blockwise = _blockwise(on, spec.mask)
    return KernelChoice(blockwise, blockwise.name, reason)


def _has_room_for_triton() -> bool:
    """Whether `Triton` is taken unasked: on NVIDIA's GPUs of known size, or where none is here."""
    capability = compute_capability()
    if capability is None:
        return jax.default_backend() != "gpu"
    return capability in ROOM_FOR_TRITON


def _blockwise(platform: str, mask: Mask) -> Blockwise:
    """Blockwise kernel with block sizes for the platform and the mask.

    On a GPU every block costs its launches, so blocks are large, unless small ones let the kernel
    skip blocks that the mask rules out.
    """
    skips = any(x is not None for x in (mask.window, mask.segment_ids, mask.positions))
    return Blockwise(1024, 1024) if platform == "gpu" and not skips else Blockwise()
