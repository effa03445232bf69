"""The keywords of a kernel, and the Spec that they describe."""

from typing import Any

import jax

from .. import refusals
from . import threefry
from .dropout import Dropout
from .logits import Logits
from .mask import Mask
from .nouns import given
from .spec import Spec

# Keyword: the noun and its field.
FIELDS: dict[str, tuple[type, str]] = {
    "bias": (Logits, "bias"),
    "mask": (Mask, "array"),
    "scale": (Logits, "scale"),
    "is_causal": (Mask, "is_causal"),
    "query_offset": (Mask, "query_offset"),
    "positions": (Mask, "positions"),
    "query_seq_lengths": (Mask, "query_seq_lengths"),
    "key_value_seq_lengths": (Mask, "key_value_seq_lengths"),
    "local_window_size": (Mask, "local_window_size"),
    "segment_ids": (Mask, "segment_ids"),
    "alibi_slopes": (Logits, "alibi_slopes"),
    "logits_soft_cap": (Logits, "soft_cap"),
    "sinks": (Logits, "sinks"),
    "dropout_rate": (Dropout, "rate"),
    "dropout_rng": (Dropout, "rng"),
}
# Keywords that take arrays.
ARRAYS = tuple(
    name
    for name, (noun, field) in FIELDS.items()
    if "axes" in noun.__dataclass_fields__[field].metadata
)
# Those of them that have a head axis.
PER_HEAD = ("bias", "mask", "alibi_slopes", "sinks", "dropout_rng")


def describe(query: Any, key: Any, value: Any, **keywords: Any) -> Spec:
    """The Spec that keywords of a kernel describe.

    Raises:
      ValueError: for anything that does not fit the query, the key and the value, or one another.
    """
    refusals.check_arrays(query, key, value)
    arrays = {name: keywords.get(name) for name in ARRAYS}
    refusals.check_has_numbers({"query": query, "key": key, "value": value} | arrays)
    spec = checked_spec(query.shape, key.shape, **keywords)
    if spec.dropout.rate == 0:
        return Spec(spec.mask, spec.logits)
    if spec.dropout.rng.ndim != 3 and jax.sharding.get_abstract_mesh().manual_axes:
        raise refusals.no_local_dropout()
    B, _, N, _ = query.shape
    keys = threefry.head_keys(spec.dropout.rng, B, N)
    return Spec(spec.mask, spec.logits, Dropout(spec.dropout.rate, keys))


def checked_spec(query: tuple[int, ...], key: tuple[int, ...], **keywords: Any) -> Spec:
    """The Spec that keywords describe, for a query and a key of these shapes.

    Raises:
      ValueError: for options out of range, and arrays that do not fit the shapes.
    """
    options = spec_of(**{name: x for name, x in keywords.items() if name not in ARRAYS})
    arrays = {name: keywords.get(name) for name in ARRAYS}
    refusals.check_spec(query, key, options, arrays)
    return spec_of(**keywords)


def spec_of(**keywords: Any) -> Spec:
    """The Spec that keywords describe, whatever they belong to."""
    nouns: dict[type, dict[str, Any]] = {Mask: {}, Logits: {}, Dropout: {}}
    for name, x in keywords.items():
        noun, field = FIELDS[name]
        nouns[noun][field] = x
    return Spec(Mask(**nouns[Mask]), Logits(**nouns[Logits]), Dropout(**nouns[Dropout]))


def keywords_of(spec: Spec) -> dict[str, Any]:
    """The keywords that describe a Spec, those that differ from their defaults."""
    nouns = {type(x): dict(given(x)) for x in (spec.mask, spec.logits, spec.dropout)}
    values = {
        name: nouns[noun][field] for name, (noun, field) in FIELDS.items() if field in nouns[noun]
    }
    arrays = spec.arrays
    return values | {n: arrays[field] for n, (_, field) in FIELDS.items() if field in arrays}
