"""PyTorch on an NVIDIA GPU: exact attention and training have the bits that they have on a CPU."""

import numpy as np
import pytest
import torch
from exact_training_runs import FULL_STEP, exact_run

from jax_seqpar.compare.numpy_conversion import numpy_to_torch
from jax_seqpar.parity.inputs import Case, adversarial
from torch_ref.exact import exact_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU."),
]


def output_and_gradients(device: str) -> list[np.ndarray]:
    case = Case(batch=2, tokens=300, heads=4, kv_heads=2, head_dim=24)
    operands = adversarial(case.inputs()).values()
    *leaves, grad = (numpy_to_torch(x).to(device) for x in operands)
    leaves = [x.requires_grad_() for x in leaves]
    out = exact_attention(*leaves, is_causal=True)
    found = (out.detach(), *torch.autograd.grad(out, leaves, grad))
    return [x.cpu().numpy() for x in found]


def test_attention():
    for got, expected in zip(*map(output_and_gradients, ("cuda", "cpu")), strict=True):
        assert np.array_equal(got.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("options", ({}, FULL_STEP), ids=("plain", "every option"))
def test_training(options):
    got, expected = (exact_run(2, **options, device=device) for device in ("cuda", "cpu"))
    assert got.keys() == expected.keys()
    for name, x in expected.items():
        assert np.array_equal(got[name].view(np.uint32), x.view(np.uint32)), name
