"""Right bits: JAX devices and PyTorch ranks, with a kernel in common, agree in every bit."""

import numpy as np
import pytest
from cases import CASES, slow

from jax_seqpar.mask import Mask, Spec
from jax_seqpar.parity.checks import Check, PipelineCheck, history_checks, reshard_checks
from jax_seqpar.parity.run import run_parity

pytestmark = pytest.mark.usefixtures("few_optimisations")

LAYOUTS = ("bshd", "sbhd")
# By the truth table, for batch 3. Batch-first, v1 and v2 fail with an error, on one rank too.
WRONG = {"v1", "v1 sbhd", "v2", "v2 sbhd", "v5 sbhd"}
RIGHT_ALONE = {"history v1 sbhd"}


def plan(degree):
    """PyTorch's kernel for every case; JAX's, which each rank has to compile, for a few."""
    checks: list[Check] = [*reshard_checks(degree, (2, 3 * degree, 5 * degree, 7))]
    # Right and wrong alike at degree 4; else where heads lie on other devices.
    labels = CASES if degree == 4 else ("grouped", "multi-query")
    for label, case in ((label, CASES[label]) for label in labels):
        inputs, rules = case.inputs(), Spec(Mask(is_causal=case.is_causal))
        checks.append(PipelineCheck(degree, inputs, "sdpa", rules, label=label))
        if label == "grouped":
            checks.append(PipelineCheck(degree, inputs, "sdpa", layout="sbhd", label=label))
            checks += [PipelineCheck(degree, inputs, "identity", layout=x) for x in LAYOUTS]
        few_ranks = degree < 8 and label == "grouped"
        if few_ranks or (degree == 4 and label in ("multi-query", "bfloat16")):
            checks.append(PipelineCheck(degree, inputs, "dense", rules, label=label))
    return [*checks, *history_checks(degree, CASES["grouped"].inputs())]


# The command runs much the same on two, in `test_cli`.
@pytest.mark.parametrize("degree", (1, 4, slow(8)))
def test_output_and_gradients(degree):
    results = run_parity(plan(degree), degree)
    failed = [r for r in results if not r.passed]
    assert not failed, "\n".join(
        f"{r.name}: {r.verdict} {r.error or ''} {[str(x) for x in r.reports.values()]}"
        for r in failed
    )
    for r in results:
        if r.name.endswith(("sdpa", "dense", "sdpa sbhd")) and "history" not in r.name:
            assert set(r.reports) == {"forward", "dq", "dk", "dv"}
    caught = {r.name for r in results if r.must_differ}
    assert caught == {f"history {name}" for name in WRONG} - (RIGHT_ALONE if degree == 1 else set())


def test_the_inputs_are_not_trivial():
    """A comparison of zeros, or of one value, would prove nothing."""
    for case in CASES.values():
        for x in case.inputs().values():
            assert len(np.unique(x.astype(np.float32))) > x.size // 40
