"""A decoder of exact operations: the table of the definition, line by line.

Parameters, float32 by name, with W as `[in, out]`:

    embedding                                  [V, D], of the tokens and, transposed, of the logits
    layers.{i}.attention_norm, .mlp_norm       [D]
    layers.{i}.q, .k, .v, .o                   [D, N H], [D, K H], [D, K H], [N H, D]
    layers.{i}.gate, .up, .down                [D, F], [D, F], [F, D]
    final_norm                                 [D]

Dropout is of the attention's weights and of what attention and MLP add to the residual. The keys of
layer i are `fold(fold(rng, i), place)`, its places 0, 1 and 2 in that order.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .activation import swiglu
from .dropout import dropout, fold
from .embedding import embedding
from .linear import linear, linears
from .norm import rms_norm
from .ranks import Ranks
from .residual import fork, residual
from .rotary import rotary, rotary_tables

Tables = tuple[Tensor, Tensor]
Keys = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Decoder:
    """Sizes of a decoder: vocabulary V, width D, N query heads and K KV heads of H channels, and F
    hidden units of SwiGLU.

    dtype: of what a layer returns, float32 or bfloat16. Parameters and logits are float32.
    dropout: its rate, where `logits` is given a key.
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    theta: float = 10_000
    eps: float = 1e-6
    dtype: torch.dtype = torch.float32
    dropout: float = 0.0

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the parameters by name, in the order of the names."""
        D, F = self.width, self.hidden
        query, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer = {
            **{"attention_norm": (D,), "q": (D, query), "k": (D, kv), "v": (D, kv)},
            **{"o": (query, D), "mlp_norm": (D,)},
            **{"gate": (D, F), "up": (D, F), "down": (F, D)},
        }
        shapes = {"embedding": (self.vocabulary, D), "final_norm": (D,)}
        for i in range(self.layers):
            shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
        return dict(sorted(shapes.items()))


def logits(
    decoder: Decoder,
    parameters: dict[str, Tensor],
    ids: Tensor,
    ranks: Ranks | None = None,
    *,
    rng: Tensor | None = None,
) -> Tensor:
    """The logits of the next token.

    Args:
      decoder: the sizes.
      parameters: as `Decoder.shapes`, the same on every rank; their gradients are those of the
        tokens of all ranks.
      ids: integers `[B, S]`, this rank's tokens.
      ranks: which tokens these are; all of them if None.
      rng: `(2,)`, the key of the dropout of this batch; without one nothing is dropped.

    Returns:
      `[B, S, V]`, float32. Differentiable once.
    """
    ranks = ranks or Ranks()
    group, eps = ranks.everyone, decoder.eps
    rows, columns = fork(parameters["embedding"])
    tables = _tables(decoder, ids, ranks)
    x = embedding(rows, ids, dtype=decoder.dtype, group=group)
    for i in range(decoder.layers):
        prefix = f"layers.{i}."
        p = {n.removeprefix(prefix): w for n, w in parameters.items() if n.startswith(prefix)}
        keys = (None,) * 3 if rng is None else tuple(fold(fold(rng, i), n) for n in range(3))
        x = _attention_block(decoder, p, x, tables, ranks, keys)
        x = _mlp_block(decoder, p, x, ranks, keys)
    y = rms_norm(x, parameters["final_norm"], eps, group=group)
    return linear(y, columns.T, group, dtype=torch.float32)


def _attention_block(
    decoder: Decoder, p: dict[str, Tensor], x: Tensor, tables: Tables, ranks: Ranks, keys: Keys
) -> Tensor:
    group, H = ranks.everyone, decoder.head_dim
    skip, x = fork(x)
    n = rms_norm(x, p["attention_norm"], decoder.eps, group=group)
    q, k, v = linears(n, p["q"], p["k"], p["v"], group=group)
    q, k, v = (y.unflatten(-1, (-1, H)) for y in (q, k, v))
    q, k = rotary(q, *tables), rotary(k, *tables)
    o = ranks.attention(q, k, v, dropout_rate=decoder.dropout, rng=keys[0])
    y = linear(o.flatten(-2), p["o"], group)
    return residual(skip, _dropped(decoder, y, ranks, keys[1]))


def _mlp_block(
    decoder: Decoder, p: dict[str, Tensor], x: Tensor, ranks: Ranks, keys: Keys
) -> Tensor:
    group = ranks.everyone
    skip, x = fork(x)
    n = rms_norm(x, p["mlp_norm"], decoder.eps, group=group)
    gate, up = linears(n, p["gate"], p["up"], group=group)
    y = linear(swiglu(gate, up), p["down"], group)
    return residual(skip, _dropped(decoder, y, ranks, keys[2]))


def _dropped(decoder: Decoder, y: Tensor, ranks: Ranks, key: Tensor | None) -> Tensor:
    """y after the dropout of its global coordinates."""
    if key is None:
        return y
    B, S, _ = y.shape
    first = {"first_sequence": ranks.first_sequence(B), "first_token": ranks.first_token(S)}
    return dropout(y, decoder.dropout, key, **first)


def _tables(decoder: Decoder, ids: Tensor, ranks: Ranks) -> Tables:
    """Cosines and sines `[S, 1, H / 2]` of this rank's positions."""
    S = ids.shape[1]
    positions = torch.arange(S, device=ids.device) + ranks.first_token(S)
    cos, sin = rotary_tables(positions, decoder.head_dim, decoder.theta)
    return cos[:, None], sin[:, None]
