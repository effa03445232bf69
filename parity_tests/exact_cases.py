"""The table of exact attention: inputs and options, for both frameworks."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cases import CASES

from jax_seqpar import exact_attention
from jax_seqpar.bridge.arrays import numpy_to_torch, torch_to_numpy
from jax_seqpar.bridge.cases import Arrays, Case
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


# Keywords that both frameworks take, as NumPy arrays or Python values.
OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"is_causal": True},
    "scale": {"scale": -0.3},
    "window": {"local_window_size": (3, 2)},
    "causal window": {"is_causal": True, "local_window_size": (5, 9)},
    "window of one": {"local_window_size": 0},
    "mask": {"mask": _mask(B, N, T, S)},
    "mask for all heads": {"mask": _mask(1, 1, T, S)},
    "mask for all queries": {"mask": _mask(B, N, 4, S)[:, :, :1]},
    "bias": {"bias": _bias(B, N, T, S)},
    "bias for all sequences": {"bias": _bias(1, N, T, 1), "is_causal": True},
    "segments": {"segment_ids": _segments(B, S), "is_causal": True},
    "segments of queries and keys": {"segment_ids": (_segments(B, T), _segments(B, S)[:, ::-1])},
    "soft cap": {"logits_soft_cap": 1.5, "is_causal": True},
    "all at once": {
        "logits_soft_cap": 30.0,
        "scale": 0.5,
        "bias": _bias(B, 1, T, S),
        "mask": _mask(B, N, 1 + 3, S)[:, :, :1],
        "segment_ids": _segments(B, S),
        "local_window_size": (9, 4),
    },
}

SHAPES = {
    **CASES,
    "one token": Case(batch=1, tokens=1, heads=1, kv_heads=1, head_dim=4),
    "one channel": Case(batch=1, tokens=9, heads=2, kv_heads=1, head_dim=1),
    "many channels": Case(batch=1, tokens=6, heads=1, kv_heads=1, head_dim=512),
    "more than one sum of float64": Case(batch=1, tokens=2100, heads=1, kv_heads=1, head_dim=4),
    "more than a chunk": Case(batch=1, tokens=300, heads=2, kv_heads=1, head_dim=64),
}


def jax_exact(inputs: Arrays, compiled: bool = True, /, **options: Any) -> Arrays:
    """Output and gradients on one JAX device."""
    static = tuple((k, x) for k, x in options.items() if not is_array(x))
    arrays = jax.tree.map(jnp.asarray, {k: x for k, x in options.items() if is_array(x)})
    run = _with_gradients(static)
    results = (jax.jit(run) if compiled else run)(**inputs, arrays=arrays)
    return jax.tree.map(np.asarray, results)


@cache
def _with_gradients(static: tuple[tuple[str, Any], ...]) -> Any:
    """One function for one set of options, so that it is compiled once."""

    def run(query, key, value, grad, arrays):
        def attend(*operands):
            return exact_attention(*operands, **arrays, **dict(static))

        out, pull = jax.vjp(attend, query, key, value)
        return dict(zip(NAMES, (out, *pull(grad)), strict=True))

    return run


def torch_exact(inputs: Arrays, **options: Any) -> Arrays:
    """Output and gradients by PyTorch."""
    import torch

    query, key, value, grad = map(numpy_to_torch, inputs.values())
    leaves = [x.requires_grad_() for x in (query, key, value)]
    given = {
        k: jax.tree.map(lambda x: torch.from_numpy(x.copy()), x) if is_array(x) else x
        for k, x in options.items()
    }
    out = torch_exact_attention(*leaves, **given)
    gradients = torch.autograd.grad(out, leaves, grad)
    return dict(zip(NAMES, map(torch_to_numpy, (out.detach(), *gradients)), strict=True))


def is_array(x: Any) -> bool:
    """Whether an option is an array, or a pair of them."""
    return isinstance(x, np.ndarray) or (isinstance(x, tuple) and isinstance(x[0], np.ndarray))
