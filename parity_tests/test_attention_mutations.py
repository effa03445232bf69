"""The suite sees the bugs it is for: each mutation is caught, by the questions named, and no more.

A question that a mutation passes is as telling as one it fails: full multi-head attention misses
rotated devices, right values miss an all-gather. The code as it is passes every question.
"""

import jax
import jax.numpy as jnp
import pytest
from cases import ONE_AXIS, Case
from questions import (
    QUICK,
    RESHARDS,
    adjoint,
    attend,
    right_communication,
    right_element,
    right_values,
)

from jax_seqpar import attention as front_door
from jax_seqpar.compare import compare_bits
from jax_seqpar.strategies import ulysses
from jax_seqpar.strategies.reshard import heads_to_sequence, sequence_to_heads

pytestmark = pytest.mark.usefixtures("less_optimised")

CASE = Case(batch=2, tokens=24, heads=16, kv_heads=8, head_dim=5)
FEW_KV_HEADS = Case(batch=2, tokens=24, heads=16, kv_heads=2, head_dim=5)
FULL_MULTI_HEAD = Case(batch=2, tokens=24, heads=16, kv_heads=16, head_dim=5, is_causal=False)
WHERE = ONE_AXIS[4]
SHAPE = (2, 12, 20, 7)


def element():
    for name in RESHARDS:
        right_element(name, 4, SHAPE)


def derivative():
    for name in RESHARDS:
        for dtype in ("float32", "bfloat16"):
            adjoint(name, 4, SHAPE, dtype)


def round_trip():
    """The original report's check: through both reshards and back is the identity."""
    query, key, value, _ = map(jnp.asarray, CASE.inputs().values())
    function = attend(CASE, WHERE, kernel=lambda query, key, value, is_causal=False: query)
    assert compare_bits(jax.jit(function)(query, key, value), query).equal


QUESTIONS = {
    "element": element,
    "derivative": derivative,
    "values": lambda: right_values(CASE, WHERE),
    "values, few KV heads": lambda: right_values(FEW_KV_HEADS, WHERE),
    "values, full multi-head": lambda: right_values(FULL_MULTI_HEAD, WHERE),
    # As much is asked of the optimised program elsewhere; collectives do not depend on its loops.
    "communication": lambda: right_communication(CASE, WHERE, compiler_options=QUICK),
    "round trip": round_trip,
}


def rotated(x, axis_name):
    """Each device gets the heads of its neighbour."""
    return sequence_to_heads(jnp.roll(x, x.shape[2] // 4, axis=2), axis_name)


def token_rotated(x, axis_name):
    """The chunks of the sequence in another order than that of the devices."""
    return jnp.roll(sequence_to_heads(x, axis_name), x.shape[1], axis=1)


def token_unrotated(x, axis_name):
    return heads_to_sequence(jnp.roll(x, -x.shape[1] // 4, axis=1), axis_name)


def gathered(x, axis_name):
    """All the tokens to every device, which then takes its heads: right, and P times the bytes."""
    whole = jax.lax.all_gather(x, axis_name, axis=1, tiled=True)
    heads = x.shape[2] // jax.lax.axis_size(axis_name)
    return jax.lax.dynamic_slice_in_dim(whole, jax.lax.axis_index(axis_name) * heads, heads, axis=2)


def batch_outside(x, axis_name):
    """v1's idea in JAX: chunks stacked before the batch, then read as tokens."""
    B, s, N, H = x.shape
    P = jax.lax.axis_size(axis_name)
    chunks = x.reshape(B, s, P, N // P, H).transpose(2, 0, 1, 3, 4)
    received = jax.lax.all_to_all(chunks, axis_name, 0, 0, tiled=True)
    return received.reshape(B, P * s, N // P, H)


def swapped(self, kernel, query, key, value, spec, true=ulysses.Ulysses.__call__, **options):
    return true(self, kernel, query, value, key, spec, **options)


def tiled_heads(x, copies):
    """KV heads repeated as 0 1 0 1 where the groups need 0 0 1 1."""
    return jnp.tile(x, (1, 1, copies, 1))


VALUES = {"values", "values, few KV heads"}
MUTATIONS = {
    "key and value swapped": (
        {"strategies.ulysses.Ulysses.__call__": swapped},
        VALUES | {"values, full multi-head"},
    ),
    "devices rotated on the way in": (
        {"strategies.ulysses.sequence_to_heads": rotated},
        VALUES | {"element", "round trip", "values, full multi-head"},
    ),
    "devices rotated in and out": (
        {
            "strategies.ulysses.sequence_to_heads": rotated,
            "strategies.ulysses.heads_to_sequence": lambda x, a: jnp.roll(
                heads_to_sequence(x, a), -x.shape[2], axis=2
            ),
        },
        # Which device computes a head changes no value: only labels on devices show it.
        {"element"},
    ),
    "tokens rotated in and out": (
        {
            "strategies.ulysses.sequence_to_heads": token_rotated,
            "strategies.ulysses.heads_to_sequence": token_unrotated,
        },
        VALUES | {"element"},
    ),
    "gather in place of all-to-all": (
        {"strategies.ulysses.sequence_to_heads": gathered},
        {"communication"},
    ),
    "batch outside the tokens": (
        {"strategies.ulysses.sequence_to_heads": batch_outside},
        VALUES | {"element", "round trip", "values, full multi-head"},
    ),
    "KV heads tiled, not repeated": (
        {"strategies.heads.repeat_heads": tiled_heads},
        {"values, few KV heads"},
    ),
}


def caught_by():
    """The questions that raise AssertionError."""
    caught = set()
    for name, ask in QUESTIONS.items():
        try:
            ask()
        except AssertionError:
            caught.add(name)
    return caught


def test_the_code_as_it_is_passes_every_question():
    assert caught_by() == set()


@pytest.mark.parametrize(("patches", "expected"), MUTATIONS.values(), ids=MUTATIONS)
def test_each_mutation_is_caught(monkeypatch, patches, expected):
    for name, mutant in patches.items():
        monkeypatch.setattr(f"jax_seqpar.{name}", mutant)
    assert caught_by() == expected


def test_a_causal_mask_that_is_dropped_is_caught(monkeypatch):
    original = front_door.dot_product_attention

    def forgetful(*args, is_causal, **options):
        return original(*args, **options)

    monkeypatch.setattr("jax_seqpar.dot_product_attention", forgetful)
    assert caught_by() == VALUES


@pytest.mark.parametrize("name", RESHARDS)
def test_a_wrong_derivative_is_caught(monkeypatch, name):
    """The derivative of a narrow float's reshard is stated by hand; here it is another's."""

    @jax.custom_jvp
    def mutant(x):
        return reshards[name](x, "seq")

    @mutant.defjvp
    def _(primals, tangents):
        (tangent,) = tangents
        return mutant(*primals), jnp.roll(reshards[name](tangent, "seq"), 1, axis=1)

    reshards = {"sequence_to_heads": sequence_to_heads, "heads_to_sequence": heads_to_sequence}
    monkeypatch.setattr(ulysses, name, lambda x, axis_name: mutant(x))
    assert caught_by() == VALUES | {"derivative", "values, full multi-head"}
