"""Cross entropy over the vocabulary, with z-loss (Chowdhery et al. 2022, arXiv:2204.02311)."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .arithmetic import exp, flush, nearest32
from .elementary import log
from .rounding import R, add, divide, multiply, narrow, subtract
from .sums import add_up, total

# Bits of a weight in the sum of all.
SUM_BITS = 32
IGNORE_INDEX = -100


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    z_loss: float = 0.0,
    ignore_index: int = IGNORE_INDEX,
    count: int | None = None,
    group: Any = None,
) -> Tensor:
    """The mean of `log(sum_j exp(z_j)) - z_label + z_loss lse^2` over the labels that count.

    Of a token: `x_j = R(z_j - max z)`, `p = exp(x)`, `L = sum rint(p 2^32)`, `l = R(L 2^-32)`,
    `lse = max z (+) log l`, loss `(log(l) (-) x_label) (+) (z_loss (*) (lse (*) lse))`, and 0 for a
    label that does not count. Of all: `total(losses) (/) N`.
    Backward: `w = (p (*) (1 (/) l)) (*) R(1 + 2 z_loss lse)`, `dz = R(w - [j = label]) (*) k`,
    `k = (1 (/) N) (*) g`, where g is the gradient of the mean, 1 in most programs.

    Args:
      logits: `[..., V]`, float32 or bfloat16; V at most 2^21.
      labels: integers, `[...]`.
      z_loss: as the nearest float32.
      ignore_index: a label that does not count.
      count: N, the labels that count, `count_labels` of the same arguments if None. Where
        gradients of several batches are accumulated, the number of labels in all of them.
      group: the ranks that hold the other tokens.

    Returns:
      A scalar, the same on every rank; 0 where no label counts. Differentiable once, in the
      logits.
    """
    n = count_labels(labels, ignore_index=ignore_index, group=group) if count is None else count
    # Of no label: a mean of 0, and not 0 / 0.
    return _CrossEntropy.apply(logits, labels, nearest32(z_loss), ignore_index, max(n, 1), group)  # pyright: ignore[reportReturnType]


@torch.no_grad()
def log_probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    """`x_label (-) log(l)` of each token, with the x and l of `cross_entropy`; no gradient.

    Args:
      logits: `[..., V]`, float32 or bfloat16.
      labels: integers, `[...]`.
    """
    x, _, _, denominator = _of_tokens(logits)
    return -subtract(log(denominator), x.gather(-1, labels[..., None])).squeeze(-1)


def _of_tokens(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, the largest logit, p and l of each token."""
    z = flush(logits)
    largest = z.amax(-1, keepdim=True)
    x = R(z - largest)
    p = exp(x.double())
    L = torch.round(p * 2.0**SUM_BITS).long().sum(-1, keepdim=True)
    return x, largest, p, R(L.double() * 2.0**-SUM_BITS)


def count_labels(labels: Tensor, *, ignore_index: int = IGNORE_INDEX, group: Any = None) -> int:
    """The number of labels that count, on all ranks."""
    return int(add_up((labels != ignore_index).sum(), group))


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        z_loss: float,
        ignore_index: int,
        count: int,
        group: Any,
    ) -> Tensor:
        x, largest, p, denominator = _of_tokens(logits)
        log_l = log(denominator)
        lse = add(largest, log_l)
        counts = (labels != ignore_index)[..., None]
        label = torch.where(counts, labels[..., None], 0)
        loss = subtract(log_l, x.gather(-1, label))
        loss = add(loss, multiply(z_loss, multiply(lse, lse)))
        ctx.z_loss, ctx.count, ctx.dtype = z_loss, count, logits.dtype
        ctx.save_for_backward(p.float(), denominator, lse, counts, label)
        losses = torch.where(counts, loss, 0.0).flatten()
        return divide(total(losses, 0, group), count)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        p, denominator, lse, counts, label = ctx.saved_tensors
        w = multiply(p, divide(1.0, denominator))
        w = multiply(w, R(1 + 2 * ctx.z_loss * flush(lse)))
        j = torch.arange(p.shape[-1], device=p.device)
        k = multiply(divide(1.0, ctx.count), grad)
        dz = multiply(subtract(w, (j == label).float()), k)
        return narrow(torch.where(counts, dz, 0.0), ctx.dtype), None, None, None, None, None
