"""Self-test of the arithmetic that exact attention relies on, for one backend.

The self-test runs a set of operations: those of `jax_seqpar.exact` on the backend at hand, or
another implementation's (`jax_seqpar.parity.torch_self_test` runs PyTorch's).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...mask import threefry
from .. import arithmetic, elementary, engines, matmul, norm, normal, rotary, rounding
from ..attention import exact_attention
from .check import Check
from .operations import Operations
from .questions import DROPOUT_RATE, DROPOUT_SHAPE, SOFT_CAP, ask
from .training_questions import ANGLE_BITS


@dataclass(frozen=True)
class Certificate:
    """A backend's answers. `trusted`: exact attention has the specified bits on the backend."""

    backend: str
    checks: tuple[Check, ...]

    @property
    def trusted(self) -> bool:
        return all(check.passed for check in self.checks)

    def __str__(self) -> str:
        failed = [f"{c.name} ({c.wrong} of {c.total} wrong)" for c in self.checks if not c.passed]
        if failed:
            return f"{self.backend}: NOT TRUSTED, its bits may differ: {', '.join(failed)}."
        return f"{self.backend}: trusted, its bits are those of the specification."


def certify(backend: str | None = None) -> Certificate:
    """Self-test of a JAX backend, compiled, for the arithmetic of exact attention. Takes seconds.

    Args:
      backend: "cpu", "gpu", "tpu"; None for the default one.

    Raises:
      RuntimeError: of JAX, for a backend that is not there.
    """
    device = jax.devices(backend)[0]
    with jax.default_device(device):
        checks = ask(_jax_operations())
    return Certificate(f"JAX {jax.__version__} on {device.device_kind} ({device.platform})", checks)


def _jax_operations() -> Operations:
    def wide(function: Callable[..., Any]) -> Callable[..., Any]:
        compiled = jax.jit(function)

        def call(*arrays: np.ndarray) -> Any:
            with jax.enable_x64(True):
                return jax.tree.map(np.asarray, compiled(*map(jnp.asarray, arrays)))

        return call

    def attention(query, key, value, grad):
        def attend(*operands):
            return exact_attention(*operands, is_causal=True)

        out, pull = jax.vjp(attend, query, key, value)
        return (out, *pull(grad))

    def plain_product(a, b):
        accumulated = jnp.int32 if a.dtype == jnp.int8 else a.dtype
        return jnp.matmul(a, b, preferred_element_type=accumulated)

    def both_narrowed(x):
        return tuple(
            arithmetic.narrowed(arithmetic.out(x), jnp.dtype(dtype))
            for dtype in (jnp.bfloat16, jnp.float16)
        )

    def soft_cap(z):
        return elementary.soft_cap(z, SOFT_CAP), elementary.soft_cap_slope(z, SOFT_CAP)

    def keep(key):
        B, N, T, S = DROPOUT_SHAPE
        heads = threefry.head_keys(key, B, N)
        return threefry.keep(heads, DROPOUT_RATE, jnp.arange(T), jnp.arange(S))

    def sines(angles):
        # Positions, of which one is one unit of an angle.
        one = (1 << rotary.TURN_BITS - ANGLE_BITS,)
        return tuple(x[0, :, 0] for x in rotary.sines(angles[None], one))

    def products(a, b):
        found = (engines.float64_products, engines.int8_products)
        return tuple(matmul.matmul("MK,KN->MN", a, b, engine=engine) for engine in found)

    return Operations(
        exp=wide(elementary.exp),
        dot=wide(arithmetic.exact_dot),
        weighted_sum=wide(arithmetic.weighted_sum),
        gradient_sum=wide(arithmetic.gradient_sum),
        matmul=wide(plain_product),
        flush=wide(arithmetic.flush),
        round32=wide(arithmetic.round32),
        widened=wide(lambda x: arithmetic.round32(x).astype(jnp.float64)),
        out=wide(arithmetic.out),
        narrowed=wide(both_narrowed),
        reciprocal=wide(lambda x: 1.0 / x),
        soft_cap=wide(soft_cap),
        dropout=wide(keep),
        attention=wide(attention),
        rounded=wide(rounding.nearest),
        chained=wide(lambda a, b, c: rounding.add(rounding.multiply(a, b), c)),
        log=wide(elementary.log),
        reciprocal_root=wide(norm.reciprocal_root),
        normal=wide(lambda x: (normal.normal_cdf(x), normal.normal_pdf(x))),
        sines=wide(sines),
        sums=wide(lambda x: x.sum(axis=1)),
        products=wide(products),
    )
