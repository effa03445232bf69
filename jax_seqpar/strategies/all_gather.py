"""AllGatherKV: every device gathers all keys and values, and keeps its own queries."""

from dataclasses import dataclass, replace

import jax
from jaxtyping import Array

from .._checks import axis_size
from ..kernels import Kernel, Residual, blockwise_attention
from ..mask import Spec
from ..mesh_layout import AxisName
from ..order import Contiguous, TokenOrder
from .strategy import (
    Degree,
    KeepsQueries,
    Shape,
    array_bytes,
    bytes_of_others,
    check_traffic,
    output,
    share,
)
from .whole_blocks import Deal, deals, numbers_dealt, padded


@dataclass(frozen=True)
class AllGatherKV(KeepsQueries):
    """`[B, S@seq, K, H]` becomes `[B, S, K, H]` by one all-gather each for key and value.

    Queries and output stay where they are, so any number of heads will do, and at few KV heads it
    sends less than Ulysses (`traffic` says). Every device holds all keys and values. As Llama 3's
    context parallelism (section 3.3.2 of https://arxiv.org/abs/2407.21783). With a causal mask the
    first devices have less work than the last.

    The kernel has to be one of this library: it is told which queries it has.
    """

    sees_all_tokens, sees_all_keys = False, True

    def __call__(
        self,
        kernel: Kernel,
        query: Array,
        key: Array,
        value: Array,
        spec: Spec,
        *,
        axis_name: AxisName,
        order: TokenOrder = Contiguous(),
        return_residual: bool = False,
    ) -> tuple[Array, Residual | None]:
        degree, T = axis_size(axis_name), query.shape[1]
        queries = Deal.in_blocks(order, min(kernel.block, T * degree), T * degree, degree)
        part = padded(spec, query.shape[0], queries=queries)
        part = replace(part, held_queries=queries.held(axis_name))
        if reason := kernel.why_not(query, key, value, part):
            raise ValueError(
                f"kernel={kernel!r} cannot work with a part of the queries: {reason}. Write "
                f"kernel=jax_seqpar.Blockwise(), or strategy=jax_seqpar.Ulysses()."
            )

        def gather(x: Array) -> Array:
            if x.shape[1] == 0:  # JAX 0.10.2 cannot compile an all-gather of nothing
                return x
            whole = jax.lax.all_gather(x, axis_name=axis_name, axis=1, tiled=True)
            return order.restore(whole, 1, degree)

        local = kernel.sharing(((axis_name, degree),))
        query = queries.forth(query, axis_name)
        out, residual = local.attend(query, gather(key), gather(value), part)
        return queries.back(out, axis_name), residual

    def traffic(
        self,
        query: Shape,
        key: Shape,
        value: Shape,
        *,
        degree: Degree,
        itemsize: int,
        kernel: Kernel = blockwise_attention,
    ) -> int:
        """Bytes received: keys and values of the other devices, and tokens moved into whole blocks.

        For contiguous tokens. `Exact()` moves the queries where a device does not hold whole
        blocks, and their output back; other orders are counted by `choose_strategy`.
        """
        P = check_traffic(query, key, degree)
        dealt = deals(Contiguous(), kernel.block, (query[1],), P)
        moved = numbers_dealt(dealt, query, key, value) * itemsize
        return bytes_of_others(key, value, P, itemsize) + moved

    def memory(
        self,
        query: Shape,
        key: Shape,
        value: Shape,
        *,
        degree: Degree,
        itemsize: int,
        gradients: bool = False,
        kernel: Kernel = blockwise_attention,
    ) -> int:
        """All keys and values, this device's output, and its queries in the layout of the kernel.

        With gradients each of these arrays counts twice, for itself and its gradient.
        """
        own = query[1] // check_traffic(query, key, degree)
        query = share(query, own, query[2])
        arrays = array_bytes(query, key, value, output(query, value), itemsize=itemsize)
        options = {"itemsize": itemsize, "gradients": gradients}
        return (1 + gradients) * arrays + kernel.workspace(query, key, value, **options)
