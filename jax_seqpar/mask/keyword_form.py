"""The keyword form of an attention: one list of keywords for every kernel and for the mesh."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Bool, Float, Integer

from .keywords import describe
from .mask import PerToken, Window


@runtime_checkable
class Attention(Protocol):
    """The keywords of every attention of this library.

    Names shared with `jax.nn.dot_product_attention` mean the same. A query attends to the keys that
    all of `mask`, `is_causal`, lengths, window and segments allow; one that may attend to no key
    gives 0. Everything is in the coordinates of the whole sequence.

    Args:
      query: `[B, T, N, H]`.
      key: `[B, S, K, H]`; K divides N, and query head n reads KV head `n // (N / K)`.
      value: `[B, S, K, V]`; all three of one floating dtype.
      bias: added to the logits; floating, each axis that of `[B, N, T, S]` or 1.
      mask: True attends; each axis that of `[B, N, T, S]` or 1.
      scale: of the logits; `1 / sqrt(H)` if None.
      is_causal: keys at or before the query's position. A query has the position
        `query_offset + t`, a key the position s: without an offset the causal diagonal starts in
        the top left corner, as in `jax.nn` and PyTorch; with `query_offset=S - T` it ends in the
        bottom right one, as in FlashAttention.
      query_offset: the position of the first query.
      positions: `[B, S]`, or a pair `[B, T]`, `[B, S]`, in place of the positions above, below 2^30
        in size; causality, window and ALiBi go by them.
      query_seq_lengths: `[B]`; queries `t < length`.
      key_value_seq_lengths: `[B]`; keys `s < length`.
      local_window_size: positions from `left` before the query's to `right` after it; one integer
        stands for both sides, None or -1 opens a side.
      segment_ids: `[B, S]`, or a pair `[B, T]`, `[B, S]`; a query attends to the keys of its own
        segment. Padding is a segment of its own.
      alibi_slopes: `[N]`; logits lose slope times the distance of the positions, which counts as
        2^29 beyond that.
      logits_soft_cap: logits become `cap * tanh(logits / cap)`, before bias and slopes.
      sinks: `[N]`, one more logit of each query head, without a value.
      dropout_rate: the part of the weights that is dropped, the others scaled up.
      dropout_rng: a threefry key of `jax.random.key`, or `[B, N, 2]` of `jax_seqpar.head_keys`.
        Which weights are dropped is a function of it and of (batch, head, query, key), counted from
        0 in the whole attention.
      options: those of the kernel.

    Raises:
      ValueError: for arrays and options that do not fit together, naming the array and its sizes.
      TypeError: for a keyword that the attention does not have.
    """

    __name__: str

    def __call__(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B S K H"],
        value: Float[Array, "B S K V"],
        *,
        bias: Float[Array, "..."] | None = None,
        mask: Bool[Array, "..."] | None = None,
        scale: float | None = None,
        is_causal: bool = False,
        query_offset: int = 0,
        positions: PerToken | None = None,
        query_seq_lengths: Integer[Array, "B"] | None = None,
        key_value_seq_lengths: Integer[Array, "B"] | None = None,
        local_window_size: Window | None = None,
        segment_ids: PerToken | None = None,
        alibi_slopes: Float[Array, "N"] | None = None,
        logits_soft_cap: float | None = None,
        sinks: Float[Array, "N"] | None = None,
        dropout_rate: float = 0.0,
        dropout_rng: Any = None,
        **options: Any,
    ) -> Any: ...


def keyword_form(attend: Callable[..., Any]) -> Attention:
    """`attend(query, key, value, spec, **options)` as a function of the keywords of `Attention`.

    The function itself is the attribute `of_spec` of the result.
    """
    _, *common, _ = inspect.signature(Attention.__call__).parameters.values()
    _, _, _, _, *own = inspect.signature(attend).parameters.values()
    signature = inspect.Signature([*common, *own])
    names = [parameter.name for parameter in own]

    @wraps(attend)
    def attention(*args: Any, **keywords: Any) -> Any:
        try:
            given = dict(signature.bind(*args, **keywords).arguments)
        except TypeError as error:
            raise TypeError(f"{attend.__name__}(): {error}") from None
        query, key, value = (given.pop(name) for name in ("query", "key", "value"))
        options = {name: given.pop(name) for name in names if name in given}
        return attend(query, key, value, describe(query, key, value, **given), **options)

    attention.__signature__ = signature  # pyright: ignore
    attention.of_spec = attend  # pyright: ignore
    return attention
