"""The training in PyTorch, on ranks of data and sequence parallel groups. Needs PyTorch."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from torch_ref.exact import optimizer, training_step
from torch_ref.exact.decoder import Decoder
from torch_ref.exact.dropout import fold
from torch_ref.exact.ranks import make_ranks

from ...bridge.torch_ranks import RankError, start_ranks
from ...compare.numpy_conversion import numpy_to_torch, torch_to_numpy
from .recipe import Recipe
from .steps import KINDS, Step, named
from .task import Training, labels_of

Context = Callable[[], AbstractContextManager[None]]
OnStep = Callable[[Step], Any]


@dataclass(frozen=True)
class Ranks:
    """Numbers of ranks that train, and hooks that they call; every field can be pickled.

    Attributes:
      data, sequence: their product is the number of ranks.
      context: entered by every rank around its steps: a planted bug.
      on_step: called by rank 0 with each step: it saves it.
    """

    data: int
    sequence: int
    context: Context = nullcontext
    on_step: OnStep | None = None


def train_on_ranks(
    training: Training,
    ranks: Ranks,
    *,
    recipe: Recipe = Recipe(),
    start: Step | None = None,
    timeout: float = 600.0,
) -> list[Step]:
    """Trains on gloo ranks, all of which have to agree.

    Args:
      recipe: how a step finds loss and gradients.
      start: the step after which to go on, of any side; the first weights if None.
      timeout: seconds for the ranks.

    Raises:
      RankError: if two ranks differ, or one fails.
      TimeoutError: of `start_ranks`.
    """
    options: Any = {"recipe": recipe, "start": start, "timeout": timeout}
    with ranks_that_train(training, ranks, **options) as collect:
        return collect()


@contextmanager
def ranks_that_train(
    training: Training,
    ranks: Ranks,
    *,
    recipe: Recipe = Recipe(),
    start: Step | None = None,
    timeout: float = 600.0,
) -> Iterator[Callable[[], list[Step]]]:
    """`train_on_ranks` with other work in between: yields a function that waits for the steps."""
    first, count = start or training.start(), ranks.data * ranks.sequence
    given = training, recipe, ranks, first
    with start_ranks(_train_on_rank, count, *given, timeout=timeout) as collect:
        yield lambda: _agreed(collect())


def _agreed(by_rank: list[tuple[list[Step], str]]) -> list[Step]:
    """The steps of rank 0, if all ranks had them."""
    (steps, digest), *others = by_rank
    for rank, (_, other) in enumerate(others, 1):
        if other != digest:
            raise RankError(
                f"rank {rank} ended with SHA-256 {other}, rank 0 with {digest}, where all ranks "
                f"must agree. Write seqpar certify to see whether PyTorch's sums can be trusted."
            )
    return steps


def _train_on_rank(
    rank: int, training: Training, recipe: Recipe, ranks: Ranks, start: Step
) -> tuple[list[Step], str]:
    """The steps, of rank 0 alone, and a digest of all of them."""
    groups = make_ranks(ranks.data, ranks.sequence, training.kv_heads)
    state = training_step.State(*(_tensors(start, kind) for kind in KINDS))
    decoder, steps, digest = decoder_of(training, recipe), [], hashlib.sha256()

    with ranks.context():
        for number, tokens in enumerate(training.batches(start.number), start.number + 1):
            parts = zip(
                *(np.split(x, recipe.micro_batches) for x in (tokens, labels_of(tokens))),
                strict=True,
            )
            rate, decay = training.learning_rate, training.weight_decay
            loss, state = training_step.step(
                decoder,
                state,
                [(_part(ids, ranks, rank), _part(labels, ranks, rank)) for ids, labels in parts],
                optimizer.adamw_numbers(number, rate, weight_decay=decay),
                largest_norm=training.largest_norm,
                label_smoothing=recipe.label_smoothing,
                z_loss=recipe.z_loss,
                rng=fold(torch.tensor([0, training.seed]), number) if recipe.dropout else None,
                ranks=groups,
            )
            step = Step(number, np.float32(loss.item()), named(*map(_arrays, state)))
            digest.update(step.sha256.encode())
            if rank == 0:
                steps.append(step)
                if ranks.on_step is not None:
                    ranks.on_step(step)
    return steps, digest.hexdigest()


def decoder_of(training: Training, recipe: Recipe = Recipe()) -> Decoder:
    """The sizes as PyTorch's decoder takes them."""
    return Decoder(
        vocabulary=training.vocabulary,
        width=training.features,
        layers=training.layers,
        heads=training.heads,
        kv_heads=training.kv_heads,
        head_dim=training.head_dim,
        hidden=training.hidden,
        theta=training.theta,
        eps=training.epsilon,
        dtype=torch.bfloat16 if recipe.bfloat16 else torch.float32,
        dropout=recipe.dropout,
    )


def _part(x: np.ndarray, ranks: Ranks, rank: int) -> torch.Tensor:
    """A rank's part of `[B, S]`, int64."""
    rows = np.split(x, ranks.data)[rank // ranks.sequence]
    columns = np.split(rows, ranks.sequence, axis=1)[rank % ranks.sequence]
    return torch.from_numpy(columns.astype(np.int64))


def _tensors(step: Step, kind: str) -> dict[str, torch.Tensor]:
    return {name: numpy_to_torch(x) for name, x in step.of_kind(kind).items()}


def _arrays(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: torch_to_numpy(x) for name, x in tensors.items()}
