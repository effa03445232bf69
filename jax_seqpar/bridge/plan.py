"""Which checks a parity run makes, of which inputs."""

from dataclasses import replace
from enum import StrEnum
from pathlib import Path

from .. import refusals
from ..layout import MeshLayout
from .cases import Arrays, Case, adversarial, case_of, load_inputs
from .checks import Check, PipelineCheck, history_checks, reshard_checks


class Kernels(StrEnum):
    """Which attention runs inside the two pipelines."""

    EXACT = "exact"  # each framework's own, with the same bits
    SHARED = "shared"  # one framework's in both
    PLAIN = "plain"  # each framework's own, with bits of its own


DTYPES = ("float32", "bfloat16", "float16")


def inputs_by_label(
    case: Case, files: list[Path], seed: int, kernels: Kernels
) -> dict[str, Arrays]:
    """By label: the user's files, or generated multi-head, grouped and multi-query attention."""
    if files:
        short = len({path.stem for path in files}) == len(files)
        return {path.stem if short else str(path): load_inputs(path, seed) for path in files}
    _refuse_dtype(case.dtype)
    grouped = case.inputs(seed)
    # Other kernels turn one NaN into NaNs whose payloads say nothing.
    special = {"adversarial": adversarial(grouped)} if kernels == Kernels.EXACT else {}
    return {
        "multi-head": replace(case, kv_heads=case.heads).inputs(seed),
        "multi-query": replace(case, kv_heads=1).inputs(seed),
        **special,
        "grouped": grouped,
    }


def plan(degree: int, named: dict[str, Arrays], causal: bool, kernels: Kernels) -> list[Check]:
    """The checks of one degree: attention for all the inputs, the rest for the last of them.

    The controls get generated inputs of its sizes: a constant, say, would hide any permutation.
    """
    for inputs in named.values():
        _refuse_misfits(degree, inputs)
    label, last = list(named.items())[-1]
    controls = case_of(last, causal).inputs()
    if kernels == Kernels.PLAIN:
        return [PipelineCheck(degree, x, "plain", causal, label=n) for n, x in named.items()]
    own = "exact" if kernels == Kernels.EXACT else "sdpa"
    checks: list[Check] = [
        *reshard_checks(degree, last["query"].shape),
        *(PipelineCheck(degree, last, "identity", layout=x) for x in ("bshd", "sbhd")),
        *(PipelineCheck(degree, x, own, causal, label=name) for name, x in named.items()),
        PipelineCheck(degree, last, own, causal, "sbhd", label=label),
    ]
    if kernels == Kernels.EXACT:
        checks.append(PipelineCheck(degree, controls, "plain", causal, label="generated"))
    else:
        checks.append(PipelineCheck(degree, last, "dense", causal, label=label))
    return [*checks, *history_checks(degree, controls)]


def _refuse_misfits(degree: int, inputs: Arrays) -> None:
    query, key, value = (inputs[name] for name in ("query", "key", "value"))
    refusals.check_arrays(query, key, value)
    refusals.check_division(query.shape, key.shape, MeshLayout(), {"seq": degree})
    refusals.check_ranks(query.shape, key.shape, degree)
    _refuse_dtype(str(query.dtype))


def _refuse_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise ValueError(
            f"dtype must be one that both frameworks' kernels take, {', '.join(DTYPES)}; "
            f"got {dtype}."
        )
