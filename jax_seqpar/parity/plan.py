"""Plan of a parity run: its checks, and the inputs of each."""

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Literal

import numpy as np

from .._checks import Shape, check_arrays
from ..mask import Mask, Spec
from ..mask.keywords import canonical, from_flat, to_flat
from ..mesh_layout import MeshLayout, check_division
from .checks import Check, PipelineCheck, history_checks, reshard_checks
from .checks.pipeline import sdpa_lacks
from .inputs import (
    DTYPES,
    NAMES,
    OPTIONAL,
    Arrays,
    Case,
    adversarial,
    case_of,
    keywords,
    load_inputs,
)


class Kernels(StrEnum):
    """Attention that runs inside the two pipelines."""

    EXACT = "exact"  # each framework's own, with the same bits
    SHARED = "shared"  # one framework's in both
    PLAIN = "plain"  # each framework's own, with bits of its own


def inputs_by_label(
    case: Case, files: list[Path], seed: int, kernels: Kernels
) -> dict[str, Arrays]:
    """Inputs by label: the user's files, or generated multi-head, grouped and multi-query ones."""
    if files:
        return {
            label: load_inputs(path, seed)
            for label, path in zip(_labels(files), files, strict=True)
        }
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


def _labels(files: list[Path]) -> list[str]:
    """File names without their suffix, or whole paths where two files have one name."""
    for labels in ([path.stem for path in files], list(map(str, files))):
        if len(set(labels)) == len(files):
            return labels
    twice = next(path for path in files if files.count(path) > 1)
    raise ValueError(f"--input names one file twice, {twice}. Write each once.")


def plan(
    degree: int, named: dict[str, Arrays], spec: Spec, kernels: Kernels, seed: int
) -> list[Check]:
    """The checks of one degree: attention for all the inputs, the rest for the last of them.

    The controls get generated inputs of its sizes: a constant, say, would hide any permutation.
    Controls and reshards take even parts only: where the degree does not divide the heads, they get
    the next larger number of heads that it does.

    Raises:
      ValueError: inputs that do not fit the degree, the spec, the kernels or one another.
    """
    for label, inputs in named.items():
        try:
            _refuse_misfits(degree, inputs, spec, kernels)
        except ValueError as error:
            raise ValueError(f"{label}: {error}") from None
    label, last = list(named.items())[-1]
    controls = _even(case_of(last), degree).inputs(seed)
    if kernels == Kernels.PLAIN:
        return [PipelineCheck(degree, x, "plain", spec, label=n) for n, x in named.items()]

    def own(x: Arrays) -> Literal["exact", "sdpa", "dense"]:
        if kernels == Kernels.EXACT:
            return "exact"
        return "dense" if sdpa_lacks(spec, keywords(x)) else "sdpa"

    checks: list[Check] = [
        *reshard_checks(degree, controls["query"].shape, seed),
        *(PipelineCheck(degree, last, "identity", layout=x) for x in ("bshd", "sbhd")),
        *(PipelineCheck(degree, x, own(x), spec, label=name) for name, x in named.items()),
        PipelineCheck(degree, last, own(last), spec, "sbhd", label=label),
    ]
    if kernels == Kernels.EXACT:
        others = ["all-gather", "ring"] * (degree > 1)
        # A hybrid has two groups of devices at least, of two each.
        others += ["hybrid"] * (degree >= 4 and degree % 2 == 0)
        checks += [
            PipelineCheck(degree, last, "exact", spec, label=label, strategy=x) for x in others
        ]
        causal = Spec(Mask(is_causal=spec.mask.is_causal))
        checks.append(PipelineCheck(degree, controls, "plain", causal, label="generated"))
    elif own(last) != "dense":
        checks.append(PipelineCheck(degree, last, "dense", spec, label=label))
    return [*checks, *history_checks(degree, controls)]


def _even(case: Case, degree: int) -> Case:
    """The case with as many heads as the degree divides."""
    N, K = case.heads, case.kv_heads
    if N % degree == 0 and (K % degree == 0 or degree % K == 0):
        return case
    heads = -(-N // degree) * degree
    return replace(case, heads=heads, kv_heads=heads)


def understood(label: str, inputs: Arrays, spec: Spec, kernels: Kernels) -> list[str]:
    """Lines that say how inputs are read, what looks wrong with them and what is not compared."""
    (B, T, N, H), (S, K) = inputs["query"].shape, inputs["key"].shape[1:3]
    tokens = f"{T} tokens" if T == S else f"{T} query and {S} key tokens"
    heads = f"{N} heads" if N == K else f"{N} query and {K} KV heads"
    beside = [f"{name} {list(inputs[name].shape)}" for name in OPTIONAL if name in inputs]
    given = to_flat(spec).items()
    options = [f"{name.replace('_', ' ')} {x}" for name, x in given if name != "is_causal"]
    sizes = f"batch {B}, {tokens}, {heads} of dimension {H}, {inputs['query'].dtype}"
    causal = "causal" if spec.mask.is_causal else "not causal"
    lines = [f"{label}: {', '.join([sizes, causal, *options, *beside])}."]
    if N > T or K > S:
        lines.append(
            f"WARNING: {label} has more heads than tokens. Its axes are read as [B, S, N, H], the "
            f"tokens before the heads. Of arrays [B, N, S, H] write x.swapaxes(1, 2)."
        )
    if odd := [n for n in NAMES if not np.isfinite(inputs[n].astype(np.float32)).all()]:
        lines.append(f"{label}: {' and '.join(odd)} with NaN or infinities.")
    if constant := [n for n in ("bias", "alibi_slopes", "sinks") if n in inputs]:
        lines.append(f"{label}: no gradient of {', '.join(constant)} is computed or compared.")
    if kernels != Kernels.EXACT and (lacks := sdpa_lacks(spec, keywords(inputs))):
        instead = {
            Kernels.SHARED: "both pipelines run the dense kernel of JAX instead",
            Kernels.PLAIN: "float64 attention, rounded, stands in its place",
        }[kernels]
        lines.append(
            f"{label}: PyTorch's scaled_dot_product_attention is not asked about "
            f"{', '.join(lacks)}; {instead}."
        )
    return lines


def _refuse_misfits(degree: int, inputs: Arrays, spec: Spec, kernels: Kernels) -> None:
    query, key, value = (inputs[name] for name in NAMES[:3])
    check_arrays(query, key, value)
    _refuse_dtype(str(query.dtype))
    if value.shape != key.shape:
        raise ValueError(
            f"key and value must have one shape in the pipeline of PyTorch, got {key.shape} and "
            f"{value.shape}. Pad the channels of the smaller one with zeros."
        )
    if 0 in (*query.shape, *key.shape):
        raise ValueError(
            f"nothing to compare: query {query.shape}, key {key.shape}. "
            f"Write at least one sequence of one token."
        )
    check_division(query.shape, key.shape, MeshLayout(), {"seq": degree})
    exact = kernels == Kernels.EXACT
    check_ranks(query.shape, key.shape, degree, adds_exactly=exact)
    canonical(from_flat(keywords(inputs) | to_flat(spec)), query, key, value)
    odd = [n for n in NAMES if not np.isfinite(inputs[n].astype(np.float32)).all()]
    if odd and kernels != Kernels.EXACT:
        raise ValueError(
            f"NaN or infinities: what other kernels make of them depends on the order of their "
            f"sums. Got them in {', '.join(odd)}. Write --kernel {Kernels.EXACT}."
        )


def _refuse_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise ValueError(
            f"dtype must be one that both frameworks' kernels take, {', '.join(DTYPES)}; "
            f"got {dtype}. Write x.astype(np.float32)."
        )


def check_ranks(query: Shape, key: Shape, ranks: int, *, adds_exactly: bool) -> None:
    """Raises ValueError unless the ranks of the PyTorch reference share the heads as JAX does.

    Args:
      query, key: shapes `[B, T, N, H]` and `[B, S, K, H]`.
      ranks: how many.
      adds_exactly: whether the kernel adds up a KV head's gradients without rounding. If not, the
        bits depend on which rank has which query heads of a group, and where the ranks do not
        divide the heads the two frameworks differ in that.

    Raises:
      ValueError: fewer heads than ranks, or KV heads that several ranks would share unevenly.
    """
    N, K = query[2], key[2]
    got = f"Got query {query}, key {key}. jax_seqpar itself takes such heads."
    if ranks > N:
        raise ValueError(
            f"query heads N = {N} are fewer than the {ranks} ranks, and a rank of PyTorch has one "
            f"at least. {got} Use at most {N} ranks."
        )
    if ranks > K and ranks % K and N != K:
        raise ValueError(
            f"KV heads K = {K} are fewer than the {ranks} ranks and do not divide their number: "
            f"ranks of PyTorch would share the query heads of a KV head unevenly. {got} "
            f"Use at most {K} ranks, or a multiple of {K}."
        )
    if not adds_exactly and N != K and (N % ranks or (K % ranks and ranks % K)):
        raise ValueError(
            f"with kernels that round sums, the gradients of KV heads depend on which rank has "
            f"which query heads, so of query heads N = {N} and KV heads K = {K} each must be "
            f"divisible by the {ranks} ranks, or K divide their number. {got} Use a degree that "
            f"fits, or write --kernel {Kernels.EXACT}."
        )
