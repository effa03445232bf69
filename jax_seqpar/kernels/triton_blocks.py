"""Launch, ranges of blocks and block logits, shared by the passes of the Triton kernel.

Imports Pallas, so it is imported where the kernel runs.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Int

from .._checks import Shape
from ..mask import AnyTokens, Mask, Spec, TokenList, Tokens
from ..mask.array_fields import Axes
from ..mask.block_ranges import pairs_in_reach
from ..mask.threefry import keep_counters
from .triton_plan import Blocks

Side = Literal["queries", "keys"]
QUERY_ROWS: Axes = ("batch", "queries", "heads", None)
KEY_ROWS: Axes = ("batch", "keys", "kv_heads", None)
# Pairs of a block and a token that XLA holds as a byte each, to find the blocks that meet: 64 MB.
# At once a million tokens in segments would take 8 GB.
PAIRS_AT_ONCE = 1 << 26


@dataclass(frozen=True)
class Block(Tokens):
    """A block of tokens whose part of every per-token array is loaded already.

    Triton has pointers where XLA has slices of arrays. With this one difference `Mask.attends` and
    `Mask.distance` are the rules inside a kernel, too; their axes of size 1 cost it no instruction
    (in the PTX for an H100 of JAX 0.10.2).

    Attributes:
      start: the place of its first token in the kernel's arrays.
      held: the number of each token in the sequence.
    """

    held: Int[Array, "size"]

    @classmethod
    def load(cls, held: Any, start: Any, size: int) -> "Block":
        """The block that begins at a place of the kernel's arrays.

        Args:
          held: a reference to the number of the first token of a run, `[1]`, or to those of all
            tokens.
        """
        if held.shape == (1,):
            return cls(start, size, held[0] + start + jnp.arange(size, dtype=jnp.int32))
        return cls(start, size, held[pl.ds(start, size)])

    @property
    def numbers(self) -> Array:
        return self.held

    def slice(self, x: Array, axis: int) -> Array:
        return x


@dataclass(frozen=True)
class Grid:
    """One program for each block of queries, or of keys, of each head of each sequence.

    A program that has a block of queries has one query head, one that has a block of keys a KV head
    and all the query heads that read it.

    Attributes:
      side: "queries" or "keys", of the blocks.
      query, key: shapes of the operands, in whole blocks.
    """

    side: Side
    blocks: Blocks
    query: Shape
    key: Shape

    def run(
        self,
        kernel: partial[None],
        spec: Spec,
        operands: list[tuple[Array, Axes]],
        results: list[tuple[Any, Axes]],
        *,
        products: int,
        interpret: bool,
    ) -> Any:
        """Results of a kernel, which gets references to its part of every array.

        First to the numbers of queries and of keys in the whole sequence, as `Block.load` has them,
        then to the ranges of blocks of the other side, as `for_meetings` reads them, then those of
        the Spec, of the operands and of the results.

        Args:
          products: of matrices, for each block of queries and of keys that meet.
        """
        meets = self._ranges(spec)
        held = tuple(_numbers(x) for x in (spec.held_queries, spec.held_keys))
        spec = _of_held_tokens(spec)
        whole = tuple(pl.BlockSpec(x.shape, lambda i, b, n: (0,)) for x in held)
        of_block = pl.BlockSpec((1, 1, 4), lambda i, b, n: (b, self._turn(i), 0))

        def of_spec(x: Any, axes: Axes) -> pl.BlockSpec:
            return self._place(x, tuple(a if a in ("batch", "heads") else None for a in axes))

        return pl.pallas_call(
            kernel,
            name=f"triton_{kernel.func.__name__}",
            grid=self._programs,
            in_specs=[whole, of_block, spec.map(of_spec), *(self._place(*x) for x in operands)],
            out_specs=[self._place(*x) for x in results],
            out_shape=[x for x, _ in results],
            compiler_params=triton.CompilerParams(
                num_warps=self.blocks.warps, num_stages=self.blocks.stages
            ),
            cost_estimate=self._cost(spec, products, [x for x, _ in operands], results),
            interpret=interpret,
        )(held, meets, spec, *(x for x, _ in operands))

    def _cost(
        self, spec: Spec, products: int, operands: list[Array], results: list[tuple[Any, Axes]]
    ) -> pl.CostEstimate:
        """Upper bound of the kernel's cost; segments, positions and lengths may skip blocks."""
        (B, T, N, H), S = self.query, self.key[1]
        held = spec.held_queries is not None or spec.held_keys is not None
        pairs = B * N * (T * S if held else pairs_in_reach(spec.mask, T, S))
        arrays = [*operands, *(x for x, _ in results)]
        return pl.CostEstimate(
            flops=2 * products * pairs * H,
            transcendentals=pairs,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays),
        )

    @property
    def _programs(self) -> tuple[int, int, int]:
        (B, T, N, _), (S, K) = self.query, self.key[1:3]
        if self.side == "queries":
            return T // self.blocks.queries, B, N
        return S // self.blocks.keys, B, K

    def _turn(self, i: Any) -> Any:
        return block_of_program(self.side, i, self._programs[0])

    def _place(self, x: Any, axes: Axes) -> pl.BlockSpec:
        """A program's part of an array by the names of its axes; all of other axes."""
        group, own = self.query[2] // self.key[2], getattr(self.blocks, self.side)
        part: dict[Any, tuple[int, Callable[..., Any]]] = {
            "batch": (1, lambda i, b, n: b),
            self.side: (own, lambda i, b, n: self._turn(i)),
            "heads": (1 if self.side == "queries" else group, lambda i, b, n: n),
            "kv_heads": (1, lambda i, b, n: n),
        }
        if self.side == "queries":
            part["kv_heads"] = (1, lambda i, b, n: jax.lax.div(n, jnp.int32(group)))
        found = [
            part.get(axis, (size, lambda i, b, n: 0))
            for size, axis in zip(x.shape, axes, strict=True)
        ]
        sizes = tuple(size for size, _ in found)
        return pl.BlockSpec(sizes, lambda *program: tuple(index(*program) for _, index in found))

    def _ranges(self, spec: Spec) -> Int[Array, "B blocks 4"]:
        """Half-open range of the blocks that each block of each sequence meets.

        The last two numbers are the range, inside the first, of blocks in which every token meets
        every token of the block, so that no mask is evaluated.
        """
        count, B, _ = self._programs
        tokens = {"queries": self.query[1], "keys": self.key[1]}
        other: Side = "keys" if self.side == "queries" else "queries"
        size, other_size = (getattr(self.blocks, side) for side in (self.side, other))

        def of_block(index: Array) -> Array:
            one = spec.take_heads(index // count, 0, 1)
            some, every = (
                (one.keys_of, one.common_keys)
                if self.side == "queries"
                else (one.queries_of, one.common_queries)
            )
            block = Tokens(index % count * size, size)
            low, high = some(block, tokens[other])
            last = jnp.where(low < high, -(-high // other_size), 0)
            first = jnp.minimum(low // other_size, last)
            low, high = every(block, tokens[other])
            full_first = jnp.clip(-(-low // other_size), first, last)
            full_last = jnp.clip(high // other_size, full_first, last)
            return jnp.stack([first, last, full_first, full_last]).astype(jnp.int32)

        numbers = jnp.arange(B * count, dtype=jnp.int32)
        at_once = max(PAIRS_AT_ONCE // tokens[other], 1)
        listed = any(isinstance(x, TokenList) for x in (spec.held_queries, spec.held_keys))
        by_token = any(x is not None for x in (spec.mask.positions, spec.mask.segment_ids))
        if (listed or by_token) and len(numbers) > at_once:
            found = jax.lax.map(of_block, numbers, batch_size=at_once)
        else:
            found = jax.vmap(of_block)(numbers)
        return found.reshape(B, count, 4)


def _numbers(held: AnyTokens | None) -> Int[Array, "first_or_all"]:
    """Token numbers that `Block.load` reads: all of a TokenList, else the first."""
    if isinstance(held, TokenList):
        return held.numbers
    return jnp.asarray(0 if held is None else held.start, jnp.int32)[None]


def _of_held_tokens(spec: Spec) -> Spec:
    """The Spec of the tokens of the kernel's arrays alone, in their order."""
    held = {"queries": spec.held_queries, "keys": spec.held_keys}

    def part(x: Array, axes: Axes) -> Array:
        for axis, name in enumerate(axes):
            tokens = held.get(str(name))
            x = x if tokens is None else tokens.slice(x, axis)
        return x

    return replace(spec.map(part), held_queries=None, held_keys=None)


def load_head(spec: Spec, head: Any) -> Spec:
    """The Spec with the numbers of one of the program's query heads in place of references.

    Per-token arrays stay references. A key of dropout becomes a pair of its words, as Triton cannot
    cut an array that is loaded.
    """

    def load(ref: Any, axes: Axes) -> Any:
        if len(axes) == 1:
            return ref[head if axes == ("heads",) else 0].reshape(1)
        return (ref[0, head, 0], ref[0, head, 1]) if "heads" in axes else ref

    return spec.map(load)


def load_tokens(spec: Spec, side: Side, block: Block) -> Spec:
    """The Spec with the numbers `[1, tokens]` of a block in place of references."""

    def load(ref: Any, axes: Axes) -> Any:
        return ref[:, pl.ds(block.start, block.size)] if side in axes else ref

    return spec.map(load)


@dataclass(frozen=True)
class Pair:
    """A block of queries and a block of keys that meet, of one head.

    Attributes:
      spec: with the numbers of the head and of both blocks.
      keys_first: whether the axes of logits, and of all that is like them, are keys and queries.
    """

    spec: Spec
    queries: Block
    keys: Block
    keys_first: bool = False

    def products(self, of_queries: Array, of_keys: Array) -> Array:
        """`[t, s]`, the products of rows of channels."""
        if self.keys_first:
            of_queries, of_keys = of_keys, of_queries
        return dot(of_queries, of_keys, 1)

    def for_queries(self, x: Array) -> Array:
        """Numbers `[t]` of the queries as `[t, 1]`."""
        return x[None, :] if self.keys_first else x[:, None]

    def logits_and_pull(
        self, dots: Array
    ) -> tuple[Array, Callable[[Array], tuple[Array, Array | None]]]:
        """The logits, and their derivative by the dot products and by the slope of each query."""
        # Terms `[t, s]` of one head, as Triton's matrix products have two axes.
        terms = jax.tree.map(
            lambda x: self._in_order(x.reshape(x.shape[2:])),
            self.spec.terms(self.queries, self.keys),
        )

        def of(dots: Array, slopes: Array | None) -> Array:
            return self.spec.to_logits(dots, terms._replace(alibi_slopes=slopes), 1)

        slopes = terms.alibi_slopes
        if slopes is not None:
            one_each = self.for_queries(jnp.zeros((self.queries.size,), jnp.float32))
            slopes = slopes.astype(jnp.float32) + one_each
        return jax.vjp(of, dots, slopes)

    def drop(self, weights: Array) -> Array:
        """Weights, or anything that they multiply, after dropout."""
        dropout = self.spec.dropout
        if dropout.rate == 0:
            return weights
        t, s = (x.numbers.astype(jnp.uint32) for x in (self.queries, self.keys))
        t, s = self._in_order(t[:, None]), self._in_order(s[None, :])
        return dropout.apply(weights, keep_counters(dropout.rng, dropout.rate, t, s))

    def _in_order(self, x: Array) -> Array:
        return x.T if self.keys_first else x


def own_start(side: Side, size: int) -> Any:
    """The place of the first token of this program's block."""
    return block_of_program(side, pl.program_id(0), pl.num_programs(0)) * size


def block_of_program(side: Side, i: Any, programs: Any) -> Any:
    """The block of the program i, which begins before those of larger numbers.

    The last queries see the most keys where attention is causal: what begins last, and leaves the
    other multiprocessors idle, is short.
    """
    return programs - 1 - i if side == "queries" else i


def for_meetings(spec: Spec, meets: Any, body: Callable[[Spec, Any, Any], Any], carry: Any) -> Any:
    """`carry = body(spec, block, carry)` for the blocks that this program's block meets.

    First for those of which all tokens meet, with a Spec without a mask: comparing and selecting
    takes 91 of the 502 instructions of a thread for a block of the forward pass.

    Args:
      meets: a reference to first, last, full_first and full_last, as `Grid` finds them.
    """
    first, last, full_first, full_last = (meets[0, 0, i] for i in range(4))
    gap = full_last - full_first
    # The Spec without a mask keeps the positions, which slopes need.
    places = Mask(query_offset=spec.mask.query_offset, positions=spec.mask.positions)
    whole = replace(spec, mask=places)
    carry = jax.lax.fori_loop(full_first, full_last, partial(body, whole), carry)

    def add(i: Array, carry: Any) -> Any:
        return body(spec, jnp.where(i < full_first, i, i + gap), carry)

    return jax.lax.fori_loop(first, last - gap, add, carry)


def dot(x: Array, y: Array, axis: int) -> Array:
    """The product that adds up along the last axis of x and this axis of y, in float32."""
    dimensions = (((1,), (axis,)), ((), ()))
    return jax.lax.dot_general(x.astype(y.dtype), y, dimensions, preferred_element_type=jnp.float32)
