"""Kernels on an NVIDIA GPU: exact attention's bits are those of every platform, all values right.

    JAX_PLATFORMS=cuda,cpu XLA_PYTHON_CLIENT_PREALLOCATE=false pytest -m gpu

Skipped where JAX sees no GPU. One is enough; programs for eight are in `test_gpu_aot`.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder import Config, Decoder, Placement
from exact_cases import CASE, CROSS, OPTIONS, SHAPES, jax_exact, torch_exact
from features import (
    KERNELS,
    SIZES,
    TRITON_FACTORS,
    Sizes,
    assert_as_near,
    cases,
    exact_by_torch,
    name_of,
    operands,
    options,
    run_jax,
    run_torch,
    sizes_of,
    with_junk,
)
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from questions import compiled, error, output_and_gradients

from jax_seqpar import (
    MeshLayout,
    Triton,
    blockwise_attention,
    dot_product_attention,
    fused_attention,
)
from jax_seqpar.compare import compare_bits
from jax_seqpar.exact import certify
from jax_seqpar.parity.golden import expected_digest
from jax_seqpar.parity.inputs import Case, adversarial
from jax_seqpar.parity.training.jax_side import train_in_jax
from jax_seqpar.parity.training.run import STEPS
from jax_seqpar.parity.training.task import Training
from jax_seqpar.training import TokenLayout

pytestmark = pytest.mark.gpu
EPS = float(np.finfo(np.float32).eps)
CUDNN = "__cudnn$fmha"


def gpu() -> Any:
    return jax.local_devices(backend="cuda")[0]


@pytest.fixture(autouse=True)
def _on_gpu():
    with jax.default_device(gpu()):
        yield


def check_equal(ours, theirs):
    report = compare_bits(ours, theirs)
    assert report.equal, str(report)


def test_the_certificate():
    certificate = certify("gpu")
    assert certificate.trusted, str(certificate)


@pytest.mark.parametrize("given", OPTIONS.values(), ids=OPTIONS)
def test_exact_attention_has_its_bits(given):
    inputs = CASE.inputs()
    check_equal(jax_exact(inputs, **given), torch_exact(inputs, **given))


@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)
def test_and_with_every_shape(case):
    inputs = case.inputs()
    given = {"is_causal": case.is_causal}
    check_equal(jax_exact(inputs, **given), torch_exact(inputs, **given))


def test_a_training_has_its_bits():
    """The last step of `seqpar parity --training` hashes to what it does on CPUs."""
    training = Training(steps=STEPS)
    *_, last = train_in_jax(training, 1, 1)
    assert last.sha256 == expected_digest(training.inputs())


@pytest.mark.parametrize("by_positions", (False, True))
def test_and_with_every_option(by_positions):
    inputs, given = CROSS.inputs(), CROSS.all_at_once(by_positions)
    check_equal(jax_exact(inputs, **given), torch_exact(inputs, **given))


@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "float16"))
def test_and_with_special_numbers(dtype):
    case = Case(batch=2, tokens=31, heads=4, kv_heads=2, head_dim=6, dtype=dtype)
    inputs = adversarial(case.inputs())
    check_equal(jax_exact(inputs, is_causal=True), torch_exact(inputs, is_causal=True))


@pytest.mark.parametrize("case", cases(), ids=name_of)
def test_every_pair_of_features(case):
    """The bits of exact attention; of the others values as near to float64 as on the CPU.

    The bound is four times the largest error there: a GPU adds in another order, and its exp errs
    by two units where that of a CPU errs by one.
    """
    kernel = case["kernel"]
    some, inputs = options(case), operands(SIZES[case["sizes"]])
    # Products of float32 that a GPU would else take in 10 bits.
    with jax.default_matmul_precision("highest"):
        got = run_jax(KERNELS[kernel], some, kernel, inputs)
        if kernel == "exact":
            check_equal(got, exact_by_torch(some, inputs))
            return
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            alone = run_jax(KERNELS[kernel], some, kernel, inputs)
    for name, expected in run_torch(some, kernel, inputs).items():
        unit = EPS * np.max(np.abs(expected), initial=0)
        bound = 4 * max(error(alone[name], expected), unit)
        assert error(got[name], expected) <= bound, f"{name}: {error(got[name], expected)} {bound}"


@pytest.mark.parametrize("case", cases(TRITON_FACTORS), ids=name_of)
def test_triton_with_every_pair_of_its_features(case):
    """Triton with small blocks is within 16 units of the largest entry, as interpreted on a CPU."""
    given, inputs = options(case), operands(sizes_of(case), case["dtype"])
    if case["junk"]:
        inputs = with_junk(inputs, given)
    with jax.default_matmul_precision("highest"):
        got = run_jax(Triton(query_chunk=16, key_chunk=16), given, "triton", inputs)
    assert_as_near(got, got, run_torch(given, "triton", inputs), copies=1)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("head_dim", (64, 128, 256))
def test_triton_in_its_own_blocks(head_dim, dtype):
    """Causal attention in documents, of tokens that are no whole blocks."""
    inputs = operands(Sizes(B=1, T=700, S=700, N=4, K=2, H=head_dim, V=head_dim), dtype)
    documents = np.searchsorted((150, 400), np.arange(700), side="right")[None].astype(np.int32)
    given = {"is_causal": True, "segment_ids": documents}
    with jax.default_matmul_precision("highest"):
        got = run_jax(Triton(), given, "triton", inputs)
    assert_as_near(got, got, run_torch(given, "triton", inputs), copies=1)


CONFIG = Config(features=128, hidden=192, layers=2, heads=4, kv_heads=2, head_dim=32)
LAYOUT = MeshLayout(batch="data")
rng = np.random.default_rng(3)
TOKENS = rng.integers(0, 256, (2, 512))
SEGMENTS = np.sort(rng.integers(1, 4, TOKENS.shape), axis=1)


def loss_and_gradients(device: Any, documents: bool, attention: Any, dtype: Any) -> Any:
    """Loss, gradients and program of a decoder on one device; parameters are made on the CPU."""
    mesh = jax.make_mesh((1, 1), ("data", "seq"), devices=[device])
    cpu = jax.local_devices(backend="cpu")[0]
    place = Placement(LAYOUT, attention, sharding={}, dtype=dtype)
    with jax.default_device(cpu):
        alone = jax.make_mesh((1, 1), ("data", "seq"), devices=[cpu])
        with jax.set_mesh(alone):
            graph, params = nnx.split(Decoder(CONFIG, place, rngs=nnx.Rngs(0)))
    whole = NamedSharding(mesh, PartitionSpec())
    params = jax.tree.map(lambda x: jax.device_put(np.asarray(x), whole), params)
    batch = TokenLayout(LAYOUT.on(mesh)).shard(TOKENS, segment_ids=SEGMENTS if documents else None)
    with jax.set_mesh(mesh), jax.default_device(device):
        with jax.numpy_dtype_promotion("standard"):  # of Flax's norm in 16 bits
            run = jax.jit(jax.value_and_grad(lambda p: nnx.merge(graph, p).loss(batch)))
            program = run.lower(params).compile()
        loss, grads = program(params)
    flat = {path: np.asarray(x, np.float64) for path, x in jax.tree.leaves_with_path(grads)}
    return float(loss), flat, program.as_text()


def test_a_decoder_has_the_loss_and_the_gradients_of_a_cpu():
    """Packed documents, float32. The bound is that between meshes of a CPU, in `test_decoder`."""
    with jax.default_matmul_precision("highest"):
        loss, grads, _ = loss_and_gradients(gpu(), True, None, jnp.float32)
    cpu = jax.local_devices(backend="cpu")[0]
    expected_loss, expected, _ = loss_and_gradients(cpu, True, blockwise_attention, jnp.float32)
    assert abs(loss - expected_loss) <= 16 * EPS * expected_loss
    for path, x in expected.items():
        assert np.abs(grads[path] - x).max() <= 120 * EPS * np.abs(x).max(), path


def test_a_decoder_in_16_bits_by_cudnn():
    """A decoder without documents runs cuDNN, and errs as blockwise attention of 16 bits does."""
    loss, grads, program = loss_and_gradients(gpu(), False, None, jnp.bfloat16)
    assert program.count(f'custom_call_target="{CUDNN}') == 2 * CONFIG.layers
    with jax.default_matmul_precision("highest"):
        true_loss, truth, _ = loss_and_gradients(gpu(), False, blockwise_attention, jnp.float32)
    other_loss, other, program = loss_and_gradients(gpu(), False, blockwise_attention, jnp.bfloat16)
    assert CUDNN not in program
    assert abs(loss - true_loss) <= 2 * max(abs(other_loss - true_loss), 2.0**-9 * true_loss)
    for path, x in truth.items():
        bound = 2 * max(np.abs(other[path] - x).max(), 2.0**-9 * np.abs(x).max())
        assert np.abs(grads[path] - x).max() <= bound, path


def test_the_front_door_takes_cudnn():
    mesh = jax.make_mesh((1,), ("seq",), devices=[gpu()])
    inputs = Case(batch=2, tokens=256, heads=8, kv_heads=2, head_dim=64, dtype="bfloat16").inputs()
    attend = partial(dot_product_attention, is_causal=True, layout=MeshLayout(mesh=mesh))
    ours = output_and_gradients(attend)(**inputs)
    assert CUDNN in compiled(output_and_gradients(attend), *inputs.values())
    theirs = output_and_gradients(partial(fused_attention, is_causal=True))(**inputs)
    for a, b in zip(ours, theirs, strict=True):
        check_equal(np.asarray(a), np.asarray(b))
