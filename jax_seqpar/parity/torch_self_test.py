"""The certificate's questions, put to PyTorch, and certificates as a table."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from .._extras import require_torch
from ..compare.numpy_conversion import numpy_to_torch, torch_to_numpy
from ..exact.self_test.certificate import Certificate, certify
from ..exact.self_test.operations import Operations
from ..exact.self_test.questions import DROPOUT_RATE, DROPOUT_SHAPE, SOFT_CAP, ask


def certificates(backend: str | None = None) -> list[Certificate]:
    """Certificates of the JAX backend and, where it is installed, of PyTorch on CPU."""
    found = [certify(backend)]
    return found if find_spec("torch") is None else [*found, certify_torch()]


def certify_torch() -> Certificate:
    """Asks `torch_ref.exact`, on CPU, what `jax_seqpar.exact.certify` asks JAX."""
    torch = require_torch()
    return Certificate(f"PyTorch {torch.__version__} on cpu", ask(_operations()))


def certificate_table(found: list[Certificate]) -> Table:
    """One row per question, one column per backend: how many answers are wrong."""
    table = Table(title="What exact attention relies on: wrong answers", box=box.SIMPLE)
    table.add_column("question")
    for certificate in found:
        table.add_column(certificate.backend, justify="right")
    for checks in zip(*(certificate.checks for certificate in found), strict=True):
        cells = (
            f"[{'green' if c.passed else 'bold red'}]{c.wrong:,} of {c.total:,}[/]" for c in checks
        )
        table.add_row(checks[0].name, *cells)
    return table


def _operations() -> Operations:
    torch = require_torch()
    from torch_ref import dropout
    from torch_ref.exact import arithmetic as exact
    from torch_ref.exact import elementary, exact_attention, matmul, normal, rotary, rounding

    def on_arrays(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arrays: torch_to_numpy(function(*map(numpy_to_torch, arrays)))

    def attention(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        query, key, value, grad = map(numpy_to_torch, arrays)
        leaves = [x.requires_grad_() for x in (query, key, value)]
        out = exact_attention(*leaves, is_causal=True)
        gradients = torch.autograd.grad(out, leaves, grad)
        return tuple(map(torch_to_numpy, (out.detach(), *gradients)))

    def narrowed(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        out = exact.out(numpy_to_torch(x))
        bfloat16, float16 = (exact.narrow(out, d) for d in (torch.bfloat16, torch.float16))
        return torch_to_numpy(bfloat16), torch_to_numpy(float16)

    def soft_cap(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        tanh, slope = exact.tanh_and_slope(numpy_to_torch(z), SOFT_CAP)
        return torch_to_numpy(SOFT_CAP * tanh), torch_to_numpy(slope)

    def plain_product(a: Any, b: Any) -> Any:
        return torch._int_mm(a, b) if a.dtype == torch.int8 else a @ b

    def normal_of(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        functions = (normal.normal_cdf, normal.normal_pdf)
        return tuple(on_arrays(f)(x) for f in functions)  # pyright: ignore[reportReturnType]

    def sines(angles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        cos, sin = rotary.cos_and_sin(numpy_to_torch(angles))
        return torch_to_numpy(sin), torch_to_numpy(cos)

    product = on_arrays(lambda a, b: matmul.mm(exact.flush(a), exact.flush(b)))

    return Operations(
        exp=on_arrays(lambda x: exact.exp(x.double()).float()),
        dot=on_arrays(lambda a, b: exact.dot(exact.flush(a), exact.flush(b))),
        weighted_sum=on_arrays(lambda p, x: exact.weighted_sum(p.double(), exact.flush(x))),
        gradient_sum=on_arrays(lambda d, x, a: exact.gradient_sum(d, exact.flush(x), a.double())),
        matmul=on_arrays(plain_product),
        flush=on_arrays(exact.flush),
        round32=on_arrays(lambda x: exact.round32(x).float()),
        widened=on_arrays(exact.round32),
        out=on_arrays(exact.out),
        narrowed=narrowed,
        reciprocal=on_arrays(lambda x: 1 / x),
        soft_cap=soft_cap,
        dropout=on_arrays(lambda key: dropout.keep(key, DROPOUT_RATE, *DROPOUT_SHAPE)),
        attention=attention,
        rounded=on_arrays(rounding.R),
        chained=on_arrays(lambda a, b, c: rounding.add(rounding.multiply(a, b), c)),
        log=on_arrays(elementary.log),
        reciprocal_root=on_arrays(elementary.rsqrt),
        normal=normal_of,
        sines=sines,
        sums=on_arrays(lambda x: x.sum(1)),
        products=lambda a, b: (product(a, b),),
    )
