"""A BERT encoder of Flax's own layers, which goes sequence-parallel by one argument.

    Encoder(config, attention_fn=SequenceParallel(), rngs=rngs)
    Encoder(config, SequenceParallel(kernel=Exact()), arithmetic=ExactArithmetic(), rngs=rngs)

Embeddings, post-norm blocks of attention and MLP, GELU, padding. No layer here knows that tokens
are sharded: on a mesh whose axes are Auto the compiler keeps all else where the tokens are. The
second line has the same bits on every mesh.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from jax_seqpar.bridge import Ignored, Map
from jax_seqpar.flax import Arithmetic

Record = Callable[[str, Array], None]


@dataclass(frozen=True)
class Config:
    """Sizes of an encoder: by default those of all-MiniLM-L6-v2."""

    vocabulary: int = 30_522
    positions: int = 512
    types: int = 2
    features: int = 384
    hidden: int = 1536
    layers: int = 6
    heads: int = 12
    epsilon: float = 1e-12


# Where the parameters of transformers' `BertModel` are here; N is of `sizes`.
FROM, TO = "encoder.layer.{i}", "layers.{i}"
MAPPING = (
    Map("embeddings.word_embeddings.weight", "words.embedding"),
    Map("embeddings.position_embeddings.weight", "positions.embedding"),
    Map("embeddings.token_type_embeddings.weight", "types.embedding"),
    Map("embeddings.LayerNorm.weight", "norm.scale"),
    Map("embeddings.LayerNorm.bias", "norm.bias"),
    Map(f"{FROM}.attention.self.query.weight", f"{TO}.attention.query.kernel", "(N H) D -> D N H"),
    Map(f"{FROM}.attention.self.query.bias", f"{TO}.attention.query.bias", "(N H) -> N H"),
    Map(f"{FROM}.attention.self.key.weight", f"{TO}.attention.key.kernel", "(N H) D -> D N H"),
    Map(f"{FROM}.attention.self.key.bias", f"{TO}.attention.key.bias", "(N H) -> N H"),
    Map(f"{FROM}.attention.self.value.weight", f"{TO}.attention.value.kernel", "(N H) D -> D N H"),
    Map(f"{FROM}.attention.self.value.bias", f"{TO}.attention.value.bias", "(N H) -> N H"),
    Map(f"{FROM}.attention.output.dense.weight", f"{TO}.attention.out.kernel", "D (N H) -> N H D"),
    Map(f"{FROM}.attention.output.dense.bias", f"{TO}.attention.out.bias"),
    Map(f"{FROM}.attention.output.LayerNorm.weight", f"{TO}.attention_norm.scale"),
    Map(f"{FROM}.attention.output.LayerNorm.bias", f"{TO}.attention_norm.bias"),
    Map(f"{FROM}.intermediate.dense.weight", f"{TO}.up.kernel", "F D -> D F"),
    Map(f"{FROM}.intermediate.dense.bias", f"{TO}.up.bias"),
    Map(f"{FROM}.output.dense.weight", f"{TO}.down.kernel", "D F -> F D"),
    Map(f"{FROM}.output.dense.bias", f"{TO}.down.bias"),
    Map(f"{FROM}.output.LayerNorm.weight", f"{TO}.mlp_norm.scale"),
    Map(f"{FROM}.output.LayerNorm.bias", f"{TO}.mlp_norm.bias"),
    Ignored("pooler.dense.weight", "texts are compared by the means of their tokens"),
    Ignored("pooler.dense.bias", "texts are compared by the means of their tokens"),
)


class Layer(nnx.Module):
    """One layer: attention and MLP, each added to what came before, and normed after."""

    def __init__(
        self,
        config: Config,
        attention_fn: Callable[..., Array],
        arithmetic: Arithmetic,
        rngs: nnx.Rngs,
    ) -> None:
        self.arithmetic = arithmetic
        self.attention = nnx.MultiHeadAttention(
            config.heads, config.features, attention_fn=attention_fn, decode=False, rngs=rngs
        )
        self.attention_norm = _norm(config, rngs)
        self.up = nnx.Linear(config.features, config.hidden, rngs=rngs)
        self.down = nnx.Linear(config.hidden, config.features, rngs=rngs)
        self.mlp_norm = _norm(config, rngs)

    def __call__(self, x: Array, mask: Array, record: Record | None) -> Array:
        note: Record = record or (lambda name, x: None)
        attention = _recording(self.attention, record) if record else self.attention
        do = self.arithmetic
        x, of_attention = do.fork(x, 2)
        mixed = do.self_attention(attention, of_attention, mask=mask)
        note("attention", mixed)
        x = do.layer_norm(self.attention_norm, do.add(x, mixed))
        note("attention_norm", x)
        x, of_mlp = do.fork(x, 2)
        fed = do.dense(self.down, do.gelu(do.dense(self.up, of_mlp)))
        note("mlp", fed)
        x = do.layer_norm(self.mlp_norm, do.add(x, fed))
        note("output", x)
        return x


class Encoder(nnx.Module):
    """An encoder: tokens to hidden states."""

    def __init__(
        self,
        config: Config,
        attention_fn: Callable[..., Array] = nnx.dot_product_attention,
        *,
        arithmetic: Arithmetic = Arithmetic(),
        rngs: nnx.Rngs,
    ) -> None:
        embed = partial(nnx.Embed, features=config.features, rngs=rngs)
        self.words = embed(config.vocabulary)
        self.positions = embed(config.positions)
        self.types = embed(config.types)
        self.norm = _norm(config, rngs)
        self.layers = nnx.List(
            Layer(config, attention_fn, arithmetic, rngs) for _ in range(config.layers)
        )
        self.arithmetic = arithmetic

    def __call__(
        self, tokens: Array, mask: Array, types: Array | None = None, record: Record | None = None
    ) -> Array:
        """Hidden states `[B, S, D]`.

        Args:
          tokens, types: integers `[B, S]`, sharded in any way; types are 0 if None.
          mask: boolean `[B, S]`, False for padding, to which nothing attends.
          record: called with the name of each tensor, layer by layer, and the tensor.
        """
        places = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        types = jnp.zeros_like(tokens) if types is None else types
        do = self.arithmetic
        x = do.add(do.look_up(self.words, tokens), do.look_up(self.types, types))
        # The same positions for every sequence: added as a bias is.
        x = do.layer_norm(self.norm, do.add_bias(x, do.look_up(self.positions, places)))
        if record:
            record("embedding", x)
        return self.through_layers(x, mask, record)

    def through_layers(self, x: Array, mask: Array, record: Record | None) -> Array:
        """The hidden states after all layers."""
        note: Record = record or (lambda name, x: None)
        for i, layer in enumerate(self.layers):
            of_layer = record and (lambda name, x, i=i: note(f"layers.{i}/{name}", x))
            x = layer(x, mask[:, None, None, :], of_layer)
        return x


def _norm(config: Config, rngs: nnx.Rngs) -> nnx.LayerNorm:
    # As PyTorch does it; Flax's fast variance, mean(x^2) - mean(x)^2, rounds more.
    return nnx.LayerNorm(
        config.features, epsilon=config.epsilon, use_fast_variance=False, rngs=rngs
    )


def _recording(attention: nnx.MultiHeadAttention, record: Record) -> nnx.MultiHeadAttention:
    """A copy of the layer that records what goes into and comes out of its `attention_fn`."""
    attend = attention.attention_fn

    # `wraps` shows arithmetic which function it is, also inside of this one.
    @wraps(attend, updated=())
    def recorded(query: Array, key: Array, value: Array, **options: Any) -> Array:
        out = attend(query, key, value, **options)
        for name, x in {"query": query, "key": key, "value": value, "context": out}.items():
            record(name, x)
        return out

    same = nnx.clone(attention, variables=False)
    same.attention_fn = recorded
    return same
