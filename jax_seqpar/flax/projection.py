"""A linear layer written as an einsum, whose letters name the axes of its kernel."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core.spmd import get_logical_axis_rules
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from ..mesh import AnyMesh, find_mesh, place
from ..mesh_layout import MeshAxes, MeshLayout, names
from .arithmetic import Arithmetic
from .checks import check_floats

# Where an axis of a parameter lies: its letter, and the mesh axes that share it.
ParameterSharding = Mapping[str, MeshAxes]
Initializer = Callable[..., Array]


@dataclass(frozen=True)
class ParameterOptions:
    """Initialisation, sharding, dtypes and arithmetic of the parameters of a layer.

    Args:
      sharding: mesh axes by letter, such as `{"D": "fsdp", "N": "tensor"}`; letters it lacks stay
        whole. If None, that of `nnx.logical_axis_rules`, to which the letters are logical names.
        Layers that `nnx.vmap` stacks have one axis more, which Flax names only if it is told to:
        `transform_metadata={nnx.PARTITION_NAME: None}`. Without it every name is one axis off, and
        an `nnx.Optimizer` shards its moments so.
      kernel_init: called with the shape `(summed, other)`.
      bias_init: called with the shape of the kernel's letters that remain.
      dtype: of the computation; if None, that of input and parameters together.
      param_dtype: of the parameters.
      precision: of the products, forward and backward, as for `jnp.einsum`.
      arithmetic: of products, norms and rotary embeddings: `Arithmetic()` computes as XLA does,
        `ExactArithmetic()` gives the same bits on every mesh.
    """

    sharding: ParameterSharding | None = None
    kernel_init: Initializer = nnx.initializers.lecun_normal()
    bias_init: Initializer = nnx.initializers.zeros_init()
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: jax.lax.PrecisionLike = None
    arithmetic: Arithmetic = Arithmetic()


class Projection(nnx.Module):
    """`einsum("BSD,DNH->BSNH", x, kernel)`, with a bias or not.

    Args:
      letters: the einsum. What the input and the kernel share and the output lacks is summed; those
        axes of the kernel come first.
      sizes: of the kernel's letters.
      use_bias: adds a bias over the kernel's letters that remain.
      layout: of the input. A kernel sharded over mesh axes of the batch or the tokens, as in
        FSDP (ZeRO 3), is gathered for its use, and its gradient scattered.
      parameters: initializers, sharding and dtypes.
      rngs: of `nnx`.

    Raises:
      ValueError: letters that are no einsum of an input and a kernel, or have no size.
    """

    def __init__(
        self,
        letters: str,
        sizes: Mapping[str, int],
        *,
        use_bias: bool = False,
        layout: MeshLayout = MeshLayout(),
        parameters: ParameterOptions = ParameterOptions(),
        rngs: nnx.Rngs,
    ) -> None:
        check_letters(letters, sizes)
        check_sharding_letters(parameters.sharding, sizes)
        operands, output = letters.replace(" ", "").split("->")
        kernel = operands.split(",")[1]
        summed = [c for c in kernel if c not in output]
        kept = [c for c in kernel if c in output]
        shape = tuple(sizes[c] for c in kernel)
        flat = tuple(math.prod(sizes[c] for c in part) for part in (summed, kept))
        self.letters = letters
        self.dtype, self.precision = parameters.dtype, parameters.precision
        self.arithmetic = parameters.arithmetic
        sharding, param_dtype = parameters.sharding, parameters.param_dtype
        rules = dict(get_logical_axis_rules()) if sharding is None else sharding
        self.gather = partial(gather, sharding=rules, layout=layout)
        self.kernel_letters, self.bias_letters = kernel, "".join(kept)
        self.kernel = parameter(
            parameters.kernel_init(rngs.params(), flat, param_dtype).reshape(shape),
            kernel,
            sharding,
            layout.mesh,
        )
        self.bias: nnx.Param[Array] | None = nnx.data(None)
        if use_bias:
            bias = parameters.bias_init(rngs.params(), shape[len(summed) :], param_dtype)
            self.bias = parameter(bias, self.bias_letters, sharding, layout.mesh)

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """The projection of x.

        Raises:
          ValueError: unless x has the axes of the letters, of the kernel's sizes.
        """
        check_projected(self.letters, x, self.kernel[...])
        kernel = self.gather(self.kernel[...], self.kernel_letters)
        dtype = jnp.promote_types(x.dtype, kernel.dtype) if self.dtype is None else self.dtype
        out_sharding = _out_sharding(self.letters, x, kernel)
        options = {"dtype": dtype, "precision": self.precision, "out_sharding": out_sharding}
        y = self.arithmetic.project(self.letters, x, kernel, **options)
        if self.bias is not None:
            y = self.arithmetic.add_bias(y, self.gather(self.bias[...], self.bias_letters))
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
    """Sharding of the result on Explicit axes, where JAX needs one for a sum; None on others."""
    operands, output = letters.replace(" ", "").split("->")
    sharding = jax.typeof(x).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    of: dict[str, Any] = {}
    for names_of, array in zip(operands.split(","), (x, kernel), strict=True):
        of |= dict(zip(names_of, jax.typeof(array).sharding.spec, strict=True))
    return NamedSharding(sharding.mesh, PartitionSpec(*(of[c] for c in output)))


def check_letters(letters: str, sizes: Mapping[str, int]) -> None:
    """Raises ValueError unless the equation is an einsum of an input and a kernel."""
    operands, _, output = letters.replace(" ", "").partition("->")
    x, _, kernel = operands.partition(",")
    kept = "".join(c for c in kernel if c in output)
    summed = "".join(c for c in kernel if c in x and c not in output)
    fits = x and summed and kept and kernel == summed + kept and output.endswith(kept)
    if not fits or not set(output) <= set(x + kernel):
        raise ValueError(
            f"letters must be an einsum of an input and a kernel whose summed axes come first and "
            f"whose others end the output, such as 'BSD,DNH->BSNH', got {letters!r}. Name the axes "
            f"of the kernel in that order."
        )
    without = [c for c in kernel if c not in sizes]
    if without:
        raise ValueError(
            f"axis {without[0]!r} of {letters!r} has no size, got sizes={sizes}. Add "
            f"{without[0]!r} to the sizes."
        )


def check_sharding_letters(sharding: Any, sizes: Mapping[str, int]) -> None:
    """Raises ValueError for a key that is not a single letter, or of another case than its axis.

    Letters of other layers pass: one sharding serves a whole model.
    """
    for key in sharding or ():
        meant = [c for c in sizes if c.lower() == str(key).lower()]
        if len(str(key)) != 1 or (key not in sizes and meant):
            raise ValueError(
                f"sharding has the key {key!r}, and the axes of the kernel are {sizes}. Write "
                f"{(meant or list(sizes))[0]!r}: a letter for each axis."
            )


def check_projected(letters: str, x: Any, kernel: Any) -> None:
    """Raises ValueError unless x has the axes that the letters name, of the kernel's sizes."""
    check_floats("x", x)
    operands = letters.replace(" ", "").partition("->")[0].split(",")
    sizes = dict(zip(operands[1], kernel.shape, strict=True))
    fits = len(x.shape) == len(operands[0]) and all(
        sizes.get(c, n) == n for c, n in zip(operands[0], x.shape, strict=True)
    )
    if not fits:
        raise ValueError(
            f"x must have the axes {operands[0]!r} of {letters!r}, with {sizes}, got shape "
            f"{tuple(x.shape)}. For one sequence write x[None]."
        )
