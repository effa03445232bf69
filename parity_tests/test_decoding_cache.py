"""A cache sharded along the tokens, step by step, against float64 and the bits of one device."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import ONE_AXIS, slow

from jax_seqpar import (
    Blockwise,
    Contiguous,
    Exact,
    Logits,
    Mask,
    MeshLayout,
    Striped,
    TokenOrder,
    Zigzag,
)
from jax_seqpar.compare import compare_bits
from jax_seqpar.decoding import KeyValueCache, SlotBlocks, SplitKV, attend_to_cache, slots, split_kv
from jax_seqpar.decoding.slots import EMPTY
from jax_seqpar.plan import collectives

pytestmark = pytest.mark.usefixtures("less_optimised", "unchecked_shapes")

B, N, K, H, V = 2, 4, 2, 8, 6
PROMPT, END = 16, 29
RNG = np.random.default_rng(3)
QUERY: Any
KEY: Any
VALUE: Any
QUERY, KEY, VALUE = (
    RNG.standard_normal((B, END, heads, channels)).astype(np.float32)
    for heads, channels in ((N, H), (K, H), (K, V))
)
SINKS: Any = np.array([0.5, -1.0, 30.0, 0.0], np.float32)
SLOPES: Any = np.array([0.5, 0.25, 0.0, 0.1], np.float32)


def layout_of(degree: int, order: TokenOrder = Contiguous()) -> MeshLayout:
    return MeshLayout(mesh=ONE_AXIS[degree].mesh(), order=order)


def truth(query: Any, key: Any, value: Any, allowed: Any, options: dict[str, Any]) -> np.ndarray:
    """Attention of one row `[T, N, H]` in float64, where `allowed` is `[T, S]`."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    key, value = (np.repeat(x, N // K, axis=1) for x in (key, value))
    z = np.einsum("tnh,snh->nts", query, key) * (options.get("scale") or H**-0.5)
    if cap := options.get("soft_cap"):
        z = cap * np.tanh(z / cap)
    if (slopes := options.get("alibi_slopes")) is not None:
        T, S = allowed.shape
        distance = np.abs(np.arange(S)[None] - (np.arange(T)[:, None] + S - T))
        z = z - np.asarray(slopes, np.float64)[:, None, None] * distance
    weights = np.where(allowed, np.exp(z), 0)
    total = weights.sum(-1, keepdims=True)
    if (sinks := options.get("sinks")) is not None:
        total = total + np.exp(np.asarray(sinks, np.float64))[:, None, None]
    weights = weights / np.where(total == 0, 1, total)
    return np.einsum("nts,snv->tnv", weights, value)


@dataclass(frozen=True)
class Decoder:
    """Decodes the rows of this module, each from the length of its prompt on.

    Attributes:
      lengths: of the prompts.
    """

    layout: MeshLayout
    lengths: tuple[int, ...] = (PROMPT, 11)
    kernel: Any = SlotBlocks()
    window: int | None = None
    logits: Any = Logits()
    strategy: SplitKV = SplitKV()
    tokens: int = END

    @property
    def degree(self) -> int:
        mesh: Any = self.layout.mesh
        return mesh.shape["seq"]

    def filled(self) -> KeyValueCache:
        kv = {"kv_heads": K, "head_dim": H, "value_dim": V, "layout": self.layout}
        cache = KeyValueCache.empty(B, self.tokens, **kv, window=self.window)
        order = self.layout.order
        prompt = [order.reorder(x[:, :PROMPT], 1, self.degree) for x in (KEY, VALUE)]
        return cache.fill(*prompt, lengths=np.asarray(self.lengths))

    def step(self, cache: KeyValueCache, query: Any, key: Any, value: Any, positions: Any) -> Any:
        cache = cache.append(key, value, positions)
        before = None if self.window is None else (self.window, 0)
        mask = Mask(is_causal=True, local_window_size=before)
        options = {"mask": mask, "logits": self.logits}
        options |= {"kernel": self.kernel, "strategy": self.strategy}
        return attend_to_cache(query, cache, positions=positions, **options), cache

    def steps(self, cache: KeyValueCache, start: Any = None) -> Iterator[tuple[Any, Any, Any]]:
        """Position of each row, output and cache of each step, to the end of the longest row."""
        step = jax.jit(self.step)
        start = np.asarray(self.lengths if start is None else start)
        while (start < END).all():
            at = [x[np.arange(B), start][:, None] for x in (QUERY, KEY, VALUE)]
            out, cache = step(cache, *at, start[:, None].astype(np.int32))
            yield start, np.asarray(out), cache
            start = start + 1

    def outputs(self, **options: Any) -> list[np.ndarray]:
        return [out for _, out, _ in self.steps(self.filled(), **options)]

    def expected(self) -> list[np.ndarray]:
        options = {name: getattr(self.logits, name) for name in ("scale", "soft_cap")}
        options |= {name: getattr(self.logits, name) for name in ("sinks", "alibi_slopes")}
        rows = []
        for i in range(END - max(self.lengths)):
            ends = [length + i + 1 for length in self.lengths]
            out = []
            for b, end in enumerate(ends):
                allowed = np.arange(end)[None] >= end - 1 - (self.window or END)
                q, k, v = QUERY[b, end - 1 : end], KEY[b, :end], VALUE[b, :end]
                out.append(truth(q, k, v, allowed, options))
            rows.append(np.stack(out))
        return rows


def far(got: list[np.ndarray], expected: list[np.ndarray]) -> float:
    assert len(got) == len(expected) > 0
    return np.max([np.abs(a - b).max() for a, b in zip(got, expected, strict=True)])


ALL_LOGITS = Logits(scale=0.4, soft_cap=3.0, sinks=SINKS, alibi_slopes=SLOPES)


IN_ORDERS = (
    (1, Contiguous()),
    (2, Zigzag()),
    *((4, order) for order in (Contiguous(), Zigzag(), Striped())),
    (8, Striped()),
    *(slow(8, order) for order in (Contiguous(), Zigzag())),
    *(slow(2, order) for order in (Contiguous(), Striped())),
)


@pytest.mark.parametrize(("degree", "order"), IN_ORDERS, ids=repr)
def test_steps_after_a_prompt(degree, order):
    """Rows of two lengths, sinks and slopes; and the bits of one device with exact attention."""
    decoder = Decoder(layout_of(degree, order), logits=ALL_LOGITS)
    kernels = (SlotBlocks(), SlotBlocks(2), Blockwise()) if degree == 4 else (SlotBlocks(3),)
    for kernel in kernels:
        assert far(replace(decoder, kernel=kernel).outputs(), decoder.expected()) < 2e-6
    exact = replace(decoder, kernel=Exact())
    for (start, out, _), right in zip(exact.steps(exact.filled()), exact.expected(), strict=True):
        assert np.abs(out - right).max() < 5e-7
        for b, t in enumerate(start):
            assert compare_bits(out[b, 0], WHOLE[b][t]).equal


def whole(b: int) -> np.ndarray:
    """Exact attention of a whole row on one device, as a training step computes it."""
    row = (x[b : b + 1] for x in (QUERY, KEY, VALUE))
    return np.asarray(Exact()(*map(jnp.asarray, row), is_causal=True, logits=ALL_LOGITS))[0]


WHOLE = [whole(b) for b in range(B)]


def test_an_empty_row_and_float64():
    with jax.enable_x64(True):
        decoder = Decoder(layout_of(4), lengths=(PROMPT, 0))
        cache = jax.tree.map(
            lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, decoder.filled()
        )
        steps = decoder.steps(cache)
        start, out, _ = next(steps)
        assert start.tolist() == [PROMPT, 0]
        one = replace(decoder, lengths=(0, 0)).expected()[0][1]
        assert np.abs(out[1] - one).max() < 1e-6  # of float32 queries
    nothing = Decoder(layout_of(4), lengths=(0, 0)).filled()
    query = QUERY[:, :1]
    out = attend_to_cache(query, nothing, positions=jnp.zeros((B, 1), jnp.int32))
    assert np.array_equal(out, np.zeros((B, 1, N, V)))


@pytest.mark.parametrize("kernel", (SlotBlocks(), Exact()), ids=repr)
def test_chunks_and_padding(kernel):
    """Chunks of 5 tokens, of which a row may have fewer: the others are not kept, and give 0."""
    decoder = Decoder(layout_of(4), kernel=kernel)
    step, cache = jax.jit(decoder.step), decoder.filled()
    counts, start = np.array([[5, 5, 3], [5, 2, 5]]).T, np.array(decoder.lengths)
    for count in counts:
        numbers = start[:, None] + np.arange(5)
        at = np.minimum(numbers, END - 1)
        chunk = [np.stack([x[b, at[b]] for b in range(B)]) for x in (QUERY, KEY, VALUE)]
        is_token = np.arange(5) < count[:, None]
        positions = np.where(is_token, numbers, EMPTY).astype(np.int32)
        out, cache = step(cache, *chunk, positions)
        for b in range(B):
            for i in range(5):
                if not is_token[b, i]:
                    assert not np.asarray(out[b, i]).any()
                    continue
                end = start[b] + i + 1
                q, k, v = QUERY[b, end - 1 : end], KEY[b, :end], VALUE[b, :end]
                right = truth(q, k, v, np.ones((1, end), bool), {})
                assert np.abs(out[b, i] - right[0]).max() < 1e-6
        start = start + count


@pytest.mark.parametrize("order", (Contiguous(), Zigzag()), ids=repr)
@pytest.mark.parametrize("kernel", (SlotBlocks(), Exact()), ids=repr)
def test_a_ring_buffer_of_a_window(kernel, order):
    """Six slots for a window of 4 before the query, after a prompt of 16."""
    decoder = Decoder(layout_of(2, order), window=4, tokens=6, kernel=kernel)
    assert far(decoder.outputs(), decoder.expected()) < 1e-6
    assert decoder.filled().tokens == 6


def test_a_ring_buffer_goes_round_many_times():
    """Ten windows of tokens, from nothing: a slot holds its position of the last round."""
    decoder = Decoder(layout_of(2), lengths=(0, 0), window=2, tokens=3)
    assert far(decoder.outputs(), decoder.expected()) < 1e-6


def test_dropped_tokens_were_never_there():
    """Two wrong tokens after the prompt are dropped, as speculative decoding does."""
    for decoder in (
        Decoder(layout_of(4), kernel=Exact()),
        Decoder(layout_of(4), kernel=Exact(), window=4, tokens=8),
    ):
        cache, start = decoder.filled(), np.asarray(decoder.lengths)
        positions = (start[:, None] + np.arange(2)).astype(np.int32)
        wrong = cache.append(KEY[:, :2] + 7, VALUE[:, :2] + 7, positions).drop(start)
        with_wrong = [out for _, out, _ in decoder.steps(wrong)]
        for a, b in zip(with_wrong, decoder.outputs(), strict=True):
            assert compare_bits(a, b).equal


def test_a_ring_buffer_that_has_lost_what_was_dropped_for():
    """Four tokens dropped from 6 slots of a window of 4: the first row's next query misses some."""
    decoder = Decoder(layout_of(2), window=4, tokens=6)
    cache, start = decoder.filled(), np.asarray(decoder.lengths)
    positions = (start[:, None] + np.arange(4)).astype(np.int32)
    positions[1, 1:] = EMPTY
    cache = cache.append(KEY[:, :4], VALUE[:, :4], positions).drop(start)
    _, out, _ = next(decoder.steps(cache))
    assert np.isnan(out[0]).all()
    assert np.abs(out[1] - decoder.expected()[0][1]).max() < 1e-6


@pytest.mark.parametrize("kernel", (SlotBlocks(), Exact()), ids=repr)
def test_a_row_beyond_the_capacity(kernel):
    """A row beyond the capacity raises eagerly; under jit that row alone, whose prompt ended with
    padding, is NaN.

    The prompt takes 4 of the 5 slots of device 0 in both rows, and positions 12 and 16 one each.
    """
    decoder = Decoder(layout_of(4), tokens=20, kernel=kernel)
    for start, out, _ in decoder.steps(decoder.filled()):
        assert np.isnan(out[0]).all() == (start[0] >= 20) == np.isnan(out[0]).any()
        assert np.isnan(out[1]).all() == (start[1] >= 16) == np.isnan(out[1]).any()
    full = decoder.filled().append(KEY[:, :4], VALUE[:, :4], np.arange(16, 20)[None].repeat(2, 0))
    with pytest.raises(ValueError, match="append: 6 tokens do not fit in 5 slots of a row on one"):
        full.append(KEY[:, :1], VALUE[:, :1], np.full((B, 1), 20))


@pytest.mark.parametrize(
    ("before", "after", "window"), ((4, 2, None), (2, 8, 8), slow(4, 2, 8), slow(2, 8, None))
)
def test_a_cache_goes_on_at_another_degree(before, after, window):
    tokens = 16 if window else 32
    decoder = Decoder(layout_of(before), kernel=Exact(), window=window, tokens=tokens)
    *_, (start, _, cache) = (
        step for step, _ in zip(decoder.steps(decoder.filled()), range(3), strict=False)
    )
    moved = replace(decoder, layout=layout_of(after))
    rest = [out for _, out, _ in moved.steps(cache.on(moved.layout), start + 1)]
    for a, b in zip(rest, decoder.outputs()[3:], strict=True):
        assert compare_bits(a, b).equal


def test_a_row_that_has_lost_a_token_stays_lost_at_another_degree():
    decoder = Decoder(layout_of(4), tokens=16)
    start, out, cache = next(decoder.steps(decoder.filled()))
    assert np.isnan(out[0]).all()
    moved = replace(decoder, layout=layout_of(2))
    _, out, _ = next(moved.steps(cache.on(moved.layout), start + 1))
    assert np.isnan(out[0]).all()
    again = cache.on(moved.layout).fill(KEY[:, :16], VALUE[:, :16])
    positions = np.full((B, 1), 15, np.int32)
    assert not np.isnan(attend_to_cache(QUERY[:, 15:16], again, positions=positions)).any()


def test_heads_of_the_output_are_scattered():
    decoder = Decoder(layout_of(4), logits=Logits(sinks=SINKS))
    for kernel in (SlotBlocks(), Exact()):
        whole, scattered = (
            replace(decoder, kernel=kernel, strategy=SplitKV(scatter_heads=x)).outputs()
            for x in (False, True)
        )
        assert far(scattered, whole) < 3e-7


# ---------------------------------------------------------------- rings that were dropped from


def ring_after(drops: tuple[int, ...], tokens: int) -> tuple[np.ndarray, int]:
    """The next row of a ring of 6 slots and a window of 4, after so many tokens and drops."""
    decoder = Decoder(layout_of(2), lengths=(0, 0), window=4, tokens=6)
    cache, start = decoder.filled(), np.zeros(B, int)
    *_, (start, _, cache) = islice(decoder.steps(cache), tokens)
    start = start + 1
    for first in drops:
        cache, start = cache.drop(np.full(B, first)), np.full(B, first)
    return next(decoder.steps(cache, start))[1], int(start[0])


@pytest.mark.parametrize(
    ("drops", "tokens", "is_lost"),
    (
        ((8,), 11, True),
        ((9,), 11, False),
        ((9, 8), 11, True),  # what was written over is known after the first drop, too
        ((0,), 11, False),  # nothing before it is needed
        ((0,), 3, False),
        ((1,), 4, False),
        ((2,), 5, False),
        ((20,), 5, False),
    ),
)
def test_what_a_ring_has_lost(drops, tokens, is_lost):
    out, start = ring_after(drops, tokens)
    if start >= END:
        return
    right = Decoder(layout_of(2), lengths=(start, start), window=4).expected()[0]
    assert np.isnan(out).all() == is_lost == np.isnan(out).any()
    assert is_lost or start > tokens or np.abs(out - right).max() < 1e-6


def test_padding_that_is_not_a_number_is_not_kept():
    """NaN in the padding of a prompt, or left by a longer prompt, does not reach the output."""
    decoder = Decoder(layout_of(4))
    cache = decoder.filled().fill(KEY[:, :16] * np.nan, VALUE[:, :16] * np.nan)
    junk = np.arange(16)[None, :, None, None] >= np.array(decoder.lengths)[:, None, None, None]
    prompt: Any = (np.where(junk, np.nan, x[:, :16]) for x in (KEY, VALUE))
    cache = cache.fill(*prompt, lengths=np.array(decoder.lengths))
    assert far([out for _, out, _ in decoder.steps(cache)], decoder.expected()) < 1e-6


def test_positions_that_32_bits_do_not_hold_are_padding():
    decoder = Decoder(layout_of(4))
    late = np.array([[2**32 + 3], [2**30 + 5]])
    cache = decoder.filled().append(KEY[:, :1], VALUE[:, :1], late)
    assert all(map(np.array_equal, cache.slots, decoder.filled().slots))
    assert not np.asarray(attend_to_cache(QUERY[:, :1], cache, positions=late)).any()


def test_nothing_to_attend_with():
    cache = Decoder(layout_of(4)).filled()
    none = QUERY[:, :0], KEY[:, :0], VALUE[:, :0], np.zeros((B, 0), np.int32)
    cache = cache.append(*none[1:])
    assert attend_to_cache(none[0], cache, positions=none[3]).shape == (B, 0, N, V)
    assert (cache.fill(*none[1:3]).slots.positions == EMPTY).all()


# ---------------------------------------------------------------- what a step sends and holds


def compiled_step(decoder: Decoder) -> Any:
    one = [x[:, :1] for x in (QUERY, KEY, VALUE)]
    step = jax.jit(decoder.step, donate_argnums=0)
    return step.lower(decoder.filled(), *one, np.zeros((B, 1), np.int32)).compile()


@pytest.mark.usefixtures("optimised")
def test_one_maximum_and_one_sum_a_step():
    """A step has two all-reduces at every capacity, updates in place, and a fill sends nothing."""
    found = [compiled_step(Decoder(layout_of(4), tokens=n)) for n in (1 << 12, 1 << 14)]
    for program in found:
        assert collectives(program.as_text()) == {"all-reduce": 2}
    sizes = [x.memory_analysis() for x in found]
    assert sizes[0].temp_size_in_bytes == sizes[1].temp_size_in_bytes
    of_cache = sum(x.nbytes for x in Decoder(layout_of(4), tokens=1 << 14).filled().slots) // 4
    assert sizes[1].alias_size_in_bytes >= of_cache
    scattered = Decoder(layout_of(4), strategy=SplitKV(scatter_heads=True))
    counts = collectives(compiled_step(scattered).as_text())
    assert counts == {"all-reduce": 1, "reduce-scatter": 1}
    empty = KeyValueCache.empty(B, PROMPT, K, H, value_dim=V, layout=layout_of(4))
    prompt = [jax.device_put(x[:, :PROMPT], empty.slots.key.sharding) for x in (KEY, VALUE)]
    fill = jax.jit(lambda cache, *kv: cache.fill(*kv)).lower(empty, *prompt).compile()
    assert collectives(fill.as_text() or "") == {}


# ---------------------------------------------------------------- wrong caches


def owner_off_by_one(patch: Any) -> None:
    right = slots.append
    patch.setattr(slots, "append", lambda *x, device, **y: right(*x, device=device + 1, **y))


def a_slot_that_is_not_hidden(patch: Any) -> None:
    patch.setattr(slots, "EMPTY", 0)
    right = KeyValueCache.fill

    def fill(self: Any, *kv: Any, lengths: Any) -> Any:
        return right(self, *kv)

    patch.setattr(KeyValueCache, "fill", fill)


def sinks_of_every_device(patch: Any) -> None:
    right = SplitKV._merged

    def merged(self: Any, part: Any, sinks: Any, axis_name: Any) -> Any:
        return right(self, part, sinks + np.float32(np.log(4)), axis_name)

    patch.setattr(SplitKV, "_merged", merged)


def the_largest_logit_of_its_own(patch: Any) -> None:
    patch.setattr(split_kv.jax.lax, "pmax", lambda x, axis: x)


WRONG = (
    owner_off_by_one,
    a_slot_that_is_not_hidden,
    sinks_of_every_device,
    the_largest_logit_of_its_own,
)


@pytest.mark.parametrize("bug", WRONG)
def test_a_wrong_cache_is_caught(bug, monkeypatch):
    decoder = Decoder(layout_of(4), logits=Logits(sinks=SINKS))
    bug(monkeypatch)
    assert not far(decoder.outputs(), decoder.expected()) < 1e-3


def test_a_row_that_no_device_has_a_key_of_is_caught(monkeypatch):
    """The row's largest logit is -inf on every device, and -inf less -inf is NaN."""
    nothing, at = Decoder(layout_of(4), lengths=(0, 0)).filled(), np.zeros((B, 1), np.int32)
    monkeypatch.setattr(split_kv, "finite", lambda top: top)
    assert np.isnan(attend_to_cache(QUERY[:, :1], nothing, positions=at)).all()


# ---------------------------------------------------------------- refusals


def wrong(x: Any) -> Any:
    """An argument that type checkers would find before a test does."""
    return x


AT = np.zeros((B, 1), np.int32)


def cache(**options: Any) -> KeyValueCache:
    sizes = {"kv_heads": K, "head_dim": H, "value_dim": V, "layout": layout_of(4)}
    return KeyValueCache.empty(B, 16, **(sizes | options))


def attend(**options: Any) -> Any:
    positions: Any = jnp.zeros((B, 1), jnp.int32)
    window = options.pop("window", None)
    held = cache(window=window) if window else cache()
    options = {"positions": positions} | options
    return attend_to_cache(QUERY[:, :1], held, **options)


@pytest.mark.parametrize(
    ("call", "says"),
    (
        (partial(cache, dtype=jnp.int8), "floating dtype, got .*int8"),
        (partial(cache, kv_heads=0), "kv_heads"),
        (partial(cache, window=16), "tokens = 16 does not hold the window of 16 .*tokens=17"),
        (partial(cache, layout=replace(layout_of(4), batch="seq", tokens=None)), "batch = 2 is"),
        (lambda: cache().fill(KEY, VALUE[:, :, :, :2]), "value has shape"),
        (lambda: cache().fill(KEY[:, :20], VALUE[:, :20]), "20 tokens do not fit in 16 slots"),
        (lambda: cache().append(KEY[:, :1], VALUE[:, :1], np.zeros((B, 2), int)), "positions have"),
        (lambda: cache().append(KEY[:, :1], VALUE[:, :1], np.zeros((B, 1))), "expected integers"),
        (
            lambda: cache().append(wrong([1.0]), VALUE[:, :1], np.zeros((B, 1), int)),
            "key must be an array",
        ),
        (lambda: cache().drop(np.zeros((B, 1), int)), "expected .2,., one of each row"),
        (lambda: cache().drop(np.zeros(B)), "positions of drop are float64"),
        (lambda: cache().fill(KEY[:, :16], VALUE[:, :16], lengths=wrong(5)), "lengths have shape"),
        (
            lambda: cache(window=3).fill(
                KEY[:, :4], VALUE[:, :4], positions=np.array([[0, 1, 0, 1]])
            ),
            "position 0 twice, of which a ring buffer keeps one",
        ),
        (partial(cache, layout="seq"), "layout must be a MeshLayout"),
        (partial(cache, layout=replace(layout_of(4), tokens="sq")), "names axis 'sq'"),
        (partial(attend, strategy="ring"), "strategy='ring' does not attend to a cache"),
        (
            lambda: jax.grad(lambda q: attend_to_cache(q, cache(), positions=AT).sum())(
                jnp.asarray(QUERY[:, :1])
            ),
            "is differentiated, and has no derivative",
        ),
        (
            lambda: KeyValueCache.empty(B, 12, K, H, layout=layout_of(2)).on(layout_of(8)),
            "12 slots is not divisible by the 8 devices",
        ),
        (partial(attend, mask=Mask(local_window_size=(3, 0))), "is not causal"),
        (partial(attend, mask=Mask(is_causal=True, segment_ids=QUERY[:, :1, 0, 0] > 0)), "segment"),
        (partial(attend, logits=Logits(bias=QUERY[:, :1])), "Leave bias out"),
        (partial(attend, window=4), "keeps a window of 4 tokens, and .* attends to more"),
        (partial(attend, kernel=lambda q, k, v: q), "does not attend to a part"),
        (partial(attend, strategy=SplitKV(scatter_heads=True)), None),
        (partial(attend, positions=jnp.zeros((B, 2), jnp.int32)), "positions have shape"),
    ),
)
def test_refusals(call, says):
    if says is None:
        assert call().shape == (B, 1, N, V)
        return
    with pytest.raises(ValueError, match=says):
        call()
