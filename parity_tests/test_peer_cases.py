"""The cases of other attention suites: `jax.nn`'s, with `jax.nn` as the oracle, and DeepSpeed's."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MeshCase, slow
from jax.sharding import AxisType
from questions import QUICK, error, right_values

from jax_seqpar import MeshLayout, blockwise_attention, dot_product_attention
from jax_seqpar.bridge.cases import Case


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

    def shape(self, letters: str) -> tuple[int, ...]:
        return tuple(1 if letter == "1" else getattr(self, letter) for letter in letters)


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
    "bfloat16",
    "bias",
    "triangle",
    "groups of 4, vmap",
    "one array, bias of an entry",
    "one array, bias of all, vmap",
}


def operands(case: NNCase) -> tuple[dict[str, Any], Any, Any]:
    """What is differentiated, the mask, and the gradient of the output."""
    rng = np.random.default_rng(case.T + case.N)
    copies = (2,) if case.vmap else ()

    def normal(*shape: int) -> Any:
        return jnp.asarray(rng.standard_normal(shape)).astype(case.dtype)

    leaves = {"query": normal(*copies, *case.shape("BTNH"))}
    if not case.shared:
        leaves["key"] = normal(*copies, *case.shape("BSKH"))
        leaves["value"] = normal(*copies, *case.shape("BSKH"))
    if case.bias is not None:
        own = copies if case.bias.startswith("B") else ()
        leaves["bias"] = normal(*own, *case.shape(case.bias))
    mask = None
    if case.mask == "tril":
        mask = jnp.tril(jnp.ones((1, 1, case.T, case.S), bool))
    elif case.mask is not None:
        mask = jnp.asarray(rng.random(case.shape(case.mask)) < 0.7)
    return leaves, mask, normal(*copies, *case.shape("BTNH"))


def output_and_gradients(attend: Any, case: NNCase, leaves: Any, mask: Any, grad: Any) -> Any:
    def call(leaves: Any) -> Any:
        query, bias = leaves["query"], leaves.get("bias")
        key, value = (leaves.get(name, query) for name in ("key", "value"))

        def one(query: Any, key: Any, value: Any, bias: Any, mask: Any) -> Any:
            return attend(query, key, value, bias=bias, mask=mask, **options)

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
        "on one device": partial(blockwise_attention, query_chunk=5, key_chunk=7),
        "on two devices": partial(dot_product_attention, mesh=mesh),
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
    _, lse = blockwise_attention(*leaves.values(), return_lse=True)
    _, expected = jax.nn.dot_product_attention(*leaves.values(), return_residual=True)
    assert lse.shape == expected.shape
    assert error(lse, np.asarray(expected)) <= 16 * np.finfo(np.float32).eps * np.max(expected)


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

    def add(query: Any, key: Any, value: Any, *, sinks: Any) -> Any:
        token = jnp.arange(query.shape[1], dtype=jnp.float32)[None, :, None, None]
        return query + 4 * token + sinks[None, None, :, None]

    out = jax.jit(partial(dot_product_attention, attention=add, layout=MeshLayout(batch="data")))
    x = jnp.asarray(labels + 4096 * b, jnp.float32)
    with jax.set_mesh(DATA_AND_SEQUENCE.mesh()):
        got = out(x, x, x, sinks=jnp.arange(heads, dtype=jnp.float32) * 64)
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
