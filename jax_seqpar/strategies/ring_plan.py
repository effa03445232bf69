"""RingPlan: how keys and values go round the devices, and what is added to them comes home."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp

from ..kernels import Kernel
from ..kernels.kernel import together
from ..mask import AnyTokens, Spec
from ..mesh_layout import AxisName
from ..order import TokenOrder
from .hops import hops
from .send import send


@dataclass(frozen=True)
class RingPlan:
    """What does not change from round to round.

    Attributes:
      degree: devices of the ring.
      precision: of matrix products where the attention is called. JAX traces the rules of
        derivatives later, where another may be in force.
      queries, keys: tokens of a device.
    """

    kernel: Kernel
    axis_name: AxisName
    degree: int
    order: TokenOrder
    precision: str | None
    queries: int
    keys: int

    def tokens(self, size: int, distance: Any) -> AnyTokens:
        """Those of the device that is so many places before this one."""
        # With 64 bits on, loops count in int64.
        distance = jnp.asarray(distance, jnp.int32)
        index = (jax.lax.axis_index(self.axis_name) - distance) % self.degree
        return self.order.tokens(size, index, self.degree)

    def send(self, tree: Any, distance: int) -> Any:
        """Sends the arrays of a tree so many places on."""
        return jax.tree.map(lambda x: send(x, distance, self.axis_name), tree)

    def send_home(self, tree: Any, distance: Any, direction: int) -> Any:
        """Sends arrays back to where they set out, `distance` places away."""
        if isinstance(distance, int):
            return self.send(tree, -direction * distance)
        return jax.lax.fori_loop(0, distance, lambda _, x: self.send(x, -direction), tree)

    def hops(self, spec: Spec) -> list[tuple[int, Any]]:
        """Direction and number of rounds of each trip that keys and values make."""
        P = self.degree
        before, after = hops(spec.mask, self.order, self.queries * P, self.keys * P, P)
        return [
            (d, n) for d, n in ((1, before), (-1, after)) if not (isinstance(n, int) and n == 0)
        ]

    def circulate(
        self, direction: int, rounds: Any, kv: Any, visit: Callable[..., Any], carry: Any
    ) -> Any:
        """`carry = visit(kv, distance, carry)` with the keys and values of each device in turn.

        In a loop, which holds two of them at a time and compiles as many attentions whatever the
        degree. (Of an unrolled ring of splash kernels XLA starts all transfers first, which makes
        it an all-gather.) Each round the next keys and values are on their way while those that are
        here are attended to; those of the last round are not sent on, where it is known which that
        is.

        Args:
          kv: a tree of arrays of this device's keys.
          visit: given the distance that they have come, against the direction where negative.
        """

        def one_round(i: Any, state: tuple[Any, Any]) -> tuple[Any, Any]:
            here, carry = state
            following = self.send(here, direction)
            return following, visit(here, direction * (i + 1), carry)

        state = (self.send(kv, direction), carry)
        if not isinstance(rounds, int):
            return jax.lax.fori_loop(0, rounds, one_round, state)[1]
        if rounds > 1:
            state = jax.lax.fori_loop(0, rounds - 1, one_round, state)
        here, carry = state
        return visit(here, direction * rounds, carry)

    def turn(
        self,
        visit: Callable[..., tuple[Any, Any]],
        held: Any,
        spec: Spec,
        nothing: Any,
        meet: Any,
        nothing_added: Any = None,
        join: Callable[[Any, Any], Any] = jnp.add,
    ) -> tuple[Any, Any]:
        """What the queries of this device make of all keys, and all queries of its keys.

        See `jax_seqpar.kernels.kernel.Turns`. Its own keys last: what belongs to them comes home
        from the others meanwhile.
        """

        def at(here: Any, distance: Any, found: Any) -> tuple[Any, Any]:
            part = replace(spec, held_keys=self.tokens(self.keys, distance))
            in_these, added = visit(here, part)
            return together(meet, found, in_these), added

        def one_way(direction: int, rounds: Any, found: Any) -> tuple[Any, Any]:
            """What the devices on one side add to this device's keys, and what is found there."""

            def one(here: Any, distance: Any, state: tuple[Any, Any]) -> tuple[Any, Any]:
                # What was added so far follows its keys while this device's part is computed.
                added, found = state
                if not (isinstance(rounds, int) and rounds == 1):
                    added = self.send(added, direction)
                found, own = at(here, distance, found)
                return together(join, added, own), found

            start = nothing_added, found
            added, found = self.circulate(direction, rounds, held, one, start)
            return self.send_home(added, rounds, direction), found

        came_home, found = [], nothing
        for direction, rounds in self.hops(spec):
            added, found = one_way(direction, rounds, found)
            came_home.append(added)
        found, own = at(held, 0, found)
        return found, reduce(partial(together, join), came_home, own)
