"""Rings with one planted error each, which tests must catch."""

from typing import Any

import jax
import jax.numpy as jnp

from jax_seqpar import Blockwise, Ring, Zigzag
from jax_seqpar.kernels.parts import Part
from jax_seqpar.strategies import hops, ring


def _sinks_in_every_part(patch: Any) -> None:
    right, with_sinks = Blockwise.attend_part, ring.with_sinks
    sinks: list[Any] = []

    def attend_part(self: Any, query: Any, key: Any, value: Any, spec: Any) -> Part:
        return with_sinks(right(self, query, key, value, spec), sinks[-1])

    def part_spec(plan: Any, spec: Any, queries: int) -> Any:
        sinks.append(spec.logits.sinks)
        return right_spec(plan, spec, queries)

    right_spec = ring._part_spec
    patch.setattr(ring, "_part_spec", part_spec)
    patch.setattr(Blockwise, "attend_part", attend_part)


def _residual_of_the_last_part(patch: Any) -> None:
    right = ring.merge
    patch.setattr(ring, "merge", lambda a, b: Part(right(a, b).out, b.residual))


def _sums_that_stay_away(patch: Any) -> None:
    patch.setattr(ring.RingPlan, "send_home", lambda self, x, distance, direction: x)


def _other_half(patch: Any) -> None:
    right = Zigzag.numbers

    def numbers(self: Any, size: int, index: Any, degree: int) -> Any:
        if isinstance(index, int):  # how the arrays are dealt stays right
            return right(self, size, index, degree)
        half = jnp.arange(size // 2, dtype=jnp.int32)
        return jnp.concatenate([x * (size // 2) + half for x in (index, degree + index)])

    patch.setattr(Zigzag, "numbers", numbers)


def _keys_of_the_next(patch: Any) -> None:
    right = ring.RingPlan.tokens
    patch.setattr(ring.RingPlan, "tokens", lambda self, size, far: right(self, size, -far))


def _parts_in_16_bits(patch: Any) -> None:
    right = ring.merge

    def merge(a: Part, b: Part) -> Part:
        merged = right(a, b)
        rounded = jax.lax.reduce_precision(merged.out, 8, 7)  # bfloat16
        return Part(rounded, merged.residual)

    patch.setattr(ring, "merge", merge)


def _other_rounds(change: Any) -> Any:
    """Rounds before and after by `change` of those that the mask needs."""

    def plant(patch: Any) -> None:
        right = hops.hops
        patch.setattr(hops, "hops", lambda *args: change(*right(*args)))

    return plant


def _home_the_wrong_way(patch: Any) -> None:
    right = ring.RingPlan.send_home
    patch.setattr(
        ring.RingPlan, "send_home", lambda self, x, far, direction: right(self, x, far, -direction)
    )


# Of four devices, of which the second on either side is the same, with keys both ways at once.
WRONG_BOTH_WAYS = {
    "a device from both sides": _other_rounds(lambda before, after: (before, after + 1)),
    "without the last round": _other_rounds(lambda before, after: (before - 1, after)),
    "gradients sent home the wrong way": _home_the_wrong_way,
}
WRONG = {
    "sinks in every part": _sinks_in_every_part,
    "residual of the last part": _residual_of_the_last_part,
    "gradients one trip short": _sums_that_stay_away,
    "the other half of a zigzag": _other_half,
    "positions of the next device": _keys_of_the_next,
    "parts in 16 bits": _parts_in_16_bits,
}


class _OtherRing(Ring):
    """A ring whose keys and values go round in another way, forward: JAX traces the rules of its
    derivatives after the call. Its values are right."""

    @staticmethod
    def circulate(plan: Any, legs: Any, kv: Any, visit: Any, meet: Any, part: Any) -> Any: ...

    def __call__(self, *args: Any, **options: Any) -> Any:
        right = ring.RingPlan.circulate
        ring.RingPlan.circulate = type(self).circulate  # pyright: ignore
        try:
            return super().__call__(*args, **options)
        finally:
            ring.RingPlan.circulate = right


class WaitingRing(_OtherRing):
    """A ring that sends keys on when it has attended to them: all transfers are exposed."""

    @staticmethod
    def circulate(plan: Any, legs: Any, kv: Any, visit: Any, meet: Any, part: Any) -> Any:
        (((direction,), _, rounds),) = legs

        def one_round(i: Any, state: Any) -> Any:
            here, carry = jax.lax.optimization_barrier(state)
            here = plan.send(here, direction)
            return here, meet(carry, visit(here, direction * (i + 1)))

        return jax.lax.fori_loop(0, rounds, one_round, (kv, (part, None)))[1]


class LateRing(_OtherRing):
    """A ring whose transfers may end when parts have been merged, as the compiler likes."""

    @staticmethod
    def circulate(plan: Any, legs: Any, kv: Any, visit: Any, meet: Any, part: Any) -> Any:
        (((direction,), _, rounds),) = legs

        def one_round(i: Any, state: Any) -> Any:
            here, carry = state
            following = plan.send(here, direction)
            return following, meet(carry, visit(here, direction * (i + 1)))

        start = plan.send(kv, direction), (part, None)
        here, carry = jax.lax.fori_loop(0, rounds - 1, one_round, start)
        return meet(carry, visit(here, direction * rounds))


class UnrolledRing(_OtherRing):
    """A ring without a loop, of which XLA starts all transfers before the first attention."""

    @staticmethod
    def circulate(plan: Any, legs: Any, kv: Any, visit: Any, meet: Any, part: Any) -> Any:
        (((direction,), _, rounds),) = legs

        carry = part, None
        for distance in range(1, rounds + 1):
            kv = plan.send(kv, direction)
            carry = meet(carry, visit(kv, direction * distance))
        return carry
