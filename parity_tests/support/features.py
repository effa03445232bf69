"""Features of attention, as levels of factors: every pair of levels meets in some case."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from allpairspy import AllPairs
from cases import is_array
from exact_cases import torch_exact
from flat_names import keywords_of
from questions import QUICK, error

from jax_seqpar import (
    AllGatherKV,
    Blockwise,
    Contiguous,
    Hybrid,
    Ring,
    Striped,
    TokenOrder,
    Ulysses,
    Zigzag,
    dense_attention,
    exact_attention,
)
from jax_seqpar.compare.numpy_conversion import numpy_to_torch
from jax_seqpar.parity.inputs import NAMES
from torch_ref.dense import dense_attention as torch_dense_attention
from torch_ref.masks import attends

# What is added to the logits and may have a gradient.
ADDED = ("bias", "alibi_slopes", "sinks")
KERNELS = {
    "dense": dense_attention,
    # Blocks that divide nothing.
    "blockwise": Blockwise(query_chunk=5, key_chunk=7),
    "blockwise, either mode": Blockwise(query_chunk=5, key_chunk=7, forward_mode=True),
    "exact": exact_attention,
}


@dataclass(frozen=True)
class Sizes:
    """Sizes of an attention; T and S are multiples of the largest degree of the tests."""

    B: int
    T: int
    S: int
    N: int
    K: int
    H: int
    V: int


SIZES = {
    "grouped": Sizes(2, 24, 24, 8, 4, 6, 6),
    "few KV heads": Sizes(2, 16, 16, 8, 2, 5, 3),
    "heads that do not divide": Sizes(3, 16, 16, 6, 3, 5, 5),
    "five heads": Sizes(2, 16, 16, 5, 5, 4, 4),
    "cross attention": Sizes(2, 16, 32, 8, 8, 6, 3),
    "cross attention, more queries": Sizes(2, 32, 16, 12, 4, 3, 5),
}

STRATEGIES = {
    "Ulysses": Ulysses(),
    "ring": Ring(),
    "all-gather": AllGatherKV(),
    "hybrid, ring": Hybrid(Ring()),
    "hybrid, all-gather": Hybrid(AllGatherKV()),
}
ORDERS = {"contiguous": Contiguous(), "zigzag": Zigzag(), "striped": Striped()}

FACTORS: dict[str, tuple[Any, ...]] = {
    "kernel": tuple(KERNELS),
    "degree": (2, 4, 8),
    "strategy": tuple(STRATEGIES),
    "order": tuple(ORDERS),
    "sizes": tuple(SIZES),
    # Chunks of heads under Ulysses, directions of a ring.
    "at once": (1, 2),
    "place": ("from 0", "causal", "causal, offset", "causal, positions", "two positions"),
    "window": (None, 0, 3, (5, 0), (2, 9)),
    "segments": (None, "one", "a pair"),
    "lengths": (None, "keys", "queries", "both"),
    "mask": (None, "BNTS", "B11S", "1N11"),
    # Padding by finfo.min, as BERT has it, beside which -1e9 is no large number.
    "bias": (None, "BNTS", "1NTS", "B1T1", "padding"),
    "alibi": (False, True),
    "cap": (None, 2.0),
    "sinks": (False, True),
    "dropout": (0.0, 0.4),
    "scale": (None, -0.4),
    "dtype": ("float32", "bfloat16", "float16", "float64"),
    # In tokens that lengths or segments hide from all.
    "junk": (False, True),
    # On a mesh with a data axis.
    "batch": (None, 1, 2),
    "eager": (False, True),
}


# What the Triton kernel supports, on one device.
TRITON_FACTORS = FACTORS | {
    "kernel": ("triton",),
    "degree": (1,),
    "at once": (1,),
    "mask": (None,),
    "bias": (None,),
    "dtype": ("float32", "bfloat16", "float16"),
    "batch": (None,),
    "eager": (False,),
}
# Interpreted, a program takes seconds to compile. Two blocks of keys in each, of 16.
FEWER_TRITON_FACTORS = TRITON_FACTORS | {
    "sizes": ("grouped", "cross attention"),
    "place": ("from 0", "causal, offset", "two positions"),
    "window": (None, (2, 9)),
    "segments": (None, "a pair"),
    "lengths": (None, "both"),
    "dtype": ("float32", "bfloat16"),
}


def is_possible(levels: list[Any]) -> bool:
    """Whether the first levels of a case go together."""
    case = dict(zip(FACTORS, levels, strict=False))
    kernel, degree, strategy = case["kernel"], case.get("degree"), case.get("strategy", "Ulysses")
    order, sizes = case.get("order", "contiguous"), SIZES.get(case.get("sizes", ""))
    exact_in_float64 = kernel == "exact" and case.get("dtype") == "float64"
    too_many_devices = degree == 8 and case.get("batch") is not None
    no_parts = "ring" in strategy and kernel == "dense"
    not_dealt = (order == "zigzag" and degree is not None and sizes is not None) and any(
        tokens % (2 * degree) for tokens in (sizes.T, sizes.S)
    )
    # With so few keys these levels leave every query without a key.
    nothing_left = (case.get("sizes"), case.get("place"), case.get("segments")) == (
        "cross attention, more queries",
        "causal, positions",
        "a pair",
    ) and case.get("lengths") in ("keys", "both")
    impossible = exact_in_float64, too_many_devices, no_parts, not_dealt, nothing_left
    return not any(impossible)


def cases(factors: dict[str, tuple[Any, ...]] = FACTORS) -> list[dict[str, Any]]:
    """Cases that have every possible pair of levels of two factors."""
    rows = AllPairs(list(factors.values()), filter_func=is_possible)
    return [dict(zip(factors, levels, strict=True)) for levels in rows]


def sizes_of(case: dict[str, Any]) -> Sizes:
    sizes = SIZES[case["sizes"]]
    return sizes if case["batch"] is None else replace(sizes, B=case["batch"])


def name_of(case: dict[str, Any]) -> str:
    """Name of a case's test: the levels that differ from the defaults."""
    return ", ".join(f"{n} {x}" for n, x in case.items() if x not in (None, False, 0.0))


def options(case: dict[str, Any]) -> dict[str, Any]:
    """The keywords of a case, arrays as NumPy arrays."""
    s = sizes_of(case)
    rng = np.random.default_rng(s.T + s.N)
    sizes = {"B": s.B, "N": s.N, "T": s.T, "S": s.S, "1": 1}

    def shape(letters: str) -> tuple[int, ...]:
        # The letters stand in their own places.
        return tuple(sizes[letter] for letter in letters)

    def tokens(count: int) -> np.ndarray:
        return np.stack([np.roll(np.arange(count), 3 * b) for b in range(s.B)]).astype(np.int32)

    def documents(count: int) -> np.ndarray:
        return np.sort(rng.integers(0, 3, (s.B, count)), axis=1).astype(np.int32)

    def lengths(count: int, some: tuple[float, ...]) -> np.ndarray:
        return np.array([int(count * x) for x in some[: s.B]], np.int32)

    made: dict[str, Any] = {"is_causal": case["place"].startswith("causal")}
    if case["place"].endswith("offset"):
        made["query_offset"] = s.S - s.T + 2
    if case["place"].endswith("positions"):
        pair = tokens(s.T), tokens(s.S)
        made["positions"] = pair[0] if s.T == s.S and "two" not in case["place"] else pair
    made["local_window_size"] = case["window"]
    if case["segments"] is not None:
        made["segment_ids"] = documents(s.T), documents(s.S)
        if case["segments"] == "one" and s.T == s.S:
            made["segment_ids"] = made["segment_ids"][0]
        elif case["junk"]:
            # The first segment of the queries and the last of the keys are without a partner.
            of_queries, of_keys = made["segment_ids"]
            made["segment_ids"] = (
                np.where(of_queries == 0, np.int32(-1), of_queries),
                np.where(of_keys == 2, np.int32(3), of_keys),
            )
    if case["lengths"] in ("keys", "both"):
        made["key_value_seq_lengths"] = lengths(s.S, (0.6, 0, 1))
    if case["lengths"] in ("queries", "both"):
        made["query_seq_lengths"] = lengths(s.T, (0.7, 1, 0))
    if case["mask"] is not None:
        made["mask"] = rng.random(shape(case["mask"])) < 0.8
    if case["bias"] == "padding":
        masked = np.finfo(np.float32).min
        before = np.arange(s.S) < np.arange(2, 2 + s.B)[:, None]
        made["bias"] = np.where(before, masked, 0).astype(np.float32)[:, None, None, :]
    elif case["bias"] is not None:
        made["bias"] = rng.standard_normal(shape(case["bias"])).astype(np.float32)
    if case["alibi"]:
        made["alibi_slopes"] = (0.5 ** np.arange(1, s.N + 1)).astype(np.float32)
    made["logits_soft_cap"] = case["cap"]
    if case["sinks"]:
        made["sinks"] = rng.standard_normal(s.N).astype(np.float32)
    if case["dropout"]:
        made["dropout_rate"] = case["dropout"]
        made["dropout_rng"] = np.array([7, 11], np.uint32)
    made["scale"] = case["scale"]
    return {name: x for name, x in made.items() if x is not None and x is not False}


def operands(sizes: Sizes, dtype: str = "float32") -> list[np.ndarray]:
    """Query, key, value and the gradient of the output."""
    rng = np.random.default_rng(sizes.S + sizes.H)
    shapes = (
        (sizes.B, sizes.T, sizes.N, sizes.H),
        (sizes.B, sizes.S, sizes.K, sizes.H),
        (sizes.B, sizes.S, sizes.K, sizes.V),
        (sizes.B, sizes.T, sizes.N, sizes.V),
    )
    return [rng.standard_normal(shape).astype(jnp.dtype(dtype)) for shape in shapes]


def with_junk(inputs: list[np.ndarray], given: dict[str, Any]) -> list[np.ndarray]:
    """Large numbers in place of queries and keys that lengths and segments hide from all."""
    names = ("segment_ids", "query_seq_lengths", "key_value_seq_lengths")
    (B, T), S = inputs[0].shape[:2], inputs[1].shape[1]
    some: Any = attends(T, S, **as_torch({n: given[n] for n in names if n in given}))
    if some is None:
        return inputs
    some = np.broadcast_to(some.numpy(), (B, 1, T, S))[:, 0]
    # JAX has the gradient of 16-bit weights, value times gradient of the output, in 16 bits: it
    # would be infinite above 65504, also where the weights are 0.
    junk = 1e2 if inputs[0].dtype == np.float16 else 1e12
    of_query, of_key = some.any(2)[..., None, None], some.any(1)[..., None, None]
    return [
        np.where(seen, x, junk).astype(x.dtype)
        for x, seen in zip(inputs, (of_query, of_key, of_key, of_query), strict=True)
    ]


# Where the tokens are in the arrays of a case and of its results: of queries, of keys.
TOKEN_AXES = {"out": (1, None), "dq": (1, None), "dk": (None, 1), "dv": (None, 1)} | {
    name: (2, 3) for name in ("mask", "bias")
}


def in_order(
    order: TokenOrder, degree: int, given: dict[str, Any], inputs: list[np.ndarray]
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """The options and operands of a case with their tokens as the devices hold them."""
    deal = partial(_each_axis, order.reorder, degree)
    dealt = {n: deal(x, TOKEN_AXES[n]) if n in TOKEN_AXES else x for n, x in given.items()}
    for name in ("positions", "segment_ids"):
        if name in given:
            dealt[name] = jax.tree.map(lambda x: deal(x, (1, None)), given[name])
    return dealt, [deal(x, (1, None)) for x in inputs]


def in_sequence(order: TokenOrder, degree: int, results: dict[str, Any]) -> dict[str, Any]:
    """Results with their tokens in the order of the sequence."""
    back = partial(_each_axis, order.restore, degree)
    return {
        n: back(np.asarray(x), TOKEN_AXES[n]) if n in TOKEN_AXES else x for n, x in results.items()
    }


def _each_axis(move: Any, degree: int, x: Any, axes: tuple[int | None, ...]) -> Any:
    for axis in axes:
        if axis is not None and x.shape[axis] > 1:
            x = move(x, axis, degree)
    return x


def split(given: dict[str, Any], kernel: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options that have a gradient, none in exact attention, and the others."""
    added = {n: x for n, x in given.items() if n in ADDED and kernel != "exact"}
    return added, {n: x for n, x in given.items() if n not in added}


def run_jax(
    attend: Any,
    given: dict[str, Any],
    kernel: str,
    inputs: list[np.ndarray],
    compiler_options: dict[str, Any] | None = None,
    *,
    eager: bool = False,
) -> Any:
    """Output and gradients of an attention, compiled unless eager: a dict by name."""
    added, rest = split(given, kernel)
    static = {n: x for n, x in rest.items() if not is_array(x)}
    arrays = jax.tree.map(jnp.asarray, {n: x for n, x in rest.items() if is_array(x)})

    def run(query: Any, key: Any, value: Any, grad: Any, added: Any, arrays: Any) -> Any:
        def function(query: Any, key: Any, value: Any, added: Any) -> Any:
            return attend(query, key, value, **keywords_of(**added, **arrays, **static))

        out, pull = jax.vjp(function, query, key, value, added)
        dq, dk, dv, more = pull(grad)
        return {"out": out, "dq": dq, "dk": dk, "dv": dv} | more

    operands: Any = *map(jnp.asarray, inputs), jax.tree.map(jnp.asarray, added), arrays
    return (run if eager else jax.jit(run, compiler_options=compiler_options))(*operands)


@partial(jax.jit, static_argnums=(0, 1), compiler_options=QUICK)
def one_program(
    attend: Any, rules: tuple[tuple[str, Any], ...], leaves: Any, arrays: Any, grad: Any
):
    """Output and gradients by name, compiled once for all cases that differ in arrays alone.

    Args:
      attend: the attention, the same object for all of them.
      rules: options that are no arrays, by name.
      leaves: arrays that are differentiated, by name.
      arrays: the others.
    """

    def function(leaves: Any) -> Any:
        return attend(**keywords_of(**leaves, **arrays, **dict(rules)))

    out, pull = jax.vjp(function, leaves)
    return {"out": out} | pull(grad)[0]


def run_rules(attend: Any, leaves: dict[str, Any], rest: dict[str, Any], grad: Any) -> Any:
    """`one_program` of NumPy arrays; `rest` are options and arrays that are not differentiated."""
    arrays = jax.tree.map(jnp.asarray, {n: x for n, x in rest.items() if is_array(x)})
    rules = tuple((n, x) for n, x in rest.items() if not is_array(x))
    return one_program(attend, rules, jax.tree.map(jnp.asarray, leaves), arrays, jnp.asarray(grad))


def run_torch(given: dict[str, Any], kernel: str, inputs: list[np.ndarray]) -> dict[str, Any]:
    """The same in float64, by PyTorch."""
    added, rest = split(given, kernel)
    *leaves, grad = (numpy_to_torch(x).double() for x in inputs)
    extra = {n: numpy_to_torch(x).double() for n, x in added.items()}
    inputs_of_grad = [x.requires_grad_() for x in (*leaves, *extra.values())]
    out = torch_dense_attention(*leaves, **extra, **as_torch(rest))
    gradients = torch.autograd.grad(out, inputs_of_grad, grad, allow_unused=True)
    names = ("out", "dq", "dk", "dv", *extra)
    return {n: x.detach().numpy() for n, x in zip(names, (out, *gradients), strict=True)}


def exact_by_torch(given: dict[str, Any], inputs: list[np.ndarray]) -> dict[str, Any]:
    """The bits that exact attention has on one device, without a compilation."""
    results = torch_exact(dict(zip(NAMES, inputs, strict=True)), **given)
    results.pop("dbias", None)  # `test_exact_bias.py` has the gradient of a bias, by mesh
    return dict(zip(("out", "dq", "dk", "dv"), results.values(), strict=True))


def as_torch(given: dict[str, Any]) -> dict[str, Any]:
    """Options with the arrays, also those of a pair, as tensors."""
    return jax.tree.map(
        lambda x: numpy_to_torch(np.asarray(x)) if hasattr(x, "shape") else x, given
    )


def assert_as_near(
    got: Any, alone: Any, truth: Any, copies: int, *, rows: int = 1, parts: bool = False
) -> None:
    """Asserts errors against float64 of at most twice those of the same kernel on one device.

    The error on one device is bounded, too, or a kernel that is wrong on one device would pass: by
    16 units in the last place of the largest entry, in the coarser dtype of inputs and result; for
    the gradients of bias, slopes and sinks, which may cancel to 0, of the largest entry of dq where
    that is larger.
    The largest errors of the table of pairs are 6.3 such units (JAX 0.10.2 on a CPU).

    Args:
      copies: devices that have the same KV head, whose gradients of it are added up: each addition
        rounds by half a unit in the last place of the largest entry.
      rows: devices that have rows of one head, whose gradients of bias, slopes and sinks are added
        up, likewise.
      parts: whether a ring merged parts, whose weights have twice the bits of 16-bit inputs. Where
        the gradients of the logits add up over rows (bias, slopes, sinks), in float32, that shows.
    """
    for name, expected in truth.items():
        unit = max(float(jnp.finfo(got[x].dtype).eps) for x in ("out", name))
        largest = np.max(np.abs(expected), initial=0)
        if name not in ("out", "dq", "dk", "dv"):
            largest = max(largest, np.max(np.abs(truth["dq"]), initial=0))
        if largest == 0:  # dq and dk where every query sees one key: their terms cancel
            largest = np.max(np.abs(truth["dv"]), initial=0)
        bound = 16 * unit * largest
        assert error(alone[name], expected) <= bound, f"{name}, alone: {bound}"
        eps = float(jnp.finfo(got[name].dtype).eps) * np.max(np.abs(expected), initial=0)
        more = (copies - 1) * eps if name in ("dk", "dv") else 0
        if name not in ("out", "dq", "dk", "dv"):
            more += (rows - 1) * eps
        if parts and name not in ("out", "dq", "dk", "dv"):
            more += float(jnp.finfo(got["out"].dtype).eps) ** 2 * largest
        # The program of one device may be fused otherwise, and so luckier: with JAX 0.12 dq of the
        # dense kernel is off by 0.5 units of the largest entry alone and by 1.1 sharded, with JAX
        # 0.10 by 1.7 both ways. Below one unit the two are alike.
        bound = 2 * max(error(alone[name], expected), eps) + more
        assert error(got[name], expected) <= bound, f"{name}: {error(got[name], expected)} {bound}"
