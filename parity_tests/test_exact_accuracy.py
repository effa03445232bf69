"""Exact attention is as near to float64 as float32 kernels are; the example has the table."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import torch
from cases import is_array
from exact_cases import NAMES as RESULTS
from exact_cases import Cross, torch_exact
from flat_names import keywords_of
from questions import error, output_and_gradients

from jax_seqpar import dense_attention
from jax_seqpar.compare.numpy_conversion import numpy_to_torch
from torch_ref.dense import dense_attention as torch_dense_attention

SCRIPT = Path(__file__).parent.parent / "examples" / "accuracy_exact.py"
# Of the largest element and of the rms, times the smaller error of the float32 kernels.
ORDINARY = (
    "gaussian",
    "heavy tails",
    "long rows",
    "outlier channels",
    "outlier tokens",
    "peak",
    "sink",
)
BOUNDS = {name: {"max": 1.5, "rms": 1.0} for name in ORDINARY}
BOUNDS["empty peak"] = {"max": 3.0, "rms": 1.0}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    file = tmp_path_factory.mktemp("accuracy") / "accuracy.json"
    options = [f"--only={name}" for name in BOUNDS]
    done = subprocess.run(
        [sys.executable, SCRIPT, "--quick", *options, "--json", file],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text())["distributions"]


@pytest.mark.parametrize("name", BOUNDS)
def test_as_accurate_as_float32(found, name):
    rows, ratios = found[name]["rows"], found[name]["ratios"]["exact / better"]
    for measure in ("max", "rms"):
        for result in ("out", "dq", "dk", "dv"):
            stock = min(rows[row][measure][result] for row in ("jax float32", "torch float32"))
            assert rows["exact"][measure][result] <= BOUNDS[name][measure] * stock, (
                measure,
                result,
            )
            assert ratios[measure][result] == rows["exact"][measure][result] / stock


def test_every_option_as_accurate_as_float32():
    """Exact attention with every option is as accurate as float32, for values of similar size."""
    case = Cross(T=24, S=48, N=8, H=16, V=12)
    inputs, options = case.inputs(), case.all_at_once(by_positions=True)
    *leaves, grad = (numpy_to_torch(x).double() for x in inputs.values())
    leaves = [x.requires_grad_() for x in leaves]
    given = {k: jax.tree.map(numpy_to_torch, x) if is_array(x) else x for k, x in options.items()}
    out = torch_dense_attention(*leaves, **given)
    truth = (out.detach(), *torch.autograd.grad(out, leaves, grad))

    arrays = {k: jax.tree.map(jnp.asarray, x) if is_array(x) else x for k, x in options.items()}
    plain = output_and_gradients(partial(dense_attention, **keywords_of(**arrays)))(**inputs)
    exact = torch_exact(inputs, **options)  # JAX has its bits, and would have to compile
    for name, ours, expected in zip(RESULTS, plain, truth, strict=True):
        assert 0 < error(exact[name], expected.numpy()) <= error(ours, expected.numpy()), name
