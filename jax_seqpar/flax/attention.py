"""The attention layer of today's decoders, for tokens sharded over a mesh."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Integer

from ..attention import dot_product_attention
from ..kernels import Kernel
from ..layout import MeshLayout, axes_size, names
from ..mask import Dropout, Logits, Mask, Window
from ..mesh import AnyMesh, find_mesh, place
from ..strategies import Strategy, Ulysses
from . import refusals
from .precision import kernel_precision
from .projection import Initializer, ParameterSharding, Projection, parameter
from .rotary import Rotary


class Attention(nnx.Module):
    """Self-attention with grouped queries, rotary embedding, and what else decoders use.

    `[B, S@seq, D] -> [B, S@seq, D]`. The letters of its parameters are their logical axes: D
    features, N query heads, K KV heads, H head dimension.

    Args:
      features: D.
      num_heads, num_kv_heads: N and K; K is N if None.
      head_dim: H; D / N if None.
      is_causal, local_window_size, logits_soft_cap, scale: as for `dot_product_attention`.
      rotary: turns query and key by their positions; None for no embedding.
      qk_norm: RMSNorm over the channels of each head of query and key, before the rotary embedding,
        with a scale for each channel (as in Qwen 3 and Gemma 3).
      norm_epsilon: of that norm.
      sinks: a learned logit for each query head, without a value (as in gpt-oss).
      use_bias: in query, key and value; `use_out_bias` in the output.
      dropout_rate, deterministic: of the weights; `deterministic` may be said at the call.
      kernel, strategy, layout: as for `dot_product_attention`.
      sharding, kernel_init, dtype, param_dtype: as for `Projection`.
      precision: of all products, the kernel's included, forward and backward: one
        `jax.lax.Precision` or its name. None leaves it to `jax.default_matmul_precision`.
      rngs: of `nnx`.

    Raises:
      ValueError: for sizes that make no attention.

    Example:
      layer = Attention(512, num_heads=8, num_kv_heads=2, rngs=nnx.Rngs(0))
      with jax.set_mesh(jax.make_mesh((8,), ("seq",))):
          y = layer(x, segment_ids=documents, positions=positions)
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        is_causal: bool = True,
        rotary: Rotary | None = Rotary(),
        qk_norm: bool = False,
        norm_epsilon: float = 1e-6,
        local_window_size: Window | None = None,
        logits_soft_cap: float | None = None,
        scale: float | None = None,
        sinks: bool = False,
        use_bias: bool = False,
        use_out_bias: bool = False,
        dropout_rate: float = 0.0,
        deterministic: bool | None = None,
        kernel: Kernel | Callable[..., Array] | None = None,
        strategy: Strategy = Ulysses(),
        layout: MeshLayout = MeshLayout(),
        sharding: ParameterSharding | None = None,
        kernel_init: Initializer = nnx.initializers.lecun_normal(),
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: jax.lax.PrecisionLike = None,
        rngs: nnx.Rngs,
    ) -> None:
        kernel_precision("Attention", precision)
        if head_dim is None:
            refusals.check_head_dim(features, num_heads)
            head_dim = features // num_heads
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        refusals.check_layer(features, num_heads, num_kv_heads, head_dim)
        self.features, self.rotary = features, rotary
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.layout = layout
        self.dropout_rate, self.deterministic = dropout_rate, deterministic
        self.norm_epsilon, self.precision = norm_epsilon, precision
        self.options = {
            "is_causal": is_causal,
            "local_window_size": local_window_size,
            "kernel": kernel,
        }
        self.logits = Logits(scale, logits_soft_cap)
        self.strategy = strategy

        sizes = {"D": features, "N": num_heads, "K": num_kv_heads, "H": head_dim}

        def projection(letters: str, use_bias: bool) -> Projection:
            return Projection(
                letters,
                sizes,
                sharding=sharding,
                layout=layout,
                kernel_init=kernel_init,
                use_bias=use_bias,
                dtype=dtype,
                param_dtype=param_dtype,
                precision=precision,
                rngs=rngs,
            )

        self.query = projection("BSD,DNH->BSNH", use_bias)
        self.key = projection("BSD,DKH->BSKH", use_bias)
        self.value = projection("BSD,DKH->BSKH", use_bias)
        self.out = projection("BSNH,NHD->BSD", use_out_bias)

        def ones() -> nnx.Param[Array]:
            return parameter(jnp.ones(head_dim, param_dtype), "H", sharding, layout.mesh)

        self.query_scale = ones() if qk_norm else nnx.data(None)
        self.key_scale = ones() if qk_norm else nnx.data(None)
        self.sinks: nnx.Param[Array] | None = nnx.data(None)
        if sinks:
            self.sinks = parameter(jnp.zeros(num_heads, param_dtype), "N", sharding, layout.mesh)
        self.cached_key: nnx.Cache[Array] | None = nnx.data(None)
        self.cached_value: nnx.Cache[Array] | None = nnx.data(None)
        self.cache_index: nnx.Cache[Array] | None = nnx.data(None)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Integer[Array | np.ndarray, "#B T"] | None = None,
        segment_ids: Integer[Array, "B T"] | None = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | None = None,
        decode: bool = False,
        record: Callable[[str, Array], None] | None = None,
    ) -> Float[Array, "B T D"]:
        """Attention of global arrays.

        Args:
          x: the tokens, sharded as the layout says.
          positions: for the rotary embedding, global; 0, 1, 2 ... if None, and those after what the
            cache holds when decoding. What attends to what goes by the order of the tokens.
          segment_ids: packed documents, as for `dot_product_attention`.
          deterministic, rngs: dropout unless deterministic, with `rngs.dropout()`.
          decode: x is what follows the tokens in the cache; they are attended to, and x is added to
            it. The devices share the cache by heads where they divide K, so that no key or value
            moves; otherwise each has it whole. All tokens fed are attended to, so prompts of a
            batch are of one length. Tokens beyond the end of the cache are refused, and give NaN
            under `jit`, which does not know how many it holds.
          record: called with "query", "key", "value" as they are attended with, and "context", what
            attention returns, each `[B, T, heads, H]`.

        Raises:
          ValueError: for what does not fit.
        """
        refusals.check_tokens(x, self.features, positions, segment_ids)
        deterministic = self.deterministic if deterministic is None else deterministic
        drops = self.dropout_rate > 0 and not deterministic
        if decode:
            mesh = (
                jax.sharding.get_abstract_mesh() if self.layout.mesh is None else self.layout.mesh
            )
            rate = self.dropout_rate if drops else 0.0
            refusals.check_decode(
                self.cached_key, self.cache_index, x, mesh.shape, segment_ids, rate
            )
        refusals.check_dropout(self.dropout_rate, deterministic, rngs)
        start = self.cache_index[...] if decode and self.cache_index is not None else 0
        order = (start + jnp.arange(x.shape[1], dtype=jnp.int32))[None]
        query, key, value = self._project(x, order if positions is None else positions)
        record = record or (lambda name, x: None)
        for name, projected in (("query", query), ("key", key), ("value", value)):
            record(name, projected)
        options: dict[str, Any] = self.options | {"logits": self.logits}
        if self.sinks is not None:
            options["logits"] = replace(self.logits, sinks=self.sinks[...].astype(jnp.float32))
        if drops and rngs is not None:
            options["dropout"] = Dropout(self.dropout_rate, rngs.dropout())
        with kernel_precision("Attention", self.precision):
            if decode:
                out = self._decode(query, key, value, order, options)
            else:
                options |= {"mask": Mask(segment_ids=segment_ids), "layout": self.layout}
                out = dot_product_attention(query, key, value, **options, strategy=self.strategy)
        record("context", out)
        return self.out(out)

    def _project(self, x: Array, positions: Array | np.ndarray) -> tuple[Array, Array, Array]:
        query, key, value = self.query(x), self.key(x), self.value(x)
        if self.query_scale is not None and self.key_scale is not None:
            query = _rms_norm(query, self.query_scale[...], self.norm_epsilon)
            key = _rms_norm(key, self.key_scale[...], self.norm_epsilon)
        if self.rotary is not None:
            query, key = self.rotary(query, positions), self.rotary(key, positions)
        return query, key, value

    def init_cache(self, batch: int, tokens: int, dtype: Any = jnp.float32) -> None:
        """An empty cache for decoding, `[B, S, K@(heads, tokens), H]`; whole if K does not divide.

        Raises:
          ValueError: if the devices cannot share batch or heads, and for sizes or a dtype that
            make no cache.
        """
        refusals.check_cache_sizes(batch, tokens, dtype)
        layout, mesh = self._decode_layout(None)
        refusals.check_cache_batch(batch, axes_size(layout.batch, mesh.shape), layout.batch)
        devices = axes_size(layout.heads, mesh.shape)
        refusals.check_cache_heads(self.num_heads, self.num_kv_heads, devices, layout.heads)
        empty = jnp.zeros((batch, tokens, self.num_kv_heads, self.head_dim), dtype)
        self.cached_key = nnx.Cache(self._place(empty, layout, mesh))
        self.cached_value = nnx.Cache(self._place(empty, layout, mesh))
        self.cache_index = nnx.Cache(jnp.zeros((), jnp.int32))

    def _decode(
        self, query: Array, key: Array, value: Array, order: Array, options: dict[str, Any]
    ) -> Array:
        assert self.cached_key is not None
        assert self.cached_value is not None
        assert self.cache_index is not None
        layout, mesh = self._decode_layout(query)
        start = self.cache_index[...]
        whole = []
        for cache, new in ((self.cached_key, key), (self.cached_value, value)):
            new = self._place(new.astype(cache[...].dtype), layout, mesh)
            cache[...] = jax.lax.dynamic_update_slice_in_dim(cache[...], new, start, axis=1)
            whole.append(cache[...].astype(query.dtype))
        self.cache_index[...] = start + query.shape[1]
        B, S = query.shape[0], whole[0].shape[1]
        keys = jnp.arange(S, dtype=jnp.int32)[None]
        # By their positions queries see neither what follows them nor the empty part of the cache.
        positions = (
            jnp.broadcast_to(order, (B, order.shape[1])),
            jnp.broadcast_to(keys, (B, S)),
        )
        if not options["is_causal"]:
            filled = jnp.full(B, start + query.shape[1], jnp.int32)
            options["key_value_seq_lengths"] = filled
        out = dot_product_attention(
            self._place(query, layout, mesh),
            *whole,
            mask=Mask(positions=positions),
            layout=layout,
            **options,
        )
        fits = start + query.shape[1] <= S  # beyond, other tokens were written over
        return jnp.where(fits, out, jnp.asarray(jnp.nan, out.dtype))

    def _decode_layout(self, query: Array | None) -> tuple[MeshLayout, AnyMesh]:
        """Heads over all the axes of heads and tokens: each device keeps its own part of each."""
        heads = (*names(self.layout.heads), *names(self.layout.tokens))
        return replace(self.layout, tokens=None, heads=heads), find_mesh(self.layout.mesh, query)

    def _place(self, x: Array, layout: MeshLayout, mesh: AnyMesh) -> Array:
        shared = x.shape[2] % axes_size(layout.heads, mesh.shape) == 0
        spec = layout.spec if shared else replace(layout, heads=None).spec
        return place(x, spec, mesh=mesh)


def _rms_norm(x: Array, scale: Array, epsilon: float) -> Array:
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide**2, axis=-1, keepdims=True)
    normal = wide * jax.lax.rsqrt(mean + epsilon)
    return (normal * scale.astype(jnp.float32)[None, None, None]).astype(x.dtype)
