"""The pictures of a report: where outputs differ, and where a wrong version puts tokens."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..compare.picture import Picture, picture, pictures
from ..compare.report import BitsReport
from .checks import Check, PipelineCheck
from .checks.sharded_arrays import Outputs

# Reshards of 17 dtypes differ alike.
MOST_OF_AN_OUTPUT = 2


@dataclass(frozen=True)
class Evidence:
    """Pictures that a report shows for a check that found a difference, beside the counts.

    Attributes:
      about: a sentence, of a historical version where it was published; "" for others.
      outputs: by output and path, where PyTorch's differs from JAX's, or JAX's from the truth.
      reshards: what a historical version does to tokens and heads, by reshard, where that is wrong:
        the right array against the wrong one, or a sentence where there is no such array.
    """

    about: str
    outputs: dict[str, Picture]
    reshards: dict[str, Picture | str]


def evidence(
    check: Check, reports: Mapping[str, BitsReport], jax_side: Outputs, torch_side: Outputs
) -> Evidence:
    """The evidence of one check, of the arrays that its reports are about."""
    outputs: dict[str, Picture] = {}
    for name, report in reports.items():
        if not report.equal:
            found = _of_output(check, name, jax_side, torch_side)
            outputs |= dict(list(found.items())[:MOST_OF_AN_OUTPUT])
    if not isinstance(check, PipelineCheck) or check.version is None:
        return Evidence("", outputs, {})
    from torch_ref.wrong_versions import WRONG_VERSIONS

    about = f"In PyTorch's pipeline: DeepSpeed {WRONG_VERSIONS[check.version].published}."
    return Evidence(about, outputs, _of_reshards(check))


def _of_output(
    check: Check, name: str, jax_side: Outputs, torch_side: Outputs
) -> dict[str, Picture]:
    found = pictures(jax_side[name], torch_side[name])
    if found or name not in (truth := check.truth()):
        return {f"{name}{path}": x for path, x in found.items()}
    against_truth = pictures(truth[name], jax_side[name])
    return {f"{name}{path} against the truth": x for path, x in against_truth.items()}


def _of_reshards(check: PipelineCheck) -> dict[str, Picture | str]:
    """`Evidence.reshards`: each number of an array `[B, S, N, 1]` names the place that it has."""
    B, S, N, _ = check.inputs["query"].shape
    right = np.arange(B * S * N, dtype=np.int32).reshape(B, S, N, 1)
    found: dict[str, Picture | str] = {}
    for op, name in (("op1", "sequence to heads"), ("op2", "heads to sequence")):
        try:
            wrong = _moved(check, op, right)
        except RuntimeError as error:
            found[name] = f"PyTorch raises an error: {error}"
            continue
        shape, expected = list(wrong.shape[:3]), list(right.shape[:3])
        if shape != expected:
            found[name] = f"The array [B, S, N] has shape {shape}, and {expected} is right."
        elif (of_op := picture(right, wrong)) is not None:
            found[name] = of_op
    return found


def _moved(check: PipelineCheck, op: Any, labels: np.ndarray) -> np.ndarray:
    """The labels after one reshard by a historical version, as one global array `[B, S, N, 1]`.

    The ranks are an axis that is seen, in this process.
    """
    import torch
    from einops import rearrange

    from torch_ref.wrong_versions import LAYOUTS, WRONG_VERSIONS, simulate

    tokens, batch = LAYOUTS[check.layout]
    local = {"bshd": "b s n h", "sbhd": "s b n h"}[check.layout]
    by_tokens, by_heads = "b (p s) n h", "b s (p n) h"
    before, after = (by_tokens, by_heads) if op == "op1" else (by_heads, by_tokens)
    x = rearrange(torch.from_numpy(labels), f"{before} -> p {local}", p=check.degree)
    axes = (2, tokens) if op == "op1" else (tokens, 2)
    y = simulate(WRONG_VERSIONS[str(check.version)], x, *axes, batch)
    return rearrange(y, f"p {local} -> {after}").numpy()
