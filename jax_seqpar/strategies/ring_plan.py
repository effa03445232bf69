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
from .hops import Leg, legs
from .send import send


@dataclass(frozen=True)
class RingPlan:
    """What does not change from round to round.

    Attributes:
      degree: devices of the ring.
      precision: of matrix products where the attention is called. JAX traces the rules of
        derivatives later, where another may be in force.
      queries, keys: tokens of a device.
      bidirectional: whether keys travel both ways at once.
    """

    kernel: Kernel
    axis_name: AxisName
    degree: int
    order: TokenOrder
    precision: str | None
    queries: int
    keys: int
    bidirectional: bool = False

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

    def legs(self, spec: Spec) -> list[Leg]:
        """The rounds that keys and values make."""
        tokens = self.queries * self.degree, self.keys * self.degree
        return legs(spec.mask, self.order, *tokens, self.degree, self.bidirectional)

    def circulate(
        self,
        legs: list[Leg],
        kv: Any,
        visit: Callable[..., Any],
        meet: Callable[..., Any],
        found: Any,
        nothing_added: Any = None,
    ) -> tuple[Any, dict[int, Any]]:
        """`found, added = meet((found, added), visit(kv, distance))`, of each device's keys.

        In a loop, which holds two of them at a time in each direction and compiles as many
        attentions whatever the degree. (Of an unrolled ring of splash kernels XLA starts all
        transfers first, which makes it an all-gather.) Each round the next keys and values are on
        their way while those that are here are attended to; those of the last round are not sent
        on, where it is known which that is.

        Args:
          kv: a tree of arrays of this device's keys.
          visit: given the distance that they have come, against the direction where negative.
          nothing_added: what is added to keys before they set out; it goes with them.

        Returns:
          What is found, and what was added to the keys that came last, by direction.
        """

        def one_round(on: Any, i: Any, state: Any) -> Any:
            here, found, added = state
            of_these = {d: visit(x, d * (i + 1)) for d, x in here.items()}
            following = {d: self.send(here[d], d) for d in on}
            if not (isinstance(i, int) and i == 0):
                added = {d: self.send(x, d) for d, x in added.items()}
            if on:
                # All has arrived before it meets. Without this barrier libtpu 0.0.42, which knows
                # no duration of a kernel that is not XLA's, started transfers when the attention
                # was done, under the merge alone (v5p:2x2x2, 24 query and 4 KV heads).
                (following, added), of_these = jax.lax.optimization_barrier(
                    ((following, added), of_these)
                )
            for d, x in of_these.items():
                found, added[d] = meet((found, added[d]), x)
            return following, found, added

        ways = dict.fromkeys(d for directions, *_ in legs for d in directions)
        here = {d: self.send(kv, d) for d in ways}
        # The first keys arrive while what is found so far is computed. Without this barrier libtpu
        # 0.0.42, to which a loop of one round is none, sent them on before it, and so received them
        # under no kernel (v5e:2x4, a window of two rounds).
        here, found = jax.lax.optimization_barrier((here, found))
        added = dict.fromkeys(ways, nothing_added)
        for n, (directions, first, last) in enumerate(legs):
            state = {d: here[d] for d in directions}, found, {d: added[d] for d in directions}
            every_round = partial(one_round, directions)
            if not isinstance(last, int):
                state = jax.lax.fori_loop(first, last, every_round, state)
            else:
                if last - first > 1:
                    state = jax.lax.fori_loop(first, last - 1, every_round, state)
                going = {d for directions, *_ in legs[n + 1 :] for d in directions}
                state = one_round([d for d in directions if d in going], last - 1, state)
            here, found, added = here | state[0], state[1], added | state[2]
        return found, added

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

        legs, both = self.legs(spec), partial(together, (meet, join))
        found, added = self.circulate(legs, held, at, both, nothing, nothing_added)
        distances = {d: last for directions, _, last in legs for d in directions}
        came_home = [self.send_home(x, distances[d], d) for d, x in added.items()]
        in_these, own = at(held, 0)
        return together(meet, found, in_these), reduce(partial(together, join), came_home, own)
