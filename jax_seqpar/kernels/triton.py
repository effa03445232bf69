"""Flash attention on NVIDIA GPUs with every mask but dense ones, written with Pallas and Triton."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._checks import check_flag, check_platform, got
from ..mask import Spec, Tokens
from ..varying_axes import varying_axes
from .cudnn import compute_capability
from .dense import dense_rows
from .kernel import Kernel
from .parts import Part
from .softmax_residual import Residual
from .triton_plan import MOST_CHANNELS, SMALLEST, Plan, make_plan, pad_operands, pad_rows


@dataclass(frozen=True)
class Triton(Kernel):
    """`softmax(query . key * scale) . value` on NVIDIA GPUs, in memory linear in the tokens.

    Every option but a mask array and a bias; bfloat16, float16 and float32, H and V up to 256, of
    which a power of two is computed. Any number of tokens, or a part of those of a sequence: a run,
    or a list of their numbers, and so any part of the keys, for a ring. The
    first reverse-mode derivative, with respect to query, key, value, slopes and sinks, each summed
    in one order, so that a run can be had again.

    Logits and sums are float32, weights and the gradients of logits are rounded to the dtype of the
    operands before a matrix product; the maximum and the sum of a row are kept apart, so weights
    are right beside large logits but for the rounding of these, which each pass adds up in another
    order. Products of float32 have 10 bits unless
    `jax.default_matmul_precision` says otherwise. Blocks that causality, window, segments,
    positions or lengths rule out are not computed. Inside `jax.shard_map` it needs
    `check_vma=False`. Compiled for H100 and run interpreted; not yet run on a GPU.

    Args:
      query_chunk, key_chunk: queries and keys of a block in all passes, powers of two from 16; if
        None, what fits an H100. Smaller ones need less shared memory.
      platform: "gpu" where the program is compiled for another machine than this; if None, that of
        JAX's default backend.
      interpret: run the kernel on any platform, slowly, for tests.
    """

    query_chunk: int | None = None
    key_chunk: int | None = None
    platform: str | None = None
    interpret: bool = False

    gives_residual = True
    gives_parts = True

    def __post_init__(self) -> None:
        check_flag("interpret", self.interpret)
        if self.platform is not None:
            check_platform(self.platform, ("tpu", "gpu", "cpu"))
        for name in ("query_chunk", "key_chunk"):
            chunk = getattr(self, name)
            valid = type(chunk) is int and chunk >= SMALLEST and chunk & (chunk - 1) == 0
            if not (chunk is None or valid):
                raise ValueError(
                    f"{name} must be a power of two, at least {SMALLEST}, or None, got {chunk!r}. "
                    f"Write {name}=64, or leave it out."
                )

    @property
    def check_vma(self) -> bool:
        return False

    def attend(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B S K H"],
        value: Float[Array, "B S K V"],
        spec: Spec,
    ) -> tuple[Array, Residual]:
        return _attend(self._plan(query, key, value, spec), query, key, value, spec)

    def attend_part(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B S K H"],
        value: Float[Array, "B S K V"],
        spec: Spec,
    ) -> Part:
        return _part(self._plan(query, key, value, spec), query, key, value, spec)

    def part_gradients(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B S K H"],
        value: Float[Array, "B S K V"],
        spec: Spec,
        D: Float[Array, "B T N"],
        residual: Residual,
        out_gradient: Float[Array, "B T N V"],
    ) -> tuple[Array, Array, Array, dict[str, Array]]:
        plan = self._plan(query, key, value, spec)
        return _part_gradients(plan, query, key, value, spec, D, residual, out_gradient)

    def _plan(self, query: Array, key: Array, value: Array, spec: Spec) -> Plan:
        """The plan of a call; raises ValueError for one that the kernel cannot do."""
        reason = self.why_not(query, key, value, spec)
        if reason is not None:
            raise ValueError(
                f"Triton cannot do this: {reason}. {got(query.shape, key.shape, value.shape)} "
                f"Write kernel=jax_seqpar.Blockwise(), which supports it, or take that of "
                f"jax_seqpar.choose_kernel(query, key, value, ...)."
            )
        if axes := varying_axes((query, key, value, spec)):
            raise ValueError(
                f"Triton is a Pallas kernel, which does not state how its output varies over the "
                f"mesh axes {sorted(axes)}. Write check_vma=False in the jax.shard_map."
            )
        return make_plan(query, key, value, self.query_chunk, self.key_chunk, self.interpret)

    def why_not(self, query: Any, key: Any, value: Any, spec: Spec) -> str | None:
        platform = self.platform or jax.default_backend()
        if platform != "gpu" and not self.interpret:
            return f"{platform} is not supported by Triton, but for tests: Triton(interpret=True)"
        capability = compute_capability()
        if capability is not None and capability < (8, 0) and not self.interpret:
            return f"compute capability {capability} is not supported by Triton, which has 8.0 up"
        for name, x in (("bias", spec.logits.bias), ("mask", spec.mask.array)):
            if x is not None:
                return f"{name} is not supported by Triton: its kernel reads no T x S array"
        if query.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
            return f"dtype {query.dtype} is not supported by Triton, which has 16 bits and float32"
        H, V = query.shape[3], value.shape[3]
        if max(H, V) > MOST_CHANNELS:
            return (
                f"head dimensions H = {H} and V = {V} are not supported by Triton, which has up to "
                f"{MOST_CHANNELS}"
            )
        return None


# Compiled in an eager call, too, as the block ranges are many small operations.
@partial(jax.jit, static_argnums=0)
def _attend(
    plan: Plan, query: Array, key: Array, value: Array, spec: Spec
) -> tuple[Array, Residual]:
    T, V = query.shape[1], value.shape[3]
    if 0 in (*query.shape, *value.shape[1:]):
        return dense_rows(query, key, value, spec, Tokens(0, T))  # of nothing, there is no block
    results: Any = _attention(plan, *pad_operands(plan, query, key, value, spec))
    out, residual = results
    return out[:, :T, :, :V], Residual(*(x[:, :T] for x in residual))


# Compiled in an eager call, too, as `_attend` is.
@partial(jax.jit, static_argnums=0)
def _part(plan: Plan, query: Array, key: Array, value: Array, spec: Spec) -> Part:
    T, V = query.shape[1], value.shape[3]
    results: Any = _forward(plan, jnp.float32, *pad_operands(plan, query, key, value, spec))
    out, residual = results
    return Part(out[:, :T, :, :V], Residual(*(x[:, :T] for x in residual)))


@partial(jax.jit, static_argnums=0)
def _part_gradients(
    plan: Plan,
    query: Array,
    key: Array,
    value: Array,
    spec: Spec,
    D: Array,
    residual: Residual,
    out_gradient: Array,
) -> tuple[Array, Array, Array, dict[str, Array]]:
    from .triton_backward import part_gradients  # as in _forward

    padded = pad_operands(plan, query, key, value, spec)
    rows = pad_rows(padded[0], padded[2], D, residual, out_gradient)
    *found, added = part_gradients(plan, jnp.float32, *padded, *rows)
    dq, dk, dv = (
        grad[:, : x.shape[1], :, : x.shape[3]]
        for grad, x in zip(found, (query, key, value), strict=True)
    )
    return dq, dk, dv, added


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(plan: Plan, query: Array, key: Array, value: Array, spec: Spec) -> Any:
    return _forward(plan, query.dtype, query, key, value, spec)


def _attention_fwd(plan: Plan, *operands: Any) -> Any:
    query, *_ = operands
    # The gradient reads it in float32, as `backward` says.
    out, residual = _forward(plan, jnp.float32, *operands)
    return (out.astype(query.dtype), residual), (*operands, out, residual)


def _attention_bwd(plan: Plan, saved: Any, gradients: Any) -> Any:
    spec = saved[3]
    dq, dk, dv, added = _backward(plan, *saved, *gradients)
    absent = spec.map(lambda x, axes: None)
    return dq, dk, dv, absent.with_logits(**added)


_attention.defvjp(_attention_fwd, _attention_bwd)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _forward(plan: Plan, dtype: Any, *operands: Any) -> Any:
    # Pallas takes a third of the time of `import jax_seqpar`, and only GPUs run this kernel.
    from .triton_forward import forward

    # JAX may trace it for a derivative after the caller's context has ended.
    with jax.default_matmul_precision(plan.precision):
        return forward(plan, dtype, *operands)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _backward(plan: Plan, *operands: Any) -> Any:
    from .triton_backward import backward  # as in _forward

    with jax.default_matmul_precision(plan.precision):
        return backward(plan, *operands)


def _no_second_derivative(plan: Plan, *static_and_operands: Any) -> Any:
    raise ValueError(
        f"Triton(interpret={plan.interpret}) has the first derivative only, and that of its "
        f"gradient is asked for. Write kernel=jax_seqpar.Blockwise(), which has those of any order."
    )


# Derivatives of both passes: JAX asks for them where it differentiates the first derivative.
_forward.defjvp(_no_second_derivative)
_backward.defjvp(_no_second_derivative)
