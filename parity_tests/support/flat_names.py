"""Options of an attention by flat names, as tables of cases have them for both frameworks.

PyTorch's reference, files of inputs and the tables here name every option by one flat keyword; the
public functions of JAX take a `Mask`, a `Logits` and a `Dropout`. `keywords_of(**options)` turns
the former into the latter.
"""

from typing import Any

from jax_seqpar import Dropout, Logits, Mask
from jax_seqpar.mask.keywords import FLAT_NAMES, JAX_KEYWORDS


def keywords_of(**options: Any) -> dict[str, Any]:
    """Keywords of a JAX attention for flat names; whatever else there is stays as it is."""
    for keyword, kind in (("mask", Mask), ("logits", Logits), ("dropout", Dropout)):
        fields = {name: field for name, (of, field) in FLAT_NAMES.items() if of is kind}
        if not any(name in options and name not in JAX_KEYWORDS for name in fields):
            continue
        # A mask array, and what else is said of the mask, becomes part of the Mask.
        taken = [n for n in fields if n in options and (n not in JAX_KEYWORDS or kind is Mask)]
        options[keyword] = kind(**{fields[name]: options.pop(name) for name in taken})
    return options
