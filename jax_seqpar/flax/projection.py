"""A linear layer written as an einsum, whose letters name the axes of its kernel."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core.spmd import get_logical_axis_rules
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from ..layout import MeshAxes, MeshLayout, names
from ..mesh import AnyMesh, find_mesh, place
from . import refusals

# Where an axis of a parameter lies: its letter, and the mesh axes that share it.
ParameterSharding = Mapping[str, MeshAxes]
Initializer = Callable[..., Array]


class Projection(nnx.Module):
    """`einsum("BSD,DNH->BSNH", x, kernel)`, with a bias or not.

    Args:
      letters: the einsum. What the input and the kernel share and the output lacks is summed; those
        axes of the kernel come first.
      sizes: of the kernel's letters.
      sharding: mesh axes by letter, such as `{"D": "fsdp", "N": "tensor"}`; letters it lacks stay
        whole. If None, that of `nnx.logical_axis_rules`, to which the letters are logical names.
        Layers that `nnx.vmap` stacks have one axis more, which Flax names only if it is told to:
        `transform_metadata={nnx.PARTITION_NAME: None}`. Without it every name is one axis off, and
        an `nnx.Optimizer` shards its moments so.
      layout: of the input. A kernel sharded over mesh axes of the batch or the tokens, as in
        FSDP (ZeRO 3), is gathered for its use, and its gradient scattered.
      kernel_init: called with the shape `(summed, other)`.
      use_bias, bias_init: over the kernel's letters that remain.
      dtype: of the computation; if None, that of input and parameters together.
      precision: of the products, forward and backward, as for `jnp.einsum`.
      param_dtype: of the parameters.
      rngs: of `nnx`.

    Raises:
      ValueError: letters that are no einsum of an input and a kernel, or have no size.
    """

    def __init__(
        self,
        letters: str,
        sizes: Mapping[str, int],
        *,
        sharding: ParameterSharding | None = None,
        layout: MeshLayout = MeshLayout(),
        kernel_init: Initializer = nnx.initializers.lecun_normal(),
        use_bias: bool = False,
        bias_init: Initializer = nnx.initializers.zeros_init(),
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: jax.lax.PrecisionLike = None,
        rngs: nnx.Rngs,
    ) -> None:
        refusals.check_letters(letters, sizes)
        operands, output = letters.replace(" ", "").split("->")
        kernel = operands.split(",")[1]
        summed = [c for c in kernel if c not in output]
        kept = [c for c in kernel if c in output]
        shape = tuple(sizes[c] for c in kernel)
        flat = tuple(math.prod(sizes[c] for c in part) for part in (summed, kept))
        self.letters, self.dtype, self.precision = letters, dtype, precision
        rules = dict(get_logical_axis_rules()) if sharding is None else sharding
        self.gather = partial(gather, sharding=rules, layout=layout)
        self.kernel_letters, self.bias_letters = kernel, "".join(kept)
        self.kernel = parameter(
            kernel_init(rngs.params(), flat, param_dtype).reshape(shape),
            kernel,
            sharding,
            layout.mesh,
        )
        self.bias: nnx.Param[Array] | None = nnx.data(None)
        if use_bias:
            bias = bias_init(rngs.params(), shape[len(summed) :], param_dtype)
            self.bias = parameter(bias, self.bias_letters, sharding, layout.mesh)

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """The projection of x.

        Raises:
          ValueError: unless x has the axes of the letters, of the kernel's sizes.
        """
        refusals.check_projected(self.letters, x, self.kernel[...])
        kernel = self.gather(self.kernel[...], self.kernel_letters)
        dtype = jnp.promote_types(x.dtype, kernel.dtype) if self.dtype is None else self.dtype
        out_sharding = _out_sharding(self.letters, x, kernel)
        x, kernel = x.astype(dtype), kernel.astype(dtype)
        y = jnp.einsum(self.letters, x, kernel, precision=self.precision, out_sharding=out_sharding)
        if self.bias is not None:
            bias = self.gather(self.bias[...], self.bias_letters).astype(dtype)
            y = y + bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)
        return y


def parameter(
    value: Array, letters: str, sharding: ParameterSharding | None, mesh: AnyMesh | None = None
) -> nnx.Param[Array]:
    """A parameter whose axes have names, and a sharding where there are rules for them.

    Args:
      letters: a name for each axis.
      sharding: mesh axes by letter; if None, that of `nnx.logical_axis_rules`.
      mesh: if None, that of `jax.set_mesh`.
    """
    metadata: dict[str, Any] = {"out_sharding": tuple(letters)}
    if mesh is not None:
        metadata["mesh"] = mesh
    if sharding is not None:
        metadata["sharding_rules"] = tuple((c, sharding.get(c)) for c in letters)
    elif not get_logical_axis_rules():
        # Names alone place nothing; without this nnx would take them for axes of the mesh.
        metadata["eager_sharding"] = False
    return nnx.Param(value, **metadata)


def gather(
    x: Array,
    letters: str,
    sharding: ParameterSharding | None,
    layout: MeshLayout,
) -> Array:
    """All-gathers an FSDP-sharded parameter over the batch and sequence axes (ZeRO-3)."""
    of_input = {*names(layout.batch), *names(layout.tokens)}
    axes = [names((sharding or {}).get(c)) for c in letters]
    if not any(of_input.intersection(a) for a in axes):
        return x
    spec = PartitionSpec(*(tuple(n for n in a if n not in of_input) or None for a in axes))
    return place(x, spec, mesh=find_mesh(layout.mesh, x))


def _out_sharding(letters: str, x: Array, kernel: Array) -> NamedSharding | None:
    """On Explicit axes, the sharding that each axis had; JAX asks for it where it has to add up."""
    operands, output = letters.replace(" ", "").split("->")
    sharding = jax.typeof(x).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    of: dict[str, Any] = {}
    for names_of, array in zip(operands.split(","), (x, kernel), strict=True):
        of |= dict(zip(names_of, jax.typeof(array).sharding.spec, strict=True))
    return NamedSharding(sharding.mesh, PartitionSpec(*(of[c] for c in output)))
