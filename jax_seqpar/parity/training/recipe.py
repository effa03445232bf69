"""Options of a training step: dtypes, dropout, terms of the loss, accumulation of gradients."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """Options of every step; each is part of the function, none depends on mesh or framework.

    Attributes:
      bfloat16: activations between layers are bfloat16; weights and moments stay float32.
      dropout: the rate, of attention weights and of the outputs of attention and MLP that are added
        to the residual. The key of step t, from 1, and of its part i is
        `fold(fold((0, seed), t), i)`, with the seed of the training.
      label_smoothing, z_loss: of the cross entropy.
      micro_batches: k, parts of the batch, of consecutive sequences, whose gradients are added.
    """

    bfloat16: bool = False
    dropout: float = 0.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    micro_batches: int = 1
