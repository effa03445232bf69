"""The keyword form of an attention: one list of keywords for every kernel and for the mesh."""

import inspect
from collections.abc import Callable, Container, Mapping
from functools import wraps
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Bool, Float, Integer

from .dropout import Dropout
from .keywords import FLAT_NAMES, JAX_KEYWORDS, from_keywords
from .logits import Logits
from .mask import Mask, Window


@runtime_checkable
class AttentionFunction(Protocol):
    """The keywords of every attention of this library: those of `jax.nn`, and three values.

    Names shared with `jax.nn.dot_product_attention` mean the same, and are short for a field of
    `Mask` or `Logits`. A query attends to the keys that all of mask, causality, lengths and window
    allow; one that may attend to no key gives 0. Everything is in the coordinates of the whole
    sequence.

    Args:
      query: `[B, T, N, H]`.
      key: `[B, S, K, H]`; K divides N, and query head n reads KV head `n // (N / K)`.
      value: `[B, S, K, V]`; all three of one floating dtype.
      bias: added to the logits; floating, each axis that of `[B, N, T, S]` or 1.
      mask: a `jax_seqpar.Mask`, which has positions, segments and offsets, too; or an array, where
        True attends, each axis that of `[B, N, T, S]` or 1.
      scale: of the logits; `1 / sqrt(H)` if None.
      is_causal: keys at or before the query's position. Query t has the position t and key s the
        position s, so the diagonal starts in the top left corner, as in PyTorch;
        `Mask(query_offset=S - T)` lets it end in the bottom right one, as in FlashAttention.
      query_seq_lengths: `[B]`; queries `t < length`.
      key_value_seq_lengths: `[B]`; keys `s < length`.
      local_window_size: positions from `left` before the query's to `right` after it; one integer
        stands for both sides, None or -1 opens a side. W tokens with the query's own, as
        `sliding_window=W` elsewhere, are `(W - 1, 0)`.
      logits: a `jax_seqpar.Logits`: soft cap, ALiBi slopes, sinks.
      dropout: a `jax_seqpar.Dropout` of the weights.
      return_residual: also return the log of the sum of exp of the logits, `[B, T, N]` in float32
        (float64 for float64 inputs), -inf for a query that may attend to no key. It merges parts of
        an attention over keys, and may be differentiated.
      options: of one attention alone, such as `kernel=` of `dot_product_attention`.

    Returns:
      The output `[B, T, N, V]`, of the query's dtype; with `return_residual` a pair.

    Raises:
      ValueError: for arrays and options that do not fit together, naming the array and its sizes.
      TypeError: for a keyword that the attention does not have.
    """

    def __call__(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B S K H"],
        value: Float[Array, "B S K V"],
        bias: Float[Array, "..."] | None = None,
        mask: Bool[Array, "..."] | Mask | None = None,
        *,
        scale: float | None = None,
        is_causal: bool = False,
        query_seq_lengths: Integer[Array, "B"] | None = None,
        key_value_seq_lengths: Integer[Array, "B"] | None = None,
        local_window_size: Window | None = None,
        logits: Logits | None = None,
        dropout: Dropout | None = None,
        return_residual: bool = False,
        **options: Any,
    ) -> Any: ...


def keyword_form(attend: Callable[..., Any]) -> AttentionFunction:
    """The `AttentionFunction` of `attend(query, key, value, spec, *, return_residual, **options)`.

    Parameters before the query, such as `self`, stay where they are. The docstring explains every
    keyword: those of `attend` alone as there, and the others as in `AttentionFunction`.
    """
    parameters = list(inspect.signature(attend).parameters.values())
    start = [parameter.name for parameter in parameters].index("query")
    before, own = parameters[:start], parameters[start + 4 :]
    _, *common, _ = inspect.signature(AttentionFunction.__call__).parameters.values()
    shared = {parameter.name for parameter in common}
    added = [parameter for parameter in own if parameter.name not in shared]
    signature = inspect.Signature([*before, *common, *added])
    options = [parameter.name for parameter in own]
    arrays = [parameter.name for parameter in before] + ["query", "key", "value"]

    @wraps(attend)
    def attention(*args: Any, **keywords: Any) -> Any:
        try:
            given = dict(signature.bind(*args, **keywords).arguments)
        except TypeError as error:
            instead = _instead(keywords, signature.parameters)
            taken = ", ".join([*signature.parameters][start:])
            raise TypeError(
                f"{attend.__name__}(): {error}. Use the arguments {taken}.{instead}"
            ) from None
        operands = [given.pop(name) for name in arrays]
        rest = {name: given.pop(name) for name in options if name in given}
        return attend(*operands, from_keywords(**given), **rest)

    del attention.__wrapped__  # which help() and generators of references would show instead
    attention.__signature__ = signature  # pyright: ignore
    attention.__doc__ = _explained(attend.__doc__ or "", [*signature.parameters])
    return attention


def _explained(docstring: str, order: list[str]) -> str:
    """The docstring, its Args joined with those of `AttentionFunction` that it does not name.

    Args:
      order: of the arguments.
    """
    title = "Args:\n"
    before, found, after = inspect.cleandoc(docstring).partition(title)
    _, _, rest = inspect.cleandoc(AttentionFunction.__doc__ or "").partition(title)
    own, shared = _arguments(after), _arguments(rest)
    after = after[sum(map(len, own.values())) :]
    named = {name for names in own for name in names.split(", ")}
    entries = own | {n: text for n, text in shared.items() if n in order and n not in named}
    if not {"query", "key", "value"} & named:
        entries |= {n: shared[n] for n in ("query", "key", "value")}
    text = "".join(entries[n] for n in sorted(entries, key=lambda n: order.index(n.split(", ")[0])))
    return f"{before}{'' if found else chr(10) * 2}{title}{text}{after}"


def _arguments(section: str) -> dict[str, str]:
    """The entries at the start of a docstring's Args, by the names that they explain."""
    entries: dict[str, str] = {}
    names = ""
    for line in section.splitlines(keepends=True):
        if not line.startswith("  "):
            break
        if not line.startswith("   "):
            names = line.partition(":")[0].strip()
        entries[names] = entries.get(names, "") + line
    return entries


# What other libraries call a keyword, and what to write here; W counts the query's own token.
_ELSEWHERE = {
    "causal": "is_causal=True",
    "window": "local_window_size=(W - 1, 0)",
    "sliding_window": "local_window_size=(W - 1, 0)",
    "mesh": "layout=MeshLayout(mesh=mesh)",
}


def _instead(keywords: Mapping[str, Any], taken: Container[str]) -> str:
    """Advice for an unknown keyword: the field of a value, or the word for another library's.

    Args:
      taken: the arguments that the attention has.
    """
    names = {Mask: "mask", Logits: "logits", Dropout: "dropout"}
    for name in keywords:
        written = _ELSEWHERE.get(name, "")
        if written.partition("=")[0] in taken:
            return f" Write {written} in place of {name}=."
        if name in FLAT_NAMES and name not in JAX_KEYWORDS:
            kind, field = FLAT_NAMES[name]
            return f" Write {names[kind]}={kind.__name__}({field}=...)."
    return ""
