"""Right refusal: what does not fit is named, with its sizes and what to write instead."""

import re
from contextlib import nullcontext
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flat_names import keywords_of
from flax import nnx
from jax.experimental import sparse
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_seqpar import (
    AllGatherKV,
    Blockwise,
    Dropout,
    Exact,
    FunctionKernel,
    Fused,
    Logits,
    Mask,
    MeshLayout,
    Ring,
    Triton,
    Ulysses,
    blockwise_attention,
    choose_kernel,
    dense_attention,
    dot_product_attention,
    exact_attention,
    head_keys,
    heads_to_sequence,
    pad_to_degree,
    sequence_to_heads,
)
from jax_seqpar.kernels import KernelChoice
from jax_seqpar.mask import Spec, Tokens
from jax_seqpar.mesh import platform_of
from jax_seqpar.strategies.heads import repeat_heads
from torch_ref.exact import exact_attention as torch_exact_attention
from torch_ref.masks import attends

pytestmark = pytest.mark.usefixtures("unchecked_shapes")

MESH = jax.make_mesh((2, 4), ("data", "seq"), axis_types=(AxisType.Auto,) * 2)
TENSOR_MESH = jax.make_mesh((2, 4), ("seq", "tensor"), axis_types=(AxisType.Auto,) * 2)


LAYOUT = MeshLayout(mesh=MESH)


def array(*shape, dtype=jnp.float32):
    return jnp.zeros(shape, dtype)


def qkv(tokens=16, heads=8, kv_heads=8, batch=2, head_dim=4):
    q = array(batch, tokens, heads, head_dim)
    kv = array(batch, tokens, kv_heads, head_dim)
    return q, kv, kv


def identity(query, key, value):
    return query


CALLS = {
    "three axes": (
        (array(16, 8, 4), *qkv()[1:]),
        {},
        r"query must have 4 axes \[B, T, N, H\], got shape \(16, 8, 4\).*query\[None\]",
    ),
    "integers": (
        tuple(x.astype(jnp.int32) for x in qkv()),
        {},
        r"query must have a floating dtype, got int32. Write query.astype\(jnp.float32\)",
    ),
    "segments that int32 does not hold": (
        qkv(),
        {"segment_ids": np.arange(32).reshape(2, 16) << 32},
        r"segment_ids has numbers from 0 to 133143986176, which JAX would cut to 32 bits\. .*"
        r"np\.unique\(segment_ids, return_inverse=True\)",
    ),
    "segments with and without a sign": (
        qkv(),
        {"segment_ids": (np.zeros((2, 16), np.int32), np.zeros((2, 16), np.uint32))},
        r"segment_ids of queries and keys must be both signed or both unsigned, got int32 and uint",
    ),
    "two dtypes": (
        (qkv()[0], *(x.astype(jnp.bfloat16) for x in qkv()[1:])),
        {},
        r"one dtype, got float32, bfloat16 and bfloat16. Cast them, .*key.astype\(query.dtype\)",
    ),
    "key unlike value": (
        (*qkv()[:2], array(2, 16, 4, 4)),
        {},
        r"key \[B, S, K, H\] and value \[B, S, K, V\] must agree in B, S and K.*"
        r"key \(2, 16, 8, 4\), value \(2, 16, 4, 4\)",
    ),
    "two batch sizes": (
        (qkv()[0], *qkv(batch=3)[1:]),
        {},
        r"agree in the batch size B, got 2 and 3",
    ),
    "two head dimensions": (
        (qkv()[0], *qkv(head_dim=5)[1:]),
        {},
        r"agree in the head dimension H, got 4 and 5",
    ),
    "groups": (
        (qkv()[0], *qkv(kv_heads=3)[1:]),
        {},
        r"query heads N = 8 must be a multiple of the KV heads K = 3",
    ),
    "query tokens": (
        qkv(tokens=18),
        {},
        r"query tokens T = 18 is not divisible by the 4 devices of mesh axis 'seq'.*"
        r"Write x = jax_seqpar.pad_to_degree\(query, key, value, degree=4\), which pads to 20, .*"
        r"call with x.query, x.key, x.value, \*\*x.keywords, and write x.unpad\(out\). Or write "
        r"MeshLayout\(tokens=None\), which leaves it whole \(no sequence parallelism\)",
    ),
    "key tokens": (
        (qkv()[0], *qkv(tokens=18)[1:]),
        {},
        r"key tokens S = 18 is not divisible by the 4 devices",
    ),
    "batch": (
        qkv(batch=3),
        {"layout": MeshLayout(batch="data", mesh=MESH)},
        r"query batch B = 3 is not divisible by the 2 devices of mesh axis 'data'.*"
        r"MeshLayout\(batch=None\)",
    ),
    "tensor-parallel heads": (
        qkv(heads=6, kv_heads=6),
        {"layout": MeshLayout(heads="tensor", mesh=TENSOR_MESH)},
        r"query heads N = 6 is not divisible by the 4 devices of mesh axis 'tensor'",
    ),
    "tensor-parallel KV heads": (
        qkv(heads=24, kv_heads=3),
        {"layout": MeshLayout(heads="tensor", mesh=TENSOR_MESH)},
        r"KV heads K = 3 neither is divisible by nor divides the 4 devices of mesh axis 'tensor'",
    ),
    "no such axis": (
        qkv(),
        {"layout": MeshLayout(tokens="sequence", mesh=MESH)},
        r"names axis 'sequence', which the mesh does not have: its axes are "
        r"\{'data': 2, 'seq': 4\}",
    ),
    "an axis twice": (
        qkv(),
        {"layout": MeshLayout(tokens="seq", heads="seq", mesh=MESH)},
        r"uses mesh axis 'seq' for more than one array axis",
    ),
    "a mask of floats": (
        qkv(),
        {"mask": array(1, 1, 16, 16)},
        r"mask must be boolean, got dtype float32; write mask == 0 if 0 attends .*"
        r"\(bias=mask adds .*\), mask != 0 if 1 attends and 0 hides",
    ),
    "a mask of integers": (
        qkv(),
        {"mask": array(1, 1, 16, 16, dtype=jnp.int32)},
        r"mask must be boolean, got dtype int32; write mask.astype\(bool\), or bias=",
    ),
    "a bias of booleans": (
        qkv(),
        {"bias": array(1, 1, 16, 16, dtype=bool)},
        r"bias must be floating, got dtype bool; mask= takes a boolean array",
    ),
    "a mask of two axes": (
        qkv(),
        {"mask": array(16, 16, dtype=bool)},
        r"mask must have 4 axes, each 1 or that of \[B, N, T, S\] = \(2, 8, 16, 16\), "
        r"got shape \(16, 16\).*mask\[None, None\] for \[T, S\], mask\[:, None, None\]",
    ),
    "a bias of three axes": (
        qkv(),
        {"bias": array(8, 16, 16)},
        r"got shape \(8, 16, 16\). Write bias\[None\] for \[N, T, S\], bias\[:, None\] for \[B, ",
    ),
    "a mask of other heads": (
        qkv(),
        {"mask": array(2, 4, 16, 16, dtype=bool)},
        r"mask must have 4 axes, .*got shape \(2, 4, 16, 16\)",
    ),
    "lengths": (
        qkv(),
        {"key_value_seq_lengths": array(3, dtype=jnp.int32)},
        r"key_value_seq_lengths must be integers of shape \(B,\) = \(2,\), got int32\[3\]",
    ),
    "lengths of another kind": (
        qkv(),
        {"query_seq_lengths": array(2)},
        r"query_seq_lengths must be integers of shape \(B,\) = \(2,\), got float32\[2\]",
    ),
    "segments of other tokens": (
        qkv(),
        {"segment_ids": array(2, 15, dtype=jnp.int32)},
        r"segment_ids must be integers of shape \[B, S\] = \[2, 16\], or a pair "
        r".*got int32\[2, 15\]",
    ),
    "segments of another kind": (
        qkv(),
        {"segment_ids": (array(2, 16), array(2, 16, dtype=jnp.int32))},
        r"segment_ids must be integers .*got float32\[2, 16\], int32\[2, 16\]",
    ),
    "a soft cap of 0": (
        qkv(),
        {"logits_soft_cap": 0.0},
        r"soft_cap must be a Python number between 1e-30 and 1e30, got 0.0. None, and not 0",
    ),
    "an array as soft cap": (
        qkv(),
        {"logits_soft_cap": jnp.ones(())},
        r"soft_cap must be a Python number between",
    ),
    "a soft cap that is 0 in float32": (
        qkv(),
        {"logits_soft_cap": 1e-50},
        r"soft_cap must be a Python number between 1e-30 and 1e30, got 1e-50",
    ),
    "a scale of NaN": (qkv(), {"scale": float("nan")}, r"scale must be finite .*got nan"),
    "a mask that is a list": (
        qkv(),
        {"mask": [[[[True]]]]},
        r"mask must be an array of JAX or NumPy, got list. Write jnp.asarray\(mask\)",
    ),
    "segments that are a list": (
        qkv(),
        {"segment_ids": [[0] * 16] * 2},
        r"segment_ids must be an array, or a tuple of two, got list",
    ),
    "a dtype that is not exact": (
        tuple(x.astype(jnp.float8_e5m2) for x in qkv()),
        {"kernel": exact_attention},
        r"exact attention takes float32, bfloat16 and float16, got float8_e5m2. Write query.astype",
    ),
    "an array as scale": (
        qkv(),
        {"scale": jnp.ones(())},
        r"scale must be a Python number, got .*Multiply the query",
    ),
    "an array as is_causal": (
        qkv(),
        {"is_causal": jnp.array(True)},
        r"is_causal must be Python's True or False",
    ),
    "a negative window": (
        qkv(),
        {"local_window_size": (3, -2)},
        r"local_window_size must be one Python integer or a tuple .*none negative, got \(3, -2\)",
    ),
    "a window of three": (
        qkv(),
        {"local_window_size": (3, 1, 2)},
        r"local_window_size must be one Python integer or a tuple \(left, right\)",
    ),
    "an option the kernel lacks": (
        qkv(),
        {"kernel": identity, "is_causal": True},
        r"kernel=identity: it does not name the parameter 'is_causal'.*"
        r"\['query', 'key', 'value'\].*jax_seqpar.Blockwise\(\)",
    ),
    "an array the kernel lacks": (
        qkv(),
        {"kernel": identity, "bias": array(1, 1, 16, 16)},
        r"kernel=identity: it does not name the parameter 'bias'",
    ),
    "a list": (
        (qkv()[0].tolist(), *qkv()[1:]),
        {},
        r"query must be an array of JAX or NumPy, got list. Write jnp.asarray\(query\)",
    ),
    "a string as layout": (
        qkv(),
        {"layout": "seq"},
        r"layout must be a MeshLayout, got 'seq'. Write MeshLayout\(tokens='seq'\)",
    ),
    "a kernel of another dtype": (
        tuple(x.astype(jnp.bfloat16) for x in qkv()),
        {"kernel": lambda query, key, value: query.astype(jnp.float32)},
        r"kernel returned dtype float32, expected the query's bfloat16",
    ),
    "a kernel that transposes, no token axis": (
        qkv(),
        {"layout": MeshLayout(tokens=None, mesh=MESH), "kernel": lambda q, k, v: q.swapaxes(1, 2)},
        r"kernel returned shape \(2, 8, 16, 4\), expected \(2, 16, 8, 4\)",
    ),
    "a kernel that transposes": (
        qkv(),
        {"kernel": lambda query, key, value: query.swapaxes(1, 2)},
        r"kernel returned shape \(2, 2, 16, 4\), expected \(2, 16, 2, 4\)",
    ),
}


@pytest.mark.parametrize(("arrays", "options", "message"), CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("compile", (True, False), ids=("jit", "eager"))
def test_the_public_function(arrays, options, message, compile):

    def call(query, key, value):
        return dot_product_attention(
            query, key, value, **keywords_of(**{"layout": LAYOUT} | options)
        )

    with pytest.raises(ValueError, match=f"(?s){message}"):
        (jax.jit(call) if compile else call)(*arrays)


def test_a_bias_of_exact_attention_that_jax_would_round():
    """A float64 bias raises, whether `jax_enable_x64` would round it to float32 or not."""
    with pytest.raises(ValueError, match=r"bias of exact .*got float64. Write bias.astype"):
        exact_attention(*qkv(), bias=np.zeros((1, 1, 16, 16)))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("chunk", (0, -1, 2.0, True))
@pytest.mark.parametrize("name", ("query_chunk", "key_chunk"))
def test_chunks_of_exact_attention(name, chunk):
    with pytest.raises(ValueError, match=f"{name} must be a positive integer or None, got {chunk}"):
        Exact(**{name: chunk})


@pytest.mark.parametrize(("tokens", "heads"), ((1 << 21, 1), (1 << 18, 8)))
def test_more_tokens_than_exact_sums_have_room_for(tokens, heads):
    shapes = (jax.ShapeDtypeStruct((1, tokens, n, 1), jnp.float32) for n in (heads, 1, 1))
    message = rf"fewer than 2\^21 keys, and queries of one KV head, got {tokens} and {1 << 21}"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(exact_attention, *shapes)


def test_more_than_one_exact_sum_has_room_for():
    """Exact attention raises for too many channels, query heads of a KV head, keys of a product."""
    rows = jax.ShapeDtypeStruct((1, 4, 4097, 1), jnp.float32)
    wide = jax.ShapeDtypeStruct((1, 4, 1, 513), jnp.float32)
    one = jax.ShapeDtypeStruct((1, 4, 1, 1), jnp.float32)
    for operands in ((wide, wide, one), (one, one, wide)):
        with pytest.raises(ValueError, match=r"room for 512 channels .* Split the heads"):
            jax.eval_shape(exact_attention, *operands)
    with pytest.raises(ValueError, match=r"4096 query heads .* got 4097 on 1 .* Split the query"):
        jax.eval_shape(exact_attention, rows, one, one)
    with pytest.raises(ValueError, match=r"key_chunk .* at most 256, .* got 257. Write None"):
        Exact(key_chunk=257)
    with pytest.raises(ValueError, match=r"takes all the keys of a row, got a part. Write kernel="):
        exact_attention.attend(*qkv(), Spec(held_keys=Tokens(0, 16)))


def test_the_same_of_the_pytorch_reference():
    one, wide = torch.zeros(1, 4, 1, 1), torch.zeros(1, 4, 1, 513)
    for operands in ((wide, wide, one), (one, one, wide)):
        with pytest.raises(ValueError, match=r"room for 512 channels. Got .* Split the heads"):
            torch_exact_attention(*operands)
    with pytest.raises(ValueError, match=r"room for 4096 query heads .* Got 4097 on 1 ranks"):
        torch_exact_attention(torch.zeros(1, 4, 4097, 1), one, one)


def test_an_axis_that_the_layout_forgets():
    """An axis that the layout lacks raises, though gathering it would give the right numbers."""
    mesh = jax.make_mesh((2, 4), ("data", "seq"))
    q, k, v = (jax.device_put(x, jax.NamedSharding(mesh, PartitionSpec("data"))) for x in qkv())
    message = r"query is sharded over mesh axis 'data', .*MeshLayout\(..., batch='data'\)"
    with pytest.raises(ValueError, match=message):
        jax.jit(partial(dot_product_attention, layout=MeshLayout(mesh=mesh)))(q, k, v)
    dot_product_attention(q, k, v, layout=MeshLayout(batch=("data",), mesh=mesh))


def test_no_mesh():
    with pytest.raises(
        ValueError, match=r"no mesh: .*Write MeshLayout\(mesh=mesh\), or .*jax.set_mesh"
    ):
        dot_product_attention(*qkv())


def test_inside_a_shard_map():
    spec = PartitionSpec(None, "seq")
    call = partial(dot_product_attention, layout=MeshLayout(batch="data"))
    with pytest.raises(ValueError, match=r"names axes of batch or heads inside a jax.shard_map"):
        jax.shard_map(call, mesh=MESH, in_specs=spec, out_specs=spec)(*qkv())


@pytest.mark.parametrize(
    "name", ("causal", "softcap", "dropout_rate", "implementation", "attention", "mesh")
)
def test_unknown_keywords(name):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        partial(dot_product_attention, *qkv(), layout=LAYOUT, **{name: 1})()


@pytest.mark.parametrize(
    ("name", "written"),
    (
        ("causal", "is_causal=True"),
        ("window", "local_window_size=(W - 1, 0)"),
        ("sliding_window", "local_window_size=(W - 1, 0)"),
        ("mesh", "layout=MeshLayout(mesh=mesh)"),
        ("segment_ids", "mask=Mask(segment_ids=...)"),
    ),
)
def test_keywords_of_other_libraries(name, written):
    with pytest.raises(TypeError) as caught:
        partial(dot_product_attention, *qkv(), layout=LAYOUT, **{name: 1})()
    assert f" Write {written}" in str(caught.value)
    if name == "mesh":  # of one device: there is no layout to write it in
        with pytest.raises(TypeError, match="unexpected keyword argument 'mesh'") as caught:
            partial(dense_attention, *qkv(), mesh=MESH)()
        assert "Write" not in str(caught.value)


@pytest.mark.parametrize(
    ("strategy", "got", "written"),
    (
        ("ring", "'ring'", "Ring()"),
        (Ring, "the class Ring", "Ring()"),
        ("all_gather", "'all_gather'", "AllGatherKV()"),
        (AllGatherKV, "the class AllGatherKV", "AllGatherKV()"),
        ("hybrid", "'hybrid'", "Hybrid()"),
        ("Ulysses", "'Ulysses'", "Ulysses()"),
        (7, "7", "Ulysses()"),
        ("", "''", "Ulysses()"),
    ),
    ids=str,
)
def test_a_strategy_by_name_or_class(strategy, got, written):
    message = re.escape(f"got {got}. Write strategy=jax_seqpar.{written}.")
    with pytest.raises(ValueError, match=message):
        dot_product_attention(*qkv(), layout=LAYOUT, strategy=strategy)


PER_DEVICE = {
    "output": (qkv(), r"kernel returned shape \(2, 16, 2, 3\), expected \(2, 16, 2, 4\)"),
}


@pytest.mark.parametrize(("arrays", "message"), PER_DEVICE.values(), ids=PER_DEVICE)
def test_the_per_device_function(arrays, message):
    call = partial(dot_product_attention, kernel=lambda q, k, v: q[..., :3])
    spec = PartitionSpec(None, "seq")
    with pytest.raises(ValueError, match=message):
        jax.jit(jax.shard_map(call, mesh=MESH, in_specs=spec, out_specs=spec))(*arrays)


RESHARDS = {
    "heads": (
        sequence_to_heads,
        (2, 8, 6, 4),
        r"heads N = 6 is not divisible by the 4 devices of mesh axis 'seq'. "
        r"Got shape \(2, 8, 6, 4\). Use one of \[1, 2, 3, 6\] devices",
    ),
    "tokens": (
        heads_to_sequence,
        (2, 6, 8, 4),
        r"tokens S = 6 is not divisible by the 4 devices of mesh axis 'seq'",
    ),
    "axes": (sequence_to_heads, (8, 8, 4), r"4 axes \[B, S, N, H\], got shape \(8, 8, 4\)"),
}


@pytest.mark.parametrize(("reshard", "shape", "message"), RESHARDS.values(), ids=RESHARDS)
def test_a_reshard(reshard, shape, message):
    whole = PartitionSpec()
    call = jax.shard_map(
        lambda x: reshard(x, "seq"), mesh=MESH, in_specs=whole, out_specs=whole, check_vma=False
    )
    with pytest.raises(ValueError, match=message):
        call(array(*shape))


@pytest.mark.parametrize(
    "call",
    (
        lambda x: sequence_to_heads(x, "seq"),
        lambda x: heads_to_sequence(x, "seq"),
        lambda x: Ulysses()(dense_attention, x, x, x, Spec(), axis_name="seq"),
    ),
)
def test_outside_a_shard_map(call):
    with pytest.raises(ValueError, match=r"mesh axis 'seq' is not manual here.*jax.shard_map"):
        call(qkv()[0])


def test_nothing_communicates_before_a_refusal():
    """The refusal comes while tracing: there is no program yet."""
    with pytest.raises(ValueError, match="not divisible"):
        jax.make_jaxpr(partial(dot_product_attention, layout=LAYOUT))(*qkv(tokens=18))


def test_shapes_are_checked_under_test():
    """The annotations mean something: with the checks on, a wrong rank is caught by them."""
    import jaxtyping

    jaxtyping.config.update("jaxtyping_disable", False)
    with pytest.raises(jaxtyping.TypeCheckError, match="parameter 'x'"):
        repeat_heads(array(16, 8, 4), 2)


def test_a_query_without_a_key_is_zero_and_its_gradient_finite():
    """A query without a key has output 0 and finite gradients; other libraries define neither."""
    q, k, v = (jnp.asarray(np.random.default_rng(0).standard_normal(x.shape)) for x in qkv())
    mask = jnp.zeros((1, 1, 16, 16), bool).at[:, :, 3:].set(True)
    call = jax.jit(partial(dot_product_attention, mask=mask, layout=LAYOUT))
    out, pull = jax.vjp(call, q, k, v)
    assert not np.any(np.asarray(out)[:, :3])
    assert np.any(np.asarray(out)[:, 3:])
    assert all(np.isfinite(np.asarray(x)).all() for x in pull(out))


def data_parallel(query, key, value, **options):
    """The public function, nested in a shard_map over the batch."""
    spec = PartitionSpec("data")
    call = partial(dot_product_attention, **options)
    with jax.set_mesh(MESH):
        return jax.shard_map(call, in_specs=spec, out_specs=spec, axis_names={"data"})(
            query, key, value
        )


def per_device(kernel, **options):
    spec = PartitionSpec(None, "seq")
    call = partial(dot_product_attention, kernel=kernel, **options)
    return jax.shard_map(call, mesh=MESH, in_specs=spec, out_specs=spec)


KEY = jax.random.key(0)
DROPPED = Dropout(0.5, KEY)
OTHER_CALLS = {
    "dropout counted on each device": (
        lambda: per_device(dense_attention, dropout=DROPPED)(*qkv()),
        r"Dropout has one key here.*each device would drop the same.*jax_seqpar.head_keys",
    ),
    "dropout counted on each shard of the batch": (
        lambda: data_parallel(*qkv(), dropout=DROPPED),
        r"Dropout has one key here.*jax_seqpar.head_keys",
    ),
    "sinks that are a list": (
        lambda: per_device(dense_attention, logits=Logits(sinks=[0.0] * 8))(*qkv()),  # pyright: ignore
        r"sinks must be an array of JAX or NumPy, got list",
    ),
    "an option that a function is not given": (
        lambda: per_device(identity, logits=Logits(sinks=jnp.ones(8)))(*qkv()),
        r"kernel=identity: a function is given the keywords of jax.nn only, and sinks is none",
    ),
    "a kernel of two results": (
        lambda: per_device(lambda q, k, v: (q, q))(*qkv()),
        r"kernel returned tuple, expected one array",
    ),
    "a residual of a function": (
        lambda: per_device(identity, return_residual=True)(*qkv()),
        r"return_residual=True: FunctionKernel.* does not return .*kernel=jax_seqpar.Blockwise",
    ),
    "a mask said twice": (
        lambda: dense_attention(*qkv(), mask=Mask(is_causal=True), is_causal=True),
        r"is_causal= and Mask\(is_causal=\) say the same thing twice",
    ),
    "logits that are a number": (
        lambda: dense_attention(*qkv(), logits=3.0),  # pyright: ignore
        r"logits must be a jax_seqpar.Logits, got 3.0",
    ),
    "overlap that is a string": (
        lambda: Ulysses(overlap="no"),  # pyright: ignore
        r"overlap must be one of \[True, False\], got 'no'",
    ),
    "overlap without a reshard": (
        lambda: dot_product_attention(
            *qkv(), layout=MeshLayout(tokens=None, mesh=MESH), strategy=Ulysses(overlap=False)
        ),
        r"overlap=False.* has no reshard to work on",
    ),
    "a mesh that is a string": (
        lambda: dot_product_attention(*qkv(), layout=MeshLayout(mesh="seq")),  # pyright: ignore
        r"mesh must be a jax.sharding.Mesh, got 'seq'",
    ),
    "another mesh inside a shard_map": (
        lambda: data_parallel(*qkv(), layout=MeshLayout(mesh=TENSOR_MESH)),
        r"mesh has the axes \{'seq': 2, 'tensor': 4\}, but this is inside .*Leave mesh= out",
    ),
    "an attention that is a string": (
        lambda: dot_product_attention(*qkv(), layout=LAYOUT, kernel="dense"),  # pyright: ignore
        r"kernel must be .*got 'dense'. Write kernel=jax_seqpar.Dense\(\),",
    ),
    "no channels": (
        lambda: dense_attention(*qkv(head_dim=0)),
        r"at least one head and one channel, got N = 8 and H = 0",
    ),
    "no heads": (
        lambda: dense_attention(array(2, 16, 0, 4), *qkv()[1:]),
        r"at least one head and one channel, got N = 0",
    ),
    "a list of segments": (
        lambda: dense_attention(*qkv(), mask=Mask(segment_ids=[0, 1])),  # pyright: ignore
        r"segment_ids must be an array, or a tuple of two, got list",
    ),
    "a number as key": (
        lambda: dense_attention(*qkv(), dropout=Dropout(0.5, 3)),
        r"rng must be a key, got 3. Write jax.random.key\(seed, impl=",
    ),
    "no key": (
        lambda: dense_attention(*qkv(), dropout=Dropout(0.5)),
        r"Dropout\(rate=0.5\) needs a key. Write Dropout\(0.5, jax.random.key",
    ),
    "a key of another kind": (
        lambda: dense_attention(*qkv(), dropout=Dropout(0.5, jax.random.key(0, impl="rbg"))),
        r"rng must be a threefry key, got one of rbg",
    ),
    "everything dropped": (
        lambda: dense_attention(*qkv(), dropout=Dropout(1.0, KEY)),
        r"rate must be a Python number, at least 0 and below 1, got 1.0",
    ),
    "slopes of other heads": (
        lambda: dense_attention(*qkv(), logits=Logits(alibi_slopes=jnp.ones(4))),
        r"alibi_slopes must be floating of shape \(N,\) = \(8,\), one for each",
    ),
    "positions and an offset": (
        lambda: dense_attention(
            *qkv(), mask=Mask(positions=jnp.zeros((2, 16), jnp.int32), query_offset=1)
        ),
        r"positions and query_offset = 1 both say where the queries are",
    ),
    "an offset that leaves int32": (
        lambda: dense_attention(*qkv(), mask=Mask(query_offset=1 << 29)),
        r"query_offset must be a Python integer below 2\^29",
    ),
    "a window that is no integer": (
        lambda: dense_attention(*qkv(), local_window_size=np.float64(3)),  # pyright: ignore
        r"local_window_size must be one Python integer or a tuple",
    ),
}


@pytest.mark.parametrize(("call", "message"), OTHER_CALLS.values(), ids=OTHER_CALLS)
def test_other_calls(call, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        call()


@pytest.mark.parametrize(
    "kernel",
    (blockwise_attention, dense_attention, exact_attention),
    ids=lambda f: type(f).__name__,
)
@pytest.mark.parametrize("heads", ((8, 8), (6, 3)), ids=str)
@pytest.mark.parametrize("sizes", ((0, 16, 16), (2, 0, 16), (2, 16, 0)), ids=str)
@pytest.mark.parametrize("kind", (AxisType.Auto, AxisType.Explicit), ids=str)
def test_nothing_is_no_misfit(sizes, heads, kernel, kind):
    """Empty sequences, queries or keys give zeros, with heads added for the devices or without."""
    (B, T, S), (N, K) = sizes, heads
    query, key = array(B, T, N, 4) + 1, array(B, S, K, 4) + 1
    mesh = jax.make_mesh((2, 4), ("data", "seq"), axis_types=(kind,) * 2)
    call = partial(
        dot_product_attention,
        kernel=kernel,
        layout=MeshLayout(mesh=mesh),
        strategy=Ulysses(1 + (N == 8)),
    )

    def run(*operands):
        out, pull = jax.vjp(call, *operands)
        return out, *pull(jnp.ones_like(out))

    results = jax.jit(run)(query, key, key)
    assert [x.shape for x in results] == [query.shape, query.shape, key.shape, key.shape]
    assert not any(np.any(x) for x in results)


NUMBERS = {
    "scale": (np.float32(0.5), 0.5),
    "is_causal": (np.True_, True),
    "query_offset": (np.int64(3), 3),
    "logits_soft_cap": (np.array(2.0), 2.0),
    "a window of NumPy": (np.int32(3), (3, 3)),
    "a window in a list": ([3, 0], (3, 0)),
    "a window without a left side": ((None, 0), (16, 0)),
    "a window of FlashAttention": ((-1, 0), (16, 0)),
    "a window without a right side": ((3, -1), (3, 16)),
    "a window without sides": (-1, None),
}


@pytest.mark.parametrize(("given", "plain"), NUMBERS.values(), ids=NUMBERS)
def test_static_numbers_of_numpy_and_open_windows(request, given, plain):
    name = request.node.callspec.id
    name = "local_window_size" if name.startswith("a window") else name
    q, k, v = (jnp.asarray(np.random.default_rng(0).standard_normal(x.shape)) for x in qkv())
    expected = dense_attention(q, k, v, **keywords_of(**{name: plain}))
    np.testing.assert_array_equal(
        dense_attention(q, k, v, **keywords_of(**{name: given})), expected
    )
    if name == "local_window_size":
        torch_mask = attends(16, 16, local_window_size=given)
        expected = attends(16, 16, local_window_size=plain)
        everything = np.ones((16, 16), bool)
        got, expected = (everything if x is None else x.numpy() for x in (torch_mask, expected))
        assert np.all(got == expected)


def test_the_platform_of_an_abstract_mesh():
    """The platform is that of the devices of `jax.set_mesh`, not of the default backend."""
    with jax.set_mesh(MESH):
        assert platform_of(jax.sharding.get_abstract_mesh()) == "cpu"
    tpu = jax.sharding.AbstractDevice("TPU v5e", 1, "tpu")
    assert platform_of(jax.sharding.AbstractMesh((4,), ("seq",), abstract_device=tpu)) == "tpu"
    assert platform_of(jax.sharding.AbstractMesh((4,), ("seq",))) is None


def shard_maps(jaxpr):
    """Parameters of every `shard_map` of a program."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "shard_map":
            yield equation.params
        for inner in jaxprs_in_params(equation.params):
            yield from shard_maps(inner)


@pytest.mark.parametrize(
    ("kernel", "checked"),
    (
        (Blockwise(), True),
        (Fused(platform="tpu"), False),
        (Fused(platform="gpu"), True),
        (Triton(platform="gpu"), False),
        (FunctionKernel(dense_attention, check_vma=False), False),
        (dense_attention, True),
        (identity, True),
    ),
)
def test_jax_checks_how_values_vary_unless_the_kernel_does_not_say(monkeypatch, kernel, checked):
    monkeypatch.setattr(Fused, "attend", lambda self, q, k, v, spec: (q, None))
    mesh = jax.sharding.AbstractMesh((4,), ("seq",))
    call = partial(dot_product_attention, kernel=kernel, layout=MeshLayout(mesh=mesh))
    program = jax.make_jaxpr(call)(*qkv())
    assert [found["check_vma"] for found in shard_maps(program.jaxpr)] == [checked]


@pytest.mark.parametrize("platform", ("cpu", "tpu"))
def test_the_kernel_is_chosen_for_the_mesh(monkeypatch, platform):
    """The platform of the mesh's devices decides, not that of the default backend."""
    device = jax.sharding.AbstractDevice("some", 1, platform)
    mesh = jax.sharding.AbstractMesh((4,), ("seq",), abstract_device=device)
    asked = []

    def choose(query, key, value, spec, platform, **options):
        asked.append(platform)
        return KernelChoice(dense_attention, "dense", "")

    monkeypatch.setattr("jax_seqpar.kernels.choice.choose", choose)
    call = partial(dot_product_attention, layout=MeshLayout(mesh=mesh))
    jax.make_jaxpr(call)(*qkv())
    assert asked == [platform]
    jax.make_jaxpr(partial(call, kernel=dense_attention))(*qkv())
    assert asked == [platform], "a kernel that is given is not chosen"


GOOD: Any = np.ones((2, 8, 4, 8), np.float32)
FOUR = jax.devices()[:4]
SEQ = jax.make_mesh((4,), ("seq",), devices=FOUR, axis_types=(AxisType.Auto,))
ON_SEQ = MeshLayout(mesh=SEQ)
ELSEWHERE = jax.make_mesh((4,), ("seq",), devices=jax.devices()[4:], axis_types=(AxisType.Auto,))


class OfTorch:
    """Stand-in for a PyTorch tensor, with the attributes that are read without PyTorch."""

    shape, dtype = GOOD.shape, "torch.float32"


OfTorch.__module__ = "torch"


def deleted():
    x = jnp.asarray(GOOD)
    x.delete()
    return x


WRONG_KINDS = {
    "of PyTorch": (OfTorch, r"got OfTorch\. Write jax_seqpar\.bridge\.to_jax\({}\)"),
    "sparse": (lambda: sparse.BCOO.fromdense(GOOD), r"got BCOO\. Write {}\.todense\(\)"),
    "of Flax": (lambda: nnx.Param(jnp.asarray(GOOD)), r"got Param\. Write {}\[\.\.\.\]"),
    "a list": (GOOD.tolist, r"got list\. Write jnp\.asarray\({}\)"),
    "a number": (lambda: 1.0, r"got float\. Write jnp\.asarray\({}\)"),
    "shapes": (
        lambda: jax.ShapeDtypeStruct(GOOD.shape, GOOD.dtype),
        r"{} has a shape and no numbers\. Write jax\.eval_shape",
    ),
    "of another byte order": (
        lambda: GOOD.astype(">f4"),
        r'dtype >f4, .* Write {0}\.astype\({0}\.dtype\.newbyteorder\("="\)\)',
    ),
    "of objects": (
        lambda: GOOD.astype(object),
        r"dtype object, .* Write {}\.astype\(np\.float32\)",
    ),
    "of 128 bits": (lambda: GOOD.astype(np.longdouble), r"dtype float128, .* Write {}\.astype"),
    "deleted": (deleted, r"{0} is deleted, .* Copy it before: {0} \+ 0"),
    "masked": (lambda: np.ma.masked_array(GOOD, GOOD > 0), r"Write {}\.filled\(0\)"),
}


def sharded_call(function):
    specs = {"in_specs": (), "out_specs": PartitionSpec(None, "seq")}
    return jax.shard_map(function, mesh=SEQ, **specs)()


DOORS = {
    "dot_product_attention": (
        "value",
        lambda x: dot_product_attention(GOOD, GOOD, x, layout=ON_SEQ),
    ),
    "bias": ("bias", lambda x: dot_product_attention(*(GOOD,) * 3, bias=x, layout=ON_SEQ)),
    "lengths": (
        "query_seq_lengths",
        lambda x: dot_product_attention(*(GOOD,) * 3, query_seq_lengths=x, layout=ON_SEQ),
    ),
    "segments": (
        "segment_ids",
        lambda x: dot_product_attention(*(GOOD,) * 3, mask=Mask(segment_ids=(x, x)), layout=ON_SEQ),
    ),
    "sinks": ("sinks", lambda x: blockwise_attention(*(GOOD,) * 3, logits=Logits(sinks=x))),
    "dense": ("query", lambda x: dense_attention(x, x, x)),
    "blockwise": ("key", lambda x: blockwise_attention(GOOD, x, x)),
    "exact": ("query", lambda x: exact_attention(x, x, x)),
    "choose_kernel": ("query", lambda x: choose_kernel(x, x, x)),
    "pad_to_degree": ("key", lambda x: pad_to_degree(GOOD, x, x, degree=3)),
    "head_keys": ("rng", lambda x: head_keys(x, 2, 4)),
    "on a device": (
        "query",
        lambda x: sharded_call(lambda: dot_product_attention(x, x, x)),
    ),
    "sequence_to_heads": ("x", lambda x: sharded_call(lambda: sequence_to_heads(x, "seq"))),
    "heads_to_sequence": ("x", lambda x: sharded_call(lambda: heads_to_sequence(x, "seq"))),
}


@pytest.mark.parametrize(
    ("door", "kind"),
    # That function chooses by shapes.
    [pair for pair in product(DOORS, WRONG_KINDS) if pair != ("choose_kernel", "shapes")],
)
def test_the_wrong_kind_of_array_is_refused_at_every_door(door, kind):
    name, call = DOORS[door]
    make, message = WRONG_KINDS[kind]
    if door == "head_keys" and kind in ("a list", "a number"):
        message = r"{} must be a key, got .* Write jax\.random\.key\(seed"
    with pytest.raises(ValueError, match=message.format(name)):
        call(make())


def test_a_constant_of_a_jitted_function_may_lie_anywhere():
    """Constants of a jitted function may lie on any device: JAX moves them to the program's."""
    slopes = jax.device_put(jnp.ones(GOOD.shape[2]), FOUR[1])
    attend = partial(dot_product_attention, logits=Logits(alibi_slopes=slopes), layout=ON_SEQ)
    got = jax.jit(lambda x: attend(x, x, x))(GOOD)
    expected = dense_attention(*(GOOD,) * 3, logits=Logits(alibi_slopes=jnp.ones(GOOD.shape[2])))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("name", ("query", "value", "bias", "segment_ids"))
@pytest.mark.parametrize("given", (True, False), ids=("mesh=", "jax.set_mesh"))
@pytest.mark.parametrize("where", (ELSEWHERE, FOUR[1]), ids=("another mesh", "one device"))
def test_arrays_on_other_devices_than_the_mesh_are_refused(name, given, where):
    x = np.zeros((2, 8), np.int32) if name == "segment_ids" else GOOD[:, :1, :1, :]
    x = GOOD if name in ("query", "value") else x
    x = jax.device_put(x, NamedSharding(where, PartitionSpec()) if where is ELSEWHERE else where)
    options: Any = {"query": GOOD, "key": GOOD, "value": GOOD, name: x}
    options |= {"layout": ON_SEQ} if given else {}
    on = "devices 4, 5, 6, 7" if where is ELSEWHERE else "device 1"
    message = rf"{name} is on cpu {on}, the mesh has cpu devices 0, 1, 2, 3\. .*device_put\({name}"
    with nullcontext() if given else jax.set_mesh(SEQ), pytest.raises(ValueError, match=message):
        dot_product_attention(**keywords_of(**options))
