"""A check of the whole pipeline around one kernel, and the controls that must differ."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from ...attention import dot_product_attention
from ...bridge.shared_kernels import as_torch_attention, staged_attention
from ...compare.numpy_conversion import numpy_to_torch, torch_to_numpy
from ...exact import exact_attention
from ...kernels import dense_attention
from ...mask import Mask, Spec
from ...mask.array_fields import Axes
from ...mask.keywords import from_flat, to_flat
from ...mesh_layout import MeshLayout
from ...strategies import AllGatherKV, Hybrid, Ring, Strategy, Ulysses
from ..inputs import NAMES, Arrays, case_of, keywords
from .sharded_arrays import TOKENS, Outputs, join, local_part

# None; PyTorch's or JAX's in both; each framework's own, float32 or exact.
Kernel = Literal["identity", "sdpa", "dense", "plain", "exact"]
Layout = Literal["bshd", "sbhd"]

STRATEGIES: dict[str, Strategy] = {
    "Ulysses": Ulysses(),
    "all-gather": AllGatherKV(),
    "ring": Ring(),
    "hybrid": Hybrid(AllGatherKV()),
}
CAUSAL = Spec(Mask(is_causal=True))


@dataclass(frozen=True)
class PipelineCheck:
    """Ulysses attention and its gradients, with one kernel in both frameworks or one in each.

    Exact attention has the same bits under other strategies: JAX's devices share the work as
    `strategy` says, against PyTorch's ranks by Ulysses.

    The attention is the one that `spec` and the arrays beside query, key and value describe; those
    arrays are constants, whose gradients nobody computes. `identity` is the pipeline of the
    original report, whose output must be its query; `sdpa` and `dense` are shared; `exact` is
    written twice, and must agree all the same; `plain` is PyTorch's attention (the float64
    reference, rounded, for what `sdpa_lacks`) against JAX's, a control: without exact sums their
    bits must differ. A historical version in PyTorch's pipeline makes it a control, too, where that
    version is wrong.
    """

    degree: int
    inputs: Arrays
    kernel: Kernel
    spec: Spec = CAUSAL
    layout: Layout = "bshd"
    version: str | None = None
    label: str = ""
    strategy: str = "Ulysses"

    @property
    def name(self) -> str:
        what = ("history", self.version) if self.version else (self.label, self.kernel)
        unusual = (x for x in (self.layout, self.strategy) if x not in ("bshd", "Ulysses"))
        return " ".join(filter(None, (*what, *unusual)))

    @property
    def shape(self) -> str:
        return str(case_of(self.inputs))

    @property
    def expected(self) -> str:
        """Outcome that the comparison must have: "right", or by the truth table of the version."""
        if self.kernel == "plain":
            return "rounded"
        if self.version is None:
            return "right"
        from torch_ref.wrong_versions import expected_outcome

        batch, tokens, heads, _ = self.inputs["query"].shape
        kv_heads = max(self.inputs["key"].shape[2] // self.degree, 1)
        local = (heads // self.degree, kv_heads)
        return expected_outcome(
            self.version, self.layout, self.degree, batch, tokens // self.degree, local
        )

    def run_torch(self, rank: int) -> Outputs | str:
        import torch

        from torch_ref.ulysses import DistributedAttention
        from torch_ref.wrong_versions import WRONG_VERSIONS
        from torch_ref.wrong_versions import single_all_to_all as wrong_all_to_all

        exchange = None
        if self.version:
            exchange = partial(wrong_all_to_all, WRONG_VERSIONS[self.version])
        token_first = self.layout == "sbhd"

        def swap(x):
            return x.transpose(0, 1).contiguous() if token_first else x

        kernel = self._torch_kernel(rank)
        attention = DistributedAttention(
            lambda q, k, v: swap(kernel(swap(q), swap(k), swap(v))), exchange=exchange
        )
        local = {
            name: swap(local_part(self.inputs[name], TOKENS, self.degree, rank)) for name in NAMES
        }
        grad = local.pop("grad")
        leaves = [x.requires_grad_() for x in local.values()]
        try:
            out = attention(*leaves, batch_dim_idx=int(token_first))
            if out.shape != grad.shape:
                return {"forward": torch_to_numpy(swap(out))}
            unused = self.kernel == "identity"
            gradients = torch.autograd.grad(out, leaves, grad, allow_unused=unused)
        except RuntimeError as error:
            if not self.version:
                raise
            return str(error)
        results = dict(zip(("forward", "dq", "dk", "dv"), (out, *gradients), strict=True))
        return {name: torch_to_numpy(swap(x)) for name, x in results.items() if x is not None}

    def _torch_kernel(self, rank: int) -> Callable[..., Any]:
        """Kernel of PyTorch for a rank, batch-first, on whole sequences."""
        from torch_ref.ulysses import heads_of_ranks

        if self.kernel == "identity":
            return lambda q, k, v: q.clone()
        arrays = keywords(self.inputs)
        N, K = (self.inputs[name].shape[2] for name in ("query", "key"))
        heads, _ = heads_of_ranks(N, K, self.degree)
        part = partial(_part_of_rank, heads=heads, rank=rank)
        own = to_flat(from_flat(arrays).map(part))
        if self.kernel == "dense":
            whole = from_flat(to_flat(self.spec) | own)
            return as_torch_attention(partial(dense_attention, **whole.keywords))
        options = to_flat(self.spec) | jax.tree.map(numpy_to_torch, own)
        if self.kernel == "exact":
            from torch_ref.exact import exact_attention

            shared = _ranks_of_the_same_head(rank, self.degree, self.inputs["key"].shape[2])
            return partial(exact_attention, **options, shared_by=shared)
        if sdpa_lacks(self.spec, arrays):
            return partial(_float64_rounded, options)
        return partial(_sdpa, self.spec)

    def run_jax(self, mesh: Mesh) -> Outputs:
        layout = MeshLayout(mesh=mesh)
        if self.strategy == "hybrid":
            tokens = ("outer", "inner")
            layout = MeshLayout(tokens, mesh=Mesh(mesh.devices.reshape(2, -1), tokens))
        assert layout.mesh is not None
        sharding = NamedSharding(layout.mesh, layout.partition_spec)
        operands = {name: jax.device_put(self.inputs[name], sharding) for name in NAMES}
        arrays = {} if self.kernel == "identity" else keywords(self.inputs)
        program = _jax_program(self.kernel, self.spec, STRATEGIES[self.strategy], layout)
        results = program(**operands, arrays=arrays)
        if self.kernel == "identity":
            del results["dk"], results["dv"]
        return jax.tree.map(np.asarray, results)

    def joined(self, parts: Sequence[Outputs]) -> Outputs:
        return {name: join(parts, name, TOKENS) for name in parts[0]}

    def truth(self) -> Outputs:
        if self.kernel != "identity":
            return {}
        return {"forward": self.inputs["query"], "dq": self.inputs["grad"]}


def history_checks(degree: int, inputs: Arrays) -> list[PipelineCheck]:
    """Every historical version in both layouts, around PyTorch's attention."""
    return [
        PipelineCheck(degree, inputs, "sdpa", layout=layout, version=version)
        for version in ("v1", "v2", "v5")
        for layout in ("bshd", "sbhd")
    ]


@cache
def _jax_program(
    kernel: Kernel, spec: Spec, strategy: Strategy, layout: MeshLayout
) -> Callable[..., Outputs]:
    """JAX program, compiled once for inputs of the same sizes; PyTorch's kernel is not jitted."""
    if kernel == "sdpa":
        assert isinstance(layout.mesh, Mesh)
        attend = partial(staged_attention, attention=partial(_sdpa, spec), mesh=layout.mesh)
    else:
        local = {"identity": _identity, "exact": exact_attention}.get(kernel, dense_attention)
        attend = partial(dot_product_attention, kernel=local, strategy=strategy, layout=layout)
    options = {} if kernel in ("identity", "sdpa") else to_flat(spec)

    def run(query: Any, key: Any, value: Any, grad: Any, arrays: dict[str, Any]) -> Outputs:
        keywords = from_flat(options | arrays).keywords if options or arrays else {}
        out, pull = jax.vjp(partial(attend, **keywords), query, key, value)
        return dict(zip(("forward", "dq", "dk", "dv"), (out, *pull(grad)), strict=True))

    return run if kernel == "sdpa" else jax.jit(run)


def _identity(query: Any, key: Any, value: Any) -> Any:
    return query


def sdpa_lacks(spec: Spec, arrays: dict[str, Any]) -> list[str]:
    """Names of the options beyond causality and scale, which PyTorch's kernel is not given."""
    asked = [name for name in to_flat(spec) if name not in ("is_causal", "scale")]
    return asked + list(arrays)


def _part_of_rank(x: np.ndarray, axes: Axes, *, heads: list[int], rank: int) -> np.ndarray:
    """The part of an attention's array that belongs to the heads of a rank."""
    axis = axes.index("heads") if "heads" in axes else None
    if axis is None or x.shape[axis] == 1:
        return x
    return np.split(x, np.cumsum(heads)[:-1], axis)[rank]


def _float64_rounded(options: dict[str, Any], q: Any, k: Any, v: Any) -> Any:
    from torch_ref.dense import dense_attention

    return dense_attention(q, k, v, **options).to(q.dtype)


def _sdpa(spec: Spec, q: Any, k: Any, v: Any) -> Any:
    """PyTorch's attention, batch-first."""
    from torch.nn.functional import scaled_dot_product_attention

    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    out = scaled_dot_product_attention(
        q, k, v, is_causal=spec.mask.is_causal, scale=spec.logits.scale, enable_gqa=True
    )
    return out.transpose(1, 2).contiguous()


def _ranks_of_the_same_head(rank: int, degree: int, kv_heads: int) -> Any:
    """The process group that has a rank's KV head; None where no other rank has it."""
    import torch.distributed as dist

    copies = degree // kv_heads
    if copies <= 1:
        return None
    # Every rank has to make every group.
    starts = range(0, degree, copies)
    groups = [dist.new_group(list(range(start, start + copies))) for start in starts]
    return groups[rank // copies]
