"""Functions that the tests' ranks run, importable by a fresh process, and inputs of both sides."""

import os
import subprocess
import time
from dataclasses import dataclass
from functools import partial
from itertools import permutations, product
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from torch_ref import wrong_versions
from torch_ref.dense import dense_attention
from torch_ref.dropout import head_keys
from torch_ref.exact import exact_attention
from torch_ref.ulysses import DistributedAttention, SeqAllToAll, single_all_to_all

# test_ranks


def failure(function: Any, *args: Any, **kwargs: Any) -> str:
    """The type and message of what a call raises."""
    try:
        function(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def describe_rank(rank: int, *args: Any) -> tuple[Any, ...]:
    group = dist.get_rank(), dist.get_world_size(), dist.get_backend()
    return rank, group, torch.get_num_threads(), os.getpid(), args, return_bits(rank)


def return_bits(rank: int) -> tuple[dict[str, Tensor], dict[str, np.ndarray]]:
    """Tensors, in the dtypes that PyTorch can pickle, and arrays in those that NumPy has not."""
    tensors = ("bool", "int64", "bfloat16", "float16", "float32", "complex64")
    arrays = ("float8_e4m3fn", "float8_e5m2", "bfloat16", "float32")
    return (
        {name: random_bits(name, (30, 50), rank) for name in tensors},
        {name: random_array(name, (30, 50), rank) for name in arrays},
    )


def raise_in_rank_1(rank: int) -> None:
    if rank == 1:
        _name_of_the_failing_function()
    wait_for_the_others()


def _name_of_the_failing_function() -> None:
    raise LookupError("no seventh seal")


def exit_in_rank_1(rank: int, code: int) -> None:
    if rank == 1:
        os._exit(code)
    wait_for_the_others()


def return_with_a_signal_in_rank_1(rank: int, number: int) -> Any:
    """Rank 1 gets the signal after 64 MB of its answer are written, before the rest."""
    if rank == 1:
        return np.ones(1 << 23), SignalWhenPickled(number)
    wait_for_the_others()


@dataclass(frozen=True)
class SignalWhenPickled:
    number: int

    def __reduce__(self) -> Any:
        os.kill(os.getpid(), self.number)
        return SignalWhenPickled, (self.number,)


def hang_in_rank_1(rank: int) -> None:
    if rank == 1:
        time.sleep(3600)


def start_a_program(rank: int) -> int:
    return subprocess.Popen(["sleep", "600"]).pid


def return_a_lambda(rank: int) -> Any:
    return lambda: rank


def wait_for_the_others() -> None:
    dist.all_reduce(torch.ones(2))


# test_exact_bits


def exact_on_ranks(
    rank: int, degree: int, inputs: dict[str, np.ndarray], options: dict[str, Any]
) -> list[Tensor]:
    """This rank's tokens of output and gradients; all ranks share one KV head.

    Args:
      options: of the whole attention; those of a head axis are cut here.
    """
    B, _, N, _ = inputs["query"].shape
    given = {
        name: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for name, x in options.items()
    }
    given["dropout_rng"] = head_keys(given["dropout_rng"], B, N)
    for name, axis in {
        "bias": 1,
        "mask": 1,
        "alibi_slopes": 0,
        "sinks": 0,
        "dropout_rng": 1,
    }.items():
        given[name] = local(given[name], axis, rank, degree)
    given["segment_ids"] = tuple(map(torch.from_numpy, given["segment_ids"]))
    attend = DistributedAttention(partial(exact_attention, shared_by=dist.group.WORLD, **given))
    *leaves, grad = (local(torch.from_numpy(x), TOKENS, rank, degree) for x in inputs.values())
    leaves = [x.requires_grad_() for x in leaves]
    out = attend(*leaves, batch_dim_idx=0)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


# test_torch_ulysses

DTYPES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
    *("bfloat16", "float16", "float32", "float64", "complex64", "complex128"),
)
# b, local tokens, heads per rank, channels.
SIZES = ((1, 3, 5, 7), (2, 5, 3, 2), (3, 2, 7, 5))
BATCH, TOKENS, HEADS = 0, 1, 2
OPS = {"sequence_to_heads": (TOKENS, HEADS), "heads_to_sequence": (HEADS, TOKENS)}
LAYOUTS = {"bshd": 0, "sbhd": 1}  # batch_dim_idx


def random_array(dtype: Any, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Bytes at random, so that NaNs of every payload, infinities and subnormals are among them."""
    import ml_dtypes

    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    raw = np.random.default_rng(seed).bytes(int(np.prod(shape)) * dtype.itemsize)
    return np.frombuffer(raw, dtype).reshape(shape)


def random_bits(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    dtype = getattr(torch, name)
    raw = bytearray(np.random.default_rng(seed).bytes(int(np.prod(shape)) * dtype.itemsize))
    if name == "bool":
        raw = bytearray(byte % 2 for byte in raw)
    return torch.frombuffer(raw, dtype=dtype).reshape(shape)


def global_shape(sizes: tuple[int, int, int, int], degree: int) -> tuple[int, ...]:
    b, s, hl, d = sizes
    return b, s * degree, hl * degree, d


def integers(shape: tuple[int, ...], seed: int) -> Tensor:
    """Small whole numbers in float64, whose products and sums round nowhere."""
    return torch.from_numpy(np.random.default_rng(seed).integers(-99, 100, shape).astype(float))


def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def swap(x: Tensor, layout: str) -> Tensor:
    """View of x from batch-first in a layout, or back."""
    return x.transpose(0, 1) if layout == "sbhd" else x


def local(x: Tensor, axis: int, rank: int, degree: int) -> Tensor:
    """This rank's part of a global array; not contiguous in general, which must not matter."""
    return x.chunk(degree, axis)[rank]


def axis_indices(op: str, layout: str) -> tuple[int, int, int]:
    """scatter_idx, gather_idx and batch_dim_idx."""
    batch_idx = LAYOUTS[layout]
    tokens_idx = 1 - batch_idx
    if op == "sequence_to_heads":
        return HEADS, tokens_idx, batch_idx
    return tokens_idx, HEADS, batch_idx


def all_ulysses(rank: int, degree: int) -> dict[str, Any]:
    """Results of `test_torch_ulysses` that need ranks, in one launch."""
    return {
        "all_to_all": all_to_all(rank, degree),
        "strides": strides(rank, degree),
        "uneven": uneven(rank, degree),
        "adjoint": adjoint(rank, degree),
        "attention": attention(rank, degree),
        "rotary": rotary(rank, degree),
        "subgroups": subgroups(rank, degree),
        "passed on": passed_on(rank),
        "refusals": refusals(degree),
        "history": historical(rank, degree),
    }


Packed = tuple[str, tuple[int, ...], bytes]


def packed(x: Tensor) -> Packed:
    """Dtype, shape and bits: PyTorch cannot pickle a float8 or uint16 tensor by itself."""
    return str(x.dtype), tuple(x.shape), x.contiguous().view(torch.uint8).numpy().tobytes()


def all_to_all(rank: int, degree: int) -> dict[Any, Packed]:
    outputs = {}
    for sizes, dtype, layout, op in product(SIZES, DTYPES, LAYOUTS, OPS):
        x = local(random_bits(dtype, global_shape(sizes, degree), 0), OPS[op][0], rank, degree)
        out = single_all_to_all(swap(x, layout), *axis_indices(op, layout))
        outputs[sizes, dtype, layout, op] = packed(out)
    return outputs


def uneven(rank: int, degree: int) -> dict[Any, tuple[Packed, Packed]]:
    """This rank's heads of an array whose heads the ranks do not divide, and its tokens again."""
    outputs = {}
    for heads, dtype, layout in product((5, 6, 7), ("uint8", "bfloat16", "float64"), LAYOUTS):
        x = local(random_bits(dtype, (2, 3 * degree, heads, 3), 0), TOKENS, rank, degree)
        by_heads = single_all_to_all(swap(x, layout), *axis_indices("sequence_to_heads", layout))
        back = single_all_to_all(by_heads, *axis_indices("heads_to_sequence", layout))
        outputs[heads, dtype, layout] = packed(swap(by_heads, layout)), packed(swap(back, layout))
    return outputs


def strides(rank: int, degree: int) -> dict[Any, Packed | str]:
    """All-to-alls of arrays in every order of the axes in memory, or what they raise."""
    outputs: dict[Any, Packed | str] = {}
    for order, dtype, op in product(permutations(range(4)), ("float32", "uint8"), OPS):
        x = local(random_bits(dtype, global_shape(SIZES[2], degree), 0), OPS[op][0], rank, degree)
        x = x.permute(order).contiguous().permute(np.argsort(order).tolist())
        try:
            outputs[order, dtype, op] = packed(single_all_to_all(x, *axis_indices(op, "bshd")))
        except RuntimeError as error:
            outputs[order, dtype, op] = str(error)
    return outputs


def adjoint(rank: int, degree: int) -> dict[Any, tuple[float, float]]:
    """This rank's shares of <op x, y> and <x, vjp y>."""
    products = {}
    for sizes, layout, op in product(SIZES, LAYOUTS, OPS):
        before, after = OPS[op]
        shape = global_shape(sizes, degree)
        x, y = (
            swap(local(integers(shape, seed), axis, rank, degree), layout)
            for seed, axis in enumerate((before, after))
        )
        x.requires_grad_()
        arguments = axis_indices(op, layout)
        out = SeqAllToAll.apply(None, x, *arguments)
        assert isinstance(out, Tensor)
        (dx,) = torch.autograd.grad(out, x, y)
        products[sizes, layout, op] = (out * y).sum().item(), (x * dx).sum().item()
    return products


@dataclass(frozen=True)
class AttentionCase:
    """Sizes of an attention of N query heads and K KV heads, by degree."""

    batch: int
    heads_per_rank: int
    kv_heads_per_rank: float  # one half: two ranks share a head; 0: all of them do
    is_causal: bool = True
    local_tokens: int = 3
    head_dim: int = 5
    value_dim: int = 5
    numbers: tuple[int, int] | None = None  # N and K at every degree, in place of those per rank

    def heads(self, degree: int) -> tuple[int, int]:
        if self.numbers is not None:
            return self.numbers
        return self.heads_per_rank * degree, max(int(self.kv_heads_per_rank * degree), 1)

    def repeats(self, degree: int) -> int:
        return max(degree // self.heads(degree)[1], 1)

    def inputs(self, degree: int) -> list[Tensor]:
        """Query, key, value, output gradient, and a cotangent of each gradient."""
        N, K = self.heads(degree)
        H, V = self.head_dim, self.value_dim
        shapes = [
            (self.batch, self.local_tokens * degree, n, channels)
            for n, channels in ((N, H), (K, H), (K, V), (N, V), (N, H), (K, H), (K, V))
        ]
        return [normal(shape, seed) for seed, shape in enumerate(shapes)]


ATTENTION = {
    "multi-head": AttentionCase(1, 3, 3),
    "grouped": AttentionCase(2, 4, 2),
    "one KV head a rank": AttentionCase(3, 2, 1),
    "fewer KV heads than ranks": AttentionCase(2, 2, 0.5),
    "multi-query": AttentionCase(3, 2, 0),
    "one head a rank": AttentionCase(2, 1, 1),
    "not causal": AttentionCase(2, 4, 2, is_causal=False),
    "wider values": AttentionCase(2, 2, 1, value_dim=7),
}
# Heads that 2 ranks, 4 ranks or both do not divide, and the KV heads that go with them.
UNEVEN = {
    "odd heads": AttentionCase(2, 0, 0, numbers=(7, 7)),
    "odd heads, one KV head": AttentionCase(3, 0, 0, numbers=(5, 1), value_dim=3),
    "odd groups": AttentionCase(2, 0, 0, numbers=(9, 3)),
    "six heads": AttentionCase(2, 0, 0, numbers=(6, 2)),
    "even heads, odd KV heads": AttentionCase(1, 0, 0, numbers=(12, 3)),
}


def dense(query: Tensor, key: Tensor, value: Tensor, *, layout: str, is_causal: bool) -> Tensor:
    q, k, v = (swap(x, layout) for x in (query, key, value))
    return swap(dense_attention(q, k, v, is_causal=is_causal), layout)


def derivatives(attend: Any, inputs: list[Tensor]) -> list[Tensor]:
    """The output, its gradients, and the gradients of those; differentiable inputs are inputs[:4].

    The last four are of <dq, tq> + <dk, tk> + <dv, tv> for the cotangents inputs[4:].
    """
    query, key, value, grad = leaves = [x.detach().requires_grad_() for x in inputs[:4]]
    out = attend(query, key, value)
    first = torch.autograd.grad(out, leaves[:3], grad, create_graph=True)
    second = torch.autograd.grad(first, leaves, inputs[4:])
    return [x.detach() for x in (out, *first, *second)]


def attention(rank: int, degree: int) -> dict[Any, list[Tensor]]:
    outputs = {}
    cases = (ATTENTION | UNEVEN).items()
    for (name, case), (layout, batch_dim_idx) in product(cases, LAYOUTS.items()):
        ulysses = DistributedAttention(partial(dense, layout=layout, is_causal=case.is_causal))
        inputs = [swap(local(x, TOKENS, rank, degree), layout) for x in case.inputs(degree)]
        results = derivatives(partial(ulysses, batch_dim_idx=batch_dim_idx), inputs)
        outputs[name, layout] = [swap(x, layout) for x in results]
    return outputs


ROTARY = AttentionCase(2, 4, 2, head_dim=6, value_dim=6)
ROTATED_CHANNELS = (6, 4)


def angles(degree: int, channels: int) -> Tensor:
    """`[S, channels / 2]`"""
    return normal((ROTARY.local_tokens * degree, channels // 2), 7)


def rotary(rank: int, degree: int) -> dict[Any, list[Tensor]]:
    outputs = {}
    for channels, (layout, batch_dim_idx) in product(ROTATED_CHANNELS, LAYOUTS.items()):
        table = torch.cat([angles(degree, channels)] * 2, dim=-1)[:, None, None]
        ulysses = DistributedAttention(partial(dense, layout=layout, is_causal=True))
        inputs = [swap(local(x, TOKENS, rank, degree), layout) for x in ROTARY.inputs(degree)]
        attend = partial(
            ulysses, batch_dim_idx=batch_dim_idx, rotary_pos_emb=(table.cos(), table.sin())
        )
        outputs[channels, layout] = [swap(x, layout) for x in derivatives(attend, inputs)]
    return outputs


SUBGROUPS = AttentionCase(2, 4, 2)


def subgroups(rank: int, degree: int) -> list[Tensor]:
    """Two sequences, one for the even ranks and one for the odd."""
    groups = [dist.new_group(list(range(parity, degree, 2))) for parity in (0, 1)]
    parity, sub_rank, sub_degree = rank % 2, rank // 2, degree // 2
    inputs = [
        local(x[parity : parity + 1], TOKENS, sub_rank, sub_degree)
        for x in SUBGROUPS.inputs(sub_degree)
    ]
    ulysses = DistributedAttention(partial(dense, layout="bshd", is_causal=True), groups[parity])
    return derivatives(partial(ulysses, batch_dim_idx=0), inputs)


def passed_on(rank: int) -> tuple[Tensor, tuple[Any, ...]]:
    """The output of a local attention that is called with more arguments, and what it was given."""
    given = []

    def scaled(query, key, value, *args, **kwargs):
        given.append((args, kwargs))
        return query * args[0] + kwargs["offset"]

    x = normal((2, 3, 4, 5), rank)
    out = DistributedAttention(scaled)(x, x, x, 0, None, 2.0, "other", offset=0.5)
    assert torch.equal(out, x * 2.0 + 0.5)
    return given[0]


def refusals(degree: int) -> dict[str, str]:
    """Errors of calls with arguments that do not fit, by the argument."""
    N = 2 * degree
    q = torch.ones(2, 3, N, 5)
    attend = DistributedAttention(lambda q, k, v: q)

    def heads(n: int) -> Tensor:
        return torch.ones(2, 3, n, 5)

    def short(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q[:, 1:]

    return {
        "sp_stream": failure(DistributedAttention, dense, None, 2, 1, object()),
        "gather_idx of the batch": failure(DistributedAttention(dense, None, 2, 0), q, q, q, 0),
        "scatter_idx of the channels": failure(DistributedAttention(dense, None, 3), q, q, q, 0),
        "batch_dim_idx": failure(attend, q, q, q, 2),
        "query heads": failure(attend, heads(degree - 1), q, q, 0),
        "heads": failure(single_all_to_all, heads(degree - 1), 2, 1, 0),
        "KV heads and query heads": failure(attend, q, heads(2 * N), heads(2 * N), 0),
        "key and value": failure(attend, q, q, heads(degree), 0),
        "three axes": failure(attend, q[0], q[0], q[0], 0),
        "output": failure(DistributedAttention(short), q, q, q, 0),
        "one axis twice": failure(single_all_to_all, q, 2, 2, 0),
        "negative axis": failure(single_all_to_all, q, -2, 1, 0),
        "tokens": failure(single_all_to_all, torch.ones(2, 3 * degree + 1, 2, 5), 1, 2, 0),
    }


def historical(rank: int, degree: int) -> dict[Any, Tensor | str]:
    """The wrong versions over real ranks, of local parts of integers that are all different."""
    outputs: dict[Any, Tensor | str] = {}
    for (version, layout), op in product(product(wrong_versions.WRONG_VERSIONS, LAYOUTS), OPS):
        x = historical_inputs(layout, op, degree)[rank]
        arguments = axis_indices(op, layout)
        try:
            outputs[version, layout, op] = wrong_versions.single_all_to_all(
                wrong_versions.WRONG_VERSIONS[version], x, *arguments
            )
        except RuntimeError as error:
            outputs[version, layout, op] = str(error)
    return outputs


def historical_inputs(layout: str, op: str, degree: int) -> Tensor:
    """`[P, ...]`, as the ranks hold them."""
    shape = global_shape((2, 3, 4 if degree == 2 else 8, 2), degree)
    x = torch.arange(int(np.prod(shape))).reshape(shape)
    return torch.stack([swap(part, layout) for part in x.chunk(degree, OPS[op][0])])
