"""A check of one reshard alone, in every dtype that both frameworks have."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from ...compare.numpy_conversion import torch_to_numpy
from ...strategies.reshard import heads_to_sequence, sequence_to_heads
from ..inputs import Arrays
from .sharded_arrays import HEADS, SPECS, TOKENS, Outputs, join, local_part

Op = Literal["sequence_to_heads", "heads_to_sequence"]

RESHARDS = {"sequence_to_heads": sequence_to_heads, "heads_to_sequence": heads_to_sequence}
DTYPES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float8_e4m3fn", "float8_e5m2", "bfloat16", "float16", "float32", "float64"),
    *("complex64", "complex128"),
)


@dataclass(frozen=True)
class ReshardCheck:
    """One reshard of random bits in many dtypes, and its derivative applied to a cotangent.

    Inputs are `[B, S, N, H]`: "x int8" and the like, and "grad float32" for dtypes with gradients.
    """

    op: Op
    degree: int
    inputs: Arrays
    expected: str = "right"

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
            x = local_part(self.inputs[key], before, self.degree, rank)
            grad = self.inputs.get(f"grad {dtype}")
            x.requires_grad_(grad is not None)
            out = SeqAllToAll.apply(None, x, after, before, 0, single_all_to_all)
            outputs["forward"][dtype] = torch_to_numpy(out)
            if grad is not None:
                local_grad = local_part(grad, after, self.degree, rank)
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
        return {"forward": join(parts, "forward", after), "dq": join(parts, "dq", before)}

    def truth(self) -> Outputs:
        outputs: Outputs = {"forward": {}, "dq": {}}
        for key, x in self.inputs.items():
            kind, dtype = key.split()
            outputs["forward" if kind == "x" else "dq"][dtype] = x
        return outputs


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


def _random_bits(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    if dtype == np.bool_:
        return rng.integers(0, 2, shape).astype(bool)
    bits = rng.integers(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), dtype=np.uint8)
    return bits.view(dtype)
