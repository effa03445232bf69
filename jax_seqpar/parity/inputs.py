"""The inputs of one attention: their sizes, generated numbers, or a file of the user's."""

import tokenize
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..bridge.tensor_files import npz_array
from ..mask.keywords import FLAT_ARRAYS

Arrays = dict[str, np.ndarray]
NAMES = ("query", "key", "value", "grad")
DTYPES = ("float32", "bfloat16", "float16")
# Arrays of the queries, where they differ from those of the keys: the first of a pair.
OF_QUERIES = {"segment_ids": "query_segment_ids", "positions": "query_positions"}
# Arrays that a file may hold beside `NAMES`.
OPTIONAL = (*(name for name in FLAT_ARRAYS if name != "dropout_rng"), *OF_QUERIES.values())


@dataclass(frozen=True)
class Case:
    """The shapes of one attention: query and grad `[B, S, N, H]`, key and value `[B, S, K, H]`."""

    batch: int = 2
    tokens: int = 48
    heads: int = 16
    kv_heads: int = 8
    head_dim: int = 20
    dtype: str = "float32"
    is_causal: bool = True

    def __str__(self) -> str:
        kv = "" if self.kv_heads == self.heads else f"/{self.kv_heads}"
        return f"{self.batch}x{self.tokens}x{self.heads}{kv}x{self.head_dim}"

    def inputs(self, seed: int = 0) -> Arrays:
        """Standard normal query, key, value and output gradient."""
        rng = np.random.default_rng(seed)
        q = (self.batch, self.tokens, self.heads, self.head_dim)
        kv = (self.batch, self.tokens, self.kv_heads, self.head_dim)
        shapes = zip(NAMES, (q, kv, kv, q), strict=True)
        return {name: rng.standard_normal(s).astype(jnp.dtype(self.dtype)) for name, s in shapes}


def adversarial(inputs: Arrays) -> Arrays:
    """Adversarial inputs of the same shapes, which break a kernel that is only nearly exact.

    Logits of 1e3, outliers, zeros of either sign, subnormals, one-hot and equal rows; and in the
    last KV head of the last sequence a NaN in query and value and an infinity in key.
    """
    dtype = inputs["query"].dtype
    inputs = {name: x.astype(np.float32) for name, x in inputs.items()}
    query, key, value, grad = inputs.values()
    query[:, ::7] *= 300
    value[:, 1::11] *= 1000
    grad[:, 2::9] *= 2.0**-60
    for step, x in enumerate((query, key, value, grad)):
        x[:, 3 + step :: 13] = 0
        x[:, 4 + step :: 13] *= -0.0
        x[:, 5 + step :: 13] = 2.0**-140
        x[:, 6 + step :: 13, :, 1:] = 0
        x[:, 7 + step :: 13] = 1
    last = query.shape[1] - 1
    query[-1, max(last - 2, 0), -1, 0] = value[-1, max(last - 1, 0), -1, 0] = np.nan
    key[-1, last, -1, -1] = np.inf
    return {name: x.astype(dtype) for name, x in inputs.items()}


def case_of(inputs: Arrays, is_causal: bool = True) -> Case:
    """The case that inputs belong to."""
    B, S, N, H = inputs["query"].shape
    K = inputs["key"].shape[2]
    return Case(B, S, N, K, H, str(inputs["query"].dtype), is_causal)


def keywords(inputs: Arrays) -> dict[str, Any]:
    """Keywords of an attention among the arrays of a file, by name: arrays, or pairs of them."""
    found: dict[str, Any] = {name: inputs[name] for name in FLAT_ARRAYS if name in inputs}
    for name, of_queries in OF_QUERIES.items():
        if of_queries in inputs:
            found[name] = (inputs[of_queries], found[name])
    return found


def load_inputs(path: Path, seed: int = 0) -> Arrays:
    """A user's own activations, from `.npz` or `.safetensors`.

    Args:
      path: a file with arrays `query [B, S, N, H]`, `key` and `value [B, S, K, H]` and, optionally,
        `grad`, the gradient of the output, standard normal where absent; and with any of the arrays
        `OPTIONAL`, shaped as `jax_seqpar.mask` says.
      seed: of that gradient.

    Returns:
      The arrays by name, integers as int32.

    Raises:
      ValueError: another kind of file, or arrays missing, unknown, misshapen or of a dtype that
        one of the frameworks lacks.
    """
    found = {name: _as_taken(path, name, x) for name, x in _read(path).items()}
    for name, needed_by in [*((n, None) for n in NAMES[:3]), *OF_QUERIES.items()]:
        if name not in found and (needed_by is None or needed_by in found):
            raise ValueError(f"{path} has no {name!r}; it has {sorted(found)}. Add {name!r} to it.")
    query = found["query"]
    if "grad" not in found:
        rng = np.random.default_rng(seed)
        found["grad"] = rng.standard_normal(query.shape).astype(query.dtype)
    if found["grad"].shape != query.shape:
        raise ValueError(
            f"{path}: grad has shape {found['grad'].shape}, expected the query's {query.shape}. "
            f"Leave it out for one that is drawn from a seed."
        )
    if found["grad"].dtype != query.dtype:
        raise ValueError(
            f"{path}: grad has dtype {found['grad'].dtype}, expected the query's {query.dtype}. "
            f"Write grad.astype(query.dtype)."
        )
    return {name: found[name] for name in (*NAMES, *OPTIONAL) if name in found}


def _as_taken(path: Path, name: str, x: np.ndarray) -> np.ndarray:
    """An array that both frameworks hold with the same values: 64-bit integers become int32."""
    if x.dtype.kind == "V" and x.dtype.name.startswith("void"):
        raise ValueError(
            f"{path}: {name} has dtype {x.dtype}, as .npz keeps a bfloat16. "
            f"Write a .safetensors file instead."
        )
    if not x.dtype.isnative:
        raise ValueError(
            f"{path}: {name} has dtype {x.dtype.str}, with the bytes in the order of another "
            f'machine. Write {name}.astype({name}.dtype.newbyteorder("=")).'
        )
    if name in OPTIONAL and jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.name not in DTYPES:
        raise ValueError(
            f"{path}: {name} must be {', '.join(DTYPES)}, got {x.dtype}. "
            f"Write {name}.astype(np.float32)."
        )
    if name in OPTIONAL and x.dtype.kind in "iu":
        if x.size and (x.min() < -(2**31) or x.max() >= 2**31):
            raise ValueError(
                f"{path}: {name} has numbers from {x.min()} to {x.max()}, which int32 does not "
                f"hold. Number segments anew: np.unique({name}, return_inverse=True)[1]."
            )
        return x.astype(np.int32)
    return x


def _known(path: Path, names: Iterable[str]) -> list[str]:
    names, taken = list(names), (*NAMES, *OPTIONAL)
    unknown = sorted(set(names) - set(taken))
    if unknown:
        raise _UnknownNameError(
            f"{path} has {', '.join(map(repr, unknown))}, of which this command knows nothing. "
            f"It takes {', '.join(taken)}. Leave out or rename the rest."
        )
    return names


class _UnknownNameError(Exception):
    """Error for a name that the command does not know.

    The error is not a ValueError, as the readers raise that for a broken file.
    """


def _read(path: Path) -> Arrays:
    from safetensors import SafetensorError, safe_open

    if path.is_dir():
        raise ValueError(f"{path} is a folder. Write --input once for each of its files.")
    try:
        if path.suffix == ".npz":
            with path.open("rb") as stream, np.load(stream) as file:
                return {name: npz_array(file, name) for name in _known(path, file.files)}
        if path.suffix == ".safetensors":
            with safe_open(path, "np") as file:
                return {name: file.get_tensor(name) for name in _known(path, file.keys())}
    except _UnknownNameError as error:
        raise ValueError(str(error)) from None
    except AttributeError as error:  # a dtype that NumPy has no name for
        raise ValueError(
            f"{path} has an array that NumPy cannot hold: {error}. Use {', '.join(DTYPES)}."
        ) from None
    except (MemoryError, RecursionError) as error:
        raise ValueError(
            f"{path} needs more memory than there is ({type(error).__name__}: {error}). "
            f"Write fewer sequences or tokens into it."
        ) from None
    # RuntimeError: a .zip that is encrypted, or compressed in a way that Python has not.
    except (
        *(SafetensorError, zipfile.BadZipFile, zlib.error, EOFError, tokenize.TokenError),
        *(RuntimeError, TypeError, ValueError),
    ) as error:
        raise ValueError(
            f"{path} is not what its name says: {error}. Write it again, with np.savez or "
            f"safetensors."
        ) from None
    raise ValueError(f"{path} must end in .npz or .safetensors. Write such a file.")
