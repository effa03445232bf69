"""AllGatherKV: every device gathers all keys and values, and keeps its own queries."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
from jaxtyping import Array

from .. import refusals
from ..exact.kv_replicas import adds_without_rounding, tell_shared_heads
from ..layout import AxisName
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

    def heads_axes(self, tokens: Any) -> tuple[str, ...]:
        return ()

    def pad_heads(self, spec: Spec, heads: int, kv_heads: int, degree: int, kernel: Any) -> Spec:
        return spec

    def kv_replicas(self, heads: int, kv_heads: int, degree: int, kernel: Any) -> int:
        return degree

    def __call__(
        self,
        kernel: Callable[..., Array],
        query: Array,
        key: Array,
        value: Array,
        spec: Spec,
        *,
        axis_name: AxisName,
    ) -> Array:
        attend = refusals.form_of_spec(kernel)
        degree, T = refusals.axis_size(axis_name), query.shape[1]
        gather = partial(jax.lax.all_gather, axis_name=axis_name, axis=1, tiled=True)
        queries = Tokens(jax.lax.axis_index(axis_name) * T, T)
        if adds_without_rounding(kernel):
            attend = tell_shared_heads(attend, ((axis_name, degree),))
        out = attend(query, gather(key), gather(value), replace(spec, queries=queries))
        refusals.check_local_output(out, query, value)
        return out

    def traffic(self, query: Shape, key: Shape, value: Shape, *, degree: int, itemsize: int) -> int:
        return sum(math.prod(shape) for shape in (key, value)) * itemsize * (degree - 1) // degree
