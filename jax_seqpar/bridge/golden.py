"""The hashes that exact attention has on every machine, kept beside this file."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from .cases import Arrays

FILE = Path(__file__).parent / "golden.json"


def digest(arrays: dict[str, Any], *, is_causal: bool | None = None) -> str:
    """SHA-256 of names, dtypes, shapes and bits."""
    sha = hashlib.sha256(b"" if is_causal is None else f"causal {is_causal}".encode())
    for name, x in sorted(arrays.items()):
        x = np.ascontiguousarray(x)
        sha.update(f"{name} {x.dtype} {x.shape}".encode())
        sha.update(x.view(np.uint8).tobytes())
    return sha.hexdigest()


def expected_digest(inputs: Arrays, is_causal: bool) -> str | None:
    """What output and gradients of exact attention hash to; None for inputs that nobody kept."""
    found = json.loads(FILE.read_text()).get(digest(inputs, is_causal=is_causal))
    return found and found["outputs"]
