"""Ring: keys and values travel from device to device, each of which attends to what it holds."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._checks import axis_size, check_flag
from ..kernels import Kernel, Residual, blockwise_attention
from ..kernels.parts import (
    Part,
    merge,
    output_products,
    residual_products,
    sinks_gradient,
    with_sinks,
)
from ..mask import Spec, accumulated
from ..mask.array_fields import arrays_of
from ..mesh_layout import AxisName
from ..order import Contiguous, TokenOrder
from ..varying_axes import full_varying, match_varying_axes
from .ring_plan import RingPlan
from .strategy import Degree, KeepsQueries, Shape, array_bytes, check_traffic, output, share
from .whole_blocks import deals, numbers_dealt, padded


@dataclass(frozen=True)
class Ring(KeepsQueries):
    """Ring attention: queries stay, keys and values go round the devices of the token axis.

    Liu et al. 2023, https://arxiv.org/abs/2310.01889. Any number of heads will do, and the memory
    of keys and values does not grow with the devices. What a device attends to in each round is a
    part of its rows; parts are merged in float32 by the maximum and the sum of their weights, and
    rounded once. The gradient is a second ring, in which the gradients of keys and values travel
    with them, in float32.

    Rounds in which no device has a key to attend to are left out: a window of W tokens in the
    contiguous order takes ceil(W P / S), packed documents as many as the longest of them spans.

    The kernel has to give parts (`Fused()` on a TPU, `Triton()` on a GPU, `Blockwise()` anywhere),
    or attend in turns: `Exact()`, whose keys and values go round four times forward and twice for
    the gradients, and whose result has the bits of one device. Under a causal mask choose
    `MeshLayout(order=Zigzag())`, with which all devices have the same work.

    Args:
      bidirectional: whether keys and values of the neighbours on both sides arrive in each round,
        in half as many rounds. On links that have as much for each direction a round then has twice
        the attention to hide its transfers under. A device holds two more slices of keys and
        values, whose gradients have half of the ring to go home.
    """

    bidirectional: bool = False

    sees_all_tokens = sees_all_keys = False

    def __post_init__(self) -> None:
        check_flag("bidirectional", self.bidirectional)

    def __repr__(self) -> str:
        return "Ring(bidirectional=True)" if self.bidirectional else "Ring()"

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
        if not kernel.gives_parts and not kernel.attends_in_turns:
            raise ValueError(
                f"kernel={kernel!r} does not attend to a part of the keys, as a ring needs it to. "
                f"Write kernel=jax_seqpar.Blockwise(), on a GPU kernel=jax_seqpar.Triton(), or "
                f"strategy=jax_seqpar.Ulysses(), which gives the kernel all keys."
            )
        if 0 in (*query.shape[:3], *value.shape[1:]):
            return kernel.attend(query, key, value, spec)  # nothing, which no device has to send
        precision = jax.config.jax_default_matmul_precision  # pyright: ignore
        sizes = query.shape[1], key.shape[1], self.bidirectional
        plan = RingPlan(kernel, axis_name, axis_size(axis_name), order, precision, *sizes)
        if kernel.attends_in_turns:
            return _in_turns(plan, query, key, value, spec), None
        # Their gradients are added up over the devices, which 16 bits would round each time.
        small = {n: x for n, x in arrays_of(spec.logits) if n != "bias"}
        spec = spec.with_logits(**{n: x.astype(accumulated(x.dtype)) for n, x in small.items()})
        return _attention(plan, *match_varying_axes((query, key, value, spec)))

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
        """Bytes received in the turns of the kernel: most kernels have one, of keys and values.

        All rounds, and of tokens in their order, which `Exact()` has dealt in whole blocks; a mask
        that makes rounds needless and other orders are counted by `choose_strategy`.
        """
        P = check_traffic(query, key, degree)
        if 0 in (*query[:3], *value[1:]):
            return 0
        dealt = deals(Contiguous(), kernel.block, (query[1], key[1]), P)
        forward, _ = kernel.turns(key[3], value[3], itemsize)
        received = key[0] * dealt[1].sizes[1] * key[2] * (P - 1)
        moved = numbers_dealt(dealt, query, key, value) * itemsize
        return received * sum(turn.sent for turn in forward) + moved

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
        """Keys and values of three devices, and the output twice in float32: so far, and of a part.

        The three are a device's own, those that are attended to and those on their way; five where
        these two come from both sides. With gradients each has its gradient beside it in float32,
        and the gradient of the queries has two arrays as the output has. Keys from both sides have
        a part each, of the output or of all gradients. Two devices have one round: none on their
        way, and the outputs in float32 are gone when the gradients of the queries are there. A
        kernel that attends in turns has sums of its own, which are in its `part_workspace`, of
        whole blocks of tokens.
        """
        P, in_turns = check_traffic(query, key, degree), kernel.attends_in_turns
        dealt = deals(Contiguous(), kernel.block, (query[1], key[1]), P)
        T, S = (deal.sizes[1] for deal in dealt)
        q, k, v = share(query, T, query[2]), *(share(x, S, x[2]) for x in (key, value))
        out, wide = output(q, v), max(itemsize, 4)
        directions = 2 if self.bidirectional and P > 4 else 1
        most = min(P, 5 if self.bidirectional else 3)
        held = array_bytes(*[k, v] * most, out, itemsize=itemsize)
        sums = [] if in_turns else [out] * (1 + directions)
        if gradients and in_turns:
            held += array_bytes(q, k, v, itemsize=itemsize)
        elif gradients:
            of_parts = [q, k, v] * directions
            sums = [*([out, out] if P > 2 else ()), *[k, v] * (max(most, 3) - 1), q, *of_parts]
        held += array_bytes(*sums, itemsize=wide)
        options: Any = {"degree": P, "itemsize": itemsize, "gradients": gradients}
        options["directions"] = directions
        return held + kernel.part_workspace(q, k, v, **options)


def _in_turns(plan: RingPlan, query: Array, key: Array, value: Array, spec: Spec) -> Array:
    """The attention of a kernel that asks for the turns it needs, of whole blocks of tokens."""
    kernel, axis_name, degree = plan.kernel, plan.axis_name, plan.degree
    T, S = (x.shape[1] * degree for x in (query, key))
    queries, keys = deals(plan.order, kernel.block, (T, S), degree)
    spec = padded(spec, query.shape[0], queries=queries, keys=keys)
    spec = replace(spec, held_queries=queries.held(axis_name))
    sizes = {"queries": queries.sizes[1], "keys": keys.sizes[1]}
    plan = replace(plan, order=queries.after, **sizes)
    dealt = queries.forth(query, axis_name), *(keys.forth(x, axis_name) for x in (key, value))
    out = kernel.attend_in_turns(plan, *match_varying_axes((*dealt, spec)))
    return queries.back(out, axis_name)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    plan: RingPlan, query: Array, key: Array, value: Array, spec: Spec
) -> tuple[Array, Residual]:
    return _attention_fwd(plan, query, key, value, spec)[0]


def _attention_fwd(plan: RingPlan, query: Array, key: Array, value: Array, spec: Spec) -> Any:
    part = _forward(plan, query, key, value, spec)
    return (part.out.astype(query.dtype), part.residual), (query, key, value, spec, part)


def _attention_bwd(plan: RingPlan, saved: Any, gradients: Any) -> Any:
    *of_operands, added = _backward(plan, saved, gradients)
    spec = saved[3]
    return *of_operands, spec.map(lambda x, axes: None).with_logits(**added)


_attention.defvjp(_attention_fwd, _attention_bwd)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _forward(plan: RingPlan, query: Array, key: Array, value: Array, spec: Spec) -> Part:
    """The attention to all keys, sinks included, in float32."""
    with jax.default_matmul_precision(plan.precision):
        return _attend_to_all(plan, query, key, value, spec)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _backward(plan: RingPlan, saved: Any, gradients: Any) -> Any:
    """The gradients of query, key and value, and of the arrays of the logits by name."""
    with jax.default_matmul_precision(plan.precision):
        return _gradients(plan, saved, gradients)


def _no_second_derivative(plan: RingPlan, primals: Any, tangents: Any) -> Any:
    raise ValueError(
        f"a ring over mesh axis {plan.axis_name!r} has the first derivative in reverse mode alone, "
        f"and another one is asked for. Write strategy=jax_seqpar.Ulysses(), which has those of "
        f"its kernel."
    )


# Those of the passes, which JAX asks for where it differentiates the rules of the first derivative.
_forward.defjvp(_no_second_derivative)
_backward.defjvp(_no_second_derivative)


def _attend_to_all(plan: RingPlan, query: Array, key: Array, value: Array, spec: Spec) -> Part:
    local = _part_spec(plan, spec, query.shape[1])

    def attend(kv: Array, distance: Any) -> Part:
        k, v = _unpacked(kv, key.shape[3])
        held = replace(local, held_keys=plan.tokens(key.shape[1], distance))
        return plan.kernel.attend_part(query, k, v, held)

    def meet(state: tuple[Part, None], of_these: Part) -> tuple[Part, None]:
        return merge(state[0], of_these), None

    kv = _packed(key, value)
    part, _ = plan.circulate(plan.legs(spec), kv, attend, meet, attend(kv, 0))
    return with_sinks(part, spec.logits.sinks)


def _gradients(plan: RingPlan, saved: Any, gradients: Any) -> Any:
    query, key, value, spec, part = saved
    out_gradient, residual_gradient = gradients
    local = _part_spec(plan, spec, query.shape[1])
    D = output_products(part.out, out_gradient) - residual_products(
        part.residual, residual_gradient
    )

    def visit(kv: Array, held: Spec) -> tuple[Any, Array]:
        """The gradients of queries, bias and slopes, and those of keys and values packed."""
        k, v = _unpacked(kv, key.shape[3])
        dq, dk, dv, added = plan.kernel.part_gradients(
            query, k, v, held, D, part.residual, out_gradient
        )
        return (dq, added), _packed(dk, dv)

    def zeros(x: Array) -> Array:
        return full_varying(x.shape, 0, part.out.dtype, saved)

    kv = _packed(key, value)
    nothing: Any = zeros(query), {name: zeros(x) for name, x in arrays_of(local.logits)}
    (dq, added), dkv = plan.turn(visit, kv, local, nothing, jnp.add, zeros(kv))
    dk, dv = _unpacked(dkv, key.shape[3])
    if spec.logits.sinks is not None:
        added["sinks"] = sinks_gradient(spec.logits.sinks, D, part.residual)
    added = {name: x.astype(getattr(spec.logits, name).dtype) for name, x in added.items()}
    return *(x.astype(query.dtype) for x in (dq, dk, dv)), added


def _part_spec(plan: RingPlan, spec: Spec, queries: int) -> Spec:
    """Spec of the parts: this device's queries, and no sinks, which are added after the merge."""
    logits = replace(spec.logits, sinks=None)
    return replace(spec, logits=logits, held_queries=plan.tokens(queries, 0))


def _packed(key: Array, value: Array) -> Array:
    """Keys and values side by side in one array, as XLA:GPU hides one transfer of a round only."""
    return jnp.concatenate([key, value], axis=3)


def _unpacked(kv: Array, head_dim: int) -> tuple[Array, Array]:
    return kv[..., :head_dim], kv[..., head_dim:]
