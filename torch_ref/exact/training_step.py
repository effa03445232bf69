"""The training step: loss, gradients, clipping, AdamW. One function of its inputs, to the bit.

The loss and the new weights and moments are the same on every rank and for every number of ranks.
"""

from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .clip import clip
from .decoder import Decoder, logits
from .dropout import fold
from .loss import count_labels, cross_entropy
from .optimizer import AdamWNumbers, adamw
from .ranks import Ranks
from .rounding import add

Tensors = dict[str, Tensor]
Batch = tuple[Tensor, Tensor]


class State(NamedTuple):
    """Weights and the two moments of AdamW, float32 by name."""

    weights: Tensors
    m: Tensors
    v: Tensors


def first_state(weights: Tensors) -> State:
    """The state before the first step: moments of 0."""
    zeros = {name: torch.zeros_like(w) for name, w in weights.items()}
    return State(weights, zeros, dict(zeros))


def loss_and_gradients(
    decoder: Decoder,
    weights: Tensors,
    batches: Sequence[Batch],
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    rng: Tensor | None = None,
    ranks: Ranks | None = None,
) -> tuple[Tensor, Tensors]:
    """The loss over several batches and its gradients, added by `(+)` in the order of the batches.

    Args:
      decoder: its sizes.
      weights: as `Decoder.shapes`.
      batches: pairs of ids and labels, `[B, S]` each, this rank's tokens. The loss is a mean over
        the labels of all batches, on all ranks, so that each batch adds its part of it.
      label_smoothing, z_loss: as in `cross_entropy`.
      rng: `(2,)`, the key of the dropout of this step; that of batch i, from 0, is `fold(rng, i)`.
        Without one nothing is dropped.
      ranks: which tokens this rank has; all of them if None.
    """
    ranks = ranks or Ranks()
    count = sum(count_labels(labels, group=ranks.everyone) for _, labels in batches)
    leaves = {name: w.detach().requires_grad_() for name, w in weights.items()}
    parts = []
    for i, (ids, labels) in enumerate(batches):
        z = logits(decoder, leaves, ids, ranks, rng=None if rng is None else fold(rng, i))
        options: Any = {"label_smoothing": label_smoothing, "z_loss": z_loss}
        loss = cross_entropy(z, labels, count=count, group=ranks.everyone, **options)
        parts.append((loss.detach(), *torch.autograd.grad(loss, list(leaves.values()))))
    loss, *gradients = (reduce(add, x) for x in zip(*parts, strict=True))
    return loss, dict(zip(leaves, gradients, strict=True))


def step(
    decoder: Decoder,
    state: State,
    batches: Sequence[Batch],
    numbers: AdamWNumbers,
    *,
    largest_norm: float,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    rng: Tensor | None = None,
    ranks: Ranks | None = None,
) -> tuple[Tensor, State]:
    """The loss before the step and the state after it; for arguments see `loss_and_gradients`.

    Args:
      state: weights and moments.
      numbers: of AdamW, `adamw_numbers` of this step.
      largest_norm: the C of `clip`.

    Raises:
      ValueError: a norm of the gradients that is not finite, on every rank.
    """
    options: Any = {"label_smoothing": label_smoothing, "z_loss": z_loss, "rng": rng}
    loss, gradients = loss_and_gradients(decoder, state.weights, batches, ranks=ranks, **options)
    gradients, _ = clip(gradients, largest_norm)
    moved = {
        name: adamw(w, state.m[name], state.v[name], gradients[name], numbers)
        for name, w in state.weights.items()
    }
    return loss, State(*({name: x[i] for name, x in moved.items()} for i in range(3)))
