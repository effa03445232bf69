"""Programs of eager calls, compiled once for each kernel and kept as long as the kernel lives."""

import weakref
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import jax
import numpy as np

from .kernels import FunctionKernel, Kernel

# A compiled function refers to its kernel weakly, so that one made inside a loop is collected, with
# its programs, as soon as the caller drops it. (Static arguments of one jax.jit would keep up to
# 2048 kernels, with the arrays that they close over.)
# Programs by the identity of the function: two equal ones need not compute the same.
_COMPILED: dict[int, Callable[..., Any]] = {}


def compiled_with(
    kernel: Kernel, function: Callable[..., Any], static: Hashable
) -> Callable[..., Any]:
    """`partial(function, kernel, static)` under `jax.jit`, traced once for equal kernels.

    Functions are compared by identity. A `functools.partial` has another identity each time it is
    written, so partials are compared by value: the function, and what is bound to it. Arrays bound
    to it become operands.

    Other kernels are values, and so are static arguments of one `jax.jit`.

    Not `inline=True`: JAX would evaluate the derivative of an eager call operation by operation,
    with a compilation for each at every call (21 measured, JAX 0.10.2). Inside a caller's
    `jax.jit`, XLA inlines the program.

    Args:
      function: called as `function(kernel, static, *operands)`.
    """
    if not isinstance(kernel, FunctionKernel):
        return partial(_values, function, kernel, static)
    # Partials of partials are one partial.
    own = kernel.function
    own = own if isinstance(own, partial) else partial(own)
    leaves, tree = jax.tree.flatten((own.args, own.keywords))
    arrays = [x for x in leaves if _is_array(x)]
    # With type and sign: 1, 1.0 and True are equal, and so are 0.0 and -0.0.
    typed = tuple(None if _is_array(x) else (x, type(x), _written(x)) for x in leaves)
    key = (function, kernel.check_vma, static, tree, typed)
    try:
        hash(key)
        program = _COMPILED.get(id(own.func))
        if program is None:
            program = _COMPILED[id(own.func)] = _program(_leaving_with(own.func))
    except TypeError:  # no hash, or no weak references to it: nothing to find it by again
        return partial(function, kernel, static)
    return partial(program, key, arrays)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _values(function: Callable[..., Any], kernel: Kernel, static: Any, *operands: Any) -> Any:
    return function(kernel, static, *operands)


def _leaving_with(function: Any) -> weakref.ref[Any]:
    """A reference to a function, whose end takes its program along."""
    key = id(function)
    return weakref.ref(function, lambda _: _COMPILED.pop(key, None))


def _program(base: weakref.ref[Any]) -> Callable[..., Any]:
    @partial(jax.jit, static_argnums=0)
    def attend(key: Any, arrays: list[Any], *operands: Any) -> Any:
        function, check_vma, static, tree, leaves = key
        rest = iter(arrays)
        bound = [next(rest) if x is None else x[0] for x in leaves]
        args, keywords = jax.tree.unflatten(tree, bound)
        bare: Any = base()
        whole = partial(bare, *args, **keywords) if args or keywords else bare
        return function(FunctionKernel(whole, check_vma), static, *operands)

    return attend


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray)


def _written(x: Any) -> str | None:
    return repr(x) if isinstance(x, float | complex | np.inexact) else None
