"""The arithmetic of a model's layers: operations as XLA computes them."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Integer

from ..exact import dropout as exact_dropout
from ..kernels import Kernel
from ..mask import threefry
from ..mesh_layout import MeshLayout
from ..training.loss import cross_entropy, tiled_cross_entropy
from ..training.tiles import map_tiles
from .norm import rms_norm
from .rotary import Rotary
from .token_numbers import token_numbers


@dataclass(frozen=True)
class Arithmetic:
    """The operations of layers as XLA computes them: sums in an order that XLA chooses.

    A layer calls its operations and nothing else, so that another arithmetic needs no other layer.
    Some operations are of arrays; `norm`, `layer_norm`, `dense`, `look_up` and `self_attention` are
    those of Flax's own layers, with the parameters that these hold.
    """

    @property
    def kernel(self) -> Kernel | None:
        """The attention of a layer that names none; None leaves it to `choose_kernel`."""
        return None

    @property
    def adds_tiles(self) -> bool:
        """Whether gradients of weights may be rounded in each tile of tokens, and then added."""
        return True

    def project(
        self,
        letters: str,
        x: Array,
        kernel: Array,
        *,
        dtype: Any,
        precision: jax.lax.PrecisionLike = None,
        out_sharding: Any = None,
    ) -> Array:
        """`einsum(letters, x, kernel)`, computed in a dtype."""
        x, kernel = x.astype(dtype), kernel.astype(dtype)
        return jnp.einsum(letters, x, kernel, precision=precision, out_sharding=out_sharding)

    def add_bias(self, y: Array, bias: Array) -> Array:
        """y with a bias, which broadcasts to it."""
        return y + bias.astype(y.dtype).reshape((1,) * (y.ndim - bias.ndim) + bias.shape)

    def fork(self, x: Array, uses: int) -> tuple[Array, ...]:
        """x, once for each of its uses, in whose order their gradients are added."""
        return (x,) * uses

    def add(self, a: Array, b: Array) -> Array:
        """A residual connection."""
        return a + b

    def dropout(self, x: Array, rate: float, rng: Array, *, layout: MeshLayout) -> Array:
        """x `[B, S, D]`, of which a part is dropped, by a key and by global coordinates.

        Args:
          rng: a threefry key of `jax.random.key`; every use needs another one.
          layout: of the tokens.
        """
        kept = exact_dropout.kept_activations(x.shape, rate, rng, token_numbers(x, layout))
        c = jnp.asarray(threefry.inverse_keep_probability(rate), x.dtype)
        return jnp.where(kept, x * c, jnp.zeros((), x.dtype))

    def norm(self, layer: nnx.RMSNorm, x: Array) -> Array:
        """RMSNorm over the features."""
        return layer(x)

    def layer_norm(self, layer: nnx.LayerNorm, x: Array) -> Array:
        """LayerNorm over the features."""
        return layer(x)

    def dense(self, layer: nnx.Linear | nnx.LinearGeneral, x: Array) -> Array:
        """A linear layer of the last axes, with its bias."""
        return layer(x)

    def look_up(self, layer: nnx.Embed, tokens: Integer[Array, "..."]) -> Array:
        """The rows of the tokens; NaN for one past the vocabulary.

        A negative token counts from the end of the table, as in `jnp.take`; in exact arithmetic it
        is NaN, too.
        """
        return layer(tokens)

    def self_attention(self, layer: nnx.MultiHeadAttention, x: Array, *, mask: Array) -> Array:
        """Attention of x `[B, S, D]` to itself; the mask broadcasts to `[B, N, S, S]`."""
        return layer(x, mask=mask)

    def head_norm(self, x: Array, scale: Array, epsilon: float) -> Array:
        """RMSNorm over the channels of each head."""
        return rms_norm(x, scale, epsilon)

    def rotate(self, rotary: Rotary, x: Array, positions: Any) -> Array:
        """The rotary embedding of x."""
        return rotary(x, positions)

    def swiglu(self, gate: Array, up: Array) -> Array:
        """`silu(gate) up`."""
        return jax.nn.silu(gate) * up

    def gelu(self, x: Array) -> Array:
        """`x Phi(x)`, Phi the normal distribution function."""
        return jax.nn.gelu(x, approximate=False)

    def embed(
        self,
        table: Float[Array, "V D"],
        tokens: Integer[Array, "B S"],
        *,
        layout: MeshLayout,
        dtype: Any,
    ) -> Float[Array, "B S D"]:
        """The rows of the tokens; NaN for one outside of the vocabulary."""

        def rows(table: Array, tokens: Array) -> Array:
            # JAX would take the last row.
            found = table.at[tokens].get(
                mode="fill", fill_value=jnp.nan, wrap_negative_indices=False
            )
            return found.astype(dtype)

        return map_tiles(rows, table, tokens, tiles=1, layout=layout)

    def unembed(self, hidden: Array, table: Float[Array, "V D"]) -> Float[Array, "B S V"]:
        """Logits in float32."""
        table = table.astype(hidden.dtype)
        return jnp.einsum("BSD,VD->BSV", hidden, table, preferred_element_type=jnp.float32)

    def cross_entropy(
        self,
        logits: Array,
        labels: Array,
        normaliser: Any,
        *,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> Array:
        """The mean over the labels that count."""
        options: Any = {"label_smoothing": label_smoothing, "z_loss": z_loss}
        return cross_entropy(logits, labels, normaliser=normaliser, **options)

    def tiled_cross_entropy(
        self,
        hidden: Array,
        table: Float[Array, "V D"],
        labels: Array,
        normaliser: Any,
        *,
        tiles: int,
        layout: MeshLayout,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> Array:
        """`cross_entropy` of `unembed(hidden, table)`, never with all the logits in memory.

        Args:
          tiles: of the tokens of each device; in exact arithmetic they divide S.
          layout: of the tokens; exact arithmetic goes by the sharding of the hidden states.
        """
        options: Any = {"label_smoothing": label_smoothing, "z_loss": z_loss}
        options |= {"tiles": tiles, "layout": layout, "normaliser": normaliser}
        return tiled_cross_entropy(hidden, table.T, labels, **options)

    def log_probabilities(self, logits: Array, labels: Array) -> Array:
        """`[B, S]`, of each label among the logits `[B, S, V]` of its token."""
        is_label = jnp.arange(logits.shape[-1])[None, None] == labels[..., None]
        return jnp.where(is_label, jax.nn.log_softmax(logits), 0).sum(-1)
