"""A train step of a decoder of the shape of Llama, in shapes alone: what `seqpar plan` compiles.

RMSNorm, rotary embedding, grouped queries, SwiGLU, cross entropy, Adam. Weights are float32 and lie
over all devices by their features (FSDP), gathered for each use in the dtype of the computation.
Letters: V vocabulary, D features, F hidden features, N query heads, K KV heads, H head dimension.
`examples/decoder.py` is one to train; this one needs neither Flax nor Optax.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from .._checks import Shape
from ..attention import dot_product_attention
from ..mesh_layout import MeshLayout, axes_size
from ..strategies import Strategy, Ulysses
from ..training import map_tiles, offload_policy, offloaded, tiled_cross_entropy

Weights = dict[str, Any]
MOMENTUM, SECOND, RATE, TINY = 0.9, 0.95, 3e-4, 1e-8


@dataclass(frozen=True)
class Decoder:
    """Sizes of a decoder, and how it runs on a mesh; by default those of Llama 3 8B, one layer.

    Args:
      tokens, batch: of each sequence, and sequences of a step.
      tiles: of a device's tokens in MLP and loss.
      train: a step of Adam with each layer computed again for its gradient; otherwise the loss.
      layout, strategy, kernel: of the attention; the kernel is that of the mesh's platform if None.
      offload: keeps the layers' inputs in the memory of the host for their gradients.
    """

    tokens: int
    batch: int = 1
    layers: int = 1
    features: int = 4096
    hidden: int = 14336
    vocabulary: int = 128256
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: Any = jnp.bfloat16
    tiles: int = 16
    train: bool = True
    layout: MeshLayout = MeshLayout()
    strategy: Strategy = Ulysses()
    kernel: Any = None
    offload: bool = False

    def __post_init__(self) -> None:
        if self.offload and not self.train:
            raise ValueError(
                f"offload = {self.offload} keeps the inputs of layers for their gradients, and "
                f"with train = {self.train} there are none. Write train=True."
            )

    def build(self) -> tuple[Any, tuple[Any, ...]]:
        """The function and the shapes of its arguments, under `jax.set_mesh`.

        Raises:
          ValueError: for features that its devices, or channels that rotary embedding, cannot
            share.
        """
        self._check_sizes()
        weights = jax.tree.map(self._shape_of_weight, self._sizes(), is_leaf=_is_size)
        weights["layers"] = jax.tree.map(self._of_all_layers, weights["layers"])
        tokens = shaped((self.batch, self.tokens), jnp.int32, self.layout.token_spec)
        if not self.train:
            return self.loss, (weights, tokens, tokens)
        state = weights, weights, weights, shaped((), jnp.float32, PartitionSpec())
        return jax.jit(self.step, donate_argnums=0), (state, tokens, tokens)

    def _check_sizes(self) -> None:
        axes, mesh = self.layout.axis_names, jax.sharding.get_abstract_mesh()
        parts = axes_size(axes, mesh.shape)
        if self.features % parts:
            raise ValueError(
                f"features D = {self.features} is not divisible by the {parts} devices of mesh "
                f"axes {axes!r}, which share each weight. Write features = "
                f"{-(-self.features // parts) * parts}."
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim H = {self.head_dim} is odd, and the rotary embedding turns pairs of "
                f"channels. Write head_dim = {self.head_dim + 1}."
            )

    def step(self, state: Any, tokens: Array, labels: Array) -> tuple[Any, Array]:
        """One step of Adam: the new state and the loss."""
        weights, first, second, count = state
        loss, gradients = jax.value_and_grad(self.loss)(weights, tokens, labels)
        with jax.named_scope("optimizer"):
            moved = jax.tree.map(partial(_adam, count + 1.0), weights, first, second, gradients)
        weights, first, second = (
            jax.tree.map(lambda three, i=i: three[i], moved, is_leaf=_is_size) for i in range(3)
        )
        return (weights, first, second, count + 1.0), loss

    def loss(self, weights: Weights, tokens: Array, labels: Array) -> Array:
        """The mean cross entropy."""
        with jax.named_scope("embedding"):
            table = self._whole(weights["embedding"])
            x = map_tiles(lambda t, n: t[n], table, tokens, tiles=1, layout=self.layout)
        layer, policy = self.layer, offload_policy if self.offload else None
        if self.train:
            # XLA unrolls a loop of one layer, and then keeps what it finds computed twice.
            layer = jax.checkpoint(layer, policy=policy, prevent_cse=self.layers == 1)
        x, _ = jax.lax.scan(lambda x, w: (layer(w, x), None), x, weights["layers"])
        with jax.named_scope("loss"):
            x = _norm(x, weights["norm"])
            options = {"tiles": self.tiles, "layout": self.layout}
            return tiled_cross_entropy(x, self._whole(weights["unembedding"]), labels, **options)

    def layer(self, weights: Weights, x: Array) -> Array:
        """Attention and MLP, each on the normed sum of all that came before."""
        with jax.named_scope("layer/projections"):
            x = offloaded(x, layout=self.layout) if self.offload else x
            normed = _norm(x, weights["attention_norm"])
            q, k, v = (
                jnp.einsum("BSD,DNH->BSNH", normed, self._whole(weights[name])) for name in "qkv"
            )
            positions = jnp.arange(self.tokens, dtype=jnp.float32)
            q, k = (_turned(x, positions) for x in (q, k))
        with jax.named_scope("layer/attention"):
            mixed = dot_product_attention(
                q,
                k,
                v,
                is_causal=True,
                kernel=self.kernel,
                strategy=self.strategy,
                layout=self.layout,
            )
        with jax.named_scope("layer/projections"):
            x = x + jnp.einsum("BSNH,NHD->BSD", mixed, self._whole(weights["out"]))
        with jax.named_scope("layer/mlp"):
            kernels = [self._whole(weights[name]) for name in ("gate", "up", "down")]
            normed = _norm(x, weights["mlp_norm"])
            return x + map_tiles(_mlp, kernels, normed, tiles=self.tiles, layout=self.layout)

    def _sizes(self) -> Weights:
        D, F, V, N, K, H = (
            *(self.features, self.hidden, self.vocabulary),
            *(self.heads, self.kv_heads, self.head_dim),
        )
        layer = {
            **{"attention_norm": (D,), "mlp_norm": (D,)},
            **{"q": (D, N, H), "k": (D, K, H), "v": (D, K, H), "out": (N, H, D)},
            **{"gate": (D, F), "up": (D, F), "down": (F, D)},
        }
        outside = {"embedding": (V, D), "unembedding": (D, V), "norm": (D,)}
        return {**outside, "layers": layer}

    def _shape_of_weight(self, size: tuple[int, ...]) -> Any:
        """Shape of a float32 weight, features sharded over all mesh axes of batch and tokens."""
        axes = self.layout.axis_names
        spec = [axes if n == self.features and axes else None for n in size]
        if spec.count(axes) > 1:  # F or V of the size of D
            spec = [axes, *[None] * (len(size) - 1)]
        return shaped(size, jnp.float32, PartitionSpec(*spec))

    def _of_all_layers(self, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        """A weight of each layer, `[layers, ...]`, sharded as one of them is."""
        sharding: Any = x.sharding
        return shaped((self.layers, *x.shape), x.dtype, PartitionSpec(None, *sharding.spec))

    def _whole(self, weight: Array) -> Array:
        """A weight, gathered in the dtype of the computation."""
        return jax.lax.with_sharding_constraint(weight.astype(self.dtype), PartitionSpec())


def shaped(shape: Shape, dtype: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
    """An array's shape, with its sharding on the mesh of the context."""
    sharding = NamedSharding(jax.sharding.get_abstract_mesh(), spec)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _is_size(x: Any) -> bool:
    return isinstance(x, tuple)


def _adam(count: Array, weight: Array, m: Array, v: Array, gradient: Array) -> tuple[Array, ...]:
    m = MOMENTUM * m + (1 - MOMENTUM) * gradient
    v = SECOND * v + (1 - SECOND) * gradient**2
    rate = RATE * jnp.sqrt(1 - SECOND**count) / (1 - MOMENTUM**count)
    return weight - rate * m / (jnp.sqrt(v) + TINY), m, v


def _norm(x: Array, weight: Array) -> Array:
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + 1e-5)
    return (wide * scale * weight[None, None]).astype(x.dtype)


def _turned(x: Array, positions: Array) -> Array:
    """Rotary embedding of the halves of the channels."""
    half = x.shape[-1] // 2
    frequencies = 500_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = (positions[:, None] * frequencies[None])[None, :, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def _mlp(kernels: list[Array], x: Array) -> Array:
    gate, up, down = kernels
    hidden = jax.nn.silu(jnp.einsum("BSD,DF->BSF", x, gate))
    return jnp.einsum("BSF,FD->BSD", hidden * jnp.einsum("BSD,DF->BSF", x, up), down)
