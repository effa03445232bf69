"""The keywords of an attention, and the Spec that they describe."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import _checks
from . import checks, threefry
from .dropout import Dropout
from .logits import Logits
from .mask import Mask
from .nouns import given
from .spec import Spec

# The keywords of `jax.nn.dot_product_attention`, each with the noun and the field that it is short
# for.
SHORT: dict[str, tuple[type, str]] = {
    "bias": (Logits, "bias"),
    "mask": (Mask, "array"),
    "scale": (Logits, "scale"),
    "is_causal": (Mask, "is_causal"),
    "query_seq_lengths": (Mask, "query_seq_lengths"),
    "key_value_seq_lengths": (Mask, "key_value_seq_lengths"),
    "local_window_size": (Mask, "local_window_size"),
}
# One flat name for every field, as PyTorch's reference, files of inputs and the command have them.
FLAT: dict[str, tuple[type, str]] = SHORT | {
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
ARRAYS = tuple(
    name
    for name, (noun, field) in FLAT.items()
    if "axes" in noun.__dataclass_fields__[field].metadata
)


def spec_of_keywords(
    *,
    mask: Any = None,
    logits: Logits | None = None,
    dropout: Dropout | None = None,
    **short: Any,
) -> Spec:
    """The Spec that the keywords of an attention describe.

    Raises:
      ValueError: for options out of range, and for what a keyword and a noun both say.
    """
    for name, noun, kind in (("logits", logits, Logits), ("dropout", dropout, Dropout)):
        if noun is not None and not isinstance(noun, kind):
            raise ValueError(
                f"{name} must be a jax_seqpar.{kind.__name__}, got {noun!r}. Write "
                f"{name}={kind.__name__}(...)."
            )
    if not isinstance(mask, Mask):
        mask, short = Mask(), short | {"mask": mask}
    nouns: dict[type, Any] = {Mask: mask, Logits: logits or Logits()}
    short = {name: x for name, x in short.items() if not (x is None or x is False)}
    for kind, noun in nouns.items():
        own = {field: name for name, (k, field) in SHORT.items() if k is kind and name in short}
        for f in fields(noun):
            value = getattr(noun, f.name)
            if f.name in own and not (value is None or value is f.default):
                raise ValueError(
                    f"{own[f.name]}= and {kind.__name__}({f.name}=) say the same thing twice. "
                    f"Leave one of them out."
                )
        if own:
            nouns[kind] = replace(noun, **{field: short[name] for field, name in own.items()})
    return Spec(nouns[Mask], nouns[Logits], dropout or Dropout())


def checked(spec: Spec, query: Any, key: Any, value: Any, *, degree: int = 1) -> Spec:
    """The Spec, its arrays checked, and dropout with a key for each head.

    Args:
      query, key, value: arrays.
      degree: devices that share the tokens, where the arrays have those of one device.

    Raises:
      ValueError: for anything that does not fit the query, the key and the value, or one another.
    """
    _checks.check_arrays(query, key, value)
    operands = {"query": query, "key": key, "value": value}
    _checks.check_has_numbers(operands | flat(spec))
    B, T, N, H = query.shape
    S, K = key.shape[1:3]
    checks.check_spec((B, T * degree, N, H), (B, S * degree, K, H), spec)
    lengths = {
        name: _int32(x)
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


def _int32(lengths: Any) -> Any:
    """Lengths as int32: what it does not hold is longer than any sequence, and so is its limit."""
    xp: Any = np if isinstance(lengths, np.ndarray) else jnp
    limits = np.iinfo(np.int32)
    if lengths.dtype.itemsize >= 4 and lengths.dtype != np.int32:
        lengths = xp.minimum(lengths, limits.max)
        if lengths.dtype.kind == "i":
            lengths = xp.maximum(lengths, limits.min)
    return lengths.astype(np.int32)


def spec_of_flat(names: Mapping[str, Any]) -> Spec:
    """The Spec that flat names describe, whatever it belongs to."""
    nouns: dict[type, dict[str, Any]] = {Mask: {}, Logits: {}, Dropout: {}}
    for name, x in names.items():
        noun, field = FLAT[name]
        nouns[noun][field] = x
    return Spec(Mask(**nouns[Mask]), Logits(**nouns[Logits]), Dropout(**nouns[Dropout]))


def flat(spec: Spec) -> dict[str, Any]:
    """A Spec by flat names, of what differs from the defaults."""
    nouns = {type(x): dict(given(x)) for x in (spec.mask, spec.logits, spec.dropout)}
    values = {
        name: nouns[noun][field] for name, (noun, field) in FLAT.items() if field in nouns[noun]
    }
    arrays = spec.arrays
    return values | {n: arrays[field] for n, (_, field) in FLAT.items() if field in arrays}
