"""Exact attention of one device: the specification in `SPEC.md`, as a JAX function."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float

from .._checks import Shape, check_chunk_sizes
from ..kernels.kernel import GRADIENT_PRODUCTS, Kernel, Turn, Turns
from ..mask import Logits, Spec
from ..mask.array_fields import arrays_of
from ..mesh_layout import AxisName
from . import arithmetic, cost
from .backward import gradients_of_all_keys
from .backward_in_turns import gradients_in_turns
from .bias_gradient import BiasSums, axes_to_sum, check_summands
from .block_logits import Options
from .checks import check, check_of_one_device
from .forward import Rows, outputs_of_all_keys
from .forward_in_turns import outputs_in_turns
from .heads import grouped, heads_first, tokens_first
from .kv_replicas import SharedHeads
from .undefined_derivatives import (
    no_bias_gradient_in_turns,
    no_gradient,
    refuse_second_derivative,
    undifferentiated,
)


@dataclass(frozen=True)
class Exact(Kernel):
    """`softmax(query . key * scale + bias) . value` with the same bits however it is computed.

    Output and gradients are the function that `jax_seqpar/exact/SPEC.md` specifies: equal in every
    bit to `torch_ref.exact.exact_attention`, compiled or not, on any number of devices, on every
    backend that `jax_seqpar.exact.certify` passes. Causal to the last bit: what a query may not
    attend to changes no bit of its row. Not equal to a stock kernel, and nearer to float64 than
    float32 kernels are, but for channels far larger than the others. Memory is linear in the
    tokens. Float64 inside, whatever `jax_enable_x64` says. Reverse-mode derivatives, once, of
    query, key, value and bias; JAX raises TypeError in forward mode. Operands, bias, slopes and
    sinks are float32, bfloat16 or float16; scale and soft cap are rounded to float32. Other dtypes,
    and sequences of 2^21 tokens and more, are refused; so are arrays sharded over Explicit mesh
    axes where it is called directly, and not by `dot_product_attention`.

    Args:
      query_chunk: queries whose whole rows of weights the forward pass holds at a time, in float32;
        None chooses. No bit depends on it.
      key_chunk: keys that it visits at a time, at most 256 (None). No bit depends on it.
      shared_heads: devices with the same KV heads and different query heads. Their parts of the
        gradients of key and value are added without rounding, and one of the devices returns the
        sum, the others 0. A strategy sets it where it is needed.
    """

    query_chunk: int | None = None
    key_chunk: int | None = None
    shared_heads: SharedHeads | None = None

    sums_exactly = attends_in_turns = True

    def __post_init__(self) -> None:
        check_chunk_sizes(query_chunk=self.query_chunk, key_chunk=self.key_chunk)
        if self.key_chunk is not None and self.key_chunk > arithmetic.BLOCK:
            raise ValueError(
                f"key_chunk of exact attention is at most {arithmetic.BLOCK}, the keys that one "
                f"float64 sum has room for, got {self.key_chunk}. Write None."
            )

    @property
    def block(self) -> int:
        """The tokens that have one unit in the sums of the gradients."""
        return arithmetic.BLOCK

    def sharing(
        self,
        axes: tuple[tuple[AxisName, int], ...],
    ) -> "Exact":
        known = () if self.shared_heads is None else self.shared_heads.axes
        told = {axis_name for axis_name, _ in known}
        axes = tuple((name, count) for name, count in axes if count > 1 and name not in told)
        return replace(self, shared_heads=SharedHeads(known + axes)) if axes else self

    def sharing_traffic(self, key: Shape, value: Shape, devices: int, of: int) -> int:
        """`cost.sharing_traffic`."""
        return cost.sharing_traffic(key, value, devices, of)

    def turns(
        self, head_dim: int, value_dim: int, itemsize: int
    ) -> tuple[tuple[Turn, ...], tuple[Turn, ...]]:
        """Turns of a ring, forward and backward, of `forward_in_turns` and `backward_in_turns`.

        Two of the four matrix products forward are logits, which each visit computes anew.
        """
        channels, logits = head_dim + value_dim, Turn(head_dim * itemsize + 4, 0, 0.5)
        values = Turn(channels * itemsize, 0, 1.0)
        sums = Turn(channels * itemsize + 8, channels * 16, GRADIENT_PRODUCTS)
        return (logits, logits, logits, values), (Turn(8, 12, 0.0), sums)

    def workspace(self, query: Shape, key: Shape, value: Shape, **options: Any) -> int:
        """`cost.workspace`."""
        rows = _rows_at_a_time(key[1], self.query_chunk)
        return cost.workspace(query, key, value, rows=rows, **options)

    def part_workspace(self, query: Shape, key: Shape, value: Shape, **options: Any) -> int:
        """`cost.workspace_in_turns`."""
        rows = _rows_at_a_time(key[1], self.query_chunk)
        return cost.workspace_in_turns(query, key, value, rows=rows, **options)

    def why_not(self, query: Any, key: Any, value: Any, spec: Spec) -> str | None:
        return None if spec.held_keys is None else "exact attention takes all the keys of a row"

    def attend(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B S K H"],
        value: Float[Array, "B S K V"],
        spec: Spec,
    ) -> tuple[Array, None]:
        if reason := self.why_not(query, key, value, spec):
            raise ValueError(f"{reason}, got a part. Write kernel=jax_seqpar.Blockwise().")
        return self._attend(None, query, key, value, spec), None

    def attend_in_turns(
        self,
        turns: Turns,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B S K H"],
        value: Float[Array, "B S K V"],
        spec: Spec,
    ) -> Float[Array, "B T N V"]:
        return self._attend(turns, query, key, value, spec)

    def _attend(
        self, turns: Turns | None, query: Array, key: Array, value: Array, spec: Spec
    ) -> Array:
        added = dict(arrays_of(spec.logits))
        check_of_one_device({"query": query, "key": key, "value": value, **added})
        named = {"mask" if name == "array" else name: x for name, x in arrays_of(spec.mask)}
        check_of_one_device(named)
        sharing = 1 if self.shared_heads is None else self.shared_heads.devices
        check(query, key, value.shape[3], added, sharing, 1 if turns is None else turns.degree)
        bias = added.pop("bias", None)
        if turns is not None and bias is not None:
            bias = undifferentiated(partial(no_bias_gradient_in_turns, turns.degree), bias)
        constants = {
            name: undifferentiated(partial(no_gradient, name), x) for name, x in added.items()
        }
        H, S = query.shape[3], key.shape[1]
        if 0 in (*query.shape, *value.shape):
            return jnp.zeros((*query.shape[:3], value.shape[3]), query.dtype)
        options = Options(
            shared_heads=self.shared_heads,
            turns=turns,
            query_chunk=min(query.shape[1], _rows_at_a_time(S, self.query_chunk)),
            key_chunk=min(S, self.key_chunk or arithmetic.BLOCK),
            block=arithmetic.BLOCK,
        )
        scale, cap = spec.logits.scale, spec.logits.soft_cap
        cap = None if cap is None else _float32(cap)
        rounded = Logits(_float32(H**-0.5 if scale is None else scale), cap, **constants)
        return _attention(options, query, key, value, bias, replace(spec, logits=rounded))


exact_attention = Exact()

# Precision of all products, whatever the caller has set: some settings round the operands.
_PRECISION = "highest"


def _rows_at_a_time(keys: int, asked: int | None) -> int:
    """Number of whole rows of weights: the one asked for, else at most 64 MiB of one head."""
    return asked or max(min(256, (1 << 24) // max(keys, 1)), 16)


def _float32(x: float) -> float:
    return float(np.float32(x))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(options: Options, *operands: Any) -> Any:
    """Exact output for `operands`: query, key, value, bias, and the Spec without the bias."""
    return _with_residuals(options, *operands)[0]


def _with_residuals(
    options: Options, query: Any, key: Any, value: Any, bias: Any, spec: Spec
) -> Any:
    query, key, value, bias = map(refuse_second_derivative, (query, key, value, bias))
    spec = spec if bias is None else spec.with_logits(bias=bias)
    operands = (query, key, value, spec)
    out, top, normaliser = _looped_by_vmap(partial(_forward, options))(*operands)
    return arithmetic.narrowed(out, query.dtype), (operands, out, top, normaliser)


def _attention_fwd(options: Options, *given: Any):
    query, key, *_, bias, _ = operands = jax.tree.map(lambda x: x.value, given)
    wants_bias = bias is not None and given[3].perturbed
    if wants_bias:
        shape = (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
        check_summands(bias, shape, operands)
    out, residuals = _with_residuals(options, *operands)
    # Known while it is traced: as part of a tree, not as an array.
    return out, (*residuals, () if wants_bias else None)


def _attention_bwd(options: Options, residuals: Any, grad: Any):
    (query, key, value, spec), *saved, wants_bias = residuals
    query, key, value, *saved, grad = map(
        refuse_second_derivative, (query, key, value, *saved, grad)
    )
    gradient = _looped_by_vmap(partial(_backward, options, wants_bias is not None))
    return (*gradient(query, key, value, spec, *saved, grad), None)


# Whether somebody asks for the gradient of the bias: symbolic_zeros tells.
_attention.defvjp(_attention_fwd, _attention_bwd, symbolic_zeros=True)


def _looped_by_vmap(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which `jax.vmap` turns into a loop instead of rewriting its operations.

    Rewritten, outside the scope that switches float64 on, they would be rounded to float32.
    """
    function = custom_vmap(function)

    @function.def_vmap
    def loop(axis_size: int, batched: Any, *operands: Any):
        leaves, tree = jax.tree.flatten(operands)
        varies = jax.tree.leaves(batched)

        def one(rows: list[Array]) -> Any:
            rest = iter(rows)
            own = [next(rest) if vary else x for x, vary in zip(leaves, varies, strict=True)]
            return function(*jax.tree.unflatten(tree, own))

        out = jax.lax.map(one, [x for x, vary in zip(leaves, varies, strict=True) if vary])
        return out, jax.tree.map(lambda _: True, out)

    return function


# Compiled in an eager call, too: a loop that is traced anew each time would compile each time.
@partial(jax.jit, static_argnums=0)
def _forward(
    options: Options, query: Any, key: Any, value: Any, spec: Any
) -> tuple[Array, Array, Array]:
    """The output in float32, and of each query the m and the r that the gradients read.

    Returns:
      `[B, T, N, V]`; `[B K, G, T]`; r as its two words, `[B K, G, T, 2]`, for a float64 does not
      survive outside.
    """
    query, key, value, spec = _as_given((query, key, value, spec))
    K = key.shape[2]
    with jax.enable_x64(True), jax.default_matmul_precision(_PRECISION):
        operands = grouped(query, K), heads_first(key), heads_first(value)
        outputs = outputs_of_all_keys if options.turns is None else outputs_in_turns
        out, rows = outputs(options, spec, K, *operands)
        words = jax.lax.bitcast_convert_type(rows.normaliser, jnp.uint32)
        return tokens_first(out, query), rows.top, words


@partial(jax.jit, static_argnums=(0, 1))
def _backward(
    options: Options,
    wants_bias: bool,
    query: Any,
    key: Any,
    value: Any,
    spec: Any,
    out: Any,
    top: Any,
    normaliser: Any,
    grad: Any,
) -> tuple[Array | None, ...]:
    """The gradients of query, key, value and bias, of their dtypes; None where nobody asks."""
    bias = spec.logits.bias if wants_bias else None
    # Axes from the types before the barrier, after which each operand varies as all of them do.
    axes = () if bias is None else axes_to_sum(bias, (query, key, value, spec, grad))
    query, key, value, spec, out, top, normaliser, grad = _as_given(
        (query, key, value, spec, out, top, normaliser, grad)
    )
    K = key.shape[2]
    with jax.enable_x64(True), jax.default_matmul_precision(_PRECISION):
        rows = Rows(top, jax.lax.bitcast_convert_type(normaliser, jnp.float64))
        operands = grouped(query, K), heads_first(key), heads_first(value)
        operands = (*operands, grouped(out, K), rows, grouped(grad, K))
        sums = None
        if bias is not None:
            sums = BiasSums.of_nothing(bias.shape, query.shape[1], (query, spec, grad))
        if options.turns is None:
            sums, *of_all = gradients_of_all_keys(options, spec, K, sums, *operands)
        else:
            of_all = gradients_in_turns(options, spec, K, *operands)
        of_all = (
            arithmetic.narrowed(tokens_first(x, like), query.dtype)
            for x, like in zip(of_all, (query, key, value), strict=True)
        )
        if bias is None or sums is None:
            return *of_all, None
        sums = sums.in_sequence(spec.held_queries, bias.shape[2])
        return *of_all, sums.total(axes, bias.dtype)


def _as_given(operands: Any) -> Any:
    """`optimization_barrier`, which keeps XLA:GPU from eliding the caller's cast to 16 bits.

    The operands are widened here, and XLA:GPU leaves out a pair of conversions such as
    f32->bf16->f32 (`xla_allow_excess_precision`); see `arithmetic.round32`.
    """
    return jax.lax.optimization_barrier(operands)
