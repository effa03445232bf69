"""A mask is a value: it prints, joins with another, says which blocks exist, and draws itself."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_seqpar import Dropout, Logits, Mask, dense_attention
from jax_seqpar.mask import Tokens
from jax_seqpar.mask.picture import blocks, draw

RNG = np.random.default_rng(0)
T = S = 12


def pairs(mask: Mask) -> np.ndarray:
    allowed = mask.attends(Tokens(0, T), Tokens(0, S))
    return np.broadcast_to(True if allowed is None else allowed, (2, 1, T, S))


PARTS = {
    "causal": Mask(is_causal=True),
    "offset": Mask(is_causal=True, query_offset=3),
    "window": Mask(local_window_size=(4, 2)),
    "a side of a window": Mask(local_window_size=(None, 1)),
    "array": Mask(array=jnp.asarray(RNG.random((2, 1, T, S)) < 0.8)),
    "another array": Mask(array=jnp.asarray(RNG.random((1, 1, 1, S)) < 0.8)),
    "lengths": Mask(key_value_seq_lengths=jnp.array([9, 12])),
    "other lengths": Mask(
        key_value_seq_lengths=jnp.array([11, 5]), query_seq_lengths=jnp.array([12, 7])
    ),
    "segments": Mask(segment_ids=jnp.asarray(np.sort(RNG.integers(0, 3, (2, T)), 1))),
}
LARGE = ("offset",)


@pytest.mark.parametrize("b", [name for name in PARTS if name not in LARGE])
@pytest.mark.parametrize("a", [name for name in PARTS if name not in LARGE])
def test_both(a, b):
    """The conjunction, element by element; the offset of one counts for the window of the other."""
    one, other = PARTS[a], PARTS[b]
    if a == b == "segments":
        return
    assert np.array_equal(pairs(one & other), pairs(one) & pairs(other))


@pytest.mark.parametrize("unbounded", (np.iinfo(np.int64).max, 2**40, 2**32 - 1))
@pytest.mark.parametrize("dtype", (np.int64, np.uint64))
def test_lengths_that_32_bits_do_not_hold(unbounded, dtype):
    """Lengths beyond 32 bits exceed every sequence; jnp.minimum alone would cut their bits."""
    for name in ("query_seq_lengths", "key_value_seq_lengths"):
        lengths: Any = [np.full(2, n, dtype) for n in (unbounded, 5)]
        whole, part = (Mask(**{name: x}) for x in lengths)
        for both in (whole & part, part & whole):
            assert getattr(both, name).tolist() == [5, 5]


def test_what_an_attention_has_once():
    segments = PARTS["segments"]
    assert pairs(segments & segments).sum() == pairs(segments).sum(), "the same arrays"
    ids, offset = jnp.ones((2, T), jnp.int32), int("1000")  # of small integers there is one each
    assert (Mask(segment_ids=ids) & Mask(segment_ids=ids)).segment_ids[0] is ids
    assert (Mask(query_offset=offset) & Mask(query_offset=int("1000"))).query_offset == 1000
    moved = Mask(segment_ids=jnp.zeros((2, T), jnp.int32))
    for name, one, other in (
        ("segment_ids", segments, moved),
        ("query_offset", Mask(query_offset=1), Mask(query_offset=2)),
        ("query_offset", Mask(is_causal=True), Mask(local_window_size=(9, 0), query_offset=4)),
        ("positions", Mask(is_causal=True), Mask(local_window_size=1, positions=ids)),
    ):
        with pytest.raises(ValueError, match=f"have two {name}. Write one Mask"):
            _ = one & other
    with pytest.raises(TypeError, match="unsupported operand"):
        _ = segments & True  # pyright: ignore
    late = Mask(is_causal=True, query_offset=4) & segments
    assert np.array_equal(
        pairs(late), pairs(Mask(is_causal=True, query_offset=4)) & pairs(segments)
    )


ARRAYS_OF_NO_ATTENTION = {
    "added to the logits": (
        lambda: Mask(array=jnp.zeros((1, 1, T, S))),
        r"not boolean; write array == 0 if 0 attends .*bias=array",
    ),
    "of two axes": (lambda: Mask(array=jnp.ones((T, S), bool)), r"bool\[12, 12\]\) has an array"),
    "lengths of floats": (
        lambda: Mask(key_value_seq_lengths=jnp.array([2.9])),
        r"not integers \[B\]",
    ),
}


@pytest.mark.parametrize(
    ("make", "message"), ARRAYS_OF_NO_ATTENTION.values(), ids=ARRAYS_OF_NO_ATTENTION
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_arrays_that_no_attention_takes(make, message):
    """Arrays of numbers raise when joined or drawn: as booleans every number but 0 is True."""
    wrong = make()
    right = Mask(array=jnp.ones((1, 1, T, S), bool), key_value_seq_lengths=jnp.array([5]))
    for ask in (lambda: wrong & right, lambda: right & wrong, lambda: draw(wrong, T, S)):
        with pytest.raises(ValueError, match=message):
            ask()


def test_a_sequence_that_is_not_there_is_not_drawn():
    mask = Mask(array=jnp.ones((2, 3, 4, 4), bool))
    for options, message in (({"batch": 7}, "batch = 7 of .*0 to 1"), ({"head": -1}, "head = -1")):
        with pytest.raises(ValueError, match=message):
            draw(mask, 4, 4, **options)
    assert draw(mask, 4, 4, batch=1, head=2) == draw(Mask(), 4, 4)


def test_it_is_one_value_for_all_layers():
    """One mask passes through `jax.jit` as an argument of two layers, with gradients."""
    q = jnp.asarray(RNG.standard_normal((2, T, 2, 4)), jnp.float32)
    mask = PARTS["causal"] & PARTS["segments"]

    @jax.jit
    def two_layers(q, mask):
        return dense_attention(dense_attention(q, q, q, mask=mask), q, q, mask=mask)

    assert two_layers(q, mask).shape == q.shape
    assert jax.grad(lambda q: two_layers(q, mask).sum())(q).shape == q.shape


def test_it_prints_what_is_given():
    assert str(Mask()) == "Mask()"
    mask = PARTS["causal"] & PARTS["segments"] & PARTS["a side of a window"]
    assert str(mask).startswith("Mask(is_causal=True, local_window_size=(")
    assert str(mask).endswith("segment_ids=(int32[2, 12], int32[2, 12]))")
    assert str(Logits(0.5, sinks=jnp.zeros(3))) == "Logits(scale=0.5, sinks=float32[3])"
    assert str(Dropout(0.1, np.zeros(2, np.uint32))) == "Dropout(rate=0.1, rng=uint32[2])"


def test_the_blocks_that_exist():
    assert blocks(Mask(), 8, 12, size=4).tolist() == [[True] * 3] * 2
    causal = blocks(Mask(is_causal=True), 12, 12, size=4)
    assert causal.tolist() == np.tril(np.ones((3, 3), bool)).tolist()
    band = blocks(Mask(local_window_size=(3, 0)), 16, 16, size=4)
    assert band.tolist() == (np.tril(np.ones((4, 4))) - np.tril(np.ones((4, 4)), -2)).tolist()
    padded = blocks(Mask(key_value_seq_lengths=jnp.array([3, 5])), 8, 12, size=4)
    assert padded.tolist() == [[True, True, False]] * 2
    assert blocks(Mask(is_causal=True, query_offset=-99), 4, 4, size=4).tolist() == [[False]]


@pytest.mark.parametrize("name", PARTS)
def test_no_pair_is_in_a_block_that_does_not_exist(name):
    found = blocks(PARTS[name], T, S, size=4)
    met = pairs(PARTS[name]).reshape(2, 3, 4, 3, 4).any((0, 2, 4))
    assert not (met & ~found).any()


def test_the_picture():
    causal = draw(Mask(is_causal=True), 8, 4, columns=4)
    assert causal.splitlines() == ["█▒··", "███▒", "████", "████"]
    band = draw(Mask(is_causal=True, local_window_size=(2, 0)), 1024, 1024, columns=8)
    assert band.splitlines() == ["▒▒······", "·▒▒▒····", "···▒▒▒··", "·····▒▒▒"]
    assert draw(Mask(), 2, 3) == "███"
    documents = Mask(segment_ids=jnp.array([[0, 0, 0, 0, 1, 1, 1, 1]]))
    assert draw(documents, 8, 8, columns=4).splitlines() == ["██··", "··██"]


def test_the_example_of_the_docstring():
    """The picture there is the one that is drawn."""
    _, _, example = (Mask.__doc__ or "").partition(">>> ")
    code, *picture = [line.strip() for line in example.strip().splitlines()]
    drawn = eval(code.removeprefix("print(").removesuffix(")"), {"draw": draw, "Mask": Mask})
    assert drawn.splitlines() == picture
