"""A training run with the same bits in JAX on meshes and in PyTorch on ranks, and planted bugs."""

import multiprocessing
import signal
import time
from dataclasses import replace
from functools import partial

import encoder
import encoder_classifier
import finetune_encoder
import numpy as np
import pytest
import torch
from finetune_llama import loss_by_transformers, small_llama, start_of, state_of, training_of
from killed_training import save_and_die_at, train_and_die
from planted_training_bugs import BUGS, planted
from training_in_flax import train_in_flax
from transformers import BertConfig, BertModel, LlamaConfig

from jax_seqpar.bridge import RankError
from jax_seqpar.parity.training.jax_side import train_in_jax
from jax_seqpar.parity.training.recipe import Recipe
from jax_seqpar.parity.training.step_files import load_step, newest_step, save_step
from jax_seqpar.parity.training.steps import Step, first_difference
from jax_seqpar.parity.training.task import Training
from jax_seqpar.parity.training.torch_side import Ranks, train_on_ranks
from torch_ref.exact import encoder as torch_encoder
from torch_ref.exact import exact_attention

pytestmark = pytest.mark.usefixtures("less_optimised")

SIZES = {"vocabulary": 64, "features": 32, "hidden": 48, "head_dim": 8, "tokens": 32}
# One layer compiles in half of the time. Two have the golden run, in `test_parity_training.py`, the
# Llama below, and the run with every option, whose dropout has keys of each layer.
TRAINING = Training(**SIZES, layers=1, steps=3)
RECIPE = Recipe(bfloat16=True, dropout=0.1, label_smoothing=0.1, z_loss=1e-3, micro_batches=2)


@pytest.fixture(scope="module")
def alone() -> list[Step]:
    """The steps of PyTorch in one process, with which those of JAX on a mesh are compared."""
    return train_on_ranks(TRAINING, Ranks(1, 1))


def test_a_killed_training_goes_on_elsewhere(alone, tmp_path):
    """PyTorch on four ranks, killed; Flax on a mesh of eight devices, with weights shared as in
    FSDP; and from a step of Flax on, PyTorch in one process."""
    ranks = Ranks(2, 2, on_step=partial(save_and_die_at, tmp_path, 1))
    with pytest.raises(RankError):
        train_on_ranks(TRAINING, ranks)
    killed = newest_step(tmp_path)
    assert first_difference(alone[:1], [killed]) is None
    on_mesh = train_in_flax(TRAINING, 2, 4, start=killed, on_step=partial(save_step, tmp_path))
    assert first_difference(alone[1:], on_mesh) is None
    second = load_step(tmp_path / "step-000002.safetensors")
    assert first_difference(alone[2:], train_on_ranks(TRAINING, Ranks(1, 1), start=second)) is None


def test_ordinary_training_on_a_mesh_differs(alone):
    ordinary = [train_in_flax(TRAINING, *mesh, exact=False) for mesh in ((1, 1), (2, 4))]
    assert first_difference(*ordinary) is not None
    # It trains: the losses of both are near, and not those of the first weights.
    assert np.abs(alone[-1].loss - ordinary[0][-1].loss) < 1e-3
    assert abs(alone[-1].loss - alone[0].loss) > 1e-2


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_named(alone, bug):
    """The difference is named in the first step, with the tensor and the element."""
    one_step = replace(TRAINING, steps=1)
    found = first_difference(
        alone[:1], train_on_ranks(one_step, Ranks(1, 1, partial(planted, bug)))
    )
    assert found is not None
    assert found.startswith("step 1, ")
    assert "numbers differ" in found


@pytest.mark.parametrize("lost", ["m", "v"])
def test_a_moment_that_is_not_resumed_is_seen(alone, lost):
    step = alone[1]
    arrays = {n: x * (not n.startswith(f"{lost} ")) for n, x in step.arrays.items()}
    last = train_on_ranks(TRAINING, Ranks(1, 1), start=step._replace(arrays=arrays))
    found = first_difference(alone[2:], last)
    assert found is not None
    assert found.startswith("step 3, ")


def test_a_step_is_saved_to_the_bit(alone, tmp_path):
    file = save_step(tmp_path, alone[0])
    assert first_difference(alone[:1], [load_step(file)]) is None
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001.safetensors"]
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"has no step-\*\.safetensors\. Write a folder"):
        newest_step(empty)


ON_MESHES = [
    pytest.param((2, 4), 4, id="2x4, tiles"),
    pytest.param((1, 1), 1, id="1", marks=pytest.mark.slow),  # one program more
]


@pytest.mark.parametrize(("mesh", "tiles"), ON_MESHES)
def test_every_option_of_a_step(mesh, tiles):
    """16 bits, dropout, label smoothing, z-loss, two batches a step; tiles change no bit.

    PyTorch's ranks are compared with its one process in `test_torch_exact_training.py`.
    """
    training = replace(TRAINING, layers=2)
    alone = train_on_ranks(training, Ranks(1, 1), recipe=RECIPE)
    steps = train_in_flax(training, *mesh, recipe=RECIPE, tiles=tiles)
    assert first_difference(alone, steps) is None


def test_what_no_step_is_made_of_is_refused():
    with pytest.raises(ValueError, match="micro_batches = 2 are added by exact arithmetic alone"):
        train_in_flax(TRAINING, 1, 1, exact=False, recipe=RECIPE)
    with pytest.raises(ValueError, match="Write a model whose embedding is tied"):
        training_of(LlamaConfig(tie_word_embeddings=False))


def test_a_llama_of_transformers_is_fine_tuned():
    """Ten steps, JAX on eight devices, and PyTorch; the loss is that of transformers."""
    sizes = Training(**SIZES, steps=10)
    llama = small_llama(sizes)
    training = training_of(llama.config, tokens=sizes.tokens, steps=sizes.steps)
    assert training == sizes
    start = start_of(llama, training)
    steps = train_in_flax(training, 2, 4, start=start)
    assert first_difference(steps, train_on_ranks(training, Ranks(1, 1), start=start)) is None

    batches = [*training.batches()]
    assert loss_by_transformers(llama, batches[0]) == pytest.approx(float(steps[0].loss), rel=1e-6)
    llama.load_state_dict(state_of(steps[-2], training))
    assert loss_by_transformers(llama, batches[-1]) == pytest.approx(
        float(steps[-1].loss), rel=1e-6
    )
    assert steps[-1].loss < steps[0].loss - 0.1


def test_an_encoder_of_transformers_is_fine_tuned(monkeypatch):
    """Real text with padding; an attention to the padding is seen."""
    config = encoder.Config(positions=32, features=32, hidden=64, layers=2, heads=4)
    task = encoder_classifier.Task(config, steps=2, tokens=16)
    torch.manual_seed(0)
    bert = BertModel(
        BertConfig(
            hidden_size=config.features,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=config.hidden,
            max_position_embeddings=config.positions,
            layer_norm_eps=config.epsilon,
            initializer_range=0.2,
        )
    ).eval()
    assert any(not batch.mask.all() for batch in task.batches())
    start = finetune_encoder.start_of(bert, task)
    steps = finetune_encoder.train_in_torch(task, start)
    assert first_difference(steps, finetune_encoder.train_in_flax(task, (2, 4), start)) is None

    batches = [*task.batches()]
    before, after = (
        finetune_encoder.loss_by_transformers(bert, step, task, batches[0])
        for step in (start, steps[-1])
    )
    assert before == pytest.approx(float(steps[0].loss), rel=1e-6)
    assert after < before

    def other_names(step, task, given=finetune_encoder.state_of):
        return {f"bert.{name}": x for name, x in given(step, task).items()}

    with monkeypatch.context() as patch:
        patch.setattr(finetune_encoder, "state_of", other_names)
        with pytest.raises(ValueError, match="all of its weights but the pooler's"):
            finetune_encoder.loss_by_transformers(bert, start, task, batches[0])

    def without_mask(*operands, mask):
        return exact_attention(*operands)

    monkeypatch.setattr(torch_encoder, "exact_attention", without_mask)
    planted_steps = finetune_encoder.train_in_torch(replace(task, steps=1), start)
    assert planted_steps[0].loss_bits != steps[0].loss_bits


def test_ctrl_c_ends_the_fine_tuning_in_both_frameworks(monkeypatch):
    """PyTorch's thread, which Ctrl-C does not reach, makes no step more than it is in."""
    steps = []

    def in_torch(task, start, *, on_step):
        for _ in range(1000):
            on_step()
            steps.append(time.sleep(0.01))

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    for name, instead in (
        ("pretrained", lambda task: None),
        ("start_of", lambda *_: None),
        ("train_in_torch", in_torch),
        ("train_in_flax", interrupted),
    ):
        monkeypatch.setattr(finetune_encoder, name, instead)
    monkeypatch.setattr(finetune_encoder.torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(finetune_encoder.jax.config, "update", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        finetune_encoder.main(steps=1000, layers=1)
    assert len(steps) < 100


@pytest.mark.slow  # one program more
def test_a_killed_process_of_jax_is_continued(alone, tmp_path):
    process = multiprocessing.get_context("spawn").Process(
        target=train_and_die, args=(TRAINING, tmp_path, 1)
    )
    process.start()
    process.join(300)
    assert process.exitcode == -signal.SIGKILL
    rest = train_on_ranks(TRAINING, Ranks(2, 2), start=newest_step(tmp_path))
    assert first_difference(alone[1:], rest) is None


@pytest.mark.slow  # minutes: the command's own sizes
def test_two_hundred_steps():
    training = Training(steps=200)
    runs = [train_in_jax(training, 1, 1), train_in_flax(training, 2, 4)]
    runs.append(train_on_ranks(training, Ranks(2, 2)))
    assert first_difference(runs[0], runs[1]) is None
    assert first_difference(runs[0], runs[2]) is None
