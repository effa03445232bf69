"""A decoder of the shape of Llama, whose attention is sequence-parallel.

RMSNorm, rotary embedding, grouped queries, SwiGLU. Tokens of different devices meet in
`jax_seqpar.flax.Attention` alone. Parameters lie on the mesh by the letters of the einsums: V
vocabulary, D features, F hidden features, N query heads, K KV heads, H head dimension.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jax_seqpar import Mask, MeshLayout, Ulysses
from jax_seqpar.flax import (
    Arithmetic,
    Attention,
    ParameterOptions,
    Projection,
    Rotary,
    gather,
    parameter,
)
from jax_seqpar.mesh_layout import MeshAxes
from jax_seqpar.strategies import Strategy
from jax_seqpar.training import Batch, map_tiles, offload_policy, offloaded

Sharding = Mapping[str, MeshAxes]
Record = Callable[[str, Array], None]

# FSDP: every kernel is shared by the devices that share the batch, and gathered for its use.
FSDP: Sharding = {"D": "data"}
# Tensor parallelism beside it: heads and hidden features over a mesh axis of their own.
FSDP_AND_TENSOR: Sharding = {"D": "data", "N": "tensor", "K": "tensor", "F": "tensor"}


@dataclass(frozen=True)
class Config:
    """Sizes of a decoder, and options of its training. By default 6 million parameters, for bytes.

    Args:
      dropout: the rate, of attention weights and of what attention and MLP add to the residual,
        where a call is given a key.
      label_smoothing, z_loss: of the loss.
    """

    vocabulary: int = 256
    features: int = 256
    hidden: int = 704
    layers: int = 8
    heads: int = 8
    kv_heads: int = 2
    head_dim: int | None = None
    theta: float = 10_000.0
    epsilon: float = 1e-5
    tied: bool = True
    qk_norm: bool = False
    local_window_size: int | tuple[int, int] | None = None
    dropout: float = 0.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0


@dataclass(frozen=True)
class Placement:
    """Placement of a decoder: sharding of tokens and parameters, attention, memory and dtype.

    Args:
      layout, kernel, strategy: as for `jax_seqpar.dot_product_attention`; the mesh is that of
        `jax.set_mesh`.
      sharding: of the parameters, mesh axes by letter; None leaves them whole.
      tiles: of the tokens of a device in MLP and loss, to save memory; their kernels are whole. In
        exact arithmetic of the loss alone: the MLP's gradients are sums over all tokens.
      remat: computes each block again for the gradient, instead of keeping its activations. The
        blocks are then one loop over their stacked weights, which compiles in the time of one.
      offload: with remat, keeps the inputs of the blocks in the memory of the host.
      dtype: of the computation; parameters are float32.
      arithmetic: of all layers; `ExactArithmetic()` has the same bits on every mesh.
    """

    layout: MeshLayout = MeshLayout()
    kernel: Callable[..., Array] | None = None
    strategy: Strategy | Literal["auto"] = Ulysses()
    sharding: Sharding | None = None
    tiles: int = 1
    remat: bool = False
    offload: bool = False
    dtype: Any = jnp.float32
    arithmetic: Arithmetic = Arithmetic()

    def __post_init__(self) -> None:
        if self.offload and not self.remat:
            raise ValueError(
                "offload = True keeps the inputs of blocks that are computed again, and "
                "remat = False computes none. Write remat=True."
            )

    @property
    def parameters(self) -> ParameterOptions:
        """Sharding, dtype and arithmetic of the parameters of attention and MLP."""
        return ParameterOptions(
            sharding=self.sharding, dtype=self.dtype, arithmetic=self.arithmetic
        )


class MLP(nnx.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: Config, place: Placement, rngs: nnx.Rngs) -> None:
        sizes = {"D": config.features, "F": config.hidden}
        options: dict[str, Any] = {"layout": place.layout, "parameters": place.parameters}
        self.gate = Projection("BSD,DF->BSF", sizes, **options, rngs=rngs)
        self.up = Projection("BSD,DF->BSF", sizes, **options, rngs=rngs)
        self.down = Projection("BSF,FD->BSD", sizes, **options, rngs=rngs)
        self.place = place

    def __call__(self, x: Array, decode: bool) -> Array:
        if self.place.tiles == 1 or decode or not self.place.arithmetic.adds_tiles:
            of_gate, of_up = self.place.arithmetic.fork(x, 2)
            return self.down(self.place.arithmetic.swiglu(self.gate(of_gate), self.up(of_up)))
        kernels = [p.kernel[...] for p in (self.gate, self.up, self.down)]

        def tile(kernels: list[Array], x: Array) -> Array:
            gate, up, down = (k.astype(x.dtype) for k in kernels)  # gradients add up in float32
            hidden = jax.nn.silu(jnp.einsum("BSD,DF->BSF", x, gate))
            return jnp.einsum("BSF,FD->BSD", hidden * jnp.einsum("BSD,DF->BSF", x, up), down)

        return map_tiles(tile, kernels, x, tiles=self.place.tiles, layout=self.place.layout)


class Block(nnx.Module):
    """One layer: attention and MLP, each on the normed sum of all that came before."""

    def __init__(self, config: Config, place: Placement, rngs: nnx.Rngs) -> None:
        self.attention_norm = _norm(config, place, rngs)
        self.attention = Attention(
            config.features,
            num_heads=config.heads,
            num_kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            rotary=Rotary(config.theta),
            qk_norm=1e-6 if config.qk_norm else None,
            mask=Mask(is_causal=True, local_window_size=config.local_window_size),
            dropout_rate=config.dropout,
            kernel=place.kernel,
            strategy=place.strategy,
            layout=place.layout,
            parameters=place.parameters,
            rngs=rngs,
        )
        self.mlp_norm = _norm(config, place, rngs)
        self.mlp = MLP(config, place, rngs)
        self.arithmetic, self.layout, self.dropout = place.arithmetic, place.layout, config.dropout

    def __call__(
        self, x: Array, record: Record, dropout_rng: Array | None, **attention: Any
    ) -> Array:
        # The keys 0, 1 and 2 of the layer: of the attention's weights, its output, and the MLP's.
        rngs = None if dropout_rng is None else nnx.Rngs(dropout=dropout_rng)
        attention |= {"rngs": rngs, "deterministic": rngs is None}
        x, of_norm = self.arithmetic.fork(x, 2)
        normed = self.arithmetic.norm(self.attention_norm, of_norm)
        record("attention_norm", normed)
        mixed = self.attention(normed, record=record, **attention)
        record("attention", mixed)
        mixed = self._drop(mixed, rngs)
        x, of_norm = self.arithmetic.fork(self.arithmetic.add(x, mixed), 2)
        normed = self.arithmetic.norm(self.mlp_norm, of_norm)
        fed = self.mlp(normed, decode=attention.get("decode", False))
        record("mlp", fed)
        return self.arithmetic.add(x, self._drop(fed, rngs))

    def _drop(self, x: Array, rngs: nnx.Rngs | None) -> Array:
        if rngs is None or self.dropout == 0:
            return x
        return self.arithmetic.dropout(x, self.dropout, rngs.dropout(), layout=self.layout)


class Decoder(nnx.Module):
    """A decoder: tokens to logits."""

    def __init__(self, config: Config, place: Placement = Placement(), *, rngs: nnx.Rngs) -> None:
        def table() -> nnx.Param[Array]:
            init = nnx.initializers.normal(config.features**-0.5)
            shape = (config.vocabulary, config.features)
            return parameter(init(rngs.params(), shape, jnp.float32), "VD", place.sharding)

        self.embedding = table()
        self.unembedding = nnx.data(None) if config.tied else table()
        self.blocks = nnx.List([Block(config, place, rngs) for _ in range(config.layers)])
        self.norm = _norm(config, place, rngs)
        self.place = place
        self.loss_options: dict[str, Any] = {
            "label_smoothing": config.label_smoothing,
            "z_loss": config.z_loss,
        }

    def __call__(self, tokens: Array, *, record: Record | None = None, **attention: Any) -> Array:
        """Logits `[B, S, V]`, float32, of tokens `[B, S]`; arguments as for `hidden`."""
        embedding, unembedding = self._tables()
        hidden = self._hidden(embedding, tokens, record=record, **attention)
        logits = self.place.arithmetic.unembed(hidden, unembedding)
        if record:
            record("logits", logits)
        return logits

    def hidden(self, tokens: Array, *, record: Record | None = None, **attention: Any) -> Array:
        """The last hidden states `[B, S, D]`.

        Args:
          tokens: `[B, S]`, sharded as the layout says.
          record: called with the name of each tensor, layer by layer, and the tensor.
          attention: `positions`, `segment_ids`, `decode`, as for `jax_seqpar.flax.Attention`;
            `dropout_rng`, a threefry key, without which nothing is dropped: that of layer i is
            `jax.random.fold_in(dropout_rng, i)`.
        """
        return self._hidden(self._tables()[0], tokens, record=record, **attention)

    def _hidden(
        self,
        table: Array,
        tokens: Array,
        *,
        record: Record | None,
        dropout_rng: Array | None = None,
        **attention: Any,
    ) -> Array:
        layout, arithmetic = self.place.layout, self.place.arithmetic
        if attention.get("decode"):  # a token has no devices to lie on
            layout = replace(layout, tokens=None)

        x = arithmetic.embed(table, tokens, layout=layout, dtype=self.place.dtype)
        note: Record = record or _no_record
        note("embedding", x)
        # What is recorded or cached would leave the loop, so nothing is computed again then.
        leaves = record or attention.get("decode") or attention.get("fill_cache")
        if self.place.remat and not leaves:
            x = self._computed_again(x, dropout_rng, attention)
        else:
            for i, block in enumerate(self.blocks):

                def note_of_layer(name: str, y: Array, i: int = i) -> None:
                    note(f"layers.{i}/{name}", y)

                x = block(x, note_of_layer, _key_of_layer(dropout_rng, i), **attention)
                note(f"layers.{i}/output", x)
        x = arithmetic.norm(self.norm, x)
        note("norm", x)
        return x

    def _computed_again(
        self, x: Array, dropout_rng: Array | None, attention: dict[str, Any]
    ) -> Array:
        """The blocks as one loop over their stacked weights, each computed again for its gradient.

        Only in a loop does a compiler for TPUs copy the inputs of the blocks to the host one by
        one (`jax_seqpar.training.offloaded`).
        """
        offload, layout = self.place.offload, self.place.layout
        graph = nnx.graphdef(self.blocks[0])
        weights = jax.tree.map(
            lambda *of_layers: jnp.stack(of_layers), *map(nnx.state, self.blocks)
        )

        def layer(x: Array, numbered: tuple[Array, nnx.State]) -> tuple[Array, None]:
            i, weights = numbered
            x = offloaded(x, layout=layout) if offload else x
            block = nnx.merge(graph, weights)
            return block(x, _no_record, _key_of_layer(dropout_rng, i), **attention), None

        policy = offload_policy if offload else None
        layer = jax.checkpoint(layer, policy=policy, prevent_cse=len(self.blocks) == 1)
        return jax.lax.scan(layer, x, (jnp.arange(len(self.blocks)), weights))[0]

    def loss(self, batch: Batch, **attention: Any) -> Array:
        """The mean cross entropy of a batch; arguments as for `hidden`."""
        attention |= {"positions": batch.positions, "segment_ids": batch.segment_ids}
        arithmetic, of_loss = self.place.arithmetic, (batch.labels, batch.normaliser)
        if self.place.tiles == 1:
            logits = self(batch.tokens, **attention)
            return arithmetic.cross_entropy(logits, *of_loss, **self.loss_options)
        embedding, unembedding = self._tables()
        hidden = self._hidden(embedding, batch.tokens, record=None, **attention)
        options = self.loss_options | {"tiles": self.place.tiles, "layout": self.place.layout}
        return arithmetic.tiled_cross_entropy(hidden, unembedding, *of_loss, **options)

    def _tables(self) -> tuple[Array, Array]:
        """Tables of embedding and unembedding, gathered; one table twice where they are tied."""

        def gathered(table: nnx.Param[Array]) -> Array:
            return gather(table[...], "VD", self.place.sharding, self.place.layout)

        if self.unembedding is not None:
            return gathered(self.embedding), gathered(self.unembedding)
        embedding, unembedding = self.place.arithmetic.fork(gathered(self.embedding), 2)
        return embedding, unembedding


def _no_record(name: str, x: Array) -> None:
    """Records nothing."""


def _key_of_layer(dropout_rng: Array | None, i: int | Array) -> Array | None:
    return None if dropout_rng is None else jax.random.fold_in(dropout_rng, i)


def _norm(config: Config, place: Placement, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(config.features, epsilon=config.epsilon, dtype=place.dtype, rngs=rngs)
