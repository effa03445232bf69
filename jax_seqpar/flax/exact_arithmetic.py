"""The arithmetic of a model's layers with bits that no mesh can change."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import jax
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
from ..mesh_layout import MeshLayout
from .arithmetic import Arithmetic
from .exact_checks import (
    check_attends_exactly,
    check_dense,
    check_dtype,
    check_is_narrow,
    check_norm,
    check_parameter,
    check_precision,
)
from .rotary import Rotary
from .token_numbers import token_numbers

AXES = "ABCDEFGH"


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
    them. Parameters are float32, what goes from layer to layer is float32 or bfloat16, of which a
    layer without a dtype returns that of x. Rotary embeddings are those of a theta alone. Tiles
    change no bit: those of a loss divide S.

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
        check_parameter("kernel", kernel)
        check_precision(precision)
        options: Any = {"engine": self.engine, "out_sharding": out_sharding}
        return narrow(linear.linear(letters, widen(x), kernel, **options), dtype)

    def add_bias(self, y: Array, bias: Array) -> Array:
        check_parameter("bias", bias)
        return _in_float32(linear.add_bias)(y, bias)

    def fork(self, x: Array, uses: int) -> tuple[Array, ...]:
        return _in_float32(linear.fork)(x, uses)

    def add(self, a: Array, b: Array) -> Array:
        return _in_float32(linear.add)(a, widen(b))

    def dropout(self, x: Array, rate: float, rng: Array, *, layout: MeshLayout) -> Array:
        numbers = token_numbers(x, layout)
        return _in_float32(exact_dropout.dropout)(x, rate, rng, numbers)

    def norm(self, layer: nnx.RMSNorm, x: Array) -> Array:
        check_norm(layer, x)
        assert layer.scale is not None
        return self.head_norm(x, layer.scale[...], layer.epsilon)

    def layer_norm(self, layer: nnx.LayerNorm, x: Array) -> Array:
        check_norm(layer, x)
        assert layer.scale is not None
        assert layer.bias is not None
        parameters = layer.scale[...], layer.bias[...]
        return _in_float32(exact_norm.layer_norm)(x, *parameters, layer.epsilon)

    def dense(self, layer: nnx.Linear | nnx.LinearGeneral, x: Array) -> Array:
        check_dense(layer, x)
        kernel, outputs = layer.kernel[...], layer.out_features
        # The first axes of a kernel are the last ones of x.
        out_axes = 1 if isinstance(outputs, int) else len(outputs)
        in_axes = kernel.ndim - out_axes
        tokens = x.ndim - in_axes
        of_x, of_kernel = AXES[: x.ndim], AXES[tokens : tokens + kernel.ndim]
        letters = f"{of_x},{of_kernel}->{of_x[:tokens]}{of_kernel[in_axes:]}"
        y = self.project(letters, x, kernel, dtype=x.dtype, precision=layer.precision)
        return y if layer.bias is None else self.add_bias(y, layer.bias[...])

    def look_up(self, layer: nnx.Embed, tokens: Integer[Array, "..."]) -> Array:
        table = layer.embedding[...]
        check_parameter("embedding", table)
        return narrow(embedding.embed(table, tokens), layer.dtype)

    def self_attention(self, layer: nnx.MultiHeadAttention, x: Array, *, mask: Array) -> Array:
        check_attends_exactly(layer)
        check_dtype(layer, x)
        uses = zip((layer.query, layer.key, layer.value), self.fork(x, 3), strict=True)
        query, key, value = (self.dense(projection, y) for projection, y in uses)
        return self.dense(layer.out, layer.attention_fn(query, key, value, mask=mask))

    def head_norm(self, x: Array, scale: Array, epsilon: float) -> Array:
        check_parameter("scale", scale)
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

    def gelu(self, x: Array) -> Array:
        return _in_float32(activation.gelu)(x)

    def embed(
        self,
        table: Float[Array, "V D"],
        tokens: Integer[Array, "B S"],
        *,
        layout: MeshLayout,
        dtype: Any,
    ) -> Float[Array, "B S D"]:
        check_parameter("embedding", table)
        return narrow(embedding.embed(table, tokens), dtype)

    def unembed(self, hidden: Array, table: Float[Array, "V D"]) -> Float[Array, "B S V"]:
        check_parameter("embedding", table)
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
        check_parameter("embedding", table)
        options: Any = {"label_smoothing": label_smoothing, "z_loss": z_loss}
        options |= {"tiles": tiles, "normaliser": normaliser, "engine": self.engine}
        return exact_tiled_loss.tiled_cross_entropy(widen(hidden), table, labels, **options)

    def log_probabilities(self, logits: Array, labels: Array) -> Array:
        return loss.log_probabilities(logits, labels)
