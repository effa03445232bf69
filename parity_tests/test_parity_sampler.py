"""`seqpar parity --decode`: a sampler beside the trainers, and a wrong one that is seen."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from jax_seqpar import cli
from jax_seqpar.cli import sampler_parity
from jax_seqpar.decoding import KeyValueCache
from jax_seqpar.exact import Exact
from jax_seqpar.parity import sampler
from jax_seqpar.parity.sampler import SamplerResult, run_sampler, sampled
from jax_seqpar.parity.training.task import Training

pytestmark = pytest.mark.usefixtures("less_optimised", "unchecked_shapes")

SMALL = Training(vocabulary=64, features=16, hidden=32, head_dim=8, layers=1)


@pytest.fixture(scope="module")
def result() -> SamplerResult:
    return run_sampler(SMALL, new=3)


def parity(*options: Any, columns: int = 80) -> Any:
    return CliRunner().invoke(cli.app, ["parity", *options], env={"COLUMNS": str(columns)})


def test_the_sampler_is_on_the_policy(result):
    assert result.passed
    assert result.different == {"JAX 1": 0, "JAX 2": 0, "JAX 8": 0, "PyTorch": 0}
    assert result.sample.found.shape == (2, 3)
    # Ordinary attention differs here or, of six numbers, may not; the numbers are near.
    assert np.abs(np.subtract(*result.ordinary)).max() < 1e-5


def test_a_token_at_a_wrong_position_is_seen(result, monkeypatch):
    """A token appended one position late, which hides from its query, is seen."""
    right = KeyValueCache.append
    monkeypatch.setattr(KeyValueCache, "append", lambda self, k, v, at: right(self, k, v, at + 1))
    sample = sampled(SMALL, 4, 3, Exact(), lambda: None)
    found = sampler._trained(SMALL, 1, sample, Exact())
    wrong = replace(result, sample=sample, trainers={"JAX 1": sample.of(found)})
    assert not wrong.passed


def test_the_command(result, monkeypatch, tmp_path):
    file = tmp_path / "sampler.json"
    monkeypatch.setattr(sampler_parity, "run_sampler", lambda **_: result)
    shown = parity("--decode", "--json", str(file))
    assert shown.exit_code == 0, shown.output
    bits = f"{int(result.sample.found.view(np.uint32)[0, 0]):08x}"
    assert shown.output.count(bits) >= 5, "in 80 columns every number is whole"
    assert "\u2026" not in shown.output
    assert "EQUAL: 6 log-probabilities" in shown.output
    written = json.loads(file.read_text())
    assert written["passed"]
    assert written["log_probability_bits"]["PyTorch"][0][0] == bits

    other = np.nextafter(result.trainers["JAX 2"], np.float32(9))
    wrong = replace(result, trainers=result.trainers | {"JAX 2": other})
    monkeypatch.setattr(sampler_parity, "run_sampler", lambda **_: wrong)
    shown = parity("--decode")
    assert shown.exit_code == 1
    assert "JAX 2: 6 of 6 log-probabilities differ" in shown.output


@pytest.mark.parametrize(
    ("options", "says"),
    (
        (("--decode", "--training"), "Write one of them"),
        (("--decode", "--tokens", "64"), "--decode has its own sizes"),
        (("--decode", "--timeout", "9"), "Leave out --timeout"),
    ),
)
def test_options_of_another_run(options, says):
    shown = parity(*options, columns=300)
    assert shown.exit_code == 2
    assert says in shown.output
