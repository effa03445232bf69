"""compare_bits, against oracles that do not look at bits: sorted values, nextafter, math.ulp."""

import json
import math
import subprocess
import sys
from collections import OrderedDict, namedtuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from jax_seqpar.bridge import Map, from_torch, to_jax, to_torch, to_torch_state
from jax_seqpar.compare import compare_bits, divergence_table, first_divergence
from jax_seqpar.compare.bits import LeafReport

NARROW_FLOATS = [
    "float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn", "float8_e3m4", "float8_e4m3",
    "float8_e4m3b11fnuz", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz",
    "float8_e8m0fnu", "bfloat16", "float16",
]  # fmt: skip
FLOATS = [*NARROW_FLOATS, "float32", "float64"]
INTEGERS = ["int2", "uint2", "int4", "uint4"] + [
    f"{sign}int{width}" for sign in ("", "u") for width in (8, 16, 32, 64)
]
DTYPES = [*FLOATS, *INTEGERS, "bool", "complex64", "complex128"]
IN_TORCH = [name for name in DTYPES if isinstance(getattr(torch, name, None), torch.dtype)]
IN_TORCH = [name for name in IN_TORCH if name not in ("int2", "uint2", "int4", "uint4")]


def dtype_of(name):
    return np.dtype(getattr(ml_dtypes, name, name))


def ones(name, shape=(2, 3)):
    return np.ones(shape, dtype_of(name))


def flipped(x, index):
    """A copy of x whose element `index` has its lowest bit flipped."""
    raw = np.ascontiguousarray(x).copy()
    raw.view(np.uint8).reshape(*x.shape, x.dtype.itemsize)[index][0] ^= 1
    return raw


def as_torch(x):
    """A tensor of the same bits, by another way than the library's."""
    return torch.frombuffer(bytearray(x.tobytes()), dtype=getattr(torch, x.dtype.name)).reshape(
        x.shape
    )


def only(a, b, **options) -> LeafReport:
    (leaf,) = compare_bits(a, b, **options).leaves
    return leaf


def floats(bits, name):
    return np.array(bits, f"u{dtype_of(name).itemsize}").view(dtype_of(name))


@pytest.mark.parametrize("name", DTYPES)
def test_one_flipped_bit_is_found_in_every_dtype(name):
    a = ones(name)
    b = flipped(a, (1, 0))
    assert compare_bits(a, a.copy()).equal
    leaf = only(a, b)
    assert (leaf.dtype_a, leaf.differing, leaf.total, leaf.share) == (name, 1, 6, 1 / 6)
    assert (leaf.first_index, leaf.meaning) == ((1, 0), "index (1, 0)")
    assert leaf.bits_a != leaf.bits_b
    assert leaf.value_a == 1


@pytest.mark.parametrize(
    "name", [n for n in DTYPES if not n.startswith(("float6", "int2", "uint2"))]
)
def test_jax_arrays_of_every_dtype(name):
    with jax.enable_x64(True):
        a, b = jnp.asarray(ones(name)), jnp.asarray(flipped(ones(name), (0, 2)))
    leaf = only(a, b)
    assert (leaf.dtype_a, leaf.differing, leaf.first_index) == (name, 1, (0, 2))
    assert compare_bits(a, ones(name)).equal


@pytest.mark.parametrize("name", IN_TORCH)
def test_torch_tensors_of_every_dtype(name):
    a = ones(name)
    assert compare_bits(as_torch(a), a).equal
    leaf = only(as_torch(a), flipped(a, (0, 2)))
    assert (leaf.dtype_a, leaf.dtype_b, leaf.differing) == (name, name, 1)


@pytest.mark.parametrize("name", NARROW_FLOATS)
def test_ulp_is_the_rank_among_all_the_values(name):
    dtype = dtype_of(name)
    bits = np.arange(1 << jnp.finfo(dtype).bits).astype(f"u{dtype.itemsize}")
    with np.errstate(all="ignore"):
        values = bits.view(dtype).astype(np.float64)
    # unique sorts, and makes one of -0 and +0.
    _, first = np.unique(values, return_index=True)
    ordered = bits[first][np.isfinite(values[first])].view(dtype)
    for steps in (1, 2, len(ordered) // 2, len(ordered) - 1):
        assert only(ordered[:-steps], ordered[steps:]).max_ulp == steps
        assert only(ordered[steps], ordered[0]).max_ulp == steps


@given(
    name=st.sampled_from(["float16", "float32", "float64"]),
    start=st.floats(-1e4, 1e4, width=16),
    steps=st.integers(1, 50),
    up=st.booleans(),
)
def test_ulp_counts_the_steps_of_nextafter(name, start, steps, up):
    dtype = np.dtype(name).type
    x = y = dtype(start)
    for _ in range(steps):
        y = np.nextafter(y, dtype(math.inf if up else -math.inf))
    leaf = only(x, y)
    assert leaf.max_ulp == steps
    assert leaf.max_abs == abs(float(x) - float(y))


@given(st.floats(min_value=0, allow_infinity=False, exclude_max=True, max_value=sys.float_info.max))
def test_one_math_ulp_is_one_ulp(x):
    assert only(x, x + math.ulp(x)).max_ulp == 1


def test_ulp_does_not_overflow():
    most = np.finfo(np.float64).max
    leaf = only(-most, most)
    assert leaf.max_ulp == 2 * 0x7FEF_FFFF_FFFF_FFFF
    assert leaf.max_abs == math.inf
    assert only(np.float32(-1e-45), np.float32(1e-45)).max_ulp == 2


@given(st.integers(-(2**63), 2**63 - 1), st.integers(-(2**63), 2**63 - 1))
def test_integers_are_subtracted_exactly(x, y):
    assert only(np.int64(x), np.int64(y)).max_abs == abs(x - y)
    assert only(np.uint64(x % 2**64), np.uint64(y % 2**64)).max_abs == abs(x % 2**64 - y % 2**64)


@pytest.mark.parametrize(("name", "x", "y"), [("int4", -8, 7), ("int2", -2, 1), ("uint4", 0, 15)])
def test_small_integers_keep_their_sign(name, x, y):
    leaf = only(np.array(x, dtype_of(name)), np.array(y, dtype_of(name)))
    assert (leaf.value_a, leaf.value_b, leaf.max_abs, leaf.max_ulp) == (x, y, y - x, None)


def test_the_unused_bits_of_a_byte_do_not_count():
    for dtype in (ml_dtypes.int4, ml_dtypes.float4_e2m1fn):
        a, b = (np.array([bits], np.uint8).view(dtype) for bits in (0xF5, 0x05))
        assert compare_bits(a, b).equal


@pytest.mark.parametrize("name", ["float8_e5m2", "bfloat16", "float16", "float32", "float64"])
def test_special_values_are_counted(name):
    info = ml_dtypes.finfo(dtype_of(name))
    sign = 1 << (info.bits - 1)
    inf = ((1 << info.nexp) - 1) << info.nmant
    one = int(info.dtype.type(1).view(f"u{info.bits // 8}"))
    #        -0/+0 NaN/1    1/NaN    two payloads        inf/-inf    1/inf same NaN subnormal
    a = [sign, inf + 1, one, one, inf + 1, inf + 2, inf, one, inf + 1, 1]
    b = [0, one, inf + 1, inf + 2, inf + 2, inf + 2 + sign, inf + sign, inf, inf + 1, 2]
    leaf = only(floats(a, name), floats(b, name))
    assert leaf.differing == 9
    assert (leaf.signed_zero, leaf.nan_only_a, leaf.nan_only_b) == (1, 1, 2)
    assert (leaf.nan_payload, leaf.infinite, leaf.max_ulp) == (2, 2, 1)
    text = str(leaf)
    for fact in ("-0 against +0: 1", "NaN only in a: 1", "NaN only in b: 2", "infinite: 2"):
        assert fact in text
    assert "NaN in both, other payload: 2" in text
    # The same through the frameworks, which could have quieted or flushed on the way.
    with jax.enable_x64(True):
        assert compare_bits(jnp.asarray(floats(a, name)), as_torch(floats(a, name))).equal


def test_either_part_of_a_complex_number_can_differ():
    a = np.array([1 + 2j, 1 + 2j, 1 + 2j, complex(0, -0.0)], np.complex64)
    b = np.array([1 + 2j, 3 + 2j, complex(1, math.nan), 0], np.complex64)
    leaf = only(a, b)
    assert (leaf.differing, leaf.nan_only_b, leaf.signed_zero, leaf.max_abs) == (3, 1, 1, 2)
    assert (leaf.value_a, leaf.value_b, leaf.bits_b) == (1 + 2j, 3 + 2j, "0x40400000 0x40000000")
    assert only(np.complex64(0), np.complex64(1)).value_a == 0
    beside_a_nan = only(np.complex64(complex(1, math.nan)), np.complex64(complex(2, math.nan)))
    assert (beside_a_nan.nan_payload, beside_a_nan.max_abs) == (0, 1)


def test_trees_of_mixed_frameworks():
    a = {"query": [jnp.ones(3), np.zeros(2)], "step": 3, "none": None}
    b = {"query": [torch.ones(3), torch.zeros(2, dtype=torch.float64)], "step": 3, "none": None}
    report = compare_bits(a, b)
    assert report.equal
    assert [leaf.path for leaf in report.leaves] == ["['query'][0]", "['query'][1]", "['step']"]
    assert str(report) == "equal: 3 arrays, 6 elements, 0 bits differ"
    assert str(report.leaves[0]) == "['query'][0] float32[3]: 3 elements, 0 bits differ"


Pair = namedtuple("Pair", "first second")


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ({"q": [1, 2]}, {"q": [1]}, r"only a has \['q'\]\[1\]"),
        ({"q": 1}, {"q": 1, "k": 2}, r"only b has \['k'\]"),
        ({"q": [1, 2]}, {"q": (1, 2)}, r"at \['q'\] a is of type list, b of type tuple"),
        ({"q": [1, None]}, {"q": [1, 2]}, r"at \['q'\]\[1\] a is of type NoneType, b of type int"),
        (Pair(1, [2]), Pair(1, [2, 3]), r"only b has \.second\[1\]"),
        (1, [1], "at the root a is of type int, b of type list"),
        ({"q": None}, {"q": None}, "nothing to compare: a and b have no array"),
        (
            [OrderedDict(q=1, k=2)],
            [OrderedDict(k=2, q=1)],
            r"at \[0\] the static data of a OrderedDict differs",
        ),
    ],
)
def test_structures_must_match(a, b, message):
    with pytest.raises(ValueError, match=message):
        compare_bits(a, b)


@pytest.mark.parametrize("x", ["text", object(), np.longdouble(1), np.array(["a"]), 2**70])
def test_only_numbers_are_compared(x):
    with pytest.raises(TypeError, match=r"\['x'\] must be an array of numbers"):
        compare_bits({"x": x}, {"x": x})


def deleted():
    x = jnp.arange(3.0)
    x.delete()
    return x


class Doubled(torch.Tensor):
    """Tensor subclass without a storage, like DTensors and torchao's: another tensor times two."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args, kwargs=None):
        if func is torch.ops.aten.detach.default:
            return args[0]
        args = (x.inner + x.inner if isinstance(x, cls) else x for x in args)
        return func(*args, **(kwargs or {}))


def fake():
    with FakeTensorMode():
        return torch.ones(3)


def resized(nbytes):
    x = torch.ones(64)
    x.untyped_storage().resize_(nbytes)
    return x


NO_NUMBERS = {
    "wrapper": (lambda: Doubled(torch.ones(3)), r"is a Doubled without its numbers in memory of"),
    "fake": (fake, r"is a FakeTensor without its numbers in memory of its own"),
    "freed": (lambda: resized(0), r"is a Tensor without its numbers in memory of its own"),
    "shrunk": (lambda: resized(16), r"is a Tensor without its numbers in memory of its own"),
    "meta": (lambda: torch.ones(3, device="meta"), r"is on the meta device, without data"),
    "sparse": (lambda: torch.eye(3).to_sparse(), r"has layout torch\.sparse_coo.*x\.to_dense\(\)"),
    "csr": (lambda: torch.eye(3).to_sparse_csr(), r"has layout torch\.sparse_csr.*x\.to_dense"),
    "mkldnn": (lambda: torch.ones(3).to_mkldnn(), r"has layout torch\._mkldnn.*x\.to_dense\(\)"),
    "quantised": (
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8),
        r"is quantised\. Write x\.dequantize\(\) .*x\.int_repr\(\)",
    ),
    "nested": (
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        r"is nested\. Write x\.unbind\(\)",
    ),
    "random key": (lambda: jax.random.key(0), r"is a random key\. .*jax\.random\.key_data\(x\)"),
    "deleted": (deleted, r"is deleted, as an array donated"),
    "masked": (lambda: np.ma.masked_array([1.0, 2.0], [0, 1]), r"is masked, .*x\.filled\(0\)"),  # pyright: ignore
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", NO_NUMBERS.values(), ids=NO_NUMBERS)
@pytest.mark.usefixtures("unchecked_shapes")
def test_arrays_without_dense_numbers_are_refused_at_every_door(case):
    make, message = case
    x = make()
    by_name = {"x": x}
    doors = [
        lambda: compare_bits(by_name, by_name),
        lambda: first_divergence(by_name, by_name),
        lambda: divergence_table(by_name, by_name, rtol=1e-3),
    ]
    if isinstance(x, torch.Tensor):
        doors += [lambda: to_jax(by_name), lambda: from_torch(by_name, [Map("x", "y")])]
    elif isinstance(x, jax.Array):
        doors += [lambda: to_torch(by_name), lambda: to_torch_state(by_name, [Map("y", "x")])]
    for door in doors:
        with pytest.raises(TypeError, match=message):
            door()


def test_another_shape_or_dtype_is_not_equal():
    report = compare_bits(
        [jnp.ones((2, 3)), np.ones(2), np.ones((0,))],
        [jnp.ones((3, 2)), np.ones(2, np.float32), np.ones((0, 2))],
    )
    assert [leaf.differing for leaf in report.leaves] == [6, 2, 0]
    assert not any(leaf.equal for leaf in report.leaves)
    assert {leaf.max_abs for leaf in report.leaves} == {None}
    assert (report.differing, report.total) == (8, 8)
    assert "[0] a is float32[2, 3], b is float32[3, 2]: all 6 elements differ" in str(report)


def test_the_first_difference_is_told_in_words():
    a = jnp.zeros((2, 32, 4, 8), jnp.bfloat16)
    b = a.at[1, 17:, 3, 0].set(1)
    report = compare_bits({"out": a}, {"out": b})
    assert report.leaves[0].meaning == "batch 1, token 17, head 3, channel 0"
    assert str(report).splitlines() == [
        "different: 1 of 1 array, 15 of 2,048 elements",
        "['out'] bfloat16[2, 32, 4, 8]: 15 of 2,048 elements differ (0.732%)",
        "  first at batch 1, token 17, head 3, channel 0: a = 0.0 (0x0000), b = 1.0 (0x3f80)",
        "  finite elements differ by at most 16,256 ULP, 1 absolute",
    ]
    assert only(a[0, 0], b[1, 17], axes=("head", "channel")).meaning == "head 3, channel 0"


def test_layout_and_gradients_do_not_matter():
    base = torch.arange(24, dtype=torch.bfloat16).reshape(4, 6)
    for view in (base.T, base[:, ::2], base[1:, 1:], base.expand(2, 4, 6), base[0, 0], base[:0]):
        assert compare_bits(view, view.contiguous()).equal
        assert compare_bits(
            view.clone().requires_grad_(),
            np.asarray(view.tolist(), ml_dtypes.bfloat16).reshape(view.shape),
        ).equal
    z = torch.tensor([1 + 2j])
    assert compare_bits(z.conj(), np.array([1 - 2j], np.complex64)).equal
    assert compare_bits(np.arange(6)[::-2], np.array([5, 3, 1])).equal
    assert compare_bits(np.arange(3, dtype=">f4"), np.arange(3, dtype="<f4")).equal


def test_reports_are_plain_json():
    report = compare_bits([1.0, np.complex64(1j), 3], [math.nan, np.complex64(2j), 3])
    plain = report.to_json()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert (plain["equal"], plain["differing"], plain["total"]) == (False, 2, 3)
    assert [leaf["value_b"] for leaf in plain["leaves"]] == ["nan", "2j", None]


def test_a_report_has_no_truth_value_of_its_own():
    assert "__bool__" not in vars(type(compare_bits(1, 1)))


def test_it_works_without_pytorch():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import numpy as np\n"
        "from jax_seqpar.compare.bits import compare_bits\n"
        "print(compare_bits(np.ones(2), np.ones(2)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "equal: 1 array, 2 elements, 0 bits differ\n"
