"""What the parity run compares: each check is one computation, done by JAX and by PyTorch ranks.

`run_jax` gives global arrays, `run_torch` what one rank holds, `joined` puts the ranks' parts
together, `truth` is the answer where it is known without computing: a reshard leaves the global
array as it is. Inputs are global NumPy arrays, so a check travels to a rank as it is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..attention import dot_product_attention
from ..kernels import dense_attention
from ..reshard import heads_to_sequence, sequence_to_heads
from .arrays import numpy_to_torch, torch_to_numpy
from .cases import Arrays, case_of
from .kernels import as_torch_attention, staged_attention

# By column of the table, `forward`, `dq`, `dk`, `dv`: an array, or a dictionary of arrays.
Outputs = dict[str, Any]
Op = Literal["sequence_to_heads", "heads_to_sequence"]
Kernel = Literal["identity", "sdpa", "dense"]  # none, PyTorch's, JAX's
Layout = Literal["bshd", "sbhd"]

DTYPES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float8_e4m3fn", "float8_e5m2", "bfloat16", "float16", "float32", "float64"),
    *("complex64", "complex128"),
)
RESHARDS = {"sequence_to_heads": sequence_to_heads, "heads_to_sequence": heads_to_sequence}
TOKENS, HEADS = 1, 2
SPECS = {TOKENS: PartitionSpec(None, "seq"), HEADS: PartitionSpec(None, None, "seq")}


@dataclass(frozen=True)
class ReshardCheck:
    """One reshard of random bits in many dtypes, and its derivative applied to a cotangent.

    Inputs are `[B, S, N, H]`: "x int8" and the like, and "grad float32" for dtypes with gradients.
    """

    op: Op
    degree: int
    inputs: Arrays
    must_differ: bool = False

    @property
    def name(self) -> str:
        return "reshard to " + self.op.rpartition("_")[2]

    @property
    def shape(self) -> str:
        return "x".join(map(str, next(iter(self.inputs.values())).shape))

    @property
    def axes(self) -> tuple[int, int]:
        """The sharded axis before and after."""
        return (TOKENS, HEADS) if self.op == "sequence_to_heads" else (HEADS, TOKENS)

    def run_torch(self, rank: int) -> Outputs:
        import torch

        from torch_ref.ulysses import SeqAllToAll, single_all_to_all

        before, after = self.axes
        outputs: Outputs = {"forward": {}, "dq": {}}
        for key in self.inputs:
            kind, dtype = key.split()
            if kind == "grad":
                continue
            x = _local(self.inputs[key], before, self.degree, rank)
            grad = self.inputs.get(f"grad {dtype}")
            x.requires_grad_(grad is not None)
            out = SeqAllToAll.apply(None, x, after, before, 0, single_all_to_all)
            outputs["forward"][dtype] = torch_to_numpy(out)
            if grad is not None:
                local_grad = _local(grad, after, self.degree, rank)
                (dx,) = torch.autograd.grad(out, x, local_grad)
                outputs["dq"][dtype] = torch_to_numpy(dx)
        return outputs

    def run_jax(self, mesh: Mesh) -> Outputs:
        before, after = self.axes
        reshard = jax.shard_map(
            lambda x: RESHARDS[self.op](x, "seq"),
            mesh=mesh,
            in_specs=SPECS[before],
            out_specs=SPECS[after],
        )

        def run(x, grads):
            forward = {dtype: reshard(a) for dtype, a in x.items()}
            dq = {dtype: jax.vjp(reshard, x[dtype])[1](grad)[0] for dtype, grad in grads.items()}
            return {"forward": forward, "dq": dq}

        def operands(kind, axis):
            return {
                key.split()[1]: jax.device_put(x, NamedSharding(mesh, SPECS[axis]))
                for key, x in self.inputs.items()
                if key.split()[0] == kind
            }

        # 64-bit dtypes keep their width only inside this scope.
        with jax.enable_x64(True):
            outputs = jax.jit(run)(operands("x", before), operands("grad", after))
            return jax.tree.map(np.asarray, outputs)

    def joined(self, parts: Sequence[Outputs]) -> Outputs:
        before, after = self.axes
        return {"forward": _join(parts, "forward", after), "dq": _join(parts, "dq", before)}

    def truth(self) -> Outputs:
        outputs: Outputs = {"forward": {}, "dq": {}}
        for key, x in self.inputs.items():
            kind, dtype = key.split()
            outputs["forward" if kind == "x" else "dq"][dtype] = x
        return outputs


@dataclass(frozen=True)
class PipelineCheck:
    """Ulysses attention and its gradients, with one kernel shared by both frameworks.

    `identity` is the pipeline of the original report, whose output must be its query. A historical
    version in PyTorch's pipeline makes it a control, which must differ where that version is wrong.
    """

    degree: int
    inputs: Arrays
    kernel: Kernel
    is_causal: bool = True
    layout: Layout = "bshd"
    version: str | None = None
    label: str = ""

    @property
    def name(self) -> str:
        what = ("history", self.version) if self.version else (self.label, self.kernel)
        return " ".join(filter(None, (*what, self.layout if self.layout == "sbhd" else "")))

    @property
    def shape(self) -> str:
        return str(case_of(self.inputs))

    @property
    def must_differ(self) -> bool:
        return self.version is not None and not _is_right(
            self.version, self.layout, self.degree, self.inputs
        )

    def run_torch(self, rank: int) -> Outputs | str:
        import torch

        from torch_ref.history import WRONG_VERSIONS
        from torch_ref.history import single_all_to_all as wrong_all_to_all
        from torch_ref.ulysses import DistributedAttention, single_all_to_all

        exchange = single_all_to_all
        if self.version:
            exchange = partial(wrong_all_to_all, WRONG_VERSIONS[self.version])
        token_first = self.layout == "sbhd"

        def swap(x):
            return x.transpose(0, 1).contiguous() if token_first else x

        kernel = _torch_kernel(self.kernel, self.is_causal)
        attention = DistributedAttention(
            lambda q, k, v: swap(kernel(swap(q), swap(k), swap(v))), exchange=exchange
        )
        local = {
            name: swap(_local(x, TOKENS, self.degree, rank)) for name, x in self.inputs.items()
        }
        grad = local.pop("grad")
        leaves = [x.requires_grad_() for x in local.values()]
        try:
            out = attention(*leaves, batch_dim_idx=int(token_first))
            if out.shape != grad.shape:
                return {"forward": torch_to_numpy(out)}
            gradients = torch.autograd.grad(out, leaves, grad, allow_unused=True)
        except RuntimeError as error:
            if not self.version:
                raise
            return str(error)
        results = dict(zip(("forward", "dq", "dk", "dv"), (out, *gradients), strict=True))
        return {name: torch_to_numpy(swap(x)) for name, x in results.items() if x is not None}

    def run_jax(self, mesh: Mesh) -> Outputs:
        sharding = NamedSharding(mesh, SPECS[TOKENS])
        operands = {name: jax.device_put(x, sharding) for name, x in self.inputs.items()}

        def attend(query, key, value):
            return pipeline(query, key, value, attention=kernel, mesh=mesh)

        def run(query, key, value, grad):
            out, pull = jax.vjp(attend, query, key, value)
            return dict(zip(("forward", "dq", "dk", "dv"), (out, *pull(grad)), strict=True))

        if self.kernel == "sdpa":
            kernel = _torch_kernel(self.kernel, self.is_causal)
            pipeline = staged_attention
        else:
            kernel = _jax_kernel(self.kernel, self.is_causal)
            pipeline = dot_product_attention
            run = jax.jit(run)
        results = run(**operands)
        if self.kernel == "identity":
            del results["dk"], results["dv"]
        return jax.tree.map(np.asarray, results)

    def joined(self, parts: Sequence[Outputs]) -> Outputs:
        return {name: _join(parts, name, TOKENS) for name in parts[0]}

    def truth(self) -> Outputs:
        if self.kernel != "identity":
            return {}
        return {"forward": self.inputs["query"], "dq": self.inputs["grad"]}


Check = ReshardCheck | PipelineCheck


def reshard_checks(degree: int, shape: tuple[int, ...], seed: int = 0) -> list[ReshardCheck]:
    """Both reshards of `[B, S, N, H]` in every dtype that both frameworks have."""
    rng = np.random.default_rng(seed)
    inputs = {}
    for name in DTYPES:
        dtype = jnp.dtype(name)
        inputs[f"x {name}"] = _random_bits(rng, shape, dtype)
        if jnp.issubdtype(dtype, jnp.inexact):
            inputs[f"grad {name}"] = rng.standard_normal(shape).astype(dtype)
    return [ReshardCheck(op, degree, inputs) for op in ("sequence_to_heads", "heads_to_sequence")]


def history_checks(degree: int, inputs: Arrays) -> list[PipelineCheck]:
    """Every historical version in both layouts, around PyTorch's attention."""
    return [
        PipelineCheck(degree, inputs, "sdpa", layout=layout, version=version)
        for version in ("v1", "v2", "v5")
        for layout in ("bshd", "sbhd")
    ]


def _random_bits(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    if dtype == np.bool_:
        return rng.integers(0, 2, shape).astype(bool)
    bits = rng.integers(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), dtype=np.uint8)
    return bits.view(dtype)


def _join(parts: Sequence[Outputs], name: str, axis: int) -> Any:
    return jax.tree.map(lambda *x: np.concatenate(x, axis), *(part[name] for part in parts))


def _local(x: np.ndarray, axis: int, degree: int, rank: int) -> Any:
    return numpy_to_torch(np.ascontiguousarray(np.split(x, degree, axis)[rank]))


def _torch_kernel(name: Kernel, is_causal: bool) -> Callable[..., Any]:
    """Batch-first, on whole sequences."""
    from torch.nn.functional import scaled_dot_product_attention

    if name == "identity":
        return lambda q, k, v: q.clone()
    if name == "dense":
        return as_torch_attention(partial(dense_attention, is_causal=is_causal))

    def sdpa(q, k, v):
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        out = scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)
        return out.transpose(1, 2).contiguous()

    return sdpa


def _jax_kernel(name: Kernel, is_causal: bool) -> Callable[..., Any]:
    if name == "identity":
        return lambda query, key, value: query
    return partial(dense_attention, is_causal=is_causal)


def _is_right(version: str, layout: Layout, degree: int, inputs: Arrays) -> bool:
    """Whether the truth table says that a version does every reshard of this pipeline right."""
    from torch_ref.history import TRUTH_TABLE

    b, tokens, heads, _ = inputs["query"].shape
    s = tokens // degree
    hl, kv_hl = heads // degree, max(inputs["key"].shape[2] // degree, 1)
    in_table = (TRUTH_TABLE[version, layout, "op1"], TRUTH_TABLE[version, layout, "op2"])
    outcomes = {
        *(in_table[0](degree, b, s, n) for n in (hl, kv_hl)),
        in_table[1](degree, b, s, hl),
    }
    # v5's wrong shape [b, P*S, hl/P, d] can happen to be the right one.
    if degree == 1 and b == s:
        outcomes.discard("reshaped")
    return outcomes <= {"right"}
