"""AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) and SGD with momentum, and their numbers.

The numbers of a step are found on the host, by additions, products and divisions of float64 and
without `pow`, and rounded to float32: every framework is given the same.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .arithmetic import SMALLEST_NORMAL, check_decay_rate, check_finite, flush, nearest32
from .rotary import cos_and_sin
from .rounding import R, add, divide, multiply, square_root

# Numbers that are updated at a time: 2^15 stay in the caches from one operation to the next. Of 4
# million, AdamW took 0.45 s in such chunks and 1.03 s at once, on one core.
CHUNK = 2**15


class AdamWNumbers(NamedTuple):
    """The float32 numbers of a step: `c1 = 1 - b1`, `k1 = 1 / (1 - b1^t)`, the same for 2."""

    lr: float
    b1: float
    c1: float
    k1: float
    b2: float
    c2: float
    k2: float
    eps: float
    wd: float


def adamw_numbers(
    step: int,
    lr: float,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> AdamWNumbers:
    """The numbers of step t, counted from 1; each is rounded to float32 at the end.

    Raises ValueError for a number that is not finite in float32 or out of range: b1 and b2 from 0
    to below 1, eps a normal float32 (a weight without any gradient would be 0 / 0), the others at
    least 0.
    """
    check_decay_rate("b1", b1, 0.9)
    check_decay_rate("b2", b2, 0.999)
    check_finite("eps", eps, 1e-8, least=SMALLEST_NORMAL)
    check_finite("lr", lr, 1e-3)
    check_finite("weight_decay", weight_decay, 0.01)
    powers = [1.0, 1.0]
    for _ in range(step):
        powers = [powers[0] * b1, powers[1] * b2]
    k1, k2 = (1 / (1 - power) for power in powers)
    numbers = (lr, b1, 1 - b1, k1, b2, 1 - b2, k2, eps, weight_decay)
    return AdamWNumbers(*map(nearest32, numbers))


def cosine_rate(step: int, steps: int, peak: float) -> float:
    """A learning rate that falls from its peak at step 0 to 0 at `steps` along half a cosine.

    `peak * (0.5 + 0.5 cos)` in float64, of the angle of `round(2^23 step / steps)` 2^-24 turns.
    """
    # The nearest integer, half up, without a float.
    angle = ((step << 24) + steps) // (2 * steps)
    cos, _ = cos_and_sin(torch.tensor(angle))
    return nearest32(peak * (0.5 + 0.5 * cos.item()))


def adamw(
    w: Tensor, m: Tensor, v: Tensor, g: Tensor, numbers: AdamWNumbers
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of a tensor: the new weight and moments, of float32.

    `m = R(b1 m + c1 g)`, `v = R(b2 v + c2 q)` with `q = g (*) g`,
    `u = (m (*) k1) (/) (R(sqrt(v (*) k2)) (+) eps)` and `w (+) R(-lr R(u + wd w))`.
    """
    chunks = zip(*(x.flatten().split(CHUNK) for x in (w, m, v, g)), strict=True)
    parts = [_adamw(a, b, c, d, numbers) for a, b, c, d in chunks]
    w_, m_, v_ = (torch.cat(part).view(w.shape) for part in zip(*parts, strict=True))
    return w_, m_, v_


def _adamw(
    w: Tensor, m: Tensor, v: Tensor, g: Tensor, numbers: AdamWNumbers
) -> tuple[Tensor, Tensor, Tensor]:
    lr, b1, c1, k1, b2, c2, k2, eps, wd = numbers
    m = R(b1 * flush(m) + c1 * flush(g))
    v = R(b2 * flush(v) + c2 * flush(multiply(g, g)))
    u = divide(multiply(m, k1), add(square_root(multiply(v, k2)), eps))
    return moved(w, u, lr, wd), m, v


def sgd(
    w: Tensor, m: Tensor, g: Tensor, *, lr: float, momentum: float, weight_decay: float = 0.0
) -> tuple[Tensor, Tensor]:
    """One step of a tensor: the new weight and momentum, of float32.

    `m = R(mu m + g)` and `w (+) R(-lr R(m + wd w))`, the numbers as the nearest float32. Raises
    ValueError for one that is below 0, or not finite in float32.
    """
    check_finite("momentum", momentum, 0.9)
    check_finite("lr", lr, 1e-3)
    check_finite("weight_decay", weight_decay, 0.01)
    m = R(nearest32(momentum) * flush(m) + flush(g))
    return moved(w, m, nearest32(lr), nearest32(weight_decay)), m


def moved(w: Tensor, u: Tensor, lr: float, wd: float) -> Tensor:
    """`w (+) R(-lr R(u + wd w))`: the change is rounded separately, as optimizers return it."""
    return add(w, R(-lr * flush(R(flush(u) + wd * flush(w)))))
