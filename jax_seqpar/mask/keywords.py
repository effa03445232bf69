"""The keywords of an attention, and the Spec that they describe."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import jax

from . import checks, threefry
from .array_fields import arrays_of, options_of
from .attention_spec import Spec
from .dropout import Dropout
from .logits import Logits
from .mask import Mask, int32_lengths

# The keywords of `jax.nn.dot_product_attention`, each with the class and the field that it is
# short for.
JAX_KEYWORDS: dict[str, tuple[type, str]] = {
    "bias": (Logits, "bias"),
    "mask": (Mask, "array"),
    "scale": (Logits, "scale"),
    "is_causal": (Mask, "is_causal"),
    "query_seq_lengths": (Mask, "query_seq_lengths"),
    "key_value_seq_lengths": (Mask, "key_value_seq_lengths"),
    "local_window_size": (Mask, "local_window_size"),
}
# One flat name for every field, as PyTorch's reference, files of inputs and the command have them.
FLAT_NAMES: dict[str, tuple[type, str]] = JAX_KEYWORDS | {
    "query_offset": (Mask, "query_offset"),
    "positions": (Mask, "positions"),
    "segment_ids": (Mask, "segment_ids"),
    "alibi_slopes": (Logits, "alibi_slopes"),
    "logits_soft_cap": (Logits, "soft_cap"),
    "sinks": (Logits, "sinks"),
    "dropout_rate": (Dropout, "rate"),
    "dropout_rng": (Dropout, "rng"),
}
# Flat names of arrays.
FLAT_ARRAYS = tuple(
    name
    for name, (kind, field) in FLAT_NAMES.items()
    if "axes" in kind.__dataclass_fields__[field].metadata
)


def from_keywords(
    *,
    mask: Any = None,
    logits: Logits | None = None,
    dropout: Dropout | None = None,
    **short: Any,
) -> Spec:
    """The Spec that the keywords of an attention describe.

    Raises:
      ValueError: for options out of range, and for a field given by a keyword and by a value.
    """
    for name, value, kind in (("logits", logits, Logits), ("dropout", dropout, Dropout)):
        if value is not None and not isinstance(value, kind):
            raise ValueError(
                f"{name} must be a jax_seqpar.{kind.__name__}, got {value!r}. Write "
                f"{name}={kind.__name__}(...)."
            )
    if not isinstance(mask, Mask):
        mask, short = Mask(), short | {"mask": mask}
    # Causality that is not asked for is not said.
    said = {
        name: x
        for name, x in short.items()
        if x is not None and not (name == "is_causal" and x is False)
    }
    return Spec(
        _with_keywords(mask, said), _with_keywords(logits or Logits(), said), dropout or Dropout()
    )


def _with_keywords(value: Any, said: Mapping[str, Any]) -> Any:
    """A Mask or Logits, with the fields that keywords are short for."""
    kind = type(value)
    own = {field: name for name, (of, field) in JAX_KEYWORDS.items() if of is kind and name in said}
    for f in fields(value):
        before = getattr(value, f.name)
        if f.name in own and not (before is None or before is f.default):
            raise ValueError(
                f"{own[f.name]}= and {kind.__name__}({f.name}=) say the same thing twice. Leave "
                f"one of them out."
            )
    return replace(value, **{field: said[name] for field, name in own.items()}) if own else value


def canonical(spec: Spec, query: Any, key: Any, value: Any, *, degree: int = 1) -> Spec:
    """The Spec, its arrays checked, and dropout with a key for each head.

    Args:
      query, key, value: arrays.
      degree: devices that share the tokens, where the arrays have those of one device.

    Raises:
      ValueError: for anything that does not fit the query, the key and the value, or one another.
    """
    checks.check_call(query, key, value, spec, degree=degree)
    B, N = query.shape[0], query.shape[2]
    lengths = {
        name: int32_lengths(x)
        for name in ("query_seq_lengths", "key_value_seq_lengths")
        if (x := getattr(spec.mask, name)) is not None
    }
    spec = replace(spec, mask=replace(spec.mask, **lengths)) if lengths else spec
    dropout = spec.dropout
    if dropout.rate == 0:
        return replace(spec, dropout=Dropout())
    if dropout.rng.ndim != 3 and jax.sharding.get_abstract_mesh().manual_axes:
        raise checks.no_local_dropout(dropout.rate)
    return replace(spec, dropout=Dropout(dropout.rate, threefry.head_keys(dropout.rng, B, N)))


def from_flat(names: Mapping[str, Any]) -> Spec:
    """The Spec that flat names describe."""
    given: dict[type, dict[str, Any]] = {Mask: {}, Logits: {}, Dropout: {}}
    for name, x in names.items():
        kind, field = FLAT_NAMES[name]
        given[kind][field] = x
    return Spec(Mask(**given[Mask]), Logits(**given[Logits]), Dropout(**given[Dropout]))


def to_flat(spec: Spec) -> dict[str, Any]:
    """A Spec by flat names: options that differ from their defaults, then arrays."""
    values = (spec.mask, spec.logits, spec.dropout)
    options = {type(x): dict(options_of(x)) for x in values}
    arrays = {type(x): dict(arrays_of(x)) for x in values}
    return {
        name: own[kind][field]
        for own in (options, arrays)
        for name, (kind, field) in FLAT_NAMES.items()
        if field in own[kind]
    }
