"""The hashes that exact attention has on every machine, kept beside this file."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from ..mask import Spec
from ..mask.keywords import flat
from .cases import Arrays

FILE = Path(__file__).parent / "golden.json"


def digest(arrays: dict[str, Any], rules: Spec | None = None) -> str:
    """SHA-256 of names, dtypes, shapes and bits; of an attention's rules, too, where given."""
    sha = hashlib.sha256(b"" if rules is None else _words(rules).encode())
    for name, x in sorted(arrays.items()):
        x = np.ascontiguousarray(x)
        sha.update(f"{name} {x.dtype} {x.shape}".encode())
        sha.update(x.view(np.uint8).tobytes())
    return sha.hexdigest()


def expected_digest(inputs: Arrays, rules: Spec) -> str | None:
    """What output and gradients of exact attention hash to; None for inputs that nobody kept."""
    found = json.loads(FILE.read_text()).get(digest(inputs, rules))
    return found and found["outputs"]


def _words(rules: Spec) -> str:
    """Causality, and the other rules that differ from their defaults."""
    others = (f" {name} {x}" for name, x in flat(rules).items() if name != "is_causal")
    return "".join((f"causal {rules.mask.is_causal}", *others))
