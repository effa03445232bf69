"""Options of an attention by flat names, as tables of cases have them for both frameworks.

PyTorch's reference, files of inputs and the tables here name every option by one flat keyword; the
public functions of JAX take nouns. `nouns(**options)` turns the former into the latter.
"""

from typing import Any

from jax_seqpar import Dropout, Logits, Mask
from jax_seqpar.mask.keywords import FLAT, SHORT


def nouns(**options: Any) -> dict[str, Any]:
    """Keywords of a JAX attention: nouns for flat names, and whatever else there is as it is."""
    for keyword, noun in (("mask", Mask), ("logits", Logits), ("dropout", Dropout)):
        fields = {name: field for name, (kind, field) in FLAT.items() if kind is noun}
        if not any(name in options and name not in SHORT for name in fields):
            continue
        # A mask array, and what else is said of the mask, becomes part of the noun.
        taken = [n for n in fields if n in options and (n not in SHORT or noun is Mask)]
        options[keyword] = noun(**{fields[name]: options.pop(name) for name in taken})
    return options
