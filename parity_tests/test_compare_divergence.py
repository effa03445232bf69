"""first_divergence: planted differences are found where they are; hints only where they hold."""

import math
import subprocess
import sys
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from jax_seqpar.compare import Divergence, compare_bits, divergence_table, first_divergence
from jax_seqpar.compare.numpy_conversion import numpy_to_torch
from jax_seqpar.compare.tensor_comparison import differing

B, S, N, H, V = 2, 12, 6, 4, 10
SHAPES = {
    "embed": (B, S, N * H),
    **{
        f"layers.{i}/{name}": shape
        for i in range(3)
        for name, shape in (
            ("attention/query", (B, S, N, H)),
            ("attention/out", (B, S, N * H)),
            ("mlp", (B, S, N * H)),
        )
    },
    "logits": (B, S, V),
    "tokens": (B, S),
    "loss": (),
}
QUERY = "layers.1/attention/query"
FRAMEWORKS = {"numpy": np.asarray, "jax": jnp.asarray, "torch": numpy_to_torch}


def recorded(dtype: str = "float32", seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    return {name: np.array(rng.standard_normal(shape), kind) for name, shape in SHAPES.items()}


def planted(run, name, change):
    """A copy of the run in which one tensor is changed: in place, or to what is returned."""
    copy = {key: x.copy() for key, x in run.items()}
    changed = change(copy[name])
    if changed is not None:
        copy[name] = np.ascontiguousarray(changed)
    return copy


def planted_at(x, index):
    return np.where(
        np.arange(x.size).reshape(x.shape) == np.ravel_multi_index(index, x.shape), 9, x
    )


def found(a, b, **options) -> Divergence:
    divergence = first_divergence(a, b, **options)
    assert divergence is not None
    return divergence


def add(index, amount=1.0):
    def change(x):
        x[index] += np.asarray(amount, x.dtype)

    return change


def hint_of(change, name=QUERY, **options) -> str:
    a = recorded()
    hints = {
        found(a, planted(a, name, change), rtol=rtol, **options).hint or "" for rtol in (0.0, 1e-6)
    }
    assert len(hints) == 1, "exact changes are the same to any tolerance"
    return hints.pop()


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("dtype", (jnp.float16, jnp.float32))
def test_a_narrow_rtol_does_not_overflow(dtype):
    """`jnp.finfo(dtype).eps` has that dtype, in which the bound would overflow to infinity."""
    largest = 2 * float(jnp.finfo(dtype).max)
    rtol: Any = jnp.finfo(dtype).eps
    a = {"x": np.array([largest, 1.0])}
    for b in ({"x": -a["x"]}, {"x": np.array([np.inf, 1.0])}):
        assert first_divergence(a, b, rtol=rtol) is not None


@pytest.mark.parametrize("rtol", [0.0, 1e-3])
def test_equal_runs_do_not_part(rtol):
    assert first_divergence(recorded(), recorded(), rtol=rtol) is None


@pytest.mark.parametrize("side_b", FRAMEWORKS)
@pytest.mark.parametrize("side_a", FRAMEWORKS)
def test_frameworks_may_differ(side_a, side_b):
    a = recorded("bfloat16")
    b = planted(a, QUERY, add((1, 7, 2, 3)))
    a = {name: FRAMEWORKS[side_a](x) for name, x in a.items()}
    same = {name: FRAMEWORKS[side_b](x) for name, x in recorded("bfloat16").items()}
    assert first_divergence(a, same) is None
    divergence = found(a, {name: FRAMEWORKS[side_b](x) for name, x in b.items()})
    assert (divergence.name, divergence.index) == (QUERY, (1, 7, 2, 3))


@settings(max_examples=60)
@given(st.data())
def test_a_planted_difference_is_found_where_it_is(data):
    a = recorded()
    name = data.draw(st.sampled_from([n for n in SHAPES if n != "loss"]))
    index = tuple(data.draw(st.integers(0, size - 1)) for size in SHAPES[name])
    b = planted(a, name, add(index))
    # What parts later, or in a later tensor, is not the first.
    names = list(SHAPES)
    for later in names[names.index(name) + 1 :]:
        b[later] = b[later] + np.float32(1)
    for rtol in (0.0, 1e-3):
        divergence = found(a, b, rtol=rtol)
        assert (divergence.name, divergence.index) == (name, index)
        assert divergence.layer == name.split("/")[0]
        assert (divergence.batch, divergence.token) == index[:2]
        assert divergence.head == (index[2] if len(index) == 4 else None)
        assert divergence.agreed == ([None, *names][names.index(name)])
        assert divergence.share == 1 / math.prod(SHAPES[name])
        assert divergence.value_a == a[name][index]
        assert divergence.value_b == b[name][index]
        leaf = compare_bits(a[name], b[name]).leaves[0]
        assert (divergence.max_abs, divergence.max_ulp) == (leaf.max_abs, leaf.max_ulp)
        assert divergence.relative == divergence.max_abs / float(np.abs(a[name]).max())


def test_the_first_token_comes_before_the_batch():
    a = recorded()

    def change(x):
        x[0, 7, 0, 0] += 1
        x[1, 3, 5, 3] += 1
        x[1, 3, 4, 3] += 1

    divergence = found(a, planted(a, QUERY, change))
    assert divergence.index == (1, 3, 4, 3)
    assert divergence.meaning == "batch 1, token 3, head 4, channel 3"
    assert (divergence.batches, divergence.tokens) == ("all 2 batches", "tokens 3, 7 (2 of 12)")
    assert divergence.heads == "heads 0, 4-5 (3 of 6)"


@pytest.mark.parametrize(
    ("where", "batches", "tokens", "heads"),
    [
        (np.s_[:], "all 2 batches", "all 12 tokens", "all 6 heads"),
        (np.s_[1, 5:, 1:], "batch 1", "tokens 5-11", "heads 1-5"),
        (np.s_[:, ::2, 3], "all 2 batches", "tokens 0, 2, 4, 6, 8, 10 (6 of 12)", "head 3"),
    ],
)
def test_which_heads_and_tokens_part_is_told(where, batches, tokens, heads):
    a = recorded()
    divergence = found(a, planted(a, QUERY, add(where)))
    assert (divergence.batches, divergence.tokens) == (batches, tokens)
    assert divergence.heads == heads


def test_long_lists_are_cut():
    a = {"x": np.zeros((1, 40))}
    divergence = found(a, {"x": np.arange(40)[None] % 2 * 1.0})
    assert divergence.tokens == "tokens 1, 3, 5, 7, 9, 11, and 14 more (20 of 40)"


def test_it_prints_what_a_porter_needs():
    a = {"embed": np.zeros((2, 8, 4, 2), np.float32), "layers.0/q": np.ones((2, 8, 4, 2))}
    a["layers.0/q"][0, 0, 0, 0] = 4

    def change(x):
        x[1, 5:, 3, 0] += 1
        x[1, 6, 3, 1] = math.nan

    assert str(found(a, planted(a, "layers.0/q", change))).splitlines() == [
        "the runs first differ at layers.0/q [2, 8, 4, 2], in layer layers.0; the last that agrees "
        "is embed",
        "  first at batch 1, token 5, head 3, channel 0: a = 1.0, b = 2.0",
        "  3.12% of the elements differ; head 3; tokens 5-7; batch 1",
        "  by at most 1 absolute, 0.25 of the largest magnitude in a, 4,503,599,627,370,496 ULP",
        "  NaN only in b: 1",
        "  hint: sequences differ from a token of their own to the end, as by padding, or an error "
        "that a causal mask carries on: batch 0 nowhere, batch 1 token 5",
    ]
    text = str(found({"ids": np.arange(6).reshape(2, 3)}, {"ids": np.ones((2, 3), np.int64)}))
    assert "in layer ids; it is the first" in text
    assert "ULP" not in text


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32", "float64"])
def test_without_a_tolerance_bits_count(name):
    a = recorded(name)

    def lowest_bit(x):
        x.view(f"u{x.dtype.itemsize}")[1, 4, 2, 1] ^= 1

    divergence = found(a, planted(a, QUERY, lowest_bit))
    assert (divergence.index, divergence.max_ulp) == ((1, 4, 2, 1), 1)
    zero = {"x": np.zeros((1, 3), a[QUERY].dtype)}
    divergence = found(zero, {"x": -zero["x"]})
    assert (divergence.report.signed_zero, divergence.max_abs, divergence.relative) == (3, 0, 0)
    assert "-0 against +0: 3" in str(divergence)
    assert first_divergence(zero, {"x": -zero["x"]}, rtol=1e-9) is None


def test_the_tolerance_is_of_the_largest_magnitude():
    """An element on the bound agrees, one float above it diverges; exact in powers of two."""
    a = {"x": np.array([[0.0, -8.0, 1.0]])}
    at = {"x": np.array([[0.25, -8.0, 0.75]])}
    assert first_divergence(a, at, rtol=2.0**-5) is None
    above = {"x": np.array([[0.25, -8.0, np.nextafter(1.25, 2)]])}
    divergence = found(a, above, rtol=2.0**-5)
    assert (divergence.index, divergence.share) == ((0, 2), 1 / 3)
    assert found(a, at, rtol=2.0**-6).index == (0, 0)


def test_infinities_do_not_stretch_the_tolerance():
    a = {"x": np.array([[math.inf, 2.0, 1.0]])}
    assert found(a, {"x": np.array([[math.inf, 2.0, 1.5]])}, rtol=0.1).index == (0, 2)
    assert first_divergence(a, {"x": np.array([[math.inf, 2.0, 1.1]])}, rtol=0.1) is None
    for value in (-math.inf, 1.0, math.nan):
        divergence = found(a, {"x": np.array([[value, 2.0, 1.0]])}, rtol=0.1)
        assert divergence.index == (0, 0)
        assert divergence.max_abs == 0


def test_nan_on_one_side_parts():
    a = {"x": np.array([[math.nan, 1.0, 1.0]])}
    assert first_divergence(a, a) is None
    assert first_divergence(a, {"x": np.array([[-math.nan, 1, 1]])}, rtol=1e-3) is None
    payload = found(a, {"x": np.array([[-math.nan, 1.0, 1.0]])})
    assert payload.report.nan_payload == 1
    for rtol in (0.0, 1e-3):
        assert found(a, {"x": np.array([[0.0, 1, 1]])}, rtol=rtol).report.nan_only_a == 1
        divergence = found(a, {"x": np.array([[math.nan, 1, math.nan]])}, rtol=rtol)
        assert (divergence.index, divergence.report.nan_only_b) == ((0, 2), 1)


def test_relative_to_nothing_is_infinite():
    assert found({"x": np.zeros((1, 2))}, {"x": np.ones((1, 2))}, rtol=0.5).relative == math.inf


def test_other_dtypes_are_compared_as_float64():
    a = recorded()
    b = {name: jnp.asarray(x).astype(jnp.bfloat16) for name, x in a.items()}
    assert first_divergence(a, b, rtol=2.0**-8) is None
    divergence = found(a, b, rtol=1e-4)
    assert divergence.max_ulp is None
    expected = np.abs(a["embed"] - np.asarray(b["embed"], np.float32)).max()
    assert divergence.max_abs == expected
    with pytest.raises(ValueError, match=r"Dtypes differ: embed a float32, b bfloat16, .*rtol=1e"):
        first_divergence(a, b)
    mixed = {"x": np.ones((1, 2), np.complex64)}
    assert found(mixed, {"x": np.array([[1.0, 3.0]])}, rtol=1e-3).max_abs == 2


def test_integers_bools_complex_and_byte_orders():
    for x, y in (
        (np.arange(6), np.array([0, 1, 2, 3, 9, 5])),
        (np.zeros(6, bool), np.arange(6) == 4),
        (np.zeros(6, np.uint8), (np.arange(6) == 4).astype(np.uint8)),
        (np.zeros(6, np.complex64), (1j * (np.arange(6) == 4)).astype(np.complex64)),
    ):
        for rtol in (0.0, 1e-6):
            divergence = found({"x": x.reshape(2, 3)}, {"x": y.reshape(2, 3)}, rtol=rtol)
            assert divergence.index == (1, 1)
            assert divergence.max_ulp is None or x.dtype.kind == "c"
    native = np.arange(6.0).reshape(2, 3)
    assert first_divergence({"x": native}, {"x": native.astype(">f8")}) is None
    assert found({"x": native}, {"x": planted_at(native, (1, 0)).astype(">f8")}).share == 1 / 6


@pytest.mark.parametrize(
    ("x", "y", "parts"),
    [
        (np.array([2**53, 5]), np.array([2**53 + 1, 5]), True),
        (np.array([2**64 - 1, 5], np.uint64), np.array([2**64 - 2, 5], np.uint64), True),
        (np.array([2**63, 5], np.uint64), np.array([2**63 - 1, 5], np.int64), True),
        (np.array([-(2**63), 5]), np.array([2**64 - 1, 5], np.uint64), True),
        (np.array([2**63 - 1, 5], np.uint64), np.array([2**63 - 1, 5], np.int64), False),
        (np.array([complex(1, math.inf), 2]), np.array([complex(3, math.inf), 2]), True),
        (np.array([complex(1, math.inf), 2]), np.array([complex(1, -math.inf), 2]), True),
        (np.array([complex(1, math.nan), 2]), np.array([complex(3, math.nan), 2]), True),
        (np.array([complex(1, math.nan), 2]), np.array([complex(1, math.nan), 2.0]), False),
    ],
)
def test_numbers_that_float64_does_not_tell_apart(x, y, parts):
    found = first_divergence({"x": x[None]}, {"x": y[None]}, rtol=1e-30)
    assert (found is not None) == parts
    assert found is None or found.index == (0, 0)


def test_a_tolerance_that_overflows_lets_no_infinity_agree():
    x = np.array([[1e308, 1.0, 2.0]])
    for value in (math.inf, -math.inf, math.nan):
        assert found({"x": x}, {"x": np.array([[1e308, 1.0, value]])}, rtol=1e10).index == (0, 2)


def test_views_and_gradients_do_not_matter():
    x = torch.arange(48.0).reshape(2, 3, 8)
    view = x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    assert first_divergence({"x": x}, {"x": view}) is None


def test_other_numbers_of_axes():
    for shape, meaning in (
        ((), "its one element"),
        ((4,), "axis 0 3"),
        ((1, 2, 1, 1, 4), "axis 0 0, axis 1 1, axis 2 0, axis 3 0, axis 4 3"),
    ):
        x = np.zeros(shape)
        y = x.copy()
        y[(-1,) * x.ndim] = 1
        divergence = found({"x": x}, {"x": y})
        assert divergence.meaning == meaning
        assert (divergence.token, divergence.tokens, divergence.head, divergence.hint) == (
            None,
        ) * 4
    assert found({"loss": 1.0}, {"loss": 2.0}).value_b == 2
    assert first_divergence({"x": np.zeros((0, 3))}, {"x": np.zeros((0, 3))}) is None


def test_axes_in_another_order():
    a = recorded()
    change = add((1, 7, 2, 3))
    b = planted(a, QUERY, change)

    def swapped(run):
        return {name: x if x.ndim < 2 else x.swapaxes(0, 1) for name, x in run.items()}

    axes = ("token", "batch", "head", "channel")
    divergence = found(swapped(a), swapped(b), axes=axes)
    assert divergence.index == (7, 1, 2, 3)
    assert (divergence.batch, divergence.token, divergence.head) == (1, 7, 2)
    assert divergence.meaning == "token 7, batch 1, head 2, channel 3"
    permuted = planted(a, QUERY, lambda x: x[:, :, ::-1])
    assert found(swapped(a), swapped(permuted), axes=axes).hint == "b has the heads of a in reverse"
    permuted = planted(a, QUERY, lambda x: x[:, ::-1])
    hint = "b has the tokens of a in reverse"
    assert found(swapped(a), swapped(permuted), axes=axes).hint == hint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rtol": -1.0}, r"rtol must be 0 \(bits\) or a positive number, got -1"),
        ({"rtol": math.nan}, "rtol must be 0"),
        ({"rtol": "1"}, r"rtol must be 0 .*got '1'"),
        ({"rtol": math.inf}, "rtol must be 0"),
        ({"axes": ("batch", "token", "channel")}, r"axes must be \('batch', 'token', 'head'"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_options_that_make_no_sense(options, message):
    for compare in (first_divergence, divergence_table):
        with pytest.raises(ValueError, match=message):
            compare(recorded(), recorded(), **options)


def test_names_that_differ():
    a, b = recorded(), recorded()
    del a["embed"], b[QUERY], b["loss"]
    with pytest.raises(ValueError, match="Only a has") as caught:
        first_divergence(a, b)
    message = str(caught.value)
    assert f"Only a has 2 of the names: {QUERY}, loss. Record them in both runs" in message
    assert "Only b has 1 of the names: embed." in message
    many = {f"x.{i}": 0.0 for i in range(13)}
    with pytest.raises(ValueError, match=r"13 of the names: x\.0, .*x\.9, and 3 more\."):
        first_divergence(a | many, a)
    with pytest.raises(ValueError, match="Nothing is recorded"):
        first_divergence({}, {})


def test_names_in_another_order():
    a = recorded()
    b = dict(reversed(recorded().items()))
    message = r"where a has embed, b has loss\..*\{name: b\[name\] for name in a\}"
    with pytest.raises(ValueError, match=message):
        first_divergence(a, b)
    assert first_divergence(a, {name: b[name] for name in a}) is None


def test_shapes_that_differ():
    a, b = recorded(), recorded()
    b[QUERY] = b[QUERY].swapaxes(1, 2)
    b["loss"] = b["loss"][None]
    message = r"query a \(2, 12, 6, 4\), b \(2, 6, 12, 4\), loss a \(\), b \(1,\)\. Reshape or"
    for rtol in (0.0, 1e-3):
        with pytest.raises(ValueError, match=message):
            first_divergence(a, b, rtol=rtol)


@pytest.mark.parametrize("compare", [first_divergence, divergence_table])
@pytest.mark.usefixtures("unchecked_shapes")
def test_only_arrays_of_numbers(compare):
    a = {"x": np.ones(2)}
    for x, message in {
        "text": r"\['x'\] must be an array of numbers",
        (1.0,): r"b\['x'\] must be an array, got tuple\. Record each array",
        None: r"b\['x'\] must be an array, got NoneType",
    }.items():
        with pytest.raises(TypeError, match=message):
            compare({"x": x} if x == "text" else a, {"x": x})
    with pytest.raises(TypeError, match="b must be a mapping of names to arrays, got ndarray"):
        compare(a, np.ones(2))


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        (np.negative, "b is -a"),
        (lambda x: x[:, :, ::-1], "b has the heads of a in reverse"),
        (
            lambda x: x[:, :, [0, 2, 1, 3, 4, 5]],
            "b has the heads of a in the order 0, 2, 1, 3, 4, 5",
        ),
        (lambda x: np.roll(x, 1, 2), "b has the heads of a shifted by 1, around the end"),
        (lambda x: x[:, ::-1], "b has the tokens of a in reverse"),
        (lambda x: np.roll(x, -2, 1), "b has the tokens of a shifted by -2, around the end"),
        (
            # Eight tokens in order to two devices, then dealt out in turn.
            lambda x: x[:, [0, 6, 1, 7, 2, 8, 3, 9, 4, 10, 5, 11]],
            "b has the tokens of a in the order 0, 6, 1, 7, 2, 8, 3, 9, 4, 10, 5, 11",
        ),
        (
            lambda x: x.swapaxes(2, 3).reshape(x.shape),
            "b is a with [B, S, H, N] in memory, reshaped to [B, S, N, H] where a transpose",
        ),
        (
            lambda x: x.reshape(B, S, H, N).swapaxes(2, 3),
            "b is a reshaped to [B, S, H, N] and transposed",
        ),
        (
            lambda x: x.swapaxes(1, 2).reshape(x.shape),
            "b is a with [B, N, S, H] in memory, reshaped to [B, S, N, H] where a transpose",
        ),
        (
            lambda x: x.reshape(B, N, S, H).swapaxes(1, 2),
            "b is a reshaped to [B, N, S, H] and transposed",
        ),
        (
            lambda x: np.stack([x[..., :2], x[..., 2:]], -1).reshape(x.shape),
            "b interleaves the halves of a's channels: channels i and i + 2 side by side",
        ),
    ],
)
def test_hints_of_heads(change, hint):
    assert hint_of(change).startswith(hint)


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        (
            lambda x: np.stack([x[..., :12], x[..., 12:]], -1).reshape(x.shape),
            "b interleaves the halves of a's channels: channels i and i + 12 side by side",
        ),
        (
            lambda x: np.concatenate([x[..., ::2], x[..., 1::2]], -1),
            "b has a's even channels first, then the odd ones: pairs pulled 12 apart",
        ),
        (
            lambda x: x.reshape(B, S, N, H).swapaxes(2, 3).reshape(x.shape),
            "b has a's channels (n h) as (h n), n = 6, h = 4",
        ),
        (lambda x: x[:, ::-1], "b has the tokens of a in reverse"),
        (np.negative, "b is -a"),
    ],
)
def test_hints_of_hidden_states(change, hint):
    assert hint_of(change, "layers.2/mlp") == hint


@pytest.mark.parametrize("name", ["tokens", "logits", QUERY])
def test_hints_of_padding(name):
    def right(x):
        x[0, 9:] += 1
        x[1, 4:] += 1

    def left(x):
        x[1, :3] += 1

    assert hint_of(right, name).endswith("mask carries on: batch 0 token 9, batch 1 token 4")
    assert hint_of(left, name) == (
        "sequences differ up to a token of their own, as by padding on the left: batch 0 nowhere, "
        "batch 1 token 2"
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x + 1,
        lambda x: x * np.float32(1.5),
        add((1, 5, 3, 2)),
        add(np.s_[:, 5:]),
        # Almost: one element of a permutation is not as it should be.
        lambda x: np.where(np.arange(x.size).reshape(x.shape) == 7, 0, x[:, :, ::-1]),
        lambda x: np.where(np.arange(x.size).reshape(x.shape) == 7, 0, -x),
        # A head twice is no permutation.
        lambda x: x[:, :, [0, 0, 2, 3, 4, 5]],
        # Other permutations in the two sequences.
        lambda x: np.stack([x[0, :, ::-1], x[1]]),
        # Of one sequence of two.
        lambda x: np.stack([-x[0], x[1]]),
    ],
)
def test_no_hint_that_does_not_hold(change):
    assert hint_of(change) == ""


def test_hints_within_a_tolerance():
    """Hints for permuted and rounded tensors need a tolerance, and a large enough one."""
    a = recorded()
    b = planted(a, QUERY, lambda x: (x[:, :, ::-1] * (1 + 1e-5 * np.cos(x))).astype(np.float32))
    assert found(a, b).hint is None
    assert found(a, b, rtol=1e-4).hint == "b has the heads of a in reverse"
    assert found(a, b, rtol=1e-7).hint is None


def test_equal_tokens_stay_where_they_are():
    """Equal tokens, as of padding, keep their places in the order that the hint reports."""
    a = {"x": np.arange(10.0).repeat(3).reshape(1, 10, 3)}
    a["x"][0, 6:] = 0
    b = planted(a, "x", lambda x: x[:, [0, 2, 1, 3, 4, 5, 6, 7, 8, 9]])
    expected = "b has the tokens of a in the order 0, 2, 1, 3, 4, 5, 6, 7, 8, 9"
    assert found(a, b).hint == expected
    a = {"x": np.array([[1.0, 2.0, 1.0, 3.0]])}
    b = planted(a, "x", lambda x: x[:, [3, 1, 2, 0]])
    assert found(a, b).hint == "b has the tokens of a in the order 3, 1, 2, 0"
    wide = {"x": np.arange(40.0)[None]}
    order = [1, 0, *range(2, 40)]
    assert found(wide, {"x": wide["x"][:, order]}).hint == (
        f"b has the tokens of a in the order {', '.join(map(str, order[:16]))}, ..."
    )


def test_arrays_with_nan_are_hinted_at_by_bits_only():
    a = planted(recorded(), QUERY, lambda x: x.__setitem__((0, 0, 0, 0), math.nan))
    b = planted(a, QUERY, np.negative)
    assert found(a, b).hint == "b is -a"
    b = planted(a, QUERY, lambda x: x[:, :, ::-1])
    assert found(a, b).name == QUERY


def rows_of(table):
    return list(zip(*(column.cells for column in table.columns), strict=True))


def test_the_table_shows_how_an_error_grows():
    a = {f"layers.{i}/out[0]": np.full((1, 4, 2), 2.0, np.float32) for i in range(4)}
    b = {name: x.copy() for name, x in a.items()}
    for i in (1, 2, 3):
        b[f"layers.{i}/out[0]"][0, 4 - i :] += 10.0**-i * 100
    table = divergence_table(a, b, rtol=1.0)
    rows = rows_of(table)
    assert [row[1:5] for row in rows] == [
        ("1x4x2", "0%", "0", "0"),
        ("1x4x2", "25%", "10", "5"),
        ("1x4x2", "0%", "1", "0.5"),
        ("1x4x2", "0%", "0.1", "0.05"),
    ]
    assert [row[6] for row in rows] == ["-", "3", "-", "-"]
    assert [row.style for row in table.rows] == [None, "bold red", None, None]
    assert rows[0][5] == "0"
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table)
    assert "layers.3/out[0]" in capture.get()
    assert "rtol = 1" in capture.get()


def test_the_table_takes_all_that_is_compared():
    a = recorded()
    b = {name: jnp.asarray(x).astype(jnp.bfloat16) for name, x in a.items()}
    rows = rows_of(divergence_table(a, b, rtol=1e-9))
    assert [row[0] for row in rows] == list(SHAPES)
    assert {row[5] for row in rows} == {"-"}
    assert rows[-1][1] == "scalar"
    assert rows_of(divergence_table(a, recorded()))[0][2:] == ("0%", "0", "0", "0", "-")


def test_parts_agrees_with_a_loop():
    """Element by element, from the words of the docstring."""
    special = np.array([0, -0.0, 1, 1.25, 1.5, -1, math.inf, -math.inf, math.nan])
    x, y = (z.reshape(9, 9) for z in np.meshgrid(special, special))
    for bound in (None, 0.25):
        expected = [
            (p.tobytes() != q.tobytes())
            if bound is None
            else math.isnan(p) != math.isnan(q)
            or (not (math.isnan(p) or p == q) and bool(abs(p - q) > bound))
            for p, q in zip(x.flat, y.flat, strict=True)
        ]
        assert differing(x, y, bound).ravel().tolist() == expected


@pytest.mark.parametrize(("package", "fails"), [("rich", True), ("torch", False)])
def test_what_it_needs(package, fails):
    code = (
        f"import sys; sys.modules['{package}'] = None\n"
        "import numpy as np\n"
        "from jax_seqpar.compare import divergence_table, first_divergence\n"
        "a, b = {'x': np.ones((1, 2))}, {'x': np.zeros((1, 2))}\n"
        "assert first_divergence(a, b).token == 0\n"
        "divergence_table(a, b)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (run.returncode != 0) == fails
    assert ('rich is needed here: pip install "jax-seqpar[parity]"' in run.stderr) == fails
