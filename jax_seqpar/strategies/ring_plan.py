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
        self,
        direction: int,
        rounds: Any,
        kv: Any,
        visit: Callable[..., Any],
        meet: Callable[..., Any],
        found: Any,
        added: Any = None,
    ) -> tuple[Any, Any]:
        """`found, added = meet((found, added), visit(kv, distance))`, of each device's keys.

        In a loop, which holds two of them at a time and compiles as many attentions whatever the
        degree. (Of an unrolled ring of splash kernels XLA starts all transfers first, which makes
        it an all-gather.) Each round the next keys and values are on their way while those that are
        here are attended to; those of the last round are not sent on, where it is known which that
        is.

        Args:
          kv: a tree of arrays of this device's keys.
          visit: given the distance that they have come, against the direction where negative.
          added: what was added to the keys before; it goes with them.
        """

        def one_round(i: Any, state: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
            here, found, added = state
            of_these = visit(here, direction * (i + 1))
            arrived = self.send((here, added), direction)
            # All has arrived before it meets. Without this barrier libtpu 0.0.42, which knows no
            # duration of a kernel that is not XLA's, started transfers when the attention was done,
            # under the merge alone (v5p:2x2x2, 24 query and 4 KV heads).
            (following, added), of_these = jax.lax.optimization_barrier((arrived, of_these))
            return following, *meet((found, added), of_these)

        state = self.send(kv, direction), found, added
        if not isinstance(rounds, int):
            return jax.lax.fori_loop(0, rounds, one_round, state)[1:]
        here, found, added = state
        if rounds > 1:
            here, found, added = jax.lax.fori_loop(0, rounds - 1, one_round, state)
            added = self.send(added, direction)
        return meet((found, added), visit(here, direction * rounds))

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

        def at(here: Any, distance: Any) -> tuple[Any, Any]:
            return visit(here, replace(spec, held_keys=self.tokens(self.keys, distance)))

        came_home, found = [], nothing
        for direction, rounds in self.hops(spec):
            both = partial(together, (meet, join))
            found, added = self.circulate(direction, rounds, held, at, both, found, nothing_added)
            came_home.append(self.send_home(added, rounds, direction))
        in_these, own = at(held, 0)
        return together(meet, found, in_these), reduce(partial(together, join), came_home, own)
