"""Training runs of PyTorch that the tests compare, importable by a rank: exact and ordinary."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial, reduce
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from rank_functions import failure
from torch import Tensor
from torch.nn import functional

from torch_ref.exact import decoder, embedding, linear, matmul, norm, sums
from torch_ref.exact.arithmetic import exponent, power
from torch_ref.exact.decoder import Decoder
from torch_ref.exact.dropout import dropout, fold
from torch_ref.exact.optimizer import adamw_numbers, cosine_rate
from torch_ref.exact.ranks import Ranks, make_ranks
from torch_ref.exact.training_step import Tensors, first_state, step

DECODER = Decoder(vocabulary=256, width=64, layers=2, heads=4, kv_heads=2, head_dim=16, hidden=128)
# Every option of a step: activations of 16 bits, dropout, label smoothing, two batches.
FULL = replace(DECODER, dtype=torch.bfloat16, dropout=0.1)
FULL_STEP: dict[str, Any] = {"decoder": FULL, "batches": 2, "label_smoothing": 0.1}
BATCH, TOKENS = 4, 64
IGNORED = -100
LARGEST_NORM = 0.5
PEAK = 1e-2
# Data parallel times sequence parallel, of four ranks.
MESHES = ((1, 4), (2, 2), (4, 1))


def initial_weights(decoder: Decoder) -> dict[str, np.ndarray]:
    """float32 by name: scales of 1, and matrices of standard deviation 1 / sqrt(in)."""
    rng = np.random.default_rng(0)
    weights = {}
    for name, shape in decoder.shapes().items():
        x = rng.standard_normal(shape) / (shape[0] if len(shape) > 1 else 1) ** 0.5
        weights[name] = np.float32(1 + 0.1 * x if name.endswith("norm") else x)
    weights["embedding"] *= np.float32(2)
    return weights


def batch(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and labels `[B, S]`, the next token; a few labels do not count."""
    rng = np.random.default_rng([1, number])
    # Tokens that repeat, so that there is something to learn.
    text = rng.integers(0, 256, (BATCH, 16)).repeat(TOKENS // 16 + 1, axis=1)[:, : TOKENS + 1]
    labels = np.where(rng.random((BATCH, TOKENS)) < 0.1, IGNORED, text[:, 1:])
    return text[:, :TOKENS], labels


def local(x: np.ndarray, data: int, sequence: int, rank: int) -> Tensor:
    """A rank's part of `[B, S]`."""
    part = np.array_split(x, data)[rank // sequence]
    return torch.from_numpy(np.array_split(part, sequence, axis=1)[rank % sequence].copy())


def exact_run(
    steps: int,
    decoder: Decoder = DECODER,
    *,
    batches: int = 1,
    label_smoothing: float = 0.0,
    ranks: Ranks | None = None,
    part: tuple[int, int, int] = (1, 1, 0),
    device: str = "cpu",
) -> dict[str, np.ndarray]:
    """Losses of the steps, and every weight and moment after them, as a flat dictionary."""
    weights = {n: torch.from_numpy(w).to(device) for n, w in initial_weights(decoder).items()}
    state, losses = first_state(weights), []
    for t in range(steps):
        given = [batch(t * batches + i) for i in range(batches)]
        held = [
            (local(ids, *part).to(device), local(labels, *part).to(device)) for ids, labels in given
        ]
        numbers = adamw_numbers(t + 1, cosine_rate(t, steps, PEAK))
        loss, state = step(
            decoder,
            state,
            held,
            numbers,
            largest_norm=LARGEST_NORM,
            label_smoothing=label_smoothing,
            z_loss=1e-4,
            rng=fold(torch.tensor([0, 1]), t + 1) if decoder.dropout else None,
            ranks=ranks,
        )
        losses.append(loss)
    found = {f"{kind}.{n}": x for kind, all_ in state._asdict().items() for n, x in all_.items()}
    every = {"losses": torch.stack(losses), **found}
    return {name: x.cpu().numpy() for name, x in every.items()}


def on_ranks(rank: int, steps: int) -> dict[str, Any]:
    """The runs of one of four ranks: by mesh, with every option, with bugs, and ordinary."""
    found: dict[str, Any] = {}
    for data, sequence in MESHES:
        ranks, part = make_ranks(data, sequence, DECODER.kv_heads), (data, sequence, rank)
        found[f"{data}x{sequence}"] = exact_run(steps, ranks=ranks, part=part)
        full = partial(exact_run, 1, **FULL_STEP, ranks=ranks, part=part)
        found[f"{data}x{sequence}, every option"] = full()
        if (data, sequence) == (2, 2):
            with planted(ONE_EXPONENT):
                found["mutation"] = exact_run(1, ranks=ranks, part=part)
            for name, bug in OF_DROPOUT.items():
                with planted(bug):
                    found[name] = full()
    found["ordinary"] = ordinary_run(steps, (4, 1, rank))
    found["complaints"] = failure(make_ranks, 3, 1, 2), failure(make_ranks, 1, 4, 3)
    return found


def in_one_process(rank: int, steps: int) -> dict[str, np.ndarray]:
    """Exact run in a separate process, which has a different number of threads."""
    return exact_run(steps)


# Planted bugs: what stands in a module in the place of what.

Bug = list[tuple[Any, str, Any]]


def _with_ceil(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    c = torch.ceil((exponent(x, 1) - exponent(dy, 1)) / 2)
    return x * power(-c), dy * power(c)


def _of_local_tokens(*args: Any, first_token: int, **options: Any) -> Tensor:
    return dropout(*args, **options)


ONE_EXPONENT: Bug = [(m, "meet", lambda e, group: e) for m in (sums, matmul, embedding)]
OF_DROPOUT: dict[str, Bug] = {
    "a sequence numbered by its rank": [(Ranks, "first_sequence", lambda self, n: 0)],
    "a token numbered by its rank": [(decoder, "dropout", _of_local_tokens)],
    "heads numbered by their rank": [(Ranks, "_heads", lambda self, N, K: slice(2))],
}
BUGS: dict[str, Bug] = {
    "a sum in float32": [(norm, "total", lambda x, dim, group=None: x.sum(dim))],
    "a rounding left out": [(norm, "R", lambda x: x)],
    "query, key and value in another order": [
        (linear, "reduce", lambda f, parts: reduce(f, [*parts][::-1]))
    ],
    "the balance rounded the other way": [(matmul, "balance", _with_ceil)],
}


@contextmanager
def planted(bug: Bug) -> Iterator[None]:
    with ExitStack() as stack:
        for module, name, replacement in bug:
            stack.enter_context(mock.patch.object(module, name, replacement))
        yield


# Ordinary training: the same decoder by PyTorch's own operations.


def ordinary_loss(
    decoder: Decoder, weights: Tensors, ids: Tensor, labels: Tensor, z_loss: float = 1e-4
) -> Tensor:
    """The sum of the losses of the labels that count, differentiated by PyTorch."""
    H, S = decoder.head_dim, ids.shape[1]
    dtype = weights["embedding"].dtype
    frequency = decoder.theta ** (-torch.arange(0, H, 2, dtype=torch.float64) / H)
    angle = torch.arange(S)[:, None, None] * frequency
    turn = torch.polar(torch.ones_like(angle), angle).to(
        torch.complex128 if dtype == torch.float64 else torch.complex64
    )

    def turned(x: Tensor) -> Tensor:
        y = torch.complex(*x.chunk(2, -1)) * turn
        return torch.cat((y.real, y.imag), -1)

    def normed(x: Tensor, name: str) -> Tensor:
        return functional.rms_norm(x, x.shape[-1:], weights[name], decoder.eps)

    x = weights["embedding"][ids]
    for i in range(decoder.layers):
        p = f"layers.{i}."
        n = normed(x, p + "attention_norm")
        q, k, v = ((n @ weights[p + name]).unflatten(-1, (-1, H)) for name in "qkv")
        q, k, v = (y.transpose(1, 2) for y in (turned(q), turned(k), v))
        o = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + o.transpose(1, 2).flatten(2) @ weights[p + "o"]
        n = normed(x, p + "mlp_norm")
        x = (
            x
            + (functional.silu(n @ weights[p + "gate"]) * (n @ weights[p + "up"]))
            @ weights[p + "down"]
        )
    z = (normed(x, "final_norm") @ weights["embedding"].T).flatten(0, 1)
    counts = labels.flatten() != IGNORED
    loss = functional.cross_entropy(z, labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return loss + z_loss * torch.where(counts, z.logsumexp(-1) ** 2, 0).sum()


def ordinary_run(steps: int, part: tuple[int, int, int] = (1, 1, 0)) -> dict[str, np.ndarray]:
    """AdamW of PyTorch on data parallel ranks, which add up their gradients in float32."""
    weights = {n: torch.from_numpy(w) for n, w in initial_weights(DECODER).items()}
    leaves = {n: w.requires_grad_() for n, w in weights.items()}
    optimizer = torch.optim.AdamW(leaves.values(), betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    losses = []
    for t in range(steps):
        whole, (ids, labels) = batch(t), (local(x, *part) for x in batch(t))
        count = (whole[1] != IGNORED).sum()
        loss = ordinary_loss(DECODER, leaves, ids, labels) / count
        optimizer.zero_grad()
        loss.backward()
        if part[0] > 1:
            for x in (loss.detach(), *(w.grad for w in leaves.values())):
                dist.all_reduce(x)
        torch.nn.utils.clip_grad_norm_(leaves.values(), LARGEST_NORM)
        optimizer.param_groups[0]["lr"] = cosine_rate(t, steps, PEAK)
        optimizer.step()
        losses.append(loss.detach())
    found = {f"weights.{name}": w.detach() for name, w in leaves.items()}
    return {name: x.numpy() for name, x in {"losses": torch.stack(losses), **found}.items()}
