"""An encoder of exact operations, of the shape of BERT: post-norm, GELU, biases, padding.

Parameters, float32 by name, with W as `[in, out]`; `q`, `k`, `v`, `o`, `up` and `down` have a bias
each, named `q_bias` and so on:

    words, positions, types                    [V, D], [P, D], [T, D]
    norm_scale, norm_bias                      [D], of their sum
    layers.{i}.q, .k, .v, .o                   [D, D]
    layers.{i}.attention_scale, _bias          [D], of the norm after attention
    layers.{i}.up, .down                       [D, F], [F, D]
    layers.{i}.mlp_scale, _bias                [D], of the norm after the MLP
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .activation import gelu
from .attention import exact_attention
from .embedding import embedding
from .linear import add_bias, linear, linears
from .norm import layer_norm
from .residual import fork, residual


@dataclass(frozen=True)
class Encoder:
    """Sizes of an encoder that its parameters do not have: layers, and heads of the attention."""

    layers: int
    heads: int
    eps: float = 1e-12


def hidden(encoder: Encoder, parameters: dict[str, Tensor], ids: Tensor, mask: Tensor) -> Tensor:
    """The last hidden states.

    Args:
      encoder: the sizes.
      parameters: as above.
      ids: integers `[B, S]`; all tokens are of type 0.
      mask: boolean `[B, S]`, False for padding, to which nothing attends.

    Returns:
      `[B, S, D]`, float32. Differentiable once.
    """
    p = parameters
    x = residual(embedding(p["words"], ids), embedding(p["types"], torch.zeros_like(ids)))
    # The positions of all sequences are the same rows: a bias of tokens and features.
    x = add_bias(x, embedding(p["positions"], torch.arange(ids.shape[1], device=ids.device)))
    x = layer_norm(x, p["norm_scale"], p["norm_bias"], encoder.eps)
    for i in range(encoder.layers):
        prefix = f"layers.{i}."
        of_layer = {n.removeprefix(prefix): w for n, w in p.items() if n.startswith(prefix)}
        x = _attention_block(encoder, of_layer, x, mask)
        x = _mlp_block(encoder, of_layer, x)
    return x


def _attention_block(encoder: Encoder, p: dict[str, Tensor], x: Tensor, mask: Tensor) -> Tensor:
    skip, x = fork(x)
    q, k, v = (
        add_bias(y, p[f"{name}_bias"]).unflatten(-1, (encoder.heads, -1))
        for name, y in zip("qkv", linears(x, p["q"], p["k"], p["v"]), strict=True)
    )
    o = exact_attention(q, k, v, mask=mask[:, None, None, :]).flatten(-2)
    x = residual(skip, add_bias(linear(o, p["o"]), p["o_bias"]))
    return layer_norm(x, p["attention_scale"], p["attention_bias"], encoder.eps)


def _mlp_block(encoder: Encoder, p: dict[str, Tensor], x: Tensor) -> Tensor:
    skip, x = fork(x)
    h = gelu(add_bias(linear(x, p["up"]), p["up_bias"]))
    x = residual(skip, add_bias(linear(h, p["down"]), p["down_bias"]))
    return layer_norm(x, p["mlp_scale"], p["mlp_bias"], encoder.eps)
