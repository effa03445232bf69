"""Cross entropy over the vocabulary, with label smoothing (Szegedy et al. 2015, arXiv:1512.00567)
and z-loss (Chowdhery et al. 2022, arXiv:2204.02311)."""

from typing import Any, NamedTuple

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


class _Numbers(NamedTuple):
    """The numbers of a loss: e, `1 - e` and c, float32, and N, how many labels count."""

    smoothing: float
    label: float
    z_loss: float
    labels: int


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = IGNORE_INDEX,
    count: int | None = None,
    group: Any = None,
) -> Tensor:
    """The mean of `lse - (1 - e) z_label - e mean(z) + c lse^2` over the labels that count, e the
    label smoothing, c the z-loss.

    Of a token: `x_j = R(z_j - max z)`, `p = exp(x)`, `L = sum rint(p 2^32)`, `l = R(L 2^-32)`,
    `lse = max z (+) log l`, `m = total(x) (/) V`, `aim = R((1 - e) x_label + e m)`, loss
    `(log(l) (-) aim) (+) (c (*) (lse (*) lse))`, and 0 for a label that does not count. Of all:
    `total(losses) (/) N`.
    Backward: `w = (p (*) (1 (/) l)) (*) R(1 + 2 c lse)`, `q_j = (e (/) V) (+) [j = label] (1 - e)`,
    `dz = R(w - q) (*) ((1 (/) N) (*) g)`, where g is the gradient of the mean, 1 in most programs.

    Args:
      logits: `[..., V]`, float32 or bfloat16; V at most 2^21.
      labels: integers, `[...]`.
      label_smoothing: e, from 0 to 1; it and 1 - e as the nearest float32.
      z_loss: c, as the nearest float32, from 0 to 2^126.
      ignore_index: a label that does not count.
      count: N, the labels that count, `count_labels` of the same arguments if None. Where
        gradients of several batches are accumulated, the number of labels in all of them.
      group: the ranks that hold the other tokens.

    Returns:
      A scalar, the same on every rank; 0 where no label counts. Differentiable once, in the
      logits.

    Raises:
      ValueError: a z-loss or a label smoothing out of range.
    """
    _check_options(label_smoothing, z_loss)
    n = count_labels(labels, ignore_index=ignore_index, group=group) if count is None else count
    # Without a label the mean is 0, and not 0 / 0.
    e, k, c = map(nearest32, (label_smoothing, 1 - label_smoothing, z_loss))
    numbers = _Numbers(e, k, c, max(n, 1))
    return _CrossEntropy.apply(logits, labels, numbers, ignore_index, group)  # pyright: ignore[reportReturnType]


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
        numbers: _Numbers,
        ignore_index: int,
        group: Any,
    ) -> Tensor:
        x, largest, p, denominator = _of_tokens(logits)
        log_l = log(denominator)
        lse = add(largest, log_l)
        counts = (labels != ignore_index)[..., None]
        label = torch.where(counts, labels[..., None], 0)
        aim = R(flush(x.gather(-1, label)))
        # Without smoothing, or z-loss, its term is none: 0 times an infinite mean would be NaN.
        if numbers.smoothing:
            mean = divide(total(x, -1), x.shape[-1])[..., None]
            aim = R(numbers.label * flush(aim) + numbers.smoothing * flush(mean))
        loss = subtract(log_l, aim)
        if numbers.z_loss:
            loss = add(loss, multiply(numbers.z_loss, multiply(lse, lse)))
        ctx.numbers, ctx.dtype = numbers, logits.dtype
        ctx.save_for_backward(p.float(), denominator, lse, counts, label)
        losses = torch.where(counts, loss, 0.0).flatten()
        return divide(total(losses, 0, group), numbers.labels)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        p, denominator, lse, counts, label = ctx.saved_tensors
        numbers, V = ctx.numbers, p.shape[-1]
        w = multiply(p, divide(1.0, denominator))
        w = multiply(w, R(1 + 2 * numbers.z_loss * flush(lse)))
        is_label = torch.arange(V, device=p.device) == label
        q = add(divide(numbers.smoothing, V), torch.where(is_label, numbers.label, 0.0))
        dz = multiply(subtract(w, q), multiply(divide(1.0, numbers.labels), grad))
        return narrow(torch.where(counts, dz, 0.0), ctx.dtype), None, None, None, None


def _check_options(label_smoothing: float, z_loss: float) -> None:
    # The gradient multiplies by twice the z-loss, which has to be a float32, too.
    if not (0 <= label_smoothing <= 1 and 0 <= z_loss <= 2.0**126):
        raise ValueError(
            f"label_smoothing must be from 0 to 1 and z_loss from 0 to 2^126, got "
            f"{label_smoothing} and {z_loss}. Give 0 for none."
        )
