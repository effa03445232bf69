"""The table of exact attention: inputs and options, for both frameworks."""

from dataclasses import astuple, dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cases import CASES, is_array
from flat_names import keywords_of

from jax_seqpar import Exact
from jax_seqpar.compare.numpy_conversion import numpy_to_torch, torch_to_numpy
from jax_seqpar.parity.inputs import NAMES as INPUT_NAMES
from jax_seqpar.parity.inputs import Arrays, Case
from torch_ref.exact import exact_attention as torch_exact_attention

NAMES = ("forward", "dq", "dk", "dv")

B, T, S, N, H = 2, 23, 23, 4, 6
CASE = Case(batch=B, tokens=S, heads=N, kv_heads=2, head_dim=H)


def _random(*shape: int) -> np.random.Generator:
    return np.random.default_rng(sum(shape))


def _mask(*shape: int) -> np.ndarray:
    allowed = _random(*shape).random(shape) < 0.6
    allowed[..., 3, :] = False  # a query without a key
    return allowed


def _segments(*shape: int) -> np.ndarray:
    return np.sort(_random(*shape).integers(0, 4, shape), axis=-1).astype(np.int32)


def _bias(*shape: int) -> np.ndarray:
    bias = _random(*shape).standard_normal(shape).astype(np.float32)
    bias.ravel()[::11] = -np.inf
    return bias


# Keywords that both frameworks take, as NumPy arrays or Python values. Two in one entry where they
# do not meet, to compile once: each alone is in `test_exact_oracle`.
OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"is_causal": True},
    "causal window": {"is_causal": True, "local_window_size": (5, 9)},
    "mask, scale": {"mask": _mask(B, N, T, S), "scale": -0.3},
    "mask for all heads, window": {"mask": _mask(1, 1, T, S), "local_window_size": (3, 2)},
    "mask for all queries, window of one": {
        "mask": _mask(B, N, 4, S)[:, :, :1],
        "local_window_size": 0,
    },
    "bias, soft cap": {"bias": _bias(B, N, T, S), "logits_soft_cap": 1.5, "is_causal": True},
    "bias for all sequences, segments of queries and keys": {
        "bias": _bias(1, N, T, 1),
        "is_causal": True,
        "segment_ids": (_segments(B, T), _segments(B, S)[:, ::-1]),
    },
    "segments": {"segment_ids": _segments(B, S), "is_causal": True},
    "all at once": {
        "logits_soft_cap": 30.0,
        "scale": 0.5,
        "bias": _bias(B, 1, T, S),
        "mask": _mask(B, N, 1 + 3, S)[:, :, :1],
        "segment_ids": _segments(B, S),
        "local_window_size": (9, 4),
    },
}


@dataclass(frozen=True)
class Cross:
    """An attention of T queries to S keys, with values of V channels; the degree divides T and S.

    Small enough for Python integers.
    """

    B: int = 2
    T: int = 8
    S: int = 16
    N: int = 4
    K: int = 2
    H: int = 5
    V: int = 3
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"{self.N}/{self.K} heads"

    def inputs(self) -> Arrays:
        """Inputs with channels of very different size, which share the grid of their token."""
        B, T, S, N, K, H, V = astuple(self)[:-1]
        rng = np.random.default_rng(N)
        shapes = ((B, T, N, H), (B, S, K, H), (B, S, K, V), (B, T, N, V))
        arrays = (rng.standard_normal(s) * 2.0 ** (-5 * np.arange(s[-1])) for s in shapes)
        dtype = jnp.dtype(self.dtype)
        return {name: x.astype(dtype) for name, x in zip(INPUT_NAMES, arrays, strict=True)}

    def slopes(self) -> np.ndarray:
        return (0.7 ** np.arange(self.N)).astype(jnp.dtype(self.dtype))

    def sinks(self) -> np.ndarray:
        """Sinks: one far below the logits, so that it counts for nothing, and one far above."""
        sinks = _random(self.N).standard_normal(self.N)
        sinks[:2] = -np.inf, 9
        return sinks.astype(jnp.dtype(self.dtype))

    def all_at_once(self, by_positions: bool) -> dict[str, Any]:
        """Every option, the queries placed by their positions or by an offset."""
        B, T, S, N = self.B, self.T, self.S, self.N
        rng = _random(B, T, S, N)
        place = {"positions": _positions(B, T, S)} if by_positions else {"query_offset": S - T}
        return {
            **place,
            "is_causal": True,
            "local_window_size": (11, 3),
            "mask": rng.random((B, N, T, 1)) < 0.9,
            "segment_ids": (np.zeros((B, T), np.int32), (_segments(B, S) == 2).astype(np.int32)),
            "query_seq_lengths": _lengths(T, T - 2),
            "key_value_seq_lengths": _lengths(S - 3, S),
            "bias": _bias(1, N, T, S).astype(jnp.dtype(self.dtype)),
            "alibi_slopes": self.slopes(),
            "logits_soft_cap": 5.0,
            "scale": 0.5,
            "sinks": self.sinks(),
            "dropout_rate": 0.3,
            "dropout_rng": KEY,
        }


KEY = np.array([0x9E3779B9, 0x243F6A88], np.uint32)
CROSS = Cross()


def _lengths(*lengths: int) -> np.ndarray:
    return np.array(lengths, np.int32)


def _positions(batch: int, queries: int, keys: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions in random order, as of a layout that balances causal work, drawn per sequence."""
    rng = _random(batch, queries, keys)

    def of(first: int, count: int) -> np.ndarray:
        rows = [first + rng.permutation(count) for _ in range(batch)]
        return np.stack(rows).astype(np.int32)

    return of(keys // 2, queries), of(0, keys)


def _cross_options() -> dict[str, dict[str, Any]]:
    """Options alone and by two or three; what shares its names here shares a compilation."""
    T, S = CROSS.T, CROSS.S
    positions = _positions(CROSS.B, T, S)
    slopes, sinks = CROSS.slopes(), CROSS.sinks()
    lengths = {"query_seq_lengths": _lengths(5, T), "key_value_seq_lengths": _lengths(S, 9)}
    no_keys = {"query_seq_lengths": _lengths(T, 6), "key_value_seq_lengths": _lengths(0, 7)}
    return {
        "causal to the last": {"is_causal": True, "query_offset": S - T},
        "causal before the first": {
            "is_causal": True,
            "query_offset": -3,
            "local_window_size": (4, 0),
            **lengths,
        },
        "positions": {"is_causal": True, "positions": positions},
        "lengths": lengths,
        "lengths, a sequence of no keys": no_keys,
        "slopes": {"alibi_slopes": slopes},
        "slopes, positions": {"alibi_slopes": -slopes, "positions": positions},
        "slopes, positions far apart": {
            "alibi_slopes": slopes * np.float32(2.0**-26),
            "positions": (positions[0] * 4 - 2**29, positions[1] * 2**25),
        },
        "sinks": {"sinks": sinks},
        "sinks, lengths": {"sinks": sinks, **lengths},
        "sinks, a sequence of no keys": {"sinks": sinks, **no_keys},
        "dropout": {"dropout_rate": 0.6, "dropout_rng": KEY},
    }


CROSS_OPTIONS = _cross_options()

SHAPES = {
    # Grouped heads are those of CASE.
    **{name: CASES[name] for name in ("multi-head", "multi-query", "bfloat16", "float16")},
    "one token": Case(batch=1, tokens=1, heads=1, kv_heads=1, head_dim=4),
    "one channel": Case(batch=1, tokens=9, heads=2, kv_heads=1, head_dim=1),
    "many channels": Case(batch=1, tokens=6, heads=1, kv_heads=1, head_dim=512),
    "more than a block": Case(1, tokens=300, heads=2, kv_heads=1, head_dim=64, is_causal=False),
}


def many_keys() -> Arrays:
    """Keys so many that L, S1 and S0 are above 2^53, and S1 and S0 only until their second half.

    Keys of weight 1 in turns with keys whose small weights have odd integers. The second half is
    the first one with opposite values; what is left is a small value of a key more. So an error of
    a unit in the large sums is one of the output.
    """
    half, rng = 4200, np.random.default_rng(0)
    query = np.abs(rng.standard_normal((1, 2, 2, 4))) + 0.5
    key = -4 * np.abs(rng.standard_normal((1, half, 1, 4)))
    key[:, ::2] = 0
    # Both digits above 0.
    value = (2**15 + rng.integers(0, 2**14, (1, half, 1, 3)) + 0.375) * 2.0**-15
    assert half * 2**41 > 2**53, "L: 1 of two keys, in two halves"
    assert half / 2 * 2**28 * 0.375 * 2**16 > 2**53, "S0: a weight of 1 is 2^28"
    key = np.concatenate([key, key, key[:, :1]], axis=1)
    value = np.concatenate([value, -value, value[:, :1] * 2.0**-28], axis=1)
    arrays = (query, key, value, rng.standard_normal((1, 2, 2, 3)))
    return {name: x.astype(np.float32) for name, x in zip(INPUT_NAMES, arrays, strict=True)}


def jax_exact(
    inputs: Arrays,
    compiled: bool = True,
    /,
    query_chunk: int | None = None,
    key_chunk: int | None = None,
    **options: Any,
) -> Arrays:
    """Output and gradients on one JAX device, those of a bias, too, as "dbias"."""
    static = tuple((k, x) for k, x in options.items() if not is_array(x))
    arrays = jax.tree.map(jnp.asarray, {k: x for k, x in options.items() if is_array(x)})
    run = _with_gradients(Exact(query_chunk, key_chunk), static)
    results = (jax.jit(run) if compiled else run)(**inputs, arrays=arrays)
    return jax.tree.map(np.asarray, results)


@cache
def _with_gradients(kernel: Exact, static: tuple[tuple[str, Any], ...]) -> Any:
    """Output and gradients of one set of options, one function for all calls, compiled once."""

    def run(query, key, value, grad, arrays):
        bias = {name: arrays[name] for name in ("bias",) if name in arrays}

        def attend(query, key, value, bias):
            return kernel(query, key, value, **keywords_of(**(arrays | bias), **dict(static)))

        out, pull = jax.vjp(attend, query, key, value, bias)
        *gradients, of_bias = pull(grad)
        of_bias = {f"d{name}": x for name, x in of_bias.items()}
        return dict(zip(NAMES, (out, *gradients), strict=True)) | of_bias

    return run


def torch_exact(inputs: Arrays, **options: Any) -> Arrays:
    """Output and gradients by PyTorch, those of a bias, too, as "dbias"."""
    import torch

    query, key, value, grad = map(numpy_to_torch, inputs.values())
    leaves = [x.requires_grad_() for x in (query, key, value)]
    given = {k: jax.tree.map(numpy_to_torch, x) if is_array(x) else x for k, x in options.items()}
    names = NAMES
    if "bias" in given:
        names = (*NAMES, "dbias")
        leaves.append(given["bias"].requires_grad_())
    out = torch_exact_attention(*leaves[:3], **given)
    gradients = torch.autograd.grad(out, leaves, grad)
    return dict(zip(names, map(torch_to_numpy, (out.detach(), *gradients)), strict=True))
