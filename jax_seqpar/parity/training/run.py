"""The training that `seqpar parity --training` runs on three sides, and its verdict."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..golden import expected_digest
from .jax_side import train_in_jax
from .steps import Step, all_equal, first_difference
from .task import Training

STEPS = 4
MESHES = {"JAX 1": (1, 1), "JAX 2x4": (2, 4)}
RANKS = "PyTorch 2x2"


@dataclass(frozen=True)
class TrainingResult:
    """The runs of one training by name, of which all have to be equal.

    Attributes:
      runs: the others are compared with the first.
      golden: SHA-256 of the last step on every machine; None for a training of which none is kept.
    """

    runs: dict[str, list[Step]]
    golden: str | None = None

    @property
    def steps(self) -> list[tuple[Step, ...]]:
        """Steps of all runs, step by step."""
        return list(zip(*self.runs.values(), strict=True))

    @property
    def sha256(self) -> str:
        """SHA-256 of the last step of the first run."""
        return next(iter(self.runs.values()))[-1].sha256

    @property
    def differences(self) -> dict[str, str | None]:
        """First difference of every later run from the first run, by name; None without one."""
        (_, first), *others = self.runs.items()
        return {name: first_difference(first, run) for name, run in others}

    @property
    def passed(self) -> bool:
        return all(map(all_equal, self.steps)) and self.golden in (None, self.sha256)

    def to_json(self) -> dict[str, Any]:
        steps = [
            {
                "step": row[0].number,
                "loss": float(row[0].loss),
                "equal": all_equal(row),
                "runs": {
                    name: {"loss_bits": step.loss_bits, "sha256": step.sha256}
                    for name, step in zip(self.runs, row, strict=True)
                },
            }
            for row in self.steps
        ]
        return {"steps": steps, "golden": self.golden, "differences": self.differences}


def run_training(
    training: Training = Training(steps=STEPS),
    *,
    timeout: float = 300.0,
    on_step: Callable[[Step], Any] = lambda step: None,
) -> TrainingResult:
    """Trains in JAX on one device and on eight, and in PyTorch on four ranks.

    Args:
      timeout: seconds for the ranks.
      on_step: called with each step of JAX, for a progress display.

    Raises:
      ValueError: fewer than eight JAX devices.
      RankError, TimeoutError: of `train_on_ranks`.
    """
    from .torch_side import Ranks, ranks_that_train

    # JAX compiles while the ranks start.
    with ranks_that_train(training, Ranks(2, 2), timeout=timeout) as collect:
        runs = {
            name: train_in_jax(training, *mesh, on_step=on_step) for name, mesh in MESHES.items()
        }
        runs[RANKS] = collect()
    return TrainingResult(runs, expected_digest(training.inputs()))
