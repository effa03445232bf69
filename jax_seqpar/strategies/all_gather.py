"""AllGatherKV: every device gathers all keys and values, and keeps its own queries."""

import math
from dataclasses import dataclass, replace
from functools import partial

import jax
from jaxtyping import Array

from .._checks import axis_size
from ..kernels import Kernel, Residual
from ..layout import AxisName, MeshAxes
from ..mask import Spec, Tokens
from .strategy import Shape


@dataclass(frozen=True)
class AllGatherKV:
    """`[B, S@seq, K, H]` becomes `[B, S, K, H]` by one all-gather each for key and value.

    Queries and output stay where they are, so any number of heads will do, and at few KV heads it
    sends less than Ulysses (`traffic` says). Every device holds all keys and values. As Llama 3's
    context parallelism (section 3.3.2 of https://arxiv.org/abs/2407.21783). With a causal mask the
    first devices have less work than the last.

    The kernel has to be one of this library: it is told which queries it has.
    """

    def heads_axes(self, tokens: MeshAxes) -> tuple[str, ...]:
        return ()

    def pad_heads(self, spec: Spec, heads: int, kv_heads: int, degree: int, kernel: Kernel) -> Spec:
        return spec

    def kv_replicas(self, heads: int, kv_heads: int, degree: int, kernel: Kernel) -> int:
        return degree

    def __call__(
        self,
        kernel: Kernel,
        query: Array,
        key: Array,
        value: Array,
        spec: Spec,
        *,
        axis_name: AxisName,
        return_residual: bool = False,
    ) -> tuple[Array, Residual | None]:
        degree, T = axis_size(axis_name), query.shape[1]
        part = replace(spec, queries=Tokens(jax.lax.axis_index(axis_name) * T, T))
        if reason := kernel.why_not(query, key, value, part):
            raise ValueError(
                f"kernel={kernel!r} cannot work with a part of the queries: {reason}. Write "
                f"kernel=jax_seqpar.Blockwise(), or strategy=jax_seqpar.Ulysses()."
            )
        gather = partial(jax.lax.all_gather, axis_name=axis_name, axis=1, tiled=True)
        local = kernel.sharing(((axis_name, degree),))
        return local.attend(query, gather(key), gather(value), part)

    def traffic(self, query: Shape, key: Shape, value: Shape, *, degree: int, itemsize: int) -> int:
        return sum(math.prod(shape) for shape in (key, value)) * itemsize * (degree - 1) // degree
