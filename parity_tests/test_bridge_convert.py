"""to_torch and to_jax: the same bits, the same memory, and a refusal for all that cannot cross."""

import subprocess
import sys
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_seqpar._extras import require_torch
from jax_seqpar.bridge.convert import _instead, to_jax, to_torch
from jax_seqpar.compare.bits import compare_bits

FLOAT8 = ["float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"]
NARROW = [
    *FLOAT8, "bool", "bfloat16", "float16", "float32", "complex64",
    "int8", "int16", "int32", "uint8", "uint16", "uint32",
]  # fmt: skip
WIDE = ["float64", "complex128", "int64", "uint64"]


def every_byte(name):
    """256 bytes, each value once, seen as an array: NaNs, infinities, -0 and subnormals too."""
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    if name == "bool":
        return np.arange(2).astype(bool)
    return np.random.default_rng(0).permutation(256).astype(np.uint8).view(dtype)


def corners(name):
    """-0, +0, the smallest subnormal, two NaNs of other payload and the infinities."""
    info = ml_dtypes.finfo(name)
    inf, sign = ((1 << info.nexp) - 1) << info.nmant, 1 << (info.bits - 1)
    bits = [sign, 0, 1, sign + 1, inf + 1, inf + 2, sign + inf + 3, inf, sign + inf]
    return np.array(bits, f"u{info.bits // 8}").view(info.dtype)


@pytest.mark.parametrize("name", NARROW + WIDE)
def test_every_dtype_crosses_both_ways_without_a_copy(name):
    with jax.enable_x64(name in WIDE):
        x = jnp.asarray(every_byte(name))
        tensor = to_torch(x)
        assert tensor.dtype == getattr(torch, name)
        assert tensor.data_ptr() == x.unsafe_buffer_pointer()
        assert compare_bits(x, tensor).equal
        tensor = tensor.clone()
        back = to_jax(tensor)
        assert back.dtype == x.dtype
        assert back.unsafe_buffer_pointer() == tensor.data_ptr()
        assert compare_bits(x, back).equal


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32", "float64"])
def test_the_corners_of_a_float_keep_their_bits(name):
    with jax.enable_x64(True):
        x = corners(name)
        tensor = to_torch(jnp.asarray(x))
        assert compare_bits([x, x], [tensor, to_jax(tensor.clone())]).equal


def test_trees_keep_their_structure():
    tree = {"a": [jnp.ones(2), 3, 2.5, True, 1j], "b": (None, jnp.zeros((0, 3)), jnp.float32(1))}
    tensors = to_torch(tree)
    assert tensors["a"][1:] == tree["a"][1:]
    assert [type(x) for x in tensors["a"][1:]] == [int, float, bool, complex]
    assert tensors["b"][0] is None
    assert (tensors["b"][1].shape, tensors["b"][2].shape) == ((0, 3), ())
    assert compare_bits(tree, tensors).equal
    assert compare_bits(tree, to_jax(tensors)).equal


def test_any_layout_of_a_tensor_crosses():
    base = torch.arange(60, dtype=torch.bfloat16).reshape(3, 4, 5)
    for view in (base.transpose(0, 2), base[:, ::2], base[1:, 1:], base[0].expand(2, 4, 5)):
        assert compare_bits(view, to_jax(view)).equal


def test_lazy_conjugates_and_negatives_cross_as_their_values():
    z = torch.tensor([1 + 2j])
    assert to_jax(z.conj()).item() == 1 - 2j
    # PyTorch 2.13's own DLPack export forgets the pending minus of such a tensor.
    assert to_jax(z.conj().imag).item() == -2


def test_an_unaligned_tensor_is_copied_not_garbled():
    base = torch.arange(64, dtype=torch.float32)
    assert to_jax(base[16:]).unsafe_buffer_pointer() == base[16:].data_ptr()
    assert to_jax(base[1:]).unsafe_buffer_pointer() != base[1:].data_ptr()
    assert compare_bits(base[1:], to_jax(base[1:])).equal


@pytest.mark.parametrize("kind", (AxisType.Auto, AxisType.Explicit))
def test_arrays_are_sharded_over_a_mesh(kind):
    mesh = jax.make_mesh((2, 4), ("data", "seq"), axis_types=(kind, kind))
    sharding = NamedSharding(mesh, PartitionSpec("data", "seq"))
    tensor = torch.arange(64.0).reshape(4, 8, 2)
    tree = to_jax({"x": tensor, "rate": 0.5, "none": None}, sharding=sharding)
    x = tree["x"]
    assert (tree["rate"], tree["none"], x.sharding) == (0.5, None, sharding)
    assert [shard.data.shape for shard in x.addressable_shards] == [(2, 2, 2)] * 8
    assert compare_bits(x, tensor).equal
    whole = to_jax(tensor, sharding=NamedSharding(mesh, PartitionSpec()))
    tensor.zero_()
    # Replicas of one array: none of them has the memory that PyTorch has just written to.
    assert [float(shard.data[3, 7, 1]) for shard in whole.addressable_shards] == [63.0] * 8
    beside = jax.device_put(jnp.ones((4, 8, 2)), sharding)
    assert np.asarray(jax.jit(lambda a, b: a + b)(x, beside))[3, 7, 1] == 64.0
    with pytest.raises(ValueError, match=r"shape \(3, 8\) at \['y'\] cannot have the sharding"):
        to_jax({"y": torch.ones(3, 8)}, sharding=sharding)
    with pytest.raises(ValueError, match=r"shape \(\) at \['y'\] cannot have the sharding"):
        to_jax({"y": torch.tensor(1.0)}, sharding=sharding)


def test_memory_outlives_the_array_it_came_from():
    x = jnp.arange(1000.0)
    expected = np.array(x)
    tensor = to_torch(x)
    del x
    array = to_jax(tensor)
    del tensor
    assert compare_bits(expected, array).equal


def test_a_result_still_being_computed_is_waited_for():
    x = jnp.full((400, 400), 1 / 400)
    power = jax.jit(lambda x: jax.lax.fori_loop(0, 20, lambda _, y: y @ x, x))(x)
    tensor = to_torch(power).clone()
    assert compare_bits(tensor, power).equal


def test_donating_a_shared_array_leaves_the_tensor_alone():
    tensor = torch.ones(1000)
    double = jax.jit(lambda x: 2 * x, donate_argnums=0)
    assert double(to_jax(tensor))[0] == 2
    assert tensor[0] == 1
    x = jnp.ones(1000) + 0
    tensor = to_torch(x)
    assert double(x)[0] == 2
    assert tensor[0] == 1


def test_tracers_are_refused():
    with pytest.raises(ValueError, match=r"at \['q'\] is a tracer.*Cross outside jit"):
        jax.jit(lambda x: to_torch({"q": x}))(jnp.ones(2))
    with pytest.raises(ValueError, match="tracer"):
        jax.grad(lambda x: to_torch(x).sum())(jnp.ones(2))


def test_arrays_on_several_devices_are_refused():
    # In a process of its own, as the number of devices is settled when JAX first starts.
    code = (
        "import jax, jax.numpy as jnp\n"
        "from jax.sharding import AxisType, NamedSharding, PartitionSpec as P\n"
        "from jax_seqpar.bridge.convert import to_torch\n"
        "jax.config.update('jax_num_cpu_devices', 2)\n"
        "mesh = jax.make_mesh((2,), ('seq',), axis_types=(AxisType.Auto,))\n"
        "for spec in (P('seq'), P()):\n"
        "    x = jax.device_put(jnp.arange(4.0), NamedSharding(mesh, spec))\n"
        "    try: to_torch({'x': x})\n"
        "    except ValueError as error: print(error)\n"
        "print(to_torch([shard.data for shard in x.addressable_shards])[1].tolist())\n"
        "print(to_torch(jax.device_put(x, jax.devices()[0])).tolist())\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *refusals, pieces, whole = run.stdout.splitlines()
    assert len(refusals) == 2
    for refusal in refusals:
        assert "float32 array of shape (4,) at ['x'] is on 2 devices" in refusal
        assert "addressable_shards" in refusal
    assert pieces == whole == "[0.0, 1.0, 2.0, 3.0]"


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("int4", r"x\.astype\(jnp\.int8\)"),
        ("uint4", r"x\.astype\(jnp\.int8\)"),
        ("float8_e3m4", r"jax\.lax\.bitcast_convert_type\(x, jnp\.uint8\)"),
        ("float8_e4m3b11fnuz", r"jax\.lax\.bitcast_convert_type\(x, jnp\.uint8\)"),
        ("float4_e2m1fn", r"x\.astype\(jnp\.float32\)"),
    ],
)
def test_dtypes_that_pytorch_lacks_are_refused(name, instead):
    x = jnp.ones((2, 3), getattr(jnp, name))
    with pytest.raises(TypeError, match=rf"{name} array of shape \(2, 3\) at \[0\].*{instead}"):
        to_torch([x])


def test_arrays_on_a_tpu_are_pointed_to_the_host():
    x = Mock(dtype=jnp.dtype("float32"), devices=lambda: {Mock(platform="tpu")})
    assert _instead(x) == 'jax.device_put(x, jax.devices("cpu")[0])'


def test_what_the_refusals_suggest_works():
    x = jnp.arange(-8, 8).astype(jnp.int4)
    assert to_torch(x.astype(jnp.int8)).tolist() == list(range(-8, 8))
    x = jnp.ones(3, jnp.float8_e3m4)
    assert compare_bits(
        to_torch(jax.lax.bitcast_convert_type(x, jnp.uint8)), np.asarray(x).view(np.uint8)
    ).equal
    assert to_torch(jax.random.key_data(jax.random.key(7))).tolist() == [0, 7]


def test_random_keys_are_refused():
    with pytest.raises(TypeError, match=r"\['rng'\] is a random key\. Write jax\.random\.key_data"):
        to_torch({"rng": jax.random.key(0)})


@pytest.mark.parametrize("leaf", [np.ones(2), np.float64(1), torch.ones(2), "text"])
def test_to_torch_takes_jax_arrays_only(leaf):
    message = rf"to_torch takes JAX arrays.*got {type(leaf).__name__} at \[1\]"
    with pytest.raises(TypeError, match=message):
        to_torch([jnp.ones(2), leaf])


@pytest.mark.parametrize("leaf", [np.ones(2), np.float64(1), jnp.ones(2), "text"])
def test_to_jax_takes_tensors_only(leaf):
    message = rf"to_jax takes PyTorch tensors.*got {type(leaf).__name__} at \['x'\]"
    with pytest.raises(TypeError, match=message):
        to_jax({"x": leaf})


@pytest.mark.parametrize("name", WIDE)
def test_narrowing_is_refused(name):
    tensor = torch.ones(3, dtype=getattr(torch, name))
    message = rf"torch\.{name} tensor of shape \(3,\) at \['x'\].*`with jax\.enable_x64\(True\):`"
    with jax.enable_x64(False), pytest.raises(ValueError, match=message):
        to_jax({"x": tensor})


def test_gradients_are_refused():
    for x in (torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True) * 2):
        with pytest.raises(ValueError, match=r"\[0\] requires a gradient.*x\.detach\(\)"):
            to_jax([x])
        assert to_jax([x.detach()])[0].shape == (2,)


@pytest.mark.filterwarnings("ignore:ComplexHalf support")
@pytest.mark.parametrize("name", ["complex32", "float4_e2m1fn_x2"])
def test_dtypes_that_jax_lacks_are_refused(name):
    x = torch.zeros(3, dtype=getattr(torch, name))
    message = rf"torch\.{name} tensor of shape \(3,\) at the root.*x\.view\(torch\.uint8\)"
    with pytest.raises(TypeError, match=message):
        to_jax(x)
    assert to_jax(x.view(torch.uint8)).dtype == jnp.uint8


def test_pytorch_is_optional(monkeypatch):
    assert require_torch() is torch
    monkeypatch.setitem(sys.modules, "torch", None)
    for cross in (require_torch, lambda: to_torch(1), lambda: to_jax(1)):
        with pytest.raises(ImportError, match=r'pip install "jax-seqpar\[parity\]"'):
            cross()
