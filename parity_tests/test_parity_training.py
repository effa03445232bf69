"""`seqpar parity --training`: the golden hash, and that one bit anywhere is named."""

import io
import json
import re
from dataclasses import replace

import jax
import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from jax_seqpar import cli
from jax_seqpar.cli import training_parity
from jax_seqpar.parity.golden import expected_digest
from jax_seqpar.parity.training.run import STEPS, TrainingResult
from jax_seqpar.parity.training.steps import Step, first_difference
from jax_seqpar.parity.training.table import training_table
from jax_seqpar.parity.training.task import Training

pytestmark = pytest.mark.usefixtures("less_optimised")


@pytest.fixture(autouse=True)
def devices(monkeypatch):
    """The devices of the tests are there already, and their number cannot be changed any more."""
    monkeypatch.setattr(jax.config, "update", lambda *_: None)


def seqpar(*arguments):
    environment = {"COLUMNS": "200", "TERMINAL_WIDTH": "500"}
    return CliRunner().invoke(
        cli.app, ["parity", "--training", *map(str, arguments)], env=environment
    )


def steps(count=STEPS):
    """Steps of no training, whose bits can be chosen."""
    rng = np.random.default_rng(0)
    return [
        Step(n, np.float32(n), {"weight a": rng.standard_normal((3, 4)).astype(np.float32)})
        for n in range(1, count + 1)
    ]


def with_one_bit(run, number, name):
    """The run, the last bit of one element of a step the other way."""
    step = run[number - 1]
    arrays = {n: x.copy() for n, x in step.arrays.items()}
    arrays[name].view(np.uint32)[1, 2] ^= 1
    return [*run[: number - 1], step._replace(arrays=arrays), *run[number:]]


def test_all_sides_have_the_golden_hash(tmp_path):
    """A run as a user starts it: JAX on two meshes, PyTorch on four ranks."""
    file = tmp_path / "results.json"
    result = seqpar("--json", file)
    assert result.exit_code == 0, result.output
    found = json.loads(file.read_text())
    assert found["passed"] is True
    assert found["golden"] == expected_digest(Training(steps=STEPS).inputs())
    last = found["steps"][-1]["runs"]
    assert {run["sha256"] for run in last.values()} == {found["golden"]}
    assert [*last] == ["JAX 1", "JAX 2x4", "PyTorch 2x2"]
    rows = re.findall(
        r"^ +(\d) +(\S+) +([0-9a-f]{8})((?: +[0-9a-f]{8}){3}) +yes", result.output, re.M
    )
    assert [int(number) for number, *_ in rows] == [*range(1, STEPS + 1)]
    for (_, loss, bits, _), step in zip(rows, found["steps"], strict=True):
        assert f"{step['loss']:.6f}" == loss
        assert f"{int(np.float32(step['loss']).view(np.uint32)):08x}" == bits
    losses = [step["loss"] for step in found["steps"]]
    assert len(set(losses)) == STEPS
    assert "the hash that every machine has" in result.output


def test_one_bit_is_named(monkeypatch):
    run = steps()
    wrong = with_one_bit(run, 3, "weight a")
    result = TrainingResult({"JAX 1": run, "JAX 2x4": run, "PyTorch 2x2": wrong})
    monkeypatch.setattr(training_parity, "run_training", lambda **_: result)
    printed = seqpar()
    assert printed.exit_code == 1
    assert "JAX 1 and PyTorch 2x2: step 3, weight a[1, 2]: " in printed.output
    assert "1 of its 12 numbers differ" in printed.output
    assert "JAX 1 and JAX 2x4" not in printed.output
    assert re.findall(r" (yes|no) *$", printed.output, re.M) == ["yes", "yes", "no", "yes"]
    assert "NOT EQUAL" in printed.output


def test_every_number_is_whole_in_a_terminal_of_80_columns():
    run = steps(20)
    result = TrainingResult({"JAX 1": run, "JAX 2x4": run, "PyTorch 2x2": run})
    console = Console(width=80, file=io.StringIO())
    beside = {"float32, JAX 1": run, "float32, JAX 2x4": run}
    console.print(training_table(result, beside=beside))
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    for number in (f"{run[-1].loss:.6f}", run[-1].loss_bits, run[-1].sha256[:8]):
        assert f" {number} " in shown
    assert "\u2026" not in shown


def test_another_hash_than_the_golden_one_fails(monkeypatch):
    run = steps()
    result = TrainingResult({"JAX 1": run, "PyTorch 2x2": run}, golden="0" * 64)
    monkeypatch.setattr(training_parity, "run_training", lambda **_: result)
    printed = seqpar()
    assert printed.exit_code == 1
    assert f"SHA-256 {run[-1].sha256}, expected {'0' * 64}" in printed.output
    assert replace(result, golden=run[-1].sha256).passed


def test_the_loss_alone_may_differ():
    run = steps()
    other = [step._replace(loss=np.nextafter(step.loss, np.float32(9))) for step in run]
    assert str(first_difference(run, other)).startswith("step 1, the loss: ")
    assert first_difference(run, steps()) is None
    with pytest.raises(ValueError, match="Give two runs of one training"):
        first_difference(run, [step._replace(arrays={}) for step in run])


def test_one_number_more_is_another_training():
    kept = Training(steps=STEPS)
    assert expected_digest(kept.inputs()) is not None
    for other in ({"learning_rate": 1e-3}, {"seed": 1}, {"theta": 5e5}, {"steps": STEPS + 1}):
        assert expected_digest(replace(kept, **other).inputs()) is None


@pytest.mark.parametrize("option", (("--degree", 2), ("--kernel", "plain"), ("--seed", 1)))
def test_options_of_attention_are_refused(option):
    result = seqpar(*option)
    assert result.exit_code == 2
    assert f"Leave out {option[0]}." in " ".join(result.output.split())
