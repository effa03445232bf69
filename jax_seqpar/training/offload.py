"""The inputs of layers in the memory of the host, while the gradient does not need them yet."""

import math
import warnings

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Shaped

from ..mesh import find_mesh, platform_of
from ..mesh_layout import MeshLayout, axes_size, check_mesh

_NAME = "jax_seqpar.training.offloaded"
# libtpu 0.0.42.1 aborts where an array of 4 GiB on a device is copied to the host ("llo_loop.cc:
# index_space_.start <= index_space_.limit (0 vs. -1)"); it compiles copies of 3 GiB.
_COPY_BYTES, _ABORTS = 2 << 30, 4 << 30

offload_policy = jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=[_NAME],
    offload_src="device",
    offload_dst="pinned_host",
)


def offloaded(
    x: Shaped[Array, "B S D"], *, layout: MeshLayout = MeshLayout()
) -> Shaped[Array, "B S D"]:
    """`x` itself, which `jax.checkpoint(policy=offload_policy)` saves in the memory of the host.

    For the input of a layer that is computed again for its gradient: beside the layers' inputs
    nothing grows with their number. Each device writes its part to its own host in the forward
    pass and reads it back in the backward pass. No bit of value or gradient depends on it.

    The layers have to be a loop, `jax.lax.scan`: of layers that follow one another libtpu 0.0.42.1
    makes all copies after the last one, and reads them all before the first gradient, so that no
    memory is saved. As a loop, 16 layers of `examples/decoder.py` with 512 features and 128K tokens
    on v5e:2x2 have 1.41 GiB of temporaries without it and 0.54 with it.

    On CPUs the memory of a device is that of the host, and XLA drops the copies: this warns.

    Args:
      x: sharded as the layout says.
      layout: as for `jax_seqpar.dot_product_attention`.

    Raises:
      ValueError: without a mesh, for a layout that it does not have, and for more tokens of a TPU
        than can be copied to its host, 128 features at a time.

    Example:
      def layer(x, weights):
          x = offloaded(x, layout=layout)
          return x + mlp(x, weights), None

      x, _ = jax.lax.scan(jax.checkpoint(layer, policy=offload_policy), x, weights)
    """
    mesh = find_mesh(layout.mesh, x)
    check_mesh(layout, mesh.shape, jax.sharding.get_abstract_mesh().manual_axes)
    if platform_of(mesh) == "cpu":
        warnings.warn(
            "offloaded: on CPUs the memory of a device is that of the host, so nothing moves and "
            "no memory is saved. Leave it out, or run on TPUs or GPUs.",
            stacklevel=2,
        )
    devices = axes_size(layout.batch, mesh.shape) * axes_size(layout.tokens, mesh.shape)
    pieces = -(-x.size * x.dtype.itemsize // (devices * _COPY_BYTES))
    # Whole registers of 128 lanes: what a piece is short of them, its copy has as padding.
    size = max(-(-x.shape[-1] // max(pieces, 1) // 128) * 128, 1)
    copied = math.prod((*x.shape[:-1], size, x.dtype.itemsize)) // devices
    if copied >= _ABORTS and platform_of(mesh) == "tpu":
        raise ValueError(
            f"offloaded: of x {x.shape} a device would copy {copied / 2**30:.1f} GiB to its host "
            f"at once, {size} features of all its tokens with the padding, and libtpu aborts at 4 "
            f"GiB. Write a mesh with {-(-copied // _COPY_BYTES)} times the devices along "
            f"{layout.tokens!r}, or shorter rows."
        )
    parts = jnp.split(x, list(range(size, x.shape[-1], size)), axis=-1)
    return jnp.concatenate([checkpoint_name(part, _NAME) for part in parts], axis=-1)
