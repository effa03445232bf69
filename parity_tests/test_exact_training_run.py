"""A training run with the same bits in JAX on meshes and in PyTorch on ranks, and planted bugs."""

from dataclasses import replace

import numpy as np
import pytest
from bit_equal_training import first_difference, table_of
from decoder import Config, Placement
from planted_training_bugs import BUGS
from rich.console import Console
from training_in_both import Step, Training, train_in_jax, train_on_ranks

from jax_seqpar.flax import ExactArithmetic

TRAINING = Training(
    config=Config(vocabulary=64, features=32, hidden=48, layers=2, heads=4, kv_heads=2, head_dim=8),
    tokens=32,
    steps=3,
)


@pytest.fixture(scope="module")
def alone() -> list[Step]:
    return train_in_jax(TRAINING, 1, 1)


def test_a_mesh_has_the_bits_of_one_device(alone):
    """Data and sequence parallel, weights shared as in FSDP; ordinary float32 differs."""
    assert first_difference(alone, train_in_jax(TRAINING, 2, 4)) is None
    ordinary = [train_in_jax(TRAINING, *mesh, exact=False) for mesh in ((1, 1), (2, 4))]
    assert first_difference(*ordinary) is not None
    # It trains: the losses of both are near, and not those of the first weights.
    assert np.abs(alone[-1].loss - ordinary[0][-1].loss) < 1e-3
    assert alone[-1].arrays.keys() == ordinary[0][-1].arrays.keys()


@pytest.mark.parametrize("ranks", [(1, 1), (2, 2)], ids=["one process", "2x2 ranks"])
def test_pytorch_has_the_bits_of_jax(alone, ranks):
    assert first_difference(alone, train_on_ranks(TRAINING, *ranks)) is None


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_named(alone, bug):
    """In the first step, with the tensor and the element."""
    one_step = replace(TRAINING, steps=1)
    found = first_difference(alone[:1], train_on_ranks(one_step, 1, 1, bug))
    assert found is not None
    assert found.startswith("step 1, ")


def test_the_table_shows_bits_and_what_differs(alone):
    other = [step._replace(loss=np.nextafter(step.loss, np.float32(9))) for step in alone]
    console = Console(width=200, record=True)
    console.print(table_of({"a": alone, "b": other}, {"c": alone}, 4))
    text = console.export_text()
    assert f"{int(alone[0].loss.view(np.uint32)):08x}" in text
    assert "no" in text


def test_tiles_are_refused():
    with pytest.raises(ValueError, match="tiles = 2 add up gradients in float32"):
        Placement(tiles=2, arithmetic=ExactArithmetic())


@pytest.mark.slow  # minutes: the command's own sizes
def test_two_hundred_steps():
    training = Training(steps=200)
    runs = [train_in_jax(training, 1, 1), train_in_jax(training, 2, 4)]
    runs.append(train_on_ranks(training, 2, 2))
    assert first_difference(runs[0], runs[1]) is None
    assert first_difference(runs[0], runs[2]) is None
