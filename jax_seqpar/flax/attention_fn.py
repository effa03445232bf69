"""The `attention_fn` of Flax's own attention layers, for tokens sharded over a mesh."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax.nnx.nn.dtypes import promote_dtype as flax_promote_dtype
from jaxtyping import Array, Float, Shaped

from .._checks import check_flag
from ..attention import dot_product_attention
from ..kernels import Kernel
from ..mask import Dropout, Logits, Window, head_keys
from ..mask.sequence_padding import pad_to_degree
from ..mesh import find_mesh
from ..mesh_layout import MeshLayout, axes_size, check_is_layout, check_mesh
from ..order import Contiguous
from ..strategies import Strategy, Ulysses
from .checks import check_array
from .precision import kernel_precision


class _Instances:
    """Raises TypeError where Flax calls the class itself as its attention function."""

    def __new__(cls, *arguments: Any, **options: Any) -> Any:
        check_makes_instance(arguments, options)
        return super().__new__(cls)


@dataclass(frozen=True)
class SequenceParallel(_Instances):
    """`attention_fn=SequenceParallel(...)` of `nnx.MultiHeadAttention` and of linen's
    `MultiHeadDotProductAttention`.

    A function with the contract of Flax's `dot_product_attention`, of both kinds. Nothing is
    dropped: every argument of Flax's functions is named here, and honoured or refused. Frozen and
    equal by value, so a module that holds it is compiled once.

    Args:
      kernel, strategy, layout: as for `jax_seqpar.dot_product_attention`.
      is_causal: in addition to what Flax asks for. Linen has no other way to say it but a mask of
        T x S; with nnx it is the same as `is_causal=True` at the call.
      local_window_size, logits_soft_cap: as there; Flax has no word for them.

    Flax's cache gives one query and S keys, and a mask of the keys so far, but not the position of
    the query. Decode without is_causal, at construction and at the call, and without a window: they
    are refused then. Flax before 0.12.12 passes `is_causal` on while decoding; write
    `layer(x, is_causal=not decode)`.

    Example:
      nnx.MultiHeadAttention(8, 512, attention_fn=SequenceParallel(), decode=False, rngs=rngs)
    """

    layout: MeshLayout = MeshLayout()
    kernel: Kernel | Callable[..., Array] | None = None
    is_causal: bool = False
    local_window_size: Window | None = None
    logits_soft_cap: float | None = None
    strategy: Strategy | Literal["auto"] = Ulysses()

    def __post_init__(self) -> None:
        check_is_layout(self.layout)

    def __call__(
        self,
        query: Float[Array, "*batch T N H"],
        key: Float[Array, "*batch S K H"],
        value: Float[Array, "*batch S K V"],
        bias: Shaped[Array | np.ndarray, "..."] | None = None,
        mask: Shaped[Array | np.ndarray, "..."] | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: Any = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        precision: Any = None,
        module: Any = None,
        promote_dtype: Callable[..., Any] = flax_promote_dtype,
        is_causal: bool = False,
        force_fp32_for_softmax: bool = False,
        einsum_dot_general: Any = None,
        qk_attn_weights_einsum: Any = None,
        attn_weights_value_einsum: Any = None,
    ) -> Float[Array, "*batch T N V"]:
        """Attention of global arrays whose tokens are sharded.

        Tokens that the degree does not divide are padded, so that a layer can be initialised with
        one token and decode token by token; one sequence that a batch axis cannot divide is
        attended on all its devices. A query that may attend to no key gives 0, where Flax gives
        the mean of the values.

        Args:
          query, key, value: with any number of batch axes, none included.
          bias: floating, broadcastable to `[*batch, N, T, S]`.
          mask: broadcastable to the same; a nonzero attends, of any dtype (linen makes floats).
          broadcast_dropout: one dropout mask for all sequences and heads.
          dropout_rng, dropout_rate, deterministic: dropout unless deterministic. The weights that
            are dropped are those of `jax_seqpar`, the same at every degree, not those of Flax.
          dtype, promote_dtype: of query, key and value, as in Flax.
          is_causal: query i attends to keys 0 to i, in addition to the mask; for S > 1 keys of a
            single query refused.
          force_fp32_for_softmax: always so, whatever is said.
          precision: of the kernel's products, forward and backward: one for both operands.
          module (`sow_weights`), einsum_dot_general, qk_attn_weights_einsum,
            attn_weights_value_einsum: refused.

        Raises:
          ValueError: for unsupported arguments, and for sizes that do not fit.
        """
        check_flax(
            module=module,
            einsum_dot_general=einsum_dot_general,
            qk_attn_weights_einsum=qk_attn_weights_einsum,
            attn_weights_value_einsum=attn_weights_value_einsum,
        )
        check_flag("force_fp32_for_softmax", force_fp32_for_softmax)
        check_batch_axes(query, key, value)
        check_query_positions(
            query.shape[-3],
            key.shape[-3],
            own_rules=self.is_causal or self.local_window_size is not None,
            is_causal_at_call=is_causal,
        )
        query, key, value = promote_dtype((query, key, value), dtype=dtype)
        *batch, T, N, _ = query.shape
        B = math.prod(batch)
        q, k, v = (x.reshape(B, *x.shape[-3:]) for x in (query, key, value))
        check_axes(batch, mask=mask, bias=bias)
        mask = None if mask is None else _one_batch_axis(jnp.asarray(mask), batch).astype(bool)
        bias = None if bias is None else _one_batch_axis(jnp.asarray(bias), batch)
        options: dict[str, Any] = {}
        if dropout_rate > 0 and not deterministic:
            rng = dropout_rng
            if broadcast_dropout and rng is not None:
                rng = jnp.broadcast_to(head_keys(rng, 1, 1), (q.shape[0], N, 2))
            options["dropout"] = Dropout(dropout_rate, rng)

        mesh = find_mesh(self.layout.mesh, query)
        check_mesh(self.layout, mesh.shape, ())
        layout = replace(self.layout, batch=None) if q.shape[0] == 1 else self.layout
        degree = axes_size(layout.tokens, mesh.shape)
        multiple = layout.order.multiple(degree)
        if layout.order != Contiguous() and (T % multiple or key.shape[-3] % multiple):
            # Arrays of such lengths, as in decoding, are in the order of the sequence.
            if self.is_causal or is_causal or self.local_window_size is not None:
                layout.order.check("query", T, degree)
                layout.order.check("key", key.shape[-3], degree)
            layout = replace(layout, order=Contiguous())
        padded = pad_to_degree(
            q, k, v, degree=degree, bias=bias, mask=mask, logits=Logits(None, self.logits_soft_cap)
        )
        with kernel_precision("SequenceParallel", precision):
            out = dot_product_attention(
                padded.query,
                padded.key,
                padded.value,
                **padded.keywords,
                **options,
                is_causal=self.is_causal or is_causal,
                local_window_size=self.local_window_size,
                kernel=self.kernel,
                strategy=self.strategy,
                layout=layout,
            )
        return padded.unpad(out).reshape(*batch, T, N, v.shape[-1])


def _one_batch_axis(x: Array, batch: list[int]) -> Array:
    """Array that broadcasts to `[B, N, T, S]`, from one that broadcasts to `[*batch, N, T, S]`."""
    x = x.reshape((1,) * (len(batch) + 3 - x.ndim) + x.shape)
    if len(batch) > 1 and any(n > 1 for n in x.shape[:-3]):
        x = jnp.broadcast_to(x, (*batch, *x.shape[-3:]))
    return x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])


# The arguments of Flax's layers that Flax passes on under other names.
_GIVEN_AS = {
    "qk_attn_weights_einsum": "qk_attn_weights_einsum_cls",
    "attn_weights_value_einsum": "attn_weights_value_einsum_cls",
}


def check_flax(**arguments: Any) -> None:
    """Raises ValueError for arguments of Flax that this attention function does not support."""
    for name, x in arguments.items():
        if x is None:
            continue
        if name == "module":
            raise ValueError(
                f"SequenceParallel does not support {name}: sow_weights needs the T x S weights, "
                f"which are never in memory. Use Flax's own dot_product_attention to look at them, "
                f"on a short sequence."
            )
        raise ValueError(
            f"SequenceParallel does not support {name}: the kernels make their own products. "
            f"Leave {_GIVEN_AS.get(name, name)} out."
        )


def check_makes_instance(arguments: Sequence[Any], options: Mapping[str, Any]) -> None:
    """Raises TypeError for the arguments that Flax gives to an attention function."""
    if any(hasattr(x, "shape") for x in arguments[:1]) or {"query", "mask"} & set(options):
        raise TypeError(
            "attention_fn=SequenceParallel is the class: Flax would call it in place of an "
            "instance. Write attention_fn=SequenceParallel(), or SequenceParallel(layout)."
        )


def check_batch_axes(query: Any, key: Any, value: Any) -> None:
    """Raises ValueError unless query, key and value have the same batch axes."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_array(name, x)
    shapes = [x.shape for x in (query, key, value)]
    if any(len(shape) < 3 for shape in shapes) or len({shape[:-3] for shape in shapes}) > 1:
        raise ValueError(
            f"query, key and value must be [*batch, tokens, heads, channels] with the same batch "
            f"axes, got {shapes[0]}, {shapes[1]}, {shapes[2]}. Broadcast the smaller ones."
        )


def check_axes(batch: Sequence[int], **arrays: Any) -> None:
    """Raises ValueError for a mask or bias that does not broadcast to `[*batch, N, T, S]`."""
    for name, x in arrays.items():
        if x is None:
            continue
        shape = np.shape(x)
        pairs = zip(reversed(batch), reversed(shape[:-3]), strict=False)
        if len(shape) > len(batch) + 3 or any(n not in (1, size) for size, n in pairs):
            raise ValueError(
                f"{name} must broadcast to [*batch, N, T, S] with the batch axes {tuple(batch)} of "
                f"the query, got shape {shape}. Take its other axes away, {name}[0] say."
            )


def check_query_positions(
    queries: int, keys: int, *, own_rules: bool, is_causal_at_call: bool
) -> None:
    """Raises ValueError for causality or windows where the positions of queries are unknown.

    Args:
      own_rules: `is_causal` or a window of the SequenceParallel; they need T = S.
      is_causal_at_call: query i sees the keys up to i, as in Flax. A single query of more keys is
        taken for a step of decoding: it would see the first key only.
    """
    if queries != keys and own_rules:
        raise ValueError(
            f"{queries} queries and {keys} keys: SequenceParallel(is_causal=, local_window_size=) "
            f"is not told where the queries are. Decode with SequenceParallel() and Flax's mask, "
            f"or with jax_seqpar.flax.Attention."
        )
    if queries == 1 < keys and is_causal_at_call:
        raise ValueError(
            f"1 query and {keys} keys with is_causal=True: the query would be taken for the first "
            f"token and see one key. When decoding write is_causal=False: Flax's mask of its cache "
            f"leaves out what follows the query. Elsewhere give mask=."
        )
