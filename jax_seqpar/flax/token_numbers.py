"""Numbers of the tokens of a sharded array, in their sequence."""

import jax.numpy as jnp
from jaxtyping import Array, Int

from ..mesh import find_mesh
from ..mesh_layout import MeshLayout, axes_size
from ..order import Contiguous


def token_numbers(x: Array, layout: MeshLayout) -> Int[Array, " T"]:
    """`[T]`, the numbers of the tokens of x `[B, T, ...]`, which lie in the order of the layout."""
    T, order = x.shape[1], layout.order
    if order == Contiguous():
        return jnp.arange(T, dtype=jnp.int32)
    degree = axes_size(layout.tokens, find_mesh(layout.mesh, x).shape)
    return jnp.asarray(order.permutation(T, degree), jnp.int32)
