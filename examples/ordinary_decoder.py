"""The operations and the training of `bit_equal_training.py` by PyTorch itself, in any dtype.

In float64 they are what `accuracy_exact_training.py` measures errors against. Operands are as for
`jax_seqpar.exact`: tokens `[B, S, D]`, heads `[B, S, N, H]`, weights `[in, out]`.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from jax_seqpar.parity.training.task import Training, labels_of


def linear(x: Tensor, w: Tensor) -> Tensor:
    """The product of activations `[..., D]` and a kernel `[D, F]`."""
    return x @ w


def norm(x: Tensor, scale: Tensor) -> Tensor:
    """RMSNorm over the last axis."""
    return functional.rms_norm(x, x.shape[-1:], scale, 1e-5)


def rotary(x: Tensor, theta: float = 10_000.0, tables: torch.dtype | None = None) -> Tensor:
    """x, its two halves of channels turned by the positions.

    tables: the dtype of the angles and of their sines; that of x if None.
    """
    dtype = tables or x.dtype
    channels = torch.arange(0, x.shape[-1], 2, dtype=dtype)
    positions = torch.arange(x.shape[1], dtype=dtype)
    angles = positions[:, None, None] * theta ** (-channels / x.shape[-1])
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`."""
    return functional.silu(gate) * up


def gelu(x: Tensor) -> Tensor:
    """`x Phi(x)`."""
    return functional.gelu(x)


def layer_norm(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """LayerNorm over the last axis."""
    return functional.layer_norm(x, x.shape[-1:], scale, bias, 1e-5)


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention of `[B, S, N, H]`, and `[B, S, K, H]` of KV heads."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over all labels, of which those of -100 do not count."""
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def loss(training: Training, weights: dict[str, Tensor], tokens: Tensor, labels: Tensor) -> Tensor:
    """The mean cross entropy of a batch."""
    x = weights["embedding"][tokens]
    for i in range(training.layers):
        p = {n: weights[f"layers.{i}.{n}"] for n in ("q", "k", "v", "o", "gate", "up", "down")}
        n = norm(x, weights[f"layers.{i}.attention_norm"])
        q, k, v = ((n @ p[name]).unflatten(-1, (-1, training.head_dim)) for name in "qkv")
        x = x + attention(rotary(q), rotary(k), v).flatten(2) @ p["o"]
        n = norm(x, weights[f"layers.{i}.mlp_norm"])
        x = x + swiglu(n @ p["gate"], n @ p["up"]) @ p["down"]
    return cross_entropy(norm(x, weights["final_norm"]) @ weights["embedding"].T, labels)


def losses(training: Training, dtype: torch.dtype) -> np.ndarray:
    """The loss of every step, in float64."""
    first = training.start().of_kind("weight")
    weights = {n: torch.from_numpy(w).to(dtype).requires_grad_() for n, w in first.items()}
    decay = training.weight_decay
    optimizer = torch.optim.AdamW(weights.values(), training.learning_rate, weight_decay=decay)
    found = []
    for tokens in training.batches():
        ids, labels = (torch.from_numpy(x.astype(np.int64)) for x in (tokens, labels_of(tokens)))
        optimizer.zero_grad()
        value = loss(training, weights, ids, labels)
        value.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), training.largest_norm)
        optimizer.step()
        found.append(value.item())
    return np.array(found)
