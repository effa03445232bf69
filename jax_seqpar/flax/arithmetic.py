"""The arithmetic of a model's layers: as XLA computes, or with bits that no mesh can change."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Integer

from ..exact import activation, embedding, linear, loss
from ..exact import dropout as exact_dropout
from ..exact import norm as exact_norm
from ..exact import rotary as exact_rotary
from ..exact import tiled_loss as exact_tiled_loss
from ..exact.attention import Exact
from ..exact.engines import Engine
from ..exact.narrow import narrow, widen
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
    """The operations of layers as XLA computes them: sums in an order of its own.

    A layer calls its operations and nothing else, so that another arithmetic needs no other layer.
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
        """y with a bias, whose axes are the last ones."""
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

    def head_norm(self, x: Array, scale: Array, epsilon: float) -> Array:
        """RMSNorm over the channels of each head."""
        return rms_norm(x, scale, epsilon)

    def rotate(self, rotary: Rotary, x: Array, positions: Any) -> Array:
        """The rotary embedding of x."""
        return rotary(x, positions)

    def swiglu(self, gate: Array, up: Array) -> Array:
        """`silu(gate) up`."""
        return jax.nn.silu(gate) * up

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


def _in_float32(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of float32, for operands of float32 or bfloat16; the result is as the first."""

    @wraps(function)
    def around(x: Array, *operands: Any) -> Any:
        check_is_narrow(x)
        out = function(widen(x), *operands)
        return jax.tree.map(lambda y: narrow(y, x.dtype), out)

    return around


@dataclass(frozen=True)
class ExactArithmetic(Arithmetic):
    """Operations whose sums are sums of integers: one function, whatever the mesh or the framework.

    Loss, gradients and, with the optimizers of `jax_seqpar.exact.optimizer`, weights are equal in
    every bit on any mesh, and to those of `torch_ref.exact`; `jax_seqpar/exact/SPEC.md` defines
    them. Parameters are float32, what goes from layer to layer is float32 or bfloat16. Rotary
    embeddings are those of a theta alone. Tiles change no bit: those of a loss divide S.

    Args:
      engine: of the products, one of `jax_seqpar.exact.engines`, that of the platform if None; no
        bit depends on it.
    """

    engine: Engine | None = None

    @property
    def kernel(self) -> Kernel | None:
        return Exact()

    @property
    def adds_tiles(self) -> bool:
        return False

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
        check_is_narrow(x)
        check_weights(kernel, precision)
        options: Any = {"engine": self.engine, "out_sharding": out_sharding}
        return narrow(linear.linear(letters, widen(x), kernel, **options), dtype)

    def add_bias(self, y: Array, bias: Array) -> Array:
        return _in_float32(linear.add_bias)(y, bias)

    def fork(self, x: Array, uses: int) -> tuple[Array, ...]:
        return _in_float32(linear.fork)(x, uses)

    def add(self, a: Array, b: Array) -> Array:
        return _in_float32(linear.add)(a, widen(b))

    def dropout(self, x: Array, rate: float, rng: Array, *, layout: MeshLayout) -> Array:
        numbers = token_numbers(x, layout)
        return _in_float32(exact_dropout.dropout)(x, rate, rng, numbers)

    def norm(self, layer: nnx.RMSNorm, x: Array) -> Array:
        assert layer.scale is not None
        return self.head_norm(x, layer.scale[...], layer.epsilon)

    def head_norm(self, x: Array, scale: Array, epsilon: float) -> Array:
        return _in_float32(exact_norm.rms_norm)(x, scale, epsilon)

    def rotate(self, rotary: Rotary, x: Array, positions: Any) -> Array:
        if rotary != Rotary(rotary.theta):
            raise ValueError(
                f"exact arithmetic turns all channels, in halves, by a theta alone, got "
                f"{rotary!r}. Write Rotary(theta={rotary.theta})."
            )
        return _in_float32(exact_rotary.rotary)(x, positions, rotary.theta)

    def swiglu(self, gate: Array, up: Array) -> Array:
        return _in_float32(activation.swiglu)(gate, widen(up))

    def embed(
        self,
        table: Float[Array, "V D"],
        tokens: Integer[Array, "B S"],
        *,
        layout: MeshLayout,
        dtype: Any,
    ) -> Float[Array, "B S D"]:
        return narrow(embedding.embed(table, tokens), dtype)

    def unembed(self, hidden: Array, table: Float[Array, "V D"]) -> Float[Array, "B S V"]:
        return linear.linear("BSD,VD->BSV", widen(hidden), table, engine=self.engine)

    def cross_entropy(
        self,
        logits: Array,
        labels: Array,
        normaliser: Any,
        *,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> Array:
        options: Any = {"label_smoothing": label_smoothing, "z_loss": z_loss}
        return loss.cross_entropy(logits, labels, normaliser=normaliser, **options)

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
        options: Any = {"label_smoothing": label_smoothing, "z_loss": z_loss}
        options |= {"tiles": tiles, "normaliser": normaliser, "engine": self.engine}
        return exact_tiled_loss.tiled_cross_entropy(widen(hidden), table, labels, **options)

    def log_probabilities(self, logits: Array, labels: Array) -> Array:
        return loss.log_probabilities(logits, labels)


def check_is_narrow(x: Array) -> None:
    """Raises ValueError unless x is float32 or bfloat16."""
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(
            f"exact arithmetic takes float32 and bfloat16 between layers, got {x.dtype}. Write "
            f"dtype=jnp.float32."
        )


def check_weights(kernel: Array, precision: Any) -> None:
    """Raises ValueError for weights that are not float32, and for a precision of products."""
    if kernel.dtype != jnp.float32:
        raise ValueError(
            f"exact arithmetic takes weights of float32, got {kernel.dtype}. Write "
            f"ParameterOptions(param_dtype=jnp.float32)."
        )
    if precision is not None:
        raise ValueError(
            f"precision={precision!r} rounds the products of float32, and exact arithmetic has one "
            f"rounding of its own. Leave it out of the ParameterOptions."
        )
