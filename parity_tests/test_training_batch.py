"""Batches on a mesh: what lies where, against loops over single tokens."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import KINDS, MESHES
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType

from jax_seqpar import MeshLayout, Striped, Zigzag
from jax_seqpar.training import IGNORE, TokenLayout, micro_batches, pack_documents

rng = np.random.default_rng(3)
DATA_SEQ = jax.make_mesh((2, 4), ("data", "seq"), axis_types=(AxisType.Auto,) * 2)
RAGGED: Any = [[1, 2], [3]]
PLACE = TokenLayout(MeshLayout(batch="data", mesh=DATA_SEQ))
TOKENS = rng.integers(1, 99, (4, 10))
# Of the wrong type by intent.
abstract: Any = DATA_SEQ.abstract_mesh
text: Any = [[1, 2], "text"]
SEGMENTS = np.array(
    [
        [1, 1, 1, 2, 2, 3, 3, 3, 3, 3],
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [5, 4, 4, 4, 0, 0, 0, 0, 0, 0],
        [0, 0, 1, 1, 1, 0, 2, 2, 2, 2],
    ]
)


def by_token(tokens, segments):
    """Labels and positions, one token after another."""
    labels, positions = np.full_like(tokens, IGNORE), np.zeros_like(tokens)
    for b, row in enumerate(segments):
        for s, segment in enumerate(row):
            if s and row[s - 1] == segment:
                positions[b, s] = positions[b, s - 1] + 1
            if segment and s + 1 < len(row) and row[s + 1] == segment:
                labels[b, s] = tokens[b, s + 1]
    return labels, positions


@pytest.mark.parametrize("dtype", ("uint8", "int8", "uint16", "uint32", "uint64", "int64"))
@pytest.mark.parametrize(
    "options",
    ({"segment_ids": SEGMENTS}, {"lengths": np.array([10, 3, 0, 7])}, {}),
    ids=("segments", "lengths", "whole rows"),
)
def test_tokens_of_every_integer_dtype(dtype, options):
    """Tokens may be of every integer dtype; bytes do not hold -100, the label to ignore."""
    tokens = TOKENS.astype(dtype)
    for goal in ({}, {"labels": tokens}, {"targets": tokens}):
        wide = {name: x.astype(np.int32) for name, x in goal.items()}
        expected = PLACE.shard(TOKENS.astype(np.int32), **options, **wide)
        got = PLACE.shard(tokens, **options, **goal)
        assert np.array_equal(got.labels, expected.labels)
        assert np.array_equal(got.tokens, expected.tokens)
        assert got.normaliser == expected.normaliser


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", MESHES, ids=str)
def test_what_lies_where(where, kind):
    place = TokenLayout(where.on(kind))
    tokens, segments = (np.tile(x, (2, 1)) for x in (TOKENS, SEGMENTS))
    batch = place.shard(tokens, segment_ids=segments)
    labels, positions = by_token(tokens, segments)
    S = -(-10 // place.degree) * place.degree
    assert batch.tokens.shape == (8, S)
    assert batch.size == (8, 10)
    for x, expected, padding in (
        (batch.tokens, tokens, 0),
        (batch.labels, labels, IGNORE),
        (batch.segment_ids, segments, 0),
        (batch.positions, positions, None),
    ):
        assert x.dtype == jnp.int32
        assert x.sharding.is_equivalent_to(place.sharding, 2)
        assert np.array_equal(place.unshard(x, batch), expected)
        if padding is not None:
            assert (np.asarray(x)[:, 10:] == padding).all()
    assert int(batch.normaliser) == (labels != IGNORE).sum()


@pytest.mark.parametrize("order", (Zigzag(), Striped()), ids=str)
def test_a_batch_in_another_order(order):
    """Every array in the order of the devices; labels are those of the sequence."""
    place = TokenLayout(replace(PLACE.layout, order=order))
    batch = place.shard(TOKENS, segment_ids=SEGMENTS)
    labels, positions = by_token(TOKENS, SEGMENTS)
    S = 16 if order == Zigzag() else 12
    assert batch.tokens.shape == (4, S)
    # Device 0 of 4: parts 0 and 7 of 8, or every fourth token.
    first = [0, 1, 14, 15] if order == Zigzag() else [0, 4, 8]
    for x, expected in (
        (batch.tokens, TOKENS),
        (batch.labels, labels),
        (batch.segment_ids, SEGMENTS),
        (batch.positions, positions),
    ):
        assert np.array_equal(place.unshard(x, batch), expected)
        padded = np.pad(expected, ((0, 0), (0, S - 10)), constant_values=-1)[:, first]
        mine = np.asarray(x)[:, : S // 4]
        assert np.array_equal(np.where(padded == -1, -1, mine), padded)
    spec = place.sharding.spec

    @partial(jax.shard_map, mesh=place.mesh, in_specs=spec, out_specs=spec)
    def numbers(x):
        return x + place.device_positions(x.shape[1])[None]

    found = numbers(jnp.zeros((4, 16), jnp.int32))
    assert np.array_equal(
        place.unshard(found, place.shard(TOKENS[:, :1].repeat(16, 1)))[0], range(16)
    )


def test_a_row_is_one_document():
    batch = PLACE.shard(TOKENS[:, :8])
    assert batch.segment_ids is None
    ones = np.ones((4, 8), int)
    labels, positions = by_token(TOKENS[:, :8], ones)
    assert np.array_equal(batch.labels, labels)
    assert np.array_equal(batch.positions, positions)
    padded = PLACE.shard(TOKENS)
    assert padded.tokens.shape == (4, 12)
    assert np.array_equal(padded.segment_ids, np.pad(np.ones((4, 10)), ((0, 0), (0, 2))))


def test_lengths_are_padding():
    lengths = np.array([10, 3, 0, 1])
    batch = PLACE.shard(TOKENS, lengths=lengths)
    segments = (np.arange(10) < lengths[:, None]).astype(int)
    labels, _ = by_token(TOKENS, segments)
    assert np.array_equal(PLACE.unshard(batch.segment_ids, batch), segments)
    assert np.array_equal(PLACE.unshard(batch.labels, batch), labels)
    assert int(batch.normaliser) == 9 + 2


def test_a_prompt_is_not_predicted():
    labels = TOKENS.copy()
    labels[:, :4] = IGNORE
    batch = PLACE.shard(TOKENS, labels=labels)
    got = PLACE.unshard(batch.labels, batch)
    assert (got[:, :3] == IGNORE).all()
    assert np.array_equal(got[:, 3:9], TOKENS[:, 4:])


def test_targets_are_taken_as_they_are():
    targets = rng.integers(0, 5, TOKENS.shape)
    batch = PLACE.shard(TOKENS, targets=targets)
    assert np.array_equal(PLACE.unshard(batch.labels, batch), targets)
    padded = PLACE.shard(TOKENS, targets=targets, lengths=np.array([6, 3, 0, 10]))
    assert int(padded.normaliser) == 19
    assert (np.asarray(padded.labels)[1, 3:] == IGNORE).all()


@pytest.mark.parametrize("where", MESHES, ids=str)
def test_positions_of_a_device(where):
    place = TokenLayout(where.on())
    spec = place.sharding.spec
    x = jnp.zeros((8, 16), jnp.int32)

    @partial(jax.shard_map, mesh=place.mesh, in_specs=spec, out_specs=spec)
    def positions(x):
        return x + place.device_positions(x.shape[1])[None]

    assert np.array_equal(positions(x), np.broadcast_to(np.arange(16), (8, 16)))


def test_a_batch_goes_through_jit():
    batch = PLACE.shard(TOKENS, segment_ids=SEGMENTS)
    out = jax.jit(lambda batch: batch.tokens + batch.positions)(batch)
    expected = TOKENS + by_token(TOKENS, SEGMENTS)[1]
    assert np.array_equal(PLACE.unshard(out, batch), expected)
    with pytest.raises(ValueError, match=r"of the batch's .4, 12. tokens"):
        PLACE.unshard(out[:, :8], batch)


@given(st.lists(st.lists(st.integers(0, 9), max_size=9), max_size=9), st.integers(1, 7))
@settings(max_examples=100)
def test_packing_loses_nothing(documents, tokens):
    rows, segments = pack_documents(documents, tokens)
    assert rows.shape == segments.shape
    assert rows.shape[1] == tokens
    stream = [t for document in documents for t in document]
    flat, numbers = rows.reshape(-1), segments.reshape(-1)
    assert np.array_equal(flat[: len(stream)], np.asarray(stream, np.int32))
    assert (numbers[: len(stream)] > 0).all()
    assert len(flat) - len(stream) < tokens
    assert not flat[len(stream) :].any()
    assert not numbers[len(stream) :].any()
    # Documents are counted in each row; one without tokens is in none.
    owner = [i for i, document in enumerate(documents) for _ in document]
    for i in range(len(owner) - 1):
        if (i + 1) % tokens:
            assert numbers[i + 1] - numbers[i] == (owner[i] != owner[i + 1])
        else:
            assert numbers[i + 1] == 1


def shifted(fill):
    x = np.roll(TOKENS, -1, axis=1)
    x[:, -1] = fill
    return x


@pytest.mark.parametrize(
    ("call", "message"),
    (
        (lambda: PLACE.shard(TOKENS, labels=shifted(IGNORE)), "shifted already.*labels=tokens"),
        (lambda: PLACE.shard(TOKENS, labels=shifted(0)), "shifted already"),
        (lambda: PLACE.shard(TOKENS, labels=TOKENS[:, 1:]), "look shifted already"),
        (lambda: PLACE.shard(TOKENS, labels=TOKENS + 1), r"at \[0, 0\] the label is.*targets="),
        (lambda: PLACE.shard(TOKENS, labels=TOKENS, targets=TOKENS), "not both"),
        (lambda: PLACE.shard(TOKENS, targets=TOKENS[:, 1:]), "targets must be integers"),
        (lambda: PLACE.shard(TOKENS[:, :1], labels=TOKENS[:, :1] + 1), r"at \[0, 0\] the label"),
        (lambda: PLACE.shard(TOKENS + 2**32), "tokens must be integers of 32 bits"),
        (lambda: PLACE.shard(TOKENS, segment_ids=SEGMENTS * 2**32), "segment_ids must be integers"),
        (lambda: PLACE.shard(TOKENS[:3]), "B = 3 is not divisible by the 2 devices.*Give 4"),
        (lambda: PLACE.shard(TOKENS[0]), r"write tokens\[None\]"),
        (lambda: PLACE.shard(TOKENS.astype(float)), "tokens must be integers"),
        (lambda: PLACE.shard(TOKENS[:, :0]), "must not be empty"),
        (lambda: PLACE.shard(TOKENS, segment_ids=SEGMENTS[:2]), "segment_ids must be integers"),
        (
            lambda: PLACE.shard(TOKENS, segment_ids=np.where(SEGMENTS == 3, 1, SEGMENTS)),
            "segment 1 of row 0 is not one run",
        ),
        (lambda: PLACE.shard(TOKENS, segment_ids=SEGMENTS, lengths=[1] * 4), "not both"),
        (lambda: PLACE.shard(TOKENS, lengths=[1, 2, 3, 11]), "from 0 to S = 10"),
        (
            lambda: TokenLayout(MeshLayout(batch="dp", mesh=DATA_SEQ)),
            "names axis 'dp'.*does not have",
        ),
        (lambda: TokenLayout(MeshLayout(batch="seq", mesh=DATA_SEQ)), "more than one array axis"),
        (lambda: TokenLayout(MeshLayout(mesh=abstract)), "needs a jax.sharding.Mesh"),
        (lambda: pack_documents(text, 4), "document 1 must be a row of integer"),
        (lambda: pack_documents([[1], [2**32 + 5, 7]], 4), "document 1 must be integers of 32"),
        (lambda: PLACE.shard(TOKENS, segment_ids=SEGMENTS - 1), "not be negative.*segment 0"),
        (
            lambda: pack_documents([[1], np.ma.masked_array([1, 2], [False, True])], 4),
            r"document 1 is a masked array, and its mask would be lost",
        ),
        (lambda: pack_documents([[1], RAGGED], 4), "document 1 is no array: .*one length"),
        (lambda: PLACE.shard(RAGGED), "tokens is no array: .*pack_documents"),
        (lambda: pack_documents([[1, 2]], 0), "tokens must be a positive integer"),
    ),
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_labels_that_repeat_are_not_taken_for_shifted():
    same = np.full((2, 8), 7)
    batch = PLACE.shard(same, labels=same)
    assert (PLACE.unshard(batch.labels, batch)[:, :-1] == 7).all()


def test_what_one_process_has_whole_is_not_gathered(monkeypatch):
    """Arrays that a process has whole are not gathered: other processes' rows would be appended."""
    batch = PLACE.shard(TOKENS)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    whole = jnp.ones((*batch.tokens.shape, 3))
    assert PLACE.unshard(whole, batch).shape == (*TOKENS.shape, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_go_by_the_numbers_of_sequences(kind):
    """Part i has sequences i B / k and on; each has the labels of all in its normaliser."""
    mesh = jax.make_mesh((2, 4), ("data", "seq"), axis_types=(kind,) * 2)
    layout = MeshLayout(batch="data")
    segments = np.where(np.arange(10) < 7, SEGMENTS, 0)
    batch = TokenLayout(layout.on(mesh)).shard(TOKENS, segment_ids=segments)
    with jax.set_mesh(mesh):
        parts = jax.jit(partial(micro_batches, count=2, layout=layout))(batch)
    for name in ("tokens", "labels", "positions", "segment_ids"):
        whole, split = getattr(batch, name), getattr(parts, name)
        assert np.array_equal(split, np.asarray(whole).reshape(2, 2, 12)), name
        assert split.addressable_shards[0].data.shape == (2, 1, 3)
    assert parts.normaliser.tolist() == [int(batch.normaliser)] * 2
    assert parts.size == (2, 10)


def test_parts_that_devices_cannot_share_are_refused():
    batch = PLACE.shard(TOKENS)
    with pytest.raises(ValueError, match=r"B = 4 must be a multiple of 4 .* 2 devices.*divides 2"):
        micro_batches(batch, 4, PLACE.layout)
