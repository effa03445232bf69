"""Sizes of the Triton kernel's blocks, and operands padded to whole blocks."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ..mask import AnyTokens, Spec, TokenList, Tokens
from ..mask.array_fields import Axes
from .softmax_residual import Residual

# Triton's matrix products have at least 16 rows, columns and channels, and powers of two of them.
SMALLEST = 16
MOST_CHANNELS = 256


@dataclass(frozen=True)
class Blocks:
    """Tokens of a block of queries and of one of keys, and how a program computes with them.

    Attributes:
      warps: groups of 32 threads of a program.
      stages: blocks that are on their way from memory at a time.
    """

    queries: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Plan:
    """The blocks of the three kernels, and what else is static.

    Attributes:
      forward, dq, dkv: of the forward pass, and of the gradients.
      precision: that of matrix products where the attention is called. JAX traces the rules of
        derivatives later, where another may be in force.
      interpret: whether the kernels run as plain JAX, on any platform.
    """

    forward: Blocks
    dq: Blocks
    dkv: Blocks
    precision: str | None
    interpret: bool

    @property
    def passes(self) -> tuple[Blocks, ...]:
        return self.forward, self.dq, self.dkv


# By the bytes of a row of channels: the blocks of the forward pass, of dq, and of dk and dv. The
# largest whose numbers fit into the registers of an H100 (by its compiler causal attention spills
# nothing, all options together at most 500 bytes of a thread, at 1024 bytes a row), and that the
# compiler finds room for in the 163 KB of shared memory of an A100. None was timed.
SIZES = (
    (128, (Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 2), Blocks(64, 128, 8, 2))),
    (256, (Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 2), Blocks(32, 128, 8, 2))),
    (512, (Blocks(128, 32, 8, 2), Blocks(32, 32, 4, 2), Blocks(32, 32, 4, 2))),
    (1024, (Blocks(64, 32, 8, 1), Blocks(32, 32, 8, 1), Blocks(32, 32, 8, 1))),
)


def make_plan(
    query: Any,
    key: Any,
    value: Any,
    query_chunk: int | None,
    key_chunk: int | None,
    interpret: bool,
) -> Plan:
    """The plan for operands, of the largest blocks that a GPU has room for unless sizes are given.

    Args:
      query, key, value: anything with a shape and a dtype.
    """
    row = max(_power_of_two(x.shape[3]) for x in (query, value)) * query.dtype.itemsize
    precision = jax.config.jax_default_matmul_precision  # pyright: ignore
    if query.dtype.itemsize == 4 and precision in ("highest", "float32"):
        # No tensor core has such products: in large blocks their operands spill 10 KB of a thread.
        row = 1024
    of_all = next(of_all for most, of_all in SIZES if row <= most)

    def fit(blocks: Blocks) -> Blocks:
        queries, keys = (
            chunk or min(most, _power_of_two(x.shape[1]))
            for chunk, most, x in (
                (query_chunk, blocks.queries, query),
                (key_chunk, blocks.keys, key),
            )
        )
        return replace(blocks, queries=queries, keys=keys)

    forward, dq, dkv = map(fit, of_all)
    return Plan(forward, dq, dkv, precision, interpret)


def pad_operands(
    plan: Plan, query: Array, key: Array, value: Array, spec: Spec
) -> tuple[Array, Array, Array, Spec]:
    """The operands in whole blocks of tokens and powers of two of channels.

    Keys that are added lie beyond the lengths of the keys, so that no query attends to them.
    """
    (B, T, _, H), S = query.shape, key.shape[1]
    queries = max(blocks.queries for blocks in plan.passes)
    keys = max(blocks.keys for blocks in plan.passes)
    more_queries, more_keys = -T % queries, -S % keys
    if spec.logits.scale is None:
        spec = replace(spec, logits=replace(spec.logits, scale=H**-0.5))
    if more_keys:
        end = _end(spec.held_keys, S)
        lengths = spec.mask.key_value_seq_lengths
        lengths = jnp.full((B,), end) if lengths is None else jnp.minimum(lengths, end)
        spec = replace(spec, mask=replace(spec.mask, key_value_seq_lengths=lengths))
    more = {"queries": more_queries, "keys": more_keys}
    held = {
        f"held_{name}": _pad_held(getattr(spec, f"held_{name}"), count)
        for name, count in more.items()
    }
    spec = replace(spec, **held)

    def pad_tokens(x: Array, axes: Axes) -> Array:
        # Padding repeats the last token's numbers, which widens no range of positions or segments.
        return jnp.pad(x, [(0, more.get(str(axis), 0)) for axis in axes], mode="edge")

    query, key, value = _pad(query, more_queries), _pad(key, more_keys), _pad(value, more_keys)
    return query, key, value, spec.map(pad_tokens)


def pad_rows(
    query: Array, value: Array, D: Array, residual: Residual, out_gradient: Array
) -> tuple[Array, Residual, Array]:
    """Per-query inputs of the gradients (D, residual, gradient of the output), padded with them."""
    more = query.shape[1] - D.shape[1]

    def pad(x: Array, number: Any) -> Array:
        return jnp.pad(x, ((0, 0), (0, more), (0, 0)), constant_values=number)

    channels = value.shape[3] - out_gradient.shape[3]
    out_gradient = jnp.pad(out_gradient, ((0, 0), (0, more), (0, 0), (0, channels)))
    # Below this maximum every weight is 0: beside any other some exp(z - top) could be infinite,
    # and its product with a gradient of 0 NaN.
    return pad(D, 0), Residual(pad(residual.top, jnp.inf), pad(residual.total, 1)), out_gradient


def _pad(x: Array, tokens: int) -> Array:
    channels = _power_of_two(x.shape[3]) - x.shape[3]
    return jnp.pad(x, ((0, 0), (0, tokens), (0, 0), (0, channels)))


def _pad_held(held: AnyTokens | None, more: int) -> AnyTokens | None:
    """The held tokens, and as many as `more` beyond the last of them; None stays None."""
    if isinstance(held, TokenList):
        beyond = jnp.full((more,), _end(held, 0))
        return TokenList(jnp.concatenate([held.numbers, beyond]))
    return None if held is None else Tokens(held.start, held.size + more)


def _end(held: AnyTokens | None, tokens: int) -> Array:
    """The number, in the whole sequence, of the token after the last one of the arrays."""
    end = tokens if held is None else held.bounds[1]
    return jnp.asarray(end, jnp.int32)


def _power_of_two(n: int) -> int:
    return max(SMALLEST, 1 << (n - 1).bit_length())
