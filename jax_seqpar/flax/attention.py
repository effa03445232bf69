"""The attention layer of today's decoders, for tokens sharded over a mesh."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Integer

from ..attention import dot_product_attention
from ..decoding import attend_to_cache
from ..decoding.slots import EMPTY
from ..kernels import Kernel
from ..mask import Dropout, Logits, Mask, accumulated
from ..mesh import find_mesh
from ..mesh_layout import MeshLayout, check_is_layout
from ..strategies import Strategy, Ulysses
from .cache import (
    LayerCache,
    SharedBy,
    check_decode,
    decoding_kernel,
    empty_cache,
)
from .checks import check_tokens
from .layer_checks import (
    PROJECTIONS,
    check_dropout,
    check_head_dim,
    check_layer,
    check_lengths,
    check_modes,
    check_own_rules,
    check_token_division,
    check_use_bias,
)
from .norm import check_qk_norm
from .precision import kernel_precision
from .projection import ParameterOptions, Projection, parameter
from .rotary import Rotary
from .token_numbers import token_numbers


class Attention(nnx.Module):
    """Causal self-attention with rotary embedding by default: the attention of decoders.

    `[B, S@seq, D] -> [B, S@seq, D]`. `mask=Mask()` and `rotary=None` switch the two off. The
    letters of its parameters are their logical axes: D features, N query heads, K KV heads, H head
    dimension. A query that may attend to no key adds nothing, where Flax's layers give the mean of
    the values; under causality or in a document each query has itself.

    Args:
      features: D.
      num_heads, num_kv_heads: N and K; K is N if None.
      head_dim: H; D / N if None.
      mask: causality and window of every call. Segment ids are given at the call.
      logits: scale and soft cap.
      rotary: turns query and key by their positions; None for no embedding.
      qk_norm: the epsilon of an RMSNorm over the channels of each head of query and key, before the
        rotary embedding, with a scale for each channel (as in Qwen 3, 1e-6; Gemma 3 keeps the
        scale less 1, so add it when weights are ported); None for no norm.
      sinks: a learned logit for each query head, without a value (as in gpt-oss).
      use_bias: the projections that have a bias: all (True), none (False), or some of "query",
        "key", "value" and "out" (Qwen 2 has the first three, Whisper all but the key's).
      dropout_rate: of the weights.
      kernel, strategy, layout: as for `dot_product_attention`.
      parameters: initializer, sharding and dtypes of all projections. Its precision is that of all
        products, the kernel's included, forward and backward: one `jax.lax.Precision` or its name;
        None leaves it to `jax.default_matmul_precision`.
      rngs: of `nnx`.

    Attributes:
      deterministic: whether dropout is off where the call does not say; None, and so an error,
        until `model.train()` or `model.eval()` sets it.

    Raises:
      ValueError: for sizes that make no attention, and for arrays in `mask` or `logits`.

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
        mask: Mask = Mask(is_causal=True),
        logits: Logits = Logits(),
        rotary: Rotary | None = Rotary(),
        qk_norm: float | None = None,
        sinks: bool = False,
        use_bias: bool | Sequence[str] = False,
        dropout_rate: float = 0.0,
        kernel: Kernel | Callable[..., Array] | None = None,
        strategy: Strategy | Literal["auto"] = Ulysses(),
        layout: MeshLayout = MeshLayout(),
        parameters: ParameterOptions = ParameterOptions(),
        rngs: nnx.Rngs,
    ) -> None:
        check_own_rules(mask, logits)
        check_is_layout(layout)
        kernel_precision("Attention", parameters.precision)
        if head_dim is None:
            check_head_dim(features, num_heads)
            head_dim = features // num_heads
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_layer(features, num_heads, num_kv_heads, head_dim)
        check_qk_norm(qk_norm)
        Dropout(dropout_rate)  # which refuses what is no rate
        check_use_bias(use_bias)
        self.features, self.num_heads, self.num_kv_heads = features, num_heads, num_kv_heads
        self.head_dim, self.rotary, self.qk_norm = head_dim, rotary, qk_norm
        self.mask, self.logits = mask, logits
        self.kernel = parameters.arithmetic.kernel if kernel is None else kernel
        self.strategy, self.layout = strategy, layout
        self.dropout_rate, self.precision = dropout_rate, parameters.precision
        self.arithmetic = parameters.arithmetic
        self.deterministic: bool | None = None

        sizes = {"D": features, "N": num_heads, "K": num_kv_heads, "H": head_dim}
        biased = PROJECTIONS if use_bias is True else use_bias or ()

        def projection(name: str, letters: str) -> Projection:
            return Projection(
                letters,
                sizes,
                use_bias=name in biased,
                layout=layout,
                parameters=parameters,
                rngs=rngs,
            )

        def own_parameter(value: Array, letters: str) -> nnx.Param[Array]:
            value = value.astype(parameters.param_dtype)
            return parameter(value, letters, parameters.sharding, layout.mesh)

        self.query = projection("query", "BSD,DNH->BSNH")
        self.key = projection("key", "BSD,DKH->BSKH")
        self.value = projection("value", "BSD,DKH->BSKH")
        self.out = projection("out", "BSNH,NHD->BSD")
        self.query_scale: nnx.Param[Array] | None = nnx.data(None)
        self.key_scale: nnx.Param[Array] | None = nnx.data(None)
        if qk_norm is not None:
            self.query_scale = own_parameter(jnp.ones(head_dim), "H")
            self.key_scale = own_parameter(jnp.ones(head_dim), "H")
        self.sinks: nnx.Param[Array] | None = nnx.data(None)
        if sinks:
            self.sinks = own_parameter(jnp.zeros(num_heads), "N")
        self.cache: nnx.Cache[Any] | None = nnx.data(None)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Integer[Array | np.ndarray, "#B T"] | None = None,
        segment_ids: Integer[Array, "B T"] | None = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | None = None,
        decode: bool = False,
        fill_cache: bool = False,
        lengths: Integer[Array | np.ndarray, "B"] | None = None,
        record: Callable[[str, Array], None] | None = None,
    ) -> Float[Array, "B T D"]:
        """Attention of global arrays.

        Args:
          x: the tokens, sharded as the layout says.
          positions: for the rotary embedding, global; if None the numbers of the tokens in their
            sequence, in the order of the layout, and in decoding those after what the cache holds.
            What attends to what goes by the order of the tokens.
          segment_ids: packed documents, as for `dot_product_attention`.
          deterministic, rngs: dropout unless deterministic, with `rngs.dropout()`.
          decode: x is what follows the tokens in the cache, whole on every device of the tokens;
            they are attended to, and x is added to them. Tokens beyond the end of the cache are
            refused, and give NaN in their rows under `jit`, which does not know how many it holds.
            `SlotBlocks()` computes it in place of any kernel but `Exact()`.
          fill_cache: x is a whole prompt, attended to as in training by the strategy, whose keys
            and values replace what is in the cache.
          lengths: with one of these two, how many tokens of each row of x are not padding; None for
            all. The output of padding is undefined.
          record: called with "query", "key", "value" as they are attended with, and "context", what
            attention returns, each `[B, T, heads, H]`.

        Raises:
          ValueError: for arrays and options that do not fit.
        """
        check_tokens(x, self.features, positions, segment_ids)
        deterministic = self.deterministic if deterministic is None else deterministic
        drops = self.dropout_rate > 0 and not deterministic
        cache = None if self.cache is None else self.cache.get_value()
        if decode or fill_cache:
            mesh = self.layout.mesh or jax.sharding.get_abstract_mesh()
            rate = self.dropout_rate if drops else 0.0
            check_lengths(lengths, x)
            tokens = x.shape[1] if lengths is None else lengths
            check_decode(cache, x, tokens, mesh.shape, segment_ids, rate, fills=fill_cache)
        check_modes(x, lengths, decode=decode, fill_cache=fill_cache)
        check_dropout(self.dropout_rate, deterministic, rngs)
        numbers = self._numbers(x, cache.next_position if decode and cache is not None else None)
        query, key, value = self._project(x, numbers if positions is None else positions)
        record = record or (lambda name, x: None)
        for name, projected in (("query", query), ("key", key), ("value", value)):
            record(name, projected)
        logits = self.logits
        if self.sinks is not None:
            logits = replace(logits, sinks=_widened(self.sinks[...]))
        if fill_cache and cache is not None:
            self._fill(cache, key, value, numbers, lengths)
        with kernel_precision("Attention", self.precision):
            if decode and cache is not None:
                out = self._decode(cache, query, key, value, numbers, lengths, logits)
            else:
                check_token_division(x.shape, self.layout, find_mesh(self.layout.mesh, query))
                rng = rngs.dropout() if drops and rngs is not None else None
                out = dot_product_attention(
                    query,
                    key,
                    value,
                    mask=self.mask & Mask(segment_ids=segment_ids),
                    logits=logits,
                    dropout=None if rng is None else Dropout(self.dropout_rate, rng),
                    kernel=self.kernel,
                    strategy=self.strategy,
                    layout=self.layout,
                )
        record("context", out)
        return self.out(out)

    def _numbers(self, x: Array, start: Array | None) -> Array:
        """`[1, T]`, numbers of the tokens in their sequence; in decoding `[B, T]`, from `start` on.

        Args:
          start: `[B]`.
        """
        if start is not None:
            return start[:, None] + jnp.arange(x.shape[1], dtype=jnp.int32)[None]
        return token_numbers(x, self.layout)[None]

    def _project(self, x: Array, positions: Array | np.ndarray) -> tuple[Array, Array, Array]:
        of_query, of_key, of_value = self.arithmetic.fork(x, 3)
        query, key, value = self.query(of_query), self.key(of_key), self.value(of_value)
        if self.query_scale is not None and self.key_scale is not None:
            assert self.qk_norm is not None
            query = self.arithmetic.head_norm(query, self.query_scale[...], self.qk_norm)
            key = self.arithmetic.head_norm(key, self.key_scale[...], self.qk_norm)
        if self.rotary is not None:
            query = self.arithmetic.rotate(self.rotary, query, positions)
            key = self.arithmetic.rotate(self.rotary, key, positions)
        return query, key, value

    def init_cache(
        self,
        batch: int,
        tokens: int,
        dtype: Any = jnp.float32,
        *,
        shared_by: SharedBy | None = None,
        at_once: int | None = None,
    ) -> None:
        """An empty cache for decoding.

        Args:
          batch: B.
          tokens: of the longest sequence. A prompt that is shared along the sequence takes slots
            for its padding, too.
          shared_by: how the devices of heads and tokens share it: by "heads", where a step sends
            nothing; or along the "sequence", with one maximum and one sum a step
            (`jax_seqpar.decoding`). None takes heads where the devices divide the KV heads.
          at_once: the most tokens that a call decodes. With it a layer with a window keeps a ring
            buffer of its last tokens alone.

        Raises:
          ValueError: if the devices cannot share batch or heads, and for sizes or a dtype that
            make no cache.
        """
        cache = empty_cache(
            batch,
            tokens,
            dtype,
            kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            shared_by=shared_by,
            layout=self.layout,
            mask=self.mask,
            at_once=at_once,
        )
        self.cache = nnx.Cache(cache)

    def _fill(
        self, cache: LayerCache, key: Array, value: Array, numbers: Array, lengths: Any
    ) -> None:
        """Puts a prompt into the cache."""
        B, T = key.shape[:2]
        held = jnp.full(B, T, jnp.int32) if lengths is None else _of_rows(lengths, T)
        tokens = cache.tokens.fill(key, value, positions=numbers, lengths=held)
        self._keep(LayerCache(tokens, held))

    def _decode(
        self,
        cache: LayerCache,
        query: Array,
        key: Array,
        value: Array,
        positions: Array,
        lengths: Any,
        logits: Logits,
    ) -> Array:
        T, kernel = query.shape[1], decoding_kernel(self.kernel)
        count: Any = T
        if lengths is not None:
            count = _of_rows(lengths, T)
            is_token = jnp.arange(T, dtype=jnp.int32)[None] < count[:, None]
            positions = jnp.where(is_token, positions, EMPTY)
        tokens = cache.tokens.append(key, value, positions)
        attend = partial(attend_to_cache, mask=self.mask, logits=logits, kernel=kernel)
        out = attend(query, tokens, positions=positions)
        # After what may be refused.
        self._keep(LayerCache(tokens, cache.next_position + count))
        return out

    def _keep(self, cache: LayerCache) -> None:
        assert self.cache is not None
        self.cache.set_value(cache)


def _of_rows(lengths: Any, most: int) -> Array:
    """Lengths as int32, clipped to `0 ... most`, as under `jit` they cannot be checked."""
    return jnp.clip(jnp.asarray(lengths, jnp.int32), 0, most)


def _widened(x: Array) -> Array:
    """Array in the dtype of logits, float32 for 16 bits: the gradient is then rounded once."""
    return x.astype(accumulated(x.dtype))
