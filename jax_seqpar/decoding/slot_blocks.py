"""SlotBlocks: the kernel of a few queries and many keys, all heads of a block of keys at once."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from .._checks import check_count
from ..kernels import Kernel
from ..kernels.parts import Part, merge, with_sinks
from ..kernels.softmax_residual import Residual, finite
from ..mask import Spec, Tokens, accumulated
from ..mask.token_numbers import for_blocks


@dataclass(frozen=True)
class SlotBlocks(Kernel):
    """`softmax(query . key * scale) . value` for decoding: keys are read once, where they lie.

    `Blockwise()` computes one head after another, of which it makes a copy, and has blocks of
    queries. Here a block of keys meets all queries and heads in one product, so memory does not
    grow with the keys, only with `B T N block_size`. Logits and sums are float32 for 16-bit
    inputs, the weights are rounded to the values' dtype. Blocks in which no query may attend
    to a key are not computed. Forward only.

    Args:
      block_size: keys that are visited at a time.
    """

    block_size: int = 512

    gives_residual = gives_parts = True

    def __post_init__(self) -> None:
        check_count("block_size", self.block_size)

    def attend(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B S K H"],
        value: Float[Array, "B S K V"],
        spec: Spec,
    ) -> tuple[Array, Residual]:
        part = with_sinks(self.attend_part(query, key, value, spec), spec.logits.sinks)
        return part.out.astype(query.dtype), part.residual

    def attend_part(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B S K H"],
        value: Float[Array, "B S K V"],
        spec: Spec,
    ) -> Part:
        (B, T, N, H), S, V, K = query.shape, key.shape[1], value.shape[3], key.shape[2]
        wide, queries = accumulated(query.dtype), Tokens(0, T)
        grouped = query.reshape(B, T, K, N // K, H)

        def visit(keys: Tokens, fresh: Array | None, part: Part) -> Part:
            k, v = keys.slice(key, 1), keys.slice(value, 1)
            dots = jnp.einsum("BTKGH,BSKH->BKGTS", grouped, k, preferred_element_type=wide)
            terms = spec.terms(queries, keys)
            logits = spec.to_logits(dots.reshape(B, N, T, -1), terms, H)
            if fresh is not None:
                logits = jnp.where(fresh[None, None, None], logits, -jnp.inf)
            return merge(part, _part_of(logits, v))

        nothing = jnp.zeros((B, T, N), wide)
        start = Part(jnp.zeros((B, T, N, V), wide), Residual(nothing, nothing))
        bounds = spec.keys_of(queries, S)
        return for_blocks(S, min(self.block_size, S), bounds, visit, start)


def _part_of(logits: Array, value: Array) -> Part:
    """The attention to one block, from its logits `[B, N, T, s]`."""
    (B, N, T, s), K = logits.shape, value.shape[2]
    top = finite(logits.max(-1, keepdims=True))
    weights = jnp.exp(logits - top)
    total = weights.sum(-1)
    weights = weights.astype(value.dtype).reshape(B, K, N // K, T, s)
    out = jnp.einsum("BKGTS,BSKV->BTKGV", weights, value, preferred_element_type=logits.dtype)
    residual = Residual(*(jnp.swapaxes(x, 1, 2) for x in (top[..., 0], total)))
    out = out.reshape(B, T, N, -1)
    return Part(out / residual.divisor[..., None], residual)
