"""A function of query, key and value as a kernel."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxtyping import Array

from ..mask import Spec
from ..mask.keywords import JAX_KEYWORDS, to_flat
from .kernel import Kernel, check_local_output


@dataclass(frozen=True, eq=False)
class FunctionKernel(Kernel):
    """A function of one device, called like `jax.nn.dot_product_attention`.

    Of the keywords it is given those of `jax.nn` that differ from their defaults; bind whatever
    else it takes. It is traced under `jax.jit`, so it must be pure. A function passed as `kernel=`
    is made one of these. Where it calls a kernel of this library inside, what that says of itself
    is lost: around `Exact()` the gradients of a KV head on several devices are added up with
    rounding.

    Args:
      function: `(query [B, T, n, H], key [B, S, k, H], value [B, S, k, V], **keywords)` to
        `[B, T, n, V]`, of the query's dtype.
      check_vma: of `jax.shard_map`; False for a Pallas kernel, which does not state how its output
        varies over the mesh.
    """

    function: Callable[..., Any]
    check_vma: bool = True  # pyright: ignore

    needs_a_key = True

    @property
    def name(self) -> str:
        return "a function"

    def attend(self, query: Array, key: Array, value: Array, spec: Spec) -> tuple[Array, None]:
        reason = self.why_not(query, key, value, spec)
        if reason is not None:
            raise ValueError(
                f"kernel={_name(self.function)}: {reason}. Use a kernel that supports it, for "
                f"example jax_seqpar.Blockwise()."
            )
        out = self.function(query, key, value, **to_flat(spec))
        check_local_output(out, query, value)
        return out, None

    def why_not(self, query: Any, key: Any, value: Any, spec: Spec) -> str | None:
        if spec.held_queries is not None or spec.held_keys is not None:
            return "a function cannot be told that it has a part of the tokens"
        asked = to_flat(spec)
        for name in asked:
            if name not in JAX_KEYWORDS:
                return f"a function is given the keywords of jax.nn only, and {name} is none"
        try:
            parameters = inspect.signature(self.function).parameters
        except (TypeError, ValueError):  # builtins have no signature; calling them will tell
            return None
        if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
            return None
        for name in asked:
            if name not in parameters:
                return f"it does not name the parameter {name!r}, only {list(parameters)}"
        return None


def as_kernel(kernel: Kernel | Callable[..., Any]) -> Kernel:
    """A kernel, or a function as one.

    Raises:
      ValueError: for anything else.
    """
    if isinstance(kernel, Kernel):
        return kernel
    # A function around a kernel loses the kernel's properties, such as who adds up the gradients of
    # a KV head.
    inner = inspect.unwrap(getattr(kernel, "func", kernel)) if callable(kernel) else None
    is_class = isinstance(kernel, type) and issubclass(kernel, Kernel)
    if callable(kernel) and not is_class and not isinstance(inner, Kernel):
        return FunctionKernel(kernel)
    if is_class:
        raise ValueError(
            f"kernel must be a kernel, got the class {kernel.__name__}. Write "
            f"kernel=jax_seqpar.{kernel.__name__}()."
        )
    if inner is not None:
        raise ValueError(
            f"kernel must be a kernel, got a function around {inner!r}. Pass the kernel itself; "
            f"pass what is bound to it to jax_seqpar.dot_product_attention, and put jax.jit and "
            f"jax.checkpoint around that."
        )
    name = str(kernel).capitalize()
    name = name if name in ("Dense", "Blockwise", "Exact", "Fused") else "Blockwise"
    raise ValueError(
        f"kernel must be a kernel, or a function of query, key and value, got {kernel!r}. Write "
        f"kernel=jax_seqpar.{name}(), or leave it out."
    )


def _name(f: Any) -> str:
    return getattr(f, "__name__", repr(f))
