"""A function of single tokens, applied to a few of them at a time."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Shaped

from .._checks import Shape, check_count
from ..mesh import find_mesh, set_explicit_sharding
from ..mesh_layout import MeshLayout, axes_size, check_mesh, names


def map_tiles(
    fn: Callable[..., Any],
    params: Any,
    *arrays: Shaped[Array, "B S ..."],
    tiles: int,
    layout: MeshLayout = MeshLayout(),
) -> Any:
    """`fn(params, *arrays)`, tile after tile of each device's tokens.

    For what treats each token by itself: an MLP, a projection, a loss. What is between input and
    output is in memory for one tile, and is computed again for the gradient. The gradient of params
    is added up over the tiles on each device, and then over the mesh, once.

    Args:
      fn: of params and `[b, s, ...]` of each array, of a device; returns arrays `[b, s, ...]`.
        The tokens of the last tile may be made up; what it returns for them is dropped.
      params: a pytree of arrays, whole on each device while they are used.
      arrays: sharded as the layout says.
      tiles: how many for each device; need not divide its tokens.
      layout: as for `dot_product_attention`.

    Returns:
      the results of fn, of all the tokens.

    Raises:
      ValueError: for arrays of different tokens, or that the mesh does not divide.

    Example:
      def mlp(w, x):
          return jax.nn.silu(x @ w["gate"]) @ w["down"]

      y = map_tiles(mlp, w, x, tiles=8, layout=layout)
    """
    check_count("tiles", tiles)
    check_token_arrays(arrays)
    mesh = find_mesh(layout.mesh, arrays[0])
    check_mesh(layout, mesh.shape, ())
    data, degree = (axes_size(x, mesh.shape) for x in (layout.batch, layout.tokens))
    check_division(arrays[0].shape, data, degree, layout)
    spec = layout.token_spec
    params = jax.tree.map(partial(set_explicit_sharding, spec=PartitionSpec(), mesh=mesh), params)
    arrays = tuple(set_explicit_sharding(x, spec, mesh=mesh) for x in arrays)
    varying = (*names(layout.batch), *names(layout.tokens))

    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(PartitionSpec(), *(spec for _ in arrays)),
        out_specs=spec,
        check_vma=layout.check_vma,
    )
    def per_device(params: Any, *arrays: Array) -> Any:
        if varying and layout.check_vma:
            # Before the loop, so that the sum over devices comes after it.
            params = jax.lax.pcast(params, varying, to="varying")
        return _one_by_one(partial(fn, params), arrays, tiles)

    return per_device(params, *arrays)


def _one_by_one(fn: Callable[..., Any], arrays: tuple[Array, ...], tiles: int) -> Any:
    b, S = arrays[0].shape[:2]
    size = max(-(-S // tiles), 1)
    count = -(-S // size)
    if count <= 1:
        return jax.checkpoint(fn)(*arrays)

    def split(x: Array) -> Array:
        # Copies of the last token: whatever fn is, it is finite there if it is for that one.
        widths = [(0, 0), (0, count * size - S)] + [(0, 0)] * (x.ndim - 2)
        padded = jnp.pad(x, widths, mode="edge")
        return jnp.moveaxis(padded.reshape(b, count, size, *x.shape[2:]), 1, 0)

    def join(x: Array) -> Array:
        return jnp.moveaxis(x, 0, 1).reshape(b, count * size, *x.shape[3:])[:, :S]

    step = jax.checkpoint(lambda tile: fn(*tile), prevent_cse=False)
    _, out = jax.lax.scan(lambda _, tile: (None, step(tile)), None, tuple(map(split, arrays)))
    return jax.tree.map(join, out)


def check_token_arrays(arrays: Sequence[Any]) -> None:
    """Raises ValueError unless the arrays have the same tokens."""
    shapes = [tuple(x.shape) for x in arrays]
    if not shapes or any(len(s) < 2 for s in shapes) or len({s[:2] for s in shapes}) > 1:
        raise ValueError(
            f"map_tiles takes arrays [B, S, ...] of the same tokens, got {shapes}. Pass what has "
            f"no tokens in params."
        )


def check_division(shape: Shape, data: int, degree: int, layout: MeshLayout) -> None:
    """Raises ValueError unless the mesh divides the tokens."""
    for name, n, parts, axes in (
        ("batch B", shape[0], data, layout.batch),
        ("tokens S", shape[1], degree, layout.tokens),
    ):
        if n % parts:
            raise ValueError(
                f"{name} = {n} is not divisible by the {parts} devices of mesh axis {axes!r}. "
                f"Use TokenLayout(layout).shard, which pads the tokens of a batch."
            )
