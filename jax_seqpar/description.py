"""Which query attends to which key, and what makes its logits: one description for every kernel.

All of it is in the global coordinates of the whole sequence: under Ulysses a device sees every
token, and of the arrays that have a head axis it is given its heads' part.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Integer, Shaped

from . import dropout, refusals
from .blocks import Block

# (left, right); None and -1 are an open side, one integer is for both.
Window = int | Sequence[int | None]
# Of queries and keys; one array is for both.
PerToken = Integer[Array, "B S"] | tuple[Integer[Array, "B T"], Integer[Array, "B S"]]

# What the axes of each array are. An axis of size 1 stands for all of its kind.
AXES: dict[str, tuple[str | None, ...]] = {
    "bias": ("batch", "heads", None, None),
    "mask": ("batch", "heads", None, None),
    "query_seq_lengths": ("batch",),
    "key_value_seq_lengths": ("batch",),
    "segment_ids": ("batch", None),
    "positions": ("batch", None),
    "alibi_slopes": ("heads",),
    "sinks": ("heads",),
    "dropout_rng": ("batch", "heads", None),  # once it is keys of heads
}
# What is added to the logits and may have a gradient.
ADDED = ("bias", "alibi_slopes", "sinks")
MOST_DISTANT = 1 << 29  # so that a float32 slope times a distance is exact in float64
# A side of a window without limit: more would leave int32 when a position below 2^30 is added.
OPEN = 1 << 30


@dataclass(frozen=True)
class Rules:
    """What is known before any number is; hashable, part of the compiled program.

    Scalars of NumPy become Python's, and a window None, one integer or `(left, right)`.
    """

    scale: float | None = None
    is_causal: bool = False
    query_offset: int = 0
    local_window_size: Window | None = None
    logits_soft_cap: float | None = None
    dropout_rate: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, _python(getattr(self, field.name)))
        object.__setattr__(self, "local_window_size", _sides(self.local_window_size))


class Terms(NamedTuple):
    """What turns the dot products of a block into logits; all of four axes, or None."""

    bias: Any
    alibi_slopes: Any
    distance: Any
    allowed: Any


@partial(jax.tree_util.register_dataclass, data_fields=["arrays"], meta_fields=["rules"])
@dataclass(frozen=True)
class Description:
    """What attends to what: the conjunction of everything given; and what makes the logits.

    A query has the position `query_offset + t`, a key the position s, unless `positions` says
    otherwise: without an offset the causal diagonal starts in the top left corner, as in `jax.nn`
    and PyTorch; with `query_offset=S - T` it ends in the bottom right one, as in FlashAttention.
    `logits = cap(query . key * scale) + bias - slope * distance`.

    The keywords, which are those of every kernel:
      bias: added to the logits; floating, each axis that of `[B, N, T, S]` or 1.
      mask: True attends; each axis that of `[B, N, T, S]` or 1.
      scale: of the logits; `1 / sqrt(H)` if None.
      is_causal: keys at or before the query's position.
      query_offset: the position of the first query.
      positions: `[B, S]`, or a pair `[B, T]`, `[B, S]`, in place of those above, below 2^30 in
        size; causality, window and ALiBi go by them.
      query_seq_lengths: queries `t < length`, per batch entry.
      key_value_seq_lengths: keys `s < length`, per batch entry.
      local_window_size: positions from `left` before the query's to `right` after; one integer
        means both, None or -1 in place of a side that it is open.
      segment_ids: a query attends to the keys of its own segment: `[B, S]`, or a pair `[B, T]`,
        `[B, S]`. Padding is a segment of its own.
      alibi_slopes: `[N]`; logits lose slope times the distance of the positions, which counts as
        2^29 beyond that.
      logits_soft_cap: logits become `cap * tanh(logits / cap)` before bias and slopes.
      sinks: `[N]`, a further logit of each query head, which has no value.
      dropout_rate: the part of the weights that is dropped, the others scaled up.
      dropout_rng: a threefry key of `jax.random.key`, or `[B, N, 2]` of `dropout.head_keys`. Which
        weights are dropped is a function of it and of (batch, head, query, key), counted from 0.
    """

    rules: Rules
    arrays: dict[str, Any]

    @property
    def keywords(self) -> dict[str, Any]:
        """Those that differ from their defaults."""
        given = {f.name: getattr(self.rules, f.name) for f in fields(Rules)}
        defaults = {f.name: f.default for f in fields(Rules)}
        return {n: x for n, x in given.items() if x != defaults[n]} | self.arrays

    def attends(self, queries: Block, keys: Block) -> Bool[Array, "..."] | None:
        """True where a query of a block may attend to a key of a block; None where all may.

        Broadcastable to `[B, N, queries.size, keys.size]`.
        """
        rules, arrays = self.rules, self.arrays
        conditions = []
        if "mask" in arrays:
            conditions.append(keys.of(queries.of(arrays["mask"], 2), 3))
        t, s = self._positions(queries, keys)
        if rules.is_causal:
            conditions.append(s <= t)
        if rules.local_window_size is not None:
            left, right = window(rules.local_window_size)
            conditions.append((t - left <= s) & (s <= t + right))
        if "query_seq_lengths" in arrays:
            of_query = queries.tokens[None, None, :, None]
            conditions.append(of_query < _per_sequence(arrays["query_seq_lengths"]))
        if "key_value_seq_lengths" in arrays:
            of_key = keys.tokens[None, None, None, :]
            conditions.append(of_key < _per_sequence(arrays["key_value_seq_lengths"]))
        if "segment_ids" in arrays:
            of_query, of_key = pair(arrays["segment_ids"])
            of_query, of_key = queries.of(of_query, 1), keys.of(of_key, 1)
            conditions.append(of_query[:, None, :, None] == of_key[:, None, None, :])
        if not conditions:
            return None
        allowed, *rest = conditions
        for condition in rest:
            allowed = allowed & condition
        return allowed

    def distance(self, queries: Block, keys: Block) -> Int[Array, "..."]:
        """How far the positions of queries and keys are apart, at most `MOST_DISTANT`."""
        t, s = self._positions(queries, keys)
        return jnp.minimum(jnp.abs(t - s), MOST_DISTANT)

    def terms(self, queries: Block, keys: Block) -> Terms:
        """What `logits` needs for a block."""
        bias, slopes = self.arrays.get("bias"), self.arrays.get("alibi_slopes")
        return Terms(
            None if bias is None else keys.of(queries.of(bias, 2), 3),
            None if slopes is None else slopes[None, :, None, None],
            None if slopes is None else self.distance(queries, keys),
            self.attends(queries, keys),
        )

    def keep(self, queries: Block, keys: Block) -> Bool[Array, "B N t s"] | None:
        """True for the weights that dropout leaves; None where it leaves all."""
        rate = self.rules.dropout_rate
        if rate == 0:
            return None
        return dropout.keep(self.arrays["dropout_rng"], rate, queries.tokens, keys.tokens)

    def of_heads(self, b: Any, first: Any, count: int) -> "Description":
        """The same for one sequence and `count` of its query heads."""

        def part(x: Array, *, name: str) -> Array:
            for axis, kind in enumerate(AXES[name]):
                if x.shape[axis] == 1 or kind is None:
                    continue
                start, size = (b, 1) if kind == "batch" else (first, count)
                x = jax.lax.dynamic_slice_in_dim(x, start, size, axis)
            return x

        own = {n: jax.tree.map(partial(part, name=n), x) for n, x in self.arrays.items()}
        return Description(self.rules, own)

    def keys_of(self, queries: Block, key_tokens: int) -> tuple[Array, Array]:
        """First key, and one past the last, that some query may attend to; masks not asked."""
        return self._partners(queries, 0, key_tokens)

    def queries_of(self, keys: Block, query_tokens: int) -> tuple[Array, Array]:
        """First query, and one past the last, that may attend to some key; masks not asked."""
        return self._partners(keys, 1, query_tokens)

    def _positions(self, queries: Block, keys: Block) -> tuple[Array, Array]:
        """`[B, 1, t, 1]` and `[B, 1, 1, s]`; B is 1 where all sequences have the same."""
        if "positions" in self.arrays:
            t, s = pair(self.arrays["positions"])
            t, s = queries.of(t, 1).astype(jnp.int32), keys.of(s, 1).astype(jnp.int32)
        else:
            t, s = (queries.tokens + self.rules.query_offset)[None], keys.tokens[None]
        return t[:, None, :, None], s[:, None, None, :]

    def _partners(self, block: Block, side: int, partners: int) -> tuple[Array, Array]:
        """The range of tokens on the other side that those of a block may have to do with.

        Args:
          side: 0 for a block of queries, 1 for one of keys.
        """
        rules, arrays = self.rules, self.arrays
        before, after = self._reach()
        if side == 1:
            before, after = after, before
        low, high = 0, partners
        conditions = []
        if "positions" in arrays:
            both = [x.astype(jnp.int32) for x in pair(arrays["positions"])]
            mine, theirs = block.of(both[side], 1), both[1 - side]
            if before is not None:
                conditions.append(theirs >= mine.min(1, keepdims=True) - before)
            if after is not None:
                conditions.append(theirs <= mine.max(1, keepdims=True) + after)
        else:
            shift = rules.query_offset if side == 0 else -rules.query_offset
            low = 0 if before is None else block.start + shift - before
            high = partners if after is None else block.start + block.size + shift + after
        if "segment_ids" in arrays:
            both = pair(arrays["segment_ids"])
            mine, theirs = block.of(both[side], 1), both[1 - side]
            conditions.append(theirs >= mine.min(1, keepdims=True))
            conditions.append(theirs <= mine.max(1, keepdims=True))
        lengths = [arrays.get(n) for n in ("query_seq_lengths", "key_value_seq_lengths")]
        mine, theirs = lengths[side], lengths[1 - side]
        if theirs is not None:
            high = jnp.minimum(high, theirs.max().astype(jnp.int32))
        if mine is not None:
            high = jnp.where(block.start < mine.max(), high, 0)
        if conditions:
            some = jnp.broadcast_to(jnp.bool_(True), (1, partners))
            for condition in conditions:
                some = some & condition
            some = some.any(0)
            tokens = Block(0, partners).tokens
            low = jnp.maximum(low, jnp.where(some, tokens, partners).min())
            high = jnp.minimum(high, jnp.where(some, tokens + 1, 0).max())
        low, high = jnp.clip(low, 0, partners), jnp.clip(high, 0, partners)
        return jnp.minimum(low, high), high

    def _reach(self) -> tuple[int | None, int | None]:
        """How far a query sees before and after its position; None without limit."""
        before = after = None
        if self.rules.local_window_size is not None:
            before, after = window(self.rules.local_window_size)
        if self.rules.is_causal:
            after = 0
        return before, after


def describe(query: Any, key: Any, value: Any, **keywords: Any) -> Description:
    """The description that the keywords of a kernel give.

    Raises:
      ValueError: for anything that does not fit the query, the key and the value, or one another.
    """
    refusals.check_arrays(query, key, value)
    arrays = {name: keywords.pop(name) for name in AXES}
    refusals.check_has_numbers({"query": query, "key": key, "value": value} | arrays)
    rules = Rules(**keywords)
    refusals.check_rules(rules)
    refusals.check_description(query.shape, key.shape, rules, **arrays)
    arrays = {name: x for name, x in arrays.items() if x is not None}
    if rules.dropout_rate == 0:
        arrays.pop("dropout_rng", None)
    else:
        B, _, N, _ = query.shape
        arrays["dropout_rng"] = dropout.head_keys(arrays["dropout_rng"], B, N)
    return Description(rules, arrays)


def accumulated(dtype: Any) -> Any:
    """The dtype of logits and sums in floating point."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def logits(rules: Rules, dots: Array, terms: Terms, head_dim: int) -> Array:
    """The logits `[B, N, t, s]` in floating point, -inf where nothing attends.

    Args:
      dots: query . key, of the dtype to compute in.
    """
    z = dots * (head_dim**-0.5 if rules.scale is None else rules.scale)
    if rules.logits_soft_cap is not None:
        z = rules.logits_soft_cap * jnp.tanh(z / rules.logits_soft_cap)
    if terms.bias is not None:
        z = z + terms.bias.astype(z.dtype)
    if terms.alibi_slopes is not None:
        z = z - terms.alibi_slopes.astype(z.dtype) * terms.distance.astype(z.dtype)
    return z if terms.allowed is None else jnp.where(terms.allowed, z, -jnp.inf)


def kept(weights: Array, rules: Rules, keep: Array | None) -> Array:
    """Weights, or anything that they multiply, after dropout."""
    if keep is None:
        return weights
    return jnp.where(keep, weights * dropout.kept_scale(rules.dropout_rate), 0)


def pair(x: Any) -> tuple[Any, Any]:
    """Of queries and keys, where one stands for both."""
    return x if isinstance(x, tuple) else (x, x)


def window(local_window_size: Any) -> tuple[int, int]:
    """`(left, right)` of a window that `Rules` holds."""
    left, right = (min(n, OPEN) for n in pair(local_window_size))
    return left, right


def _sides(window: Any) -> Any:
    """A window with `OPEN` for its open sides; None if both are."""
    sides = tuple(map(_python, window)) if isinstance(window, list | tuple) else window
    both = pair(sides)
    limits = tuple(OPEN if n is None or (type(n) is int and n == -1) else n for n in both)
    if all(type(n) is int and n == OPEN for n in limits) and len(limits) == 2:
        return None
    return limits if isinstance(sides, tuple) else sides


def _python(x: Any) -> Any:
    """The Python number of a NumPy one; anything else as it is."""
    is_number = isinstance(x, np.generic) or (isinstance(x, np.ndarray) and x.ndim == 0)
    return x.item() if is_number else x


def _per_sequence(lengths: Shaped[Array, "B"]) -> Int[Array, "B 1 1 1"]:
    return lengths.astype(jnp.int32)[:, None, None, None]
