"""Program: the attention of one call, described so that it can be compiled for absent devices."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from .._checks import Shape, check_flag
from ..attention import dot_product_attention
from ..kernels import cudnn
from ..mask import Dropout, Logits, Mask
from ..mesh_layout import MeshLayout, axes_size, check_division, check_is_layout, check_mesh
from ..strategies import Strategy, Ulysses
from .gpu_targets import gpu_target
from .topology import devices, platform_of


@dataclass(frozen=True)
class Program:
    """A call of `jax_seqpar.dot_product_attention`, to be compiled for the devices of a topology.

    Nothing is looked up or compiled before `compile`, and a Program can be pickled.

    Args:
      topology: of `jax_seqpar.plan.devices`, as "v5e:2x4", "h100:8" or "cpu:8".
      query, key, value: shapes of the global arrays `[B, T, N, H]`, `[B, S, K, H]`, `[B, S, K, V]`;
        that of the key if `value` is None.
      dtype: of these three.
      mask, logits, dropout: of the attention. Of arrays in them only shape and dtype
        matter, so a `jax.ShapeDtypeStruct` will do; every device has them whole.
      kernel: the attention of one device; if None, that of `choose_kernel` for the platform of the
        topology.
      strategy: how the devices of the token axis share the work.
      layout: the mesh axes of tokens, batch and heads, without a mesh.
      mesh_shape: size of each mesh axis by name, major to minor, as `{"data": 2, "seq": 4}`; if
        None, the one axis that `layout` names has all devices.
      gradients: whether the program computes the gradients of query, key and value beside the
        output, from the cotangent of the output.
      compiler_options: of `jax.jit`, such as `jax_seqpar.compiler_options("tpu")`.

    Example:
      program = Program("cpu:8", query=(1, 4096, 16, 64), key=(1, 4096, 8, 64))
      collectives(program.compile())  # {"all-to-all": 4}
    """

    topology: str
    query: Shape
    key: Shape
    value: Shape | None = None
    dtype: Any = jnp.bfloat16
    mask: Mask = Mask()
    logits: Logits = Logits()
    dropout: Dropout = Dropout()
    kernel: Any = None
    strategy: Strategy = Ulysses()
    layout: MeshLayout = MeshLayout()
    mesh_shape: Mapping[str, int] | None = None
    gradients: bool = False
    compiler_options: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        platform_of(self.topology)
        check_flag("gradients", self.gradients)
        check_is_layout(self.layout)
        value = self.key if self.value is None else self.value
        for name, shape in (("query", self.query), ("key", self.key), ("value", value)):
            sizes = shape if isinstance(shape, tuple | list) else ()
            if len(sizes) != 4 or not all(type(n) is int and n > 0 for n in sizes):
                raise ValueError(
                    f"{name} must be a shape of four positive sizes, got {shape!r}. Write "
                    f"{name}=(batch, tokens, heads, channels)."
                )
        for name, kind in (("mask", Mask), ("logits", Logits), ("dropout", Dropout)):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(
                    f"{name} must be a jax_seqpar.{kind.__name__}, got {getattr(self, name)!r}. "
                    f"Write {name}={kind.__name__}(...)."
                )
        if self.layout.mesh is not None:
            raise ValueError(
                f"layout has a mesh, but a Program is compiled for topology {self.topology!r}. "
                f"Write layout={self.layout!r} and mesh_shape={dict(self.layout.mesh.shape)}."
            )

    def compile(self) -> jax.stages.Compiled:
        """The program, compiled for the topology, by the compiler of its platform on this machine.

        Raises:
          ImportError: if that compiler is missing.
          ValueError: for shapes and options that do not fit, as `jax_seqpar.dot_product_attention`.
        """
        platform, mesh = platform_of(self.topology), self._mesh()
        options: Any = dict(self.compiler_options or {})
        # cuDNN cannot be asked for the limits of an absent GPU, so its capability is assumed.
        assumed: Any = nullcontext()
        if platform == "gpu":
            assumed = cudnn.assume_compute_capability(gpu_target(self.topology).compute_capability)
            # Which of several kernels is fastest, a GPU would have to try.
            options = {"xla_gpu_autotune_level": 0, **options}
        with assumed:
            lowered = jax.jit(self._run(mesh)).lower(*self._arguments(mesh))
        return lowered.compile(compiler_options=options)

    def _run(self, mesh: Mesh) -> Any:
        """The function that is compiled."""
        attend = partial(
            dot_product_attention,
            kernel=self.kernel,
            strategy=self.strategy,
            layout=self.layout.on(mesh),
        )

        def run(query: Any, key: Any, value: Any, grad: Any, keywords: dict[str, Any]) -> Any:
            function = partial(attend, **keywords)
            if not self.gradients:
                return function(query, key, value)
            out, pull = jax.vjp(function, query, key, value)
            return out, *pull(grad)

        return run

    def _arguments(self, mesh: Mesh) -> tuple[Any, ...]:
        """Shapes of query, key, value and the cotangent, and the keywords with their arrays."""
        layout, value = self.layout, self.value or self.key
        check_mesh(layout, mesh.shape, ())
        check_division(self.query, self.key, layout, mesh.shape)
        # Fewer KV heads than tensor-parallel devices are whole on each.
        few = self.key[2] % axes_size(layout.heads, mesh.shape) != 0
        kv_spec = replace(layout, heads=None).partition_spec if few else layout.partition_spec

        def shaped(shape: Shape, dtype: Any, spec: PartitionSpec) -> Any:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

        def whole(x: Any) -> Any:
            return shaped(x.shape, x.dtype, PartitionSpec())

        out = (*self.query[:3], value[3])
        keywords = {"mask": self.mask, "logits": self.logits, "dropout": self.dropout}
        return (
            shaped(self.query, self.dtype, layout.partition_spec),
            shaped(self.key, self.dtype, kv_spec),
            shaped(value, self.dtype, kv_spec),
            shaped(out, self.dtype, layout.partition_spec),
            jax.tree.map(whole, keywords),
        )

    def _mesh(self) -> Mesh:
        """The mesh of the topology's devices, as `jax.make_mesh` orders them."""
        found = devices(self.topology)
        sizes = self.mesh_shape
        if sizes is None:
            if len(self.layout.axis_names) != 1:
                raise ValueError(
                    f"mesh_shape is None, but {self.layout!r} does not name one mesh axis. Write "
                    f"mesh_shape={{axis: size}} for the {len(found)} devices of {self.topology!r}."
                )
            sizes = {self.layout.axis_names[0]: len(found)}
        names, shape = tuple(sizes), tuple(sizes.values())
        if axes_size(names, sizes) != len(found):
            raise ValueError(
                f"mesh_shape {dict(sizes)} does not have the {len(found)} devices of topology "
                f"{self.topology!r}. Write sizes whose product is {len(found)}."
            )
        return jax.make_mesh(shape, names, (AxisType.Auto,) * len(names), devices=found)
