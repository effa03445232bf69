"""The cases of other attention suites.

`jax.nn`'s, with `jax.nn` as the oracle; tokamax's, those of Splash attention and of Transformer
Engine, against float64; and DeepSpeed's.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import ONE_AXIS, MeshCase, slow
from features import KERNELS, Sizes, run_rules, run_torch
from flat_names import keywords_of
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash
from jax.sharding import AxisType
from questions import QUICK, error, right_values

from jax_seqpar import Blockwise, MeshLayout, blockwise_attention, dot_product_attention
from jax_seqpar.parity.inputs import Case

pytestmark = pytest.mark.usefixtures("less_optimised")


@dataclass(frozen=True)
class NNCase:
    """A call of `jax.nn.dot_product_attention`.

    `bias` and `mask` are shapes in the letters of `[B, N, T, S]`, 1 where it broadcasts. The mask
    "tril" is the lower triangle, `[1, 1, T, S]`.
    """

    B: int = 2
    T: int = 16
    S: int = 16
    N: int = 4
    K: int = 4
    H: int = 8
    dtype: str = "float32"
    bias: str | None = None
    mask: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    # Query, key and value are one array, whose gradient is the sum of three.
    shared: bool = False
    # `jax.vmap` over two such batches, which share the mask, and the bias if its batch size is 1.
    vmap: bool = False


def shape(sizes: Any, letters: str) -> tuple[int, ...]:
    return tuple(1 if letter == "1" else getattr(sizes, letter) for letter in letters)


CAUSAL = {"is_causal": True}
# Half and a quarter of 16 queries, a quarter and half of 16 keys.
PADDING = {
    "query_seq_lengths": np.array([8, 4], np.int32),
    "key_value_seq_lengths": np.array([4, 8], np.int32),
}
NN_CASES = {
    "bfloat16": NNCase(dtype="bfloat16"),
    "bfloat16, groups of 4": NNCase(dtype="bfloat16", K=1),
    "float16, groups of 2, vmap": NNCase(dtype="float16", K=2, vmap=True),
    "groups of 4, vmap": NNCase(K=1, vmap=True),
    "bias": NNCase(bias="1NTS"),
    "bias of bfloat16": NNCase(dtype="bfloat16", bias="1NTS"),
    "padding": NNCase(options=PADDING),
    "triangle": NNCase(mask="tril"),
    "causal, padding": NNCase(options=CAUSAL | PADDING),
    "triangle, padding": NNCase(mask="tril", options=PADDING),
    "bias, causal": NNCase(bias="1NTS", options=CAUSAL),
    "causal, window": NNCase(options=CAUSAL | {"local_window_size": (3, 2)}),
    "window": NNCase(options={"local_window_size": (3, 0)}),
    "one array, bias of an entry": NNCase(B=1, bias="BNTS", mask="111S", shared=True),
    "one array, bias of each": NNCase(B=4, bias="BNTS", mask="111S", shared=True),
    "one array, bias of each, vmap": NNCase(bias="BNTS", mask="111S", shared=True, vmap=True),
    "one array, bias of all, vmap": NNCase(bias="1NTS", mask="111S", shared=True, vmap=True),
    "cross attention, mask of keys": NNCase(T=6, S=8, N=6, K=3, H=11, mask="111S"),
    # Every query attends to some key: without one `jax.nn` gives the mean of the values, not 0.
    "bias and mask of keys, scale": NNCase(
        bias="B11S", mask="B11S", options={"scale": 0.3, "local_window_size": 9}
    ),
}
LIKE_ANOTHER = {
    "bias, causal",
    "triangle, padding",
    "causal, padding",
    "one array, bias of each",
    "float16, groups of 2, vmap",
    "bfloat16",
    "bias",
    "triangle",
    "groups of 4, vmap",
    "one array, bias of an entry",
    "one array, bias of all, vmap",
}


def operands(case: NNCase) -> tuple[dict[str, Any], Any, Any]:
    """Differentiated arrays, the mask, and the gradient of the output."""
    rng = np.random.default_rng(case.T + case.N)
    copies = (2,) if case.vmap else ()

    def normal(*shape: int) -> Any:
        return jnp.asarray(rng.standard_normal(shape)).astype(case.dtype)

    leaves = {"query": normal(*copies, *shape(case, "BTNH"))}
    if not case.shared:
        leaves["key"] = normal(*copies, *shape(case, "BSKH"))
        leaves["value"] = normal(*copies, *shape(case, "BSKH"))
    if case.bias is not None:
        own = copies if case.bias.startswith("B") else ()
        leaves["bias"] = normal(*own, *shape(case, case.bias))
    mask = None
    if case.mask == "tril":
        mask = jnp.tril(jnp.ones((1, 1, case.T, case.S), bool))
    elif case.mask is not None:
        mask = jnp.asarray(rng.random(shape(case, case.mask)) < 0.7)
    return leaves, mask, normal(*copies, *shape(case, "BTNH"))


def output_and_gradients(attend: Any, case: NNCase, leaves: Any, mask: Any, grad: Any) -> Any:
    def call(leaves: Any) -> Any:
        query, bias = leaves["query"], leaves.get("bias")
        key, value = (leaves.get(name, query) for name in ("key", "value"))

        def one(query: Any, key: Any, value: Any, bias: Any, mask: Any) -> Any:
            return attend(query, key, value, **keywords_of(bias=bias, mask=mask, **options))

        if not case.vmap:
            return one(query, key, value, bias, mask)
        of_bias = 0 if case.bias and case.bias.startswith("B") else None
        return jax.vmap(one, in_axes=(0, 0, 0, of_bias, None))(query, key, value, bias, mask)

    options = {n: jnp.asarray(x) if n in PADDING else x for n, x in case.options.items()}
    out, pull = jax.vjp(call, leaves)
    return {"out": out} | {f"d{name}": x for name, x in pull(grad)[0].items()}


@pytest.mark.parametrize(
    "name", [slow(name) if name in LIKE_ANOTHER else name for name in NN_CASES]
)
def test_as_jax_nn(name):
    """Output and every gradient, on one device and on two, are those of `jax.nn` in float32."""
    case = NN_CASES[name]
    mesh = jax.make_mesh((2,), ("seq",), axis_types=(AxisType.Auto,))
    kernels = {
        "on one device": Blockwise(query_chunk=5, key_chunk=7),
        "on two devices": partial(dot_product_attention, layout=MeshLayout(mesh=mesh)),
    }
    leaves, mask, grad = operands(case)

    def widened(leaves: Any, grad: Any) -> Any:
        leaves, grad = jax.tree.map(lambda x: x.astype(jnp.float32), (leaves, grad))
        return output_and_gradients(jax.nn.dot_product_attention, case, leaves, mask, grad)

    def run(leaves: Any, grad: Any) -> Any:
        ours = {n: output_and_gradients(f, case, leaves, mask, grad) for n, f in kernels.items()}
        return ours, widened(leaves, grad)

    ours, expected = jax.jit(run, compiler_options=QUICK)(leaves, grad)
    # Two float32 computations of a few dozen terms; with 16 bits the weights, their gradients and
    # the result are rounded to those, each by half a unit.
    units = 16 if case.dtype == "float32" else 4
    for kernel, results in ours.items():
        assert results.keys() == expected.keys()
        for what, got in results.items():
            truth = np.asarray(expected[what])
            assert got.dtype == case.dtype
            assert got.shape == truth.shape
            bound = units * float(jnp.finfo(got.dtype).eps) * np.max(np.abs(truth))
            assert error(got, truth) <= bound, f"{what} {kernel}: {error(got, truth)} > {bound}"


@pytest.mark.parametrize("groups", (1, 2, 4))
def test_the_lse_is_that_of_jax_nn(groups):
    leaves, _, _ = operands(NNCase(K=4 // groups))
    _, lse = blockwise_attention(*leaves.values(), return_residual=True)
    _, expected = jax.nn.dot_product_attention(*leaves.values(), return_residual=True)
    assert lse.shape == expected.shape
    assert error(lse, np.asarray(expected)) <= 16 * np.finfo(np.float32).eps * np.max(expected)


OPERANDS: tuple[str, ...] = ("query", "key", "value")


@dataclass(frozen=True)
class PeerCase:
    """An attention of another suite's cases, at a smaller size.

    Attributes:
      describe: gives, for the sizes, keywords of `dot_product_attention`, and by the suite's own
        rule, computed without them, True where a query attends to a key, broadcastable to
        `[B, N, T, S]`.
      bias, sinks: shapes in the letters of `[B, N, T, S]`, of standard normal numbers; sinks "0"
        are zeros.
      junk: queries and keys of padding are NaN, and its values the largest number; asked for the
        output alone, as gradients take the products of 0 with them.
    """

    describe: Callable[[Sizes], tuple[dict[str, Any], np.ndarray]]
    sizes: Sizes = Sizes(B=2, T=32, S=32, N=4, K=2, H=6, V=6)
    dtype: str = "float32"
    bias: str | None = None
    sinks: str | None = None
    junk: bool = False


def indices(s: Sizes) -> tuple[np.ndarray, np.ndarray]:
    """Indices of queries `[T, 1]` and of keys `[1, S]`."""
    return np.arange(s.T)[:, None], np.arange(s.S)[None]


def in_each(s: Sizes, *positions: np.ndarray) -> Any:
    """The same positions in every batch entry."""
    return tuple(np.tile(x.ravel().astype(np.int32), (s.B, 1)) for x in positions)


# tokamax: queries and keys with indices in any order, and intervals of keys or queries.
def shuffled(of: str) -> Any:
    def describe(s: Sizes) -> Any:
        t, k = indices(s)
        rng = np.random.default_rng(0)
        t, k = (rng.permutation(t), k) if of == "queries" else (t, rng.permutation(k.T).T)
        return CAUSAL | {"positions": in_each(s, t, k)}, k <= t

    return describe


def mirrored(s: Sizes) -> Any:
    """Query t from key `S - 1 - t` on: the lower triangle, left and right exchanged."""
    t, k = indices(s)
    return CAUSAL | {"positions": in_each(s, t, s.S - 1 - k)}, k >= s.S - 1 - t


def above(s: Sizes) -> Any:
    t, k = indices(s)
    return {"local_window_size": (0, None)}, k >= t


def hourglass(s: Sizes) -> Any:
    """Queries in the middle see fewer keys, each head three more or fewer."""
    t, k = indices(s)
    edge = np.minimum(t, s.T - 1 - t) + np.arange(s.N)[:, None, None] // 3
    mask = ((edge <= k) & (k < s.S - edge))[None]
    return {"mask": mask}, mask


def random_mask(letters: str, **rest: Any) -> Any:
    def describe(s: Sizes) -> Any:
        mask = np.random.default_rng(0).random(shape(s, letters)) < 0.7
        return rest | {"mask": mask}, mask

    return describe


def padded(s: Sizes) -> Any:
    t, k = indices(s)
    queries = np.array([s.T // 2, s.T - 1], np.int32)
    keys = np.array([s.S // 8, s.S - 2], np.int32)
    lengths = {"query_seq_lengths": queries, "key_value_seq_lengths": keys}
    of_query, of_key = (x[:, None, None, None] for x in (queries, keys))
    return lengths, (t < of_query) & (k < of_key)


# Splash attention, by its own classes of masks: windows with an offset, another mask for each head.
def local(window: tuple[int | None, int | None], offset: int) -> Any:
    def describe(s: Sizes) -> Any:
        rule = splash.LocalMask((s.T, s.S), window, offset)
        return {"local_window_size": window, "query_offset": offset}, rule[:, :]

    return describe


def mask_of_each_head(s: Sizes) -> Any:
    """Causal, full, local and random, and documents beside."""
    (t, k), size = indices(s), (s.T, s.S)
    rules = (
        splash.CausalMask(size)[:, :],
        splash.FullMask(size)[:, :],
        splash.LocalMask(size, (5, 2), offset=-3)[:, :] | np.eye(s.T, dtype=bool),
        splash.make_random_mask(size, 0.4, seed=0) | (k == 0),
    )
    mask = np.stack([rules[n % 4] for n in range(s.N)])[None]
    document = (np.arange(s.T) > 8).astype(np.int32) + (np.arange(s.T) > 19)
    own = document[t] == document[k]
    keywords = {"segment_ids": in_each(s, document)[0], "logits_soft_cap": 3.0}
    return keywords | {"mask": mask}, mask & own


def causal(s: Sizes) -> Any:
    return CAUSAL, splash.CausalMask((s.T, s.S))[:, :]


# Transformer Engine: packed documents with padding between them, whose number is 0, in the order
# of the sequence or in one that balances the load of four ranks; and masks as an additive bias.
def documents(rng: Any, batch: int, tokens: int, many: int) -> tuple[np.ndarray, np.ndarray]:
    """The number of each token's document, and its place there, both `[B, tokens]`."""
    numbers, places = np.zeros((2, batch, tokens), np.int32)
    for b in range(batch):
        cuts = np.sort(rng.choice(np.arange(2, tokens - 1), many - 1, replace=False))
        for i, part in enumerate(np.split(np.arange(tokens), cuts)):
            places[b, part] = np.arange(part.size)
            numbers[b, part[: rng.integers(part.size // 2, part.size) + 1]] = i + 1
    return numbers, places


def lengths_of(numbers: np.ndarray) -> np.ndarray:
    """Length of each token's document, 0 for padding."""
    same = (numbers[:, :, None] == numbers[:, None]) & (numbers[:, None] > 0)
    return same.sum(2).astype(np.int32)


def packed(many: int, bottom_right: bool = False, window: Any = None, order: Any = None) -> Any:
    """Causal in each document, whose last query sees its last key if `bottom_right`.

    Args:
      order: of the tokens, of their number.
    """

    def describe(s: Sizes) -> Any:
        rng = np.random.default_rng(3)
        sides = [documents(rng, s.B, s.T, many), documents(rng, s.B, s.S, many)]
        if s.T == s.S:
            sides[1] = sides[0]
        if bottom_right:
            # Counted from the end of each document.
            sides = [(number, place - lengths_of(number)) for number, place in sides]
        if order is not None:
            sides = [(number[:, order(s.T)], place[:, order(s.T)]) for number, place in sides]
        # Padding has no partner.
        segments = [np.where(x > 0, x, -1 - i) for i, (x, _) in enumerate(sides)]
        keywords: dict[str, Any] = CAUSAL | {
            "positions": tuple(place for _, place in sides),
            "segment_ids": tuple(x.astype(np.int32) for x in segments),
        }
        number, t = (x[:, None, :, None] for x in sides[0])
        of_key, k = (x[:, None, None, :] for x in sides[1])
        attends = (number == of_key) & (number > 0) & (k <= t)
        if window is not None:
            keywords["local_window_size"] = window
            attends &= t - window[0] <= k
        return keywords, attends

    return describe


def striped(size: int) -> Any:
    """Stripes of tokens go to four ranks in turn."""
    return lambda tokens: np.argsort(np.arange(tokens) // size % 4, kind="stable")


def dual_chunks(tokens: int) -> np.ndarray:
    """Token order of eight chunks, in which rank r holds chunks r and 7 - r."""
    return np.arange(tokens).reshape(8, -1)[[0, 7, 1, 6, 2, 5, 3, 4]].ravel()


def padding_and_window(s: Sizes) -> Any:
    """Three tenths of padding; a tenth of the keys before a query, and five more after it."""
    t, k = indices(s)
    left, right = s.S // 10, s.S // 10 + 5
    valid = [n - int(0.3 * n) for n in (s.T, s.S)]
    keywords = {
        "query_seq_lengths": np.full(s.B, valid[0], np.int32),
        "key_value_seq_lengths": np.full(s.B, valid[1], np.int32),
        "local_window_size": (left, right),
    }
    return keywords, (t - left <= k) & (k <= t + right) & (t < valid[0]) & (k < valid[1])


def blocks_by_bias(letters: str, masked: float) -> Any:
    """Three blocks on the diagonal, by a large negative bias everywhere else."""

    def describe(s: Sizes) -> Any:
        bias = np.full(shape(s, letters), masked, np.float32)
        for start, stop in ((0, 7), (7, 12), (20, 31)):
            bias[:, :, start:stop, start:stop] = 0
        return {"bias": bias}, bias == 0

    return describe


CROSS = Sizes(B=2, T=16, S=32, N=6, K=3, H=8, V=4)
BALANCED = Sizes(B=2, T=32, S=32, N=8, K=1, H=8, V=8)
OF_RANKS = {"many": 5, "window": (5, 0)}
PEER_CASES = {
    "tokamax: shuffled queries": PeerCase(shuffled("queries")),
    "tokamax: shuffled keys": PeerCase(shuffled("keys")),
    "tokamax: mirrored": PeerCase(mirrored),
    "tokamax: above": PeerCase(above),
    "tokamax: hourglass": PeerCase(hourglass),
    "tokamax: one KV head, cap, scale": PeerCase(
        random_mask("11TS", logits_soft_cap=3.4, scale=0.1), Sizes(2, 32, 32, 4, 1, 6, 6)
    ),
    # The softmax takes no notice of such a bias, whose gradient is 0.
    "tokamax: bias of queries, mask of keys": PeerCase(
        random_mask("BN1S"), Sizes(2, 16, 32, 6, 3, 6, 5), bias="BNT1"
    ),
    "tokamax: bias of keys, mask of queries": PeerCase(
        random_mask("B1T1"), Sizes(2, 16, 32, 6, 3, 6, 5), bias="BN1S"
    ),
    "tokamax: alphafold": PeerCase(
        random_mask("B11S"), Sizes(8, 8, 8, 4, 4, 4, 4), dtype="bfloat16", bias="1NTS"
    ),
    "tokamax: padding of NaN": PeerCase(padded, junk=True),
    "splash: one head": PeerCase(causal, Sizes(B=1, T=64, S=32, N=1, K=1, H=8, V=8)),
    "splash: two heads": PeerCase(causal, Sizes(B=1, T=32, S=64, N=2, K=2, H=8, V=8)),
    "splash: a mask of each head": PeerCase(
        mask_of_each_head, Sizes(1, 32, 32, 6, 2, 8, 8), dtype="bfloat16"
    ),
    "splash: local, offset": PeerCase(local((None, 3), offset=-9)),
    "splash: local, offset to the right": PeerCase(local((5, None), offset=11)),
    "TE: packed, learnable softmax": PeerCase(packed(3), CROSS, dtype="bfloat16", sinks="N"),
    "TE: packed, bottom right, softmax off by one": PeerCase(
        packed(3, bottom_right=True), CROSS, dtype="bfloat16", sinks="0"
    ),
    "TE: padding, window": PeerCase(padding_and_window, Sizes(4, 32, 32, 8, 8, 6, 3), "float16"),
    "TE: ranks": PeerCase(packed(**OF_RANKS), BALANCED, "bfloat16"),
    "TE: ranks, striped": PeerCase(packed(**OF_RANKS, order=striped(1)), BALANCED, "bfloat16"),
    "TE: ranks, stripes of 4": PeerCase(packed(**OF_RANKS, order=striped(4)), BALANCED, "bfloat16"),
    "TE: ranks, dual chunks": PeerCase(packed(**OF_RANKS, order=dual_chunks), BALANCED, "bfloat16"),
    "TE: bias as a mask": PeerCase(blocks_by_bias("B1TS", -(2.0**27)), dtype="bfloat16"),
    "TE: bias as a mask for each head": PeerCase(
        blocks_by_bias("BNTS", -(2.0**27)), dtype="bfloat16"
    ),
    "TE: bias as a mask for all": PeerCase(blocks_by_bias("11TS", -(2.0**15)), dtype="float16"),
}
PEERS_LIKE_ANOTHER = {
    *("tokamax: above", "tokamax: one KV head, cap, scale", "TE: padding, window"),
    *("tokamax: hourglass", "tokamax: bias of keys, mask of queries", "tokamax: alphafold"),
    *("splash: two heads", "splash: local, offset to the right"),
    *("TE: bias as a mask for each head", "TE: bias as a mask for all"),
}


@cache
def on_four_devices() -> Any:
    kernel = KERNELS["blockwise"]
    return partial(dot_product_attention, kernel=kernel, layout=ONE_AXIS[4].on())


def peer_leaves(case: PeerCase, seed: int = 1) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Differentiated arrays in the case's dtype, sinks in float32; and the cotangent."""
    rng = np.random.default_rng(seed)
    shapes = [shape(case.sizes, x) for x in ("BTNH", "BSKH", "BSKV", "BTNV")]
    *given, grad = (rng.standard_normal(x).astype(jnp.dtype(case.dtype)) for x in shapes)
    leaves = dict(zip(OPERANDS, given, strict=True))
    if case.bias is not None:
        normal = rng.standard_normal(shape(case.sizes, case.bias))
        leaves["bias"] = normal.astype(jnp.dtype(case.dtype))
    if case.sinks is not None:
        leaves["sinks"] = np.zeros(case.sizes.N, np.float32)
        if case.sinks == "N":
            leaves["sinks"] += rng.standard_normal(case.sizes.N).astype(np.float32)
    return leaves, grad


def with_junk(leaves: dict[str, np.ndarray], attends: np.ndarray) -> dict[str, np.ndarray]:
    """NaN in queries and keys that are padding, and the largest number in such values."""
    queries, keys = (np.any(attends, axis=(1, axis)) for axis in (3, 2))
    seen = {"query": queries, "key": keys, "value": keys}
    junk = {"query": np.nan, "key": np.nan, "value": np.finfo(np.float32).max}
    return {n: np.where(seen[n][:, :, None, None], x, junk[n]) for n, x in leaves.items()}


@pytest.mark.parametrize(
    "name", [slow(name) if name in PEERS_LIKE_ANOTHER else name for name in PEER_CASES]
)
def test_as_the_peer(name):
    """Output and gradients, on one device and on four, are those of the peer's rule in float64."""
    case, s = PEER_CASES[name], PEER_CASES[name].sizes
    keywords, attends = case.describe(s)
    attends = np.broadcast_to(attends, (s.B, s.N, s.T, s.S))
    leaves, grad = peer_leaves(case)
    seen = np.ones((1, 1, 1, 1), grad.dtype)
    if "bias" in keywords:
        keywords["bias"] = keywords["bias"].astype(grad.dtype)
        # Beside so large a bias float32 has no logits: such a query sees every key alike.
        seen = np.any(attends, axis=3).swapaxes(1, 2)[..., None].astype(grad.dtype)
        grad = grad * seen

    rule = {n: x for n, x in keywords.items() if n in ("scale", "logits_soft_cap")}
    added = {n: x for n, x in leaves.items() if n not in OPERANDS}
    if "bias" in added:
        added["bias"] = np.broadcast_to(added["bias"], attends.shape).copy()
    inputs = [*(leaves[n] for n in OPERANDS), grad]
    truths = run_torch(rule | added | {"mask": attends.copy()}, "", inputs).values()
    expected = dict(zip(("out", *OPERANDS, *added), truths, strict=True))
    largest = {what: np.max(np.abs(x)) for what, x in expected.items()}
    if "bias" in added:
        # Where it stands for several logits, their gradients are added up, and may cancel.
        axes, terms = tuple(np.flatnonzero(np.equal(leaves["bias"].shape, 1))), expected["bias"]
        expected["bias"] = terms.sum(axes, keepdims=True)
        largest["bias"] = np.max(np.abs(terms).sum(axes))

    given = with_junk(leaves, attends) if case.junk else leaves
    for attend in (KERNELS["dense"], on_four_devices()):
        got = run_rules(attend, given, keywords, grad)
        assert got.keys() == expected.keys()
        for what, x in got.items():
            if case.junk and what != "out":
                continue
            assert x.dtype == (leaves[what].dtype if what in leaves else case.dtype)
            # As above: some roundings of the weights, or of 16 bits.
            units = 16 if case.dtype == "float32" else 4
            truth, x = expected[what], np.asarray(x).astype(np.float64)
            if what == "out":
                truth, x = truth * seen, x * seen
            bound = units * float(jnp.finfo(case.dtype).eps) * largest[what]
            assert error(x, truth) <= bound, f"{what}: {error(x, truth):.3g} > {bound:.3g}"


@pytest.mark.slow  # one axis alone is among the cases of `jax.nn`
def test_vmap_over_queries_inside_a_vmap_over_keys():
    """tokamax: queries and masks have one added axis, keys, values and biases another."""
    case = PeerCase(causal, Sizes(B=2, T=8, S=8, N=4, K=2, H=4, V=4), bias="BNTS")
    sets = [peer_leaves(case, seed)[0] for seed in range(3)]
    masks = np.random.default_rng(0).random((2, 2, 1, 8, 8)) < 0.7
    queries, *others = (jnp.stack([x[n] for x in sets]) for n in (*OPERANDS, "bias"))
    queries = queries[:2]
    grad = np.random.default_rng(1).standard_normal((3, 2, *queries.shape[1:])).astype(np.float32)
    expected: list[Any] = [np.zeros_like(x, np.float64) for x in (grad, queries, *others)]
    for i, j in np.ndindex(3, 2):
        key, value, bias = (np.asarray(x[i]) for x in others)
        inputs = [np.asarray(queries[j]), key, value, grad[i, j]]
        truth = run_torch({"bias": bias, "mask": masks[j]}, "", inputs)
        for total, x, at in zip(expected, truth.values(), ((i, j), j, i, i, i), strict=True):
            total[at] += x

    @partial(jax.jit, compiler_options=QUICK)
    def run(queries: Any, others: Any, masks: Any, grad: Any) -> Any:
        def one(query: Any, key: Any, value: Any, bias: Any, mask: Any) -> Any:
            return on_four_devices()(query, key, value, bias=bias, mask=mask)

        inner = jax.vmap(one, in_axes=(0, None, None, None, 0))
        outer: Any = jax.vmap(inner, in_axes=(None, 0, 0, 0, None))
        out, pull = jax.vjp(lambda query, rest: outer(query, *rest, masks), queries, others)
        of_queries, of_others = pull(grad)
        return (out, of_queries, *of_others)

    for got, truth in zip(run(queries, others, masks, grad), expected, strict=True):
        bound = 16 * np.finfo(np.float32).eps * np.max(np.abs(truth))
        assert error(got, truth) <= bound


# DeepSpeed's, over two data-parallel and two sequence-parallel ranks: batch, tokens of a rank,
# heads (KV heads are as many), head dimension. Odd heads give its ranks unequal parts.
DATA_AND_SEQUENCE = MeshCase((2, 2), ("data", "seq"), MeshLayout(batch="data"))
DEEPSPEED = tuple(
    (batch, tokens, heads, 16) for heads in (3, 4, 7, 8) for batch, tokens in ((2, 8), (4, 4))
)


@pytest.mark.parametrize("sizes", DEEPSPEED, ids=str)
def test_every_head_meets_every_token_in_order(sizes):
    """Each element says its batch entry, token and head; the kernel adds the token and head that
    it takes it for: exactly twice the label is left, of integers below 2^24.
    """
    batch, tokens, heads, head_dim = sizes
    shape = (2 * batch, 2 * tokens, heads, head_dim)
    b, s, n, _ = np.indices(shape)
    labels = 4 * s + 64 * n

    def add(query: Any, key: Any, value: Any, *, bias: Any) -> Any:
        token = jnp.arange(query.shape[1], dtype=jnp.float32)[None, :, None, None]
        return query + 4 * token + bias.swapaxes(1, 2)

    out = jax.jit(partial(dot_product_attention, kernel=add, layout=MeshLayout(batch="data")))
    x = jnp.asarray(labels + 4096 * b, jnp.float32)
    with jax.set_mesh(DATA_AND_SEQUENCE.mesh()):
        got = out(x, x, x, bias=jnp.arange(heads, dtype=jnp.float32)[None, :, None, None] * 64)
    np.testing.assert_array_equal(got, 2 * labels + 4096 * b)


@pytest.mark.parametrize(
    "case",
    (
        Case(batch=4, tokens=16, heads=3, kv_heads=3, head_dim=16),
        Case(batch=2, tokens=8, heads=7, kv_heads=7, head_dim=16, is_causal=False),
        # Half precision and a batch of 1 for each data-parallel rank.
        Case(batch=2, tokens=32, heads=8, kv_heads=8, head_dim=32, dtype="float16"),
    ),
    ids=str,
)
def test_values_on_data_and_sequence_axes(case):
    right_values(case, DATA_AND_SEQUENCE, AxisType.Explicit)
