"""Row i of exact attention is a function of query i and of the set of tokens it may attend to.

So no later token, no padding, no other document and no order of the keys can change a bit of it. In
JAX more tokens than one block, in PyTorch a few tokens in blocks that are small for it.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import pytest
from cases import ONE_AXIS
from exact_cases import NAMES, jax_exact, torch_exact
from one_exponent import digits_of_one_exponent, token_of_one_exponent
from questions import output_and_gradients

from jax_seqpar import AllGatherKV, Exact, Ulysses, dot_product_attention
from jax_seqpar.compare import compare_bits
from jax_seqpar.exact import forward, token_blocks
from jax_seqpar.parity.inputs import Arrays, Case
from torch_ref.exact import arithmetic as exact_arithmetic

pytestmark = pytest.mark.usefixtures("less_optimised", "one_torch_thread")

PEAK = 2  # the key that has nearly all the weight, where there is one


def outlier_tokens(q, k, v, do):
    for x in (q, k, v, do):
        x[::7] *= 300


def outlier_channels(q, k, v, do):
    for x in (q, k, v, do):
        x[..., 1] *= 100


def one_peak(q, k, v, do):
    q[:] = np.abs(q)
    k[PEAK] = 30


def empty_peak(q, k, v, do):
    """The heavy key has no value, so that the others are all that is left."""
    one_peak(q, k, v, do)
    v[PEAK] = 0


def sink_token(q, k, v, do):
    """The first token takes much of the weight and has little value."""
    q[:] = np.abs(q)
    k[0] = 4
    v[0] *= 2.0**-10


def tiny(q, k, v, do):
    for x in (q, k, v, do):
        x *= 1e-30


# Each is one sequence of the batch, so that a program runs once for all of them.
KINDS: dict[str, Callable[..., None]] = {
    "Gaussian": lambda q, k, v, do: None,
    "outlier tokens": outlier_tokens,
    "outlier channels": outlier_channels,
    "one peak": one_peak,
    "empty peak": empty_peak,
    "sink-like token": sink_token,
    "tiny": tiny,
}


@cache
def inputs_of(tokens: int) -> Arrays:
    """A sequence of each kind."""
    inputs = Case(len(KINDS), tokens, heads=1, kv_heads=1, head_dim=4).inputs()
    for kind, *sequence in zip(KINDS.values(), *inputs.values(), strict=True):
        kind(*sequence)
    for x in inputs.values():
        x.flags.writeable = False
    return inputs


def torch_in_blocks(inputs: Arrays, **options: Any) -> Arrays:
    """Results of PyTorch, with several blocks and tiles in a few tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact_arithmetic, "BLOCK", 16)
        patch.setattr(exact_arithmetic, "TILE", 8)
        return torch_exact(inputs, **options)


class Framework(NamedTuple):
    """One framework's attention, the tokens of its inputs and how many of them are a prefix."""

    run: Callable[..., Arrays]
    tokens: int
    prefix: int

    @property
    def inputs(self) -> Arrays:
        return inputs_of(self.tokens)


JAX = Framework(jax_exact, tokens=300, prefix=277)
TORCH = Framework(torch_in_blocks, tokens=40, prefix=27)
both_frameworks = pytest.mark.parametrize("framework", (JAX, TORCH), ids=("JAX", "PyTorch"))


@cache
def causal(framework: Framework) -> Arrays:
    """Output and gradients of all the tokens at once."""
    return framework.run(framework.inputs, is_causal=True)


def tokens_of(arrays: Arrays, tokens: Any) -> Arrays:
    return {name: x[:, tokens] for name, x in arrays.items()}


def multiplied(x: np.ndarray) -> np.ndarray:
    return x * np.float32(1e7)


def of_nan(x: np.ndarray) -> np.ndarray:
    return np.full_like(x, np.nan)


def spoilt(inputs: Arrays, tokens: Any, junk: Callable[[np.ndarray], np.ndarray]) -> Arrays:
    """The inputs with other contents of some tokens."""
    changed = {name: x.copy() for name, x in inputs.items()}
    for x in changed.values():
        x[:, tokens] = junk(x[:, tokens])
    return changed


def check_same(ours: Arrays, expected: Arrays, names: tuple[str, ...]) -> None:
    """Asserts equal bits, and names the kinds of sequences where one differs."""
    found = {}
    for i, kind in enumerate(KINDS):
        for name in names:
            report = compare_bits(ours[name][i], expected[name][i])
            assert np.isfinite(ours[name][i]).all(), (kind, name)
            if not report.equal:
                found[kind, name] = f"{report.differing} of {report.total}"
    assert not found, f"elements differ: {found}"


def check_later_tokens(framework: Framework, rows: int, junk: Callable[..., Any]) -> None:
    """Asserts that the first rows do not depend on the tokens after them."""
    changed = spoilt(framework.inputs, slice(rows, None), junk)
    ours, before = framework.run(changed, is_causal=True), slice(rows)
    check_same(
        tokens_of(ours, before), tokens_of(causal(framework), before), names=("forward", "dq")
    )


@both_frameworks
def test_later_tokens(framework):
    check_later_tokens(framework, 5, of_nan)
    for junk in (multiplied, of_nan):
        check_later_tokens(framework, framework.prefix, junk)


@cache
def prefix(framework: Framework) -> Arrays:
    """Output and gradients of the first tokens alone."""
    own = tokens_of(framework.inputs, slice(framework.prefix))
    return framework.run(own, is_causal=True)


@both_frameworks
def test_later_tokens_that_are_cut_off(framework):
    expected = tokens_of(causal(framework), slice(framework.prefix))
    check_same(prefix(framework), expected, names=("forward", "dq"))


@both_frameworks
@pytest.mark.parametrize("rows", (1, 9), ids=("a step of decoding", "a chunk of a prefill"))
def test_the_last_queries_of_a_prefix(framework, rows):
    """One query needs no causal mask; several count from where the chunk begins."""
    start, end = framework.prefix - rows, framework.prefix
    own = tokens_of(framework.inputs, slice(end))
    own |= {name: own[name][:, start:] for name in ("query", "grad")}
    options = {} if rows == 1 else {"is_causal": True, "query_offset": start}
    ours, expected = framework.run(own, **options), tokens_of(causal(framework), slice(start, end))
    check_same(ours, expected, names=("forward", "dq"))


def in_places(
    framework: Framework,
    inputs: Arrays,
    segments: np.ndarray | int = 0,
    keys: np.ndarray | None = None,
) -> Arrays:
    """Causal, with a segment for each token and a position for each query and key.

    One set of options, which JAX compiles once.
    """
    count = np.arange(framework.tokens, dtype=np.int32)
    of_queries, of_keys, segments = (
        np.broadcast_to(np.asarray(x, np.int32), (len(KINDS), framework.tokens))
        for x in (count, count if keys is None else keys, segments)
    )
    return framework.run(
        inputs,
        is_causal=True,
        segment_ids=(segments, segments),
        positions=(of_queries, of_keys),
    )


@both_frameworks
def test_other_documents(framework):
    """The middle document of three: its gradients depend only on the places of other tokens."""
    start = 11
    end = start + framework.prefix
    count = np.arange(framework.tokens)
    own, segments = slice(start, end), np.digitize(count, (start, end))
    before = in_places(framework, framework.inputs, segments)
    elsewhere = segments != 1
    for junk in (multiplied, of_nan):
        after = in_places(framework, spoilt(framework.inputs, elsewhere, junk), segments)
        check_same(tokens_of(after, own), tokens_of(before, own), NAMES)
    alone = framework.run(tokens_of(framework.inputs, own), is_causal=True)
    check_same(tokens_of(before, own), alone, names=("forward",))


@both_frameworks
def test_a_document_that_begins_with_a_block(framework):
    """The document has the bits that it has alone, in its gradients, too."""
    own = slice(framework.prefix)
    segments = np.arange(framework.tokens) >= framework.prefix
    ours = in_places(framework, framework.inputs, segments)
    check_same(tokens_of(ours, own), prefix(framework), NAMES)


@both_frameworks
def test_padding_on_the_left(framework):
    added = framework.tokens - framework.prefix
    segments = np.arange(framework.tokens) >= added
    padded = {
        name: np.pad(x[:, : framework.prefix], ((0, 0), (added, 0), (0, 0), (0, 0)))
        for name, x in framework.inputs.items()
    }
    for junk in (1e9, np.nan):
        holds = spoilt(padded, ~segments, lambda x, junk=junk: np.full_like(x, junk))
        ours = in_places(framework, holds, segments)
        check_same(tokens_of(ours, segments), prefix(framework), names=("forward",))


@both_frameworks
def test_a_cache_whose_slots_are_in_no_order(framework):
    order = np.random.default_rng(3).permutation(framework.tokens)
    keys = {name: framework.inputs[name][:, order] for name in ("key", "value")}
    ours = in_places(framework, framework.inputs | keys, keys=order)
    check_same(ours, causal(framework), names=("forward",))


@pytest.mark.parametrize("strategy", (Ulysses(), AllGatherKV()), ids=("Ulysses", "AllGatherKV"))
def test_later_tokens_on_a_mesh(strategy):
    """Later tokens change no bit, also where the queries of a block lie on several devices."""
    inputs, rows = Case(batch=1, tokens=16, heads=4, kv_heads=2, head_dim=4).inputs(), slice(9)
    attend = partial(
        dot_product_attention,
        kernel=Exact(),
        layout=ONE_AXIS[4].on(),
        strategy=strategy,
        is_causal=True,
    )
    run, expected = output_and_gradients(attend), torch_exact(inputs, is_causal=True)
    for junk in (None, multiplied, of_nan):
        changed = inputs if junk is None else spoilt(inputs, slice(9, None), junk)
        ours = dict(zip(NAMES, map(np.asarray, run(**changed)), strict=True))
        for name in NAMES if junk is None else ("forward", "dq"):
            own = slice(None) if junk is None else rows
            report = compare_bits(ours[name][:, own], expected[name][:, own])
            assert report.equal, f"{name}: {report}"


def one_exponent_in_jax(patch):
    for module in (forward, token_blocks):
        patch.setattr(module, "token_digits", digits_of_one_exponent)


def one_exponent_in_pytorch(patch):
    patch.setattr(exact_arithmetic, "token", token_of_one_exponent)


# The last of this file: a patch makes JAX forget its programs.
@pytest.mark.parametrize(
    ("run", "mutate"),
    ((jax_exact, one_exponent_in_jax), (torch_in_blocks, one_exponent_in_pytorch)),
    ids=("JAX", "PyTorch"),
)
def test_sums_that_know_of_every_token_are_caught(monkeypatch, run, mutate):
    """The later tokens, times 1e7, leave the earlier ones fewer bits: in output and gradient."""
    few = Framework(run, tokens=TORCH.tokens, prefix=20)
    mutate(monkeypatch)
    with pytest.raises(AssertionError, match=r"differ.*'forward'.*'dq'"):
        check_later_tokens(few, few.prefix, multiplied)
