"""Bugs of real ports, for PyTorch's exact training: some change few bits, and each is seen."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from torch_ref.exact import decoder, loss, optimizer, training_step
from torch_ref.exact.arithmetic import flush
from torch_ref.exact.rounding import R, divide, multiply, square_root


def _adamw(inside_root: bool, decays: Callable[[Tensor], bool]) -> Callable[..., Any]:
    """AdamW, with epsilon inside the root of the second moment or without decay of some weights."""
    true = optimizer.adamw

    def adamw(w: Tensor, m: Tensor, v: Tensor, g: Tensor, numbers: Any) -> Any:
        if not decays(w):
            numbers = numbers._replace(wd=0.0)
        if not inside_root:
            return true(w, m, v, g, numbers)
        m = R(numbers.b1 * flush(m) + numbers.c1 * flush(g))
        v = R(numbers.b2 * flush(v) + numbers.c2 * flush(multiply(g, g)))
        root = square_root(R(flush(multiply(v, numbers.k2)) + numbers.eps))
        return (
            optimizer.moved(w, divide(multiply(m, numbers.k1), root), numbers.lr, numbers.wd),
            m,
            v,
        )

    return adamw


def _late_labels(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return _TRUE_LOSS(logits, torch.roll(labels, -1, dims=1), **options)


def _one_more_label(logits: Tensor, labels: Tensor, *, count: int, **options: Any) -> Tensor:
    """The mean over all tokens, of which the last has no label."""
    return _TRUE_LOSS(logits, labels, count=count + 1, **options)


_TRUE_LOSS = loss.cross_entropy
_TRUE_TABLES = decoder.rotary_tables

BUGS: dict[str, tuple[Any, str, Any]] = {
    "rotary off by one": (
        decoder,
        "rotary_tables",
        lambda positions, *sizes: _TRUE_TABLES(positions + 1, *sizes),
    ),
    "norms that do not decay": (training_step, "adamw", _adamw(False, lambda w: w.ndim > 1)),
    "epsilon inside the root": (training_step, "adamw", _adamw(True, lambda w: True)),
    "labels a token late": (training_step, "cross_entropy", _late_labels),
    "a label too many in the mean": (training_step, "cross_entropy", _one_more_label),
}


@contextmanager
def planted(bug: str) -> Iterator[None]:
    """The bug of this name, in this process, while the context lasts.

    Raises:
      ValueError: for an unknown one.
    """
    if bug not in BUGS:
        raise ValueError(f"no bug is called {bug!r}. Write one of {sorted(BUGS)}.")
    module, name, wrong = BUGS[bug]
    with mock.patch.object(module, name, wrong):
        yield
