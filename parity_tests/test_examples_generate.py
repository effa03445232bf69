"""The example that writes on from prompts: PyTorch's greedy text, and the trainer's bits."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cases import ONE_AXIS, slow
from flax import nnx
from generate import Sampler, app
from ported_models import llama
from typer.testing import CliRunner

from jax_seqpar.bridge import from_torch

pytestmark = pytest.mark.usefixtures("less_optimised", "unchecked_shapes")

LENGTHS, NEW = (24, 11, 17), 64


def test_a_ported_llama_writes_what_pytorch_writes():
    """64 tokens from prompts of three lengths in one batch, the cache on four devices."""
    port = llama(layers=2)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 160, n).astype(np.uint8) for n in LENGTHS]
    expected = []
    for prompt in prompts:
        ids = torch.from_numpy(prompt[None].astype(np.int64))
        options: Any = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
        given = {"inputs": ids, "attention_mask": torch.ones_like(ids)}
        out = port.torch_model.generate(**given, **options)
        expected.append(out[0, len(prompt) :].numpy())
    mesh = ONE_AXIS[4].mesh()
    with jax.set_mesh(mesh):
        model: Any = port.flax_model()
        params = from_torch(
            port.torch_model.state_dict(),
            port.mapping,
            sizes=port.sizes,
            like=nnx.state(model, nnx.Param),
        )
        nnx.update(model, params)
        steps = Sampler(NEW).sample(model, [x.tobytes() for x in prompts], mesh)
        written = np.stack([tokens for tokens, _ in steps], axis=1)
    assert len(np.unique(written)) > 20, "a text that repeats one token shows little"
    assert np.array_equal(written, np.stack(expected))


def test_no_two_draws_share_a_key():
    """Rows, positions and seeds apart: a sum of the three would give some of them one key."""
    logits, at = jnp.zeros((2, 1 << 20)), jnp.array([3, 3])
    drawn = [
        Sampler(1, 1.0, seed).draw(logits, at + later)
        for seed, later in ((0, 0), (0, 1), (1, 0), (1 << 20, 0))
    ]
    assert len(np.unique(drawn)) == 8
    again = Sampler(1, 1.0, 1).draw(logits, at)
    assert np.array_equal(again, drawn[2])


@pytest.mark.parametrize("exact", (False, slow(True)))
def test_the_command(exact, tmp_path):
    """Trains, saves, and writes on from what it saved."""
    options = ["--steps", "0" if exact else "1", "--new", "6", "--folder", str(tmp_path)]
    options += ["--prompt", "def f(", "--prompt", "x", "--temperature", "0.7", "--degree", "4"]
    options += ["--exact"] * exact
    runner, found = CliRunner(), []
    for _ in range(1 if exact else 2):
        result = runner.invoke(app, options, env={"COLUMNS": "200"})
        assert result.exit_code == 0, result.output
        assert "def f(" in result.output
        (count,) = re.findall(
            r"of the 12 bytes drawn: the training forward gives (\d+) other", result.output
        )
        found.append(result.output.split("prompts read")[0])
        assert (int(count) == 0) == exact
    assert (tmp_path / "weights").exists()
    assert found[-1] in found[0]
    assert CliRunner().invoke(app, ["--prompt", ""]).exit_code == 2
    assert CliRunner().invoke(app, ["--degree", "9"]).exit_code == 2
