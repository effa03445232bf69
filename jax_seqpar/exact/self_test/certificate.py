"""Self-test of the arithmetic that exact attention relies on, for one backend.

The self-test runs a set of operations: those of `jax_seqpar.exact` on the backend at hand, or
another implementation's (`jax_seqpar.parity.torch_self_test` runs PyTorch's).
"""

from dataclasses import dataclass

import jax

from .check import Check
from .jax_operations import jax_operations
from .questions import ask


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
        checks = ask(jax_operations())
    return Certificate(f"JAX {jax.__version__} on {device.device_kind} ({device.platform})", checks)
