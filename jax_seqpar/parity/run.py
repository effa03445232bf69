"""The parity run: the same checks by PyTorch ranks and by JAX devices, compared bit for bit."""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ..bridge.torch_ranks import start_ranks
from ..compare.bits import compare_bits
from ..compare.report import BitsReport
from .checks import Check, PipelineCheck
from .checks.sharded_arrays import Outputs
from .golden import digest, expected_digest
from .inputs import Arrays
from .pictures import Evidence, evidence

COLUMNS = ("forward", "dq", "dk", "dv")
# Bound relative to an output's largest entry, which roundings stay below and a wrong order of
# tokens or heads does not: 16 units in the last place of bfloat16, the narrowest dtype compared.
ROUNDING = 1 / 16


@dataclass(frozen=True)
class Result:
    """One check's outcome at one degree.

    Attributes:
      reports: by output, `forward`, `dq`, `dk`, `dv`; fewer where the check has fewer.
      expected: "right", or for a control what it must show: "error", "reshaped" or "scrambled" of
        a wrong version, "rounded" of attention that is not exact.
      near: of attention that is not exact, whether the two sides differ by no more than ROUNDING.
      error: of PyTorch, in place of reports.
      sha256: of output and gradients, where the kernel is exact.
      golden: the required sha256, for inputs whose hash is kept.
      evidence: pictures of the differences, where the run was asked for them.
    """

    name: str
    shape: str
    degree: int
    reports: dict[str, BitsReport]
    expected: str = "right"
    near: bool = True
    error: str | None = None
    sha256: str | None = None
    golden: str | None = None
    evidence: Evidence | None = field(default=None, compare=False)

    @property
    def outcome(self) -> str:
        """Outcome of the comparison, in the words of the truth table."""
        if self.error is not None:
            return "error"
        leaves = [leaf for report in self.reports.values() for leaf in report.leaves]
        if any(leaf.shape_a != leaf.shape_b for leaf in leaves):
            return "reshaped"
        if not all(leaf.comparable for leaf in leaves):
            return "retyped"
        if all(leaf.equal for leaf in leaves):
            return "right"
        return "rounded" if self.expected == "rounded" and self.near else "scrambled"

    @property
    def must_differ(self) -> bool:
        """Whether the check is a control, which passes if the comparison finds a difference."""
        return self.expected != "right"

    @property
    def passed(self) -> bool:
        return self.outcome == self.expected and self.golden in (None, self.sha256)

    @property
    def verdict(self) -> str:
        if self.expected == "rounded":
            found = "SEES NOTHING" if self.outcome == "right" else "DIFFERS"
            return "differs" if self.passed else found
        if self.must_differ:
            return "caught" if self.passed else "NOT CAUGHT"
        if self.outcome == "right" and not self.passed:
            return "NOT GOLDEN"
        return "equal" if self.passed else "DIFFERS"

    def to_json(self) -> dict[str, Any]:
        return {
            "case": self.name,
            "shape": self.shape,
            "degree": self.degree,
            "must_differ": self.must_differ,
            "expected": self.expected,
            "outcome": self.outcome,
            "verdict": self.verdict,
            "error": self.error,
            "sha256": self.sha256,
            "golden": self.golden,
            "outputs": {name: report.to_json() for name, report in self.reports.items()},
        }


def run_parity(
    checks: Sequence[Check],
    degree: int,
    *,
    timeout: float = 300.0,
    save_failing: Path | None = None,
    pictures: bool = False,
    on_result: Callable[[Result], None] | None = None,
) -> list[Result]:
    """Runs checks on `degree` PyTorch ranks and on `degree` JAX CPU devices, and compares.

    Args:
      checks: of this degree.
      degree: ranks, and devices of the JAX mesh.
      timeout: seconds for the PyTorch ranks.
      save_failing: a folder for the inputs and both outputs of each check that fails.
      pictures: whether results have their `evidence`, for a report.
      on_result: called after each check, for a progress display.

    Raises:
      ValueError: fewer than `degree` JAX CPU devices.
      RankError, TimeoutError: of `start_ranks`.
    """
    mesh = cpu_mesh(degree)
    # JAX compiles while the ranks start.
    with start_ranks(_run_rank, degree, list(checks), timeout=timeout) as collect:
        by_device = [check.run_jax(mesh) for check in checks]
        by_rank = collect()
    results = []
    for check, jax_side, parts in zip(checks, by_device, zip(*by_rank, strict=True), strict=True):
        result, torch_side = _compare(check, degree, parts, jax_side)
        if save_failing is not None and not result.passed:
            _save(save_failing, result, check.inputs, jax_side, torch_side)
        if pictures:
            found = evidence(check, result.reports, jax_side, torch_side)
            result = replace(result, evidence=found)
        if on_result is not None:
            on_result(result)
        results.append(result)
    return results


def cpu_mesh(degree: int) -> Mesh:
    """A mesh of CPU devices with one axis, "seq".

    Raises:
      ValueError: fewer than `degree` CPU devices.
    """
    devices = jax.devices("cpu")
    if len(devices) < degree:
        raise ValueError(
            f"degree {degree} needs {degree} JAX CPU devices, there are {len(devices)}. Before "
            f'JAX is first used, write jax.config.update("jax_num_cpu_devices", {degree}).'
        )
    return jax.make_mesh((degree,), ("seq",), devices=devices[:degree])


def _run_rank(rank: int, checks: Sequence[Check]) -> list[Outputs | str]:
    return [check.run_torch(rank) for check in checks]


def _compare(
    check: Check, degree: int, parts: Sequence[Outputs | str], jax_side: Outputs
) -> tuple[Result, Outputs]:
    errors = [part for part in parts if isinstance(part, str)]
    arrays = [part for part in parts if not isinstance(part, str)]
    if errors:
        result = Result(check.name, check.shape, degree, {}, check.expected, error=errors[0])
        return result, {}
    torch_side, truth = check.joined(arrays), check.truth()
    missing = sorted(jax_side.keys() - torch_side.keys())
    if missing and check.expected == "right":
        error = f"PyTorch gave no {', '.join(missing)}."
        return Result(check.name, check.shape, degree, {}, error=error), torch_side
    reports = {}
    for name in torch_side:
        references = {"torch": torch_side[name]}
        if name in truth:
            references["truth"] = truth[name]
        reports[name] = compare_bits(dict.fromkeys(references, jax_side[name]), references)
    hashes = {}
    if isinstance(check, PipelineCheck) and check.kernel == "exact" and check.expected == "right":
        golden = expected_digest(check.inputs, check.spec)
        hashes = {"sha256": digest(jax_side), "golden": golden}
    near = check.expected != "rounded" or all(_near(reports[n], torch_side[n]) for n in reports)
    result = Result(check.name, check.shape, degree, reports, check.expected, near, **hashes)
    return result, torch_side


def _near(report: BitsReport, torch_side: np.ndarray) -> bool:
    """Whether differences are within `ROUNDING`, and NaNs and infinities agree."""
    x = np.abs(torch_side.astype(np.float64))
    limit = ROUNDING * x.max(initial=0, where=np.isfinite(x))
    return all(
        (leaf.max_abs or 0) <= limit and not (leaf.nan_only_a or leaf.nan_only_b or leaf.infinite)
        for leaf in report.leaves
    )


def _file_name(name: str) -> str:
    """A distinct file name for each name, also where file systems ignore case."""
    short = re.sub("[^a-z0-9]+", "-", name.lower())[-100:]
    if re.fullmatch("[a-z0-9]+( [a-z0-9]+)*", name) and len(name) <= 100:
        return short
    return f"{short}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _save(folder: Path, result: Result, inputs: Arrays, jax_side: Outputs, torch_side: Outputs):
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    name = _file_name(f"{result.name} degree {result.degree}")
    arrays = {}
    for side, tree in (("input", inputs), ("jax", jax_side), ("torch", torch_side)):
        for path, x in jax.tree_util.tree_leaves_with_path(tree):
            key = ".".join([side, *(step.key for step in path)])
            # A pair of floats: the format has no complex number of 128 bits.
            pairs = x.dtype == np.complex128
            arrays[key] = np.ascontiguousarray(x[..., None].view(np.float64) if pairs else x)
    save_file(arrays, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps(result.to_json(), indent=2) + "\n")
