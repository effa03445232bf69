"""A kernel of one framework in the pipeline of the other has the bits that it has at home."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import AxisType
from torch.nn.functional import scaled_dot_product_attention

from jax_seqpar import dense_attention
from jax_seqpar.bridge import as_torch_attention, staged_attention
from jax_seqpar.compare import compare_bits
from jax_seqpar.compare.numpy_conversion import numpy_to_torch, torch_to_numpy
from jax_seqpar.parity.inputs import Case

pytestmark = pytest.mark.usefixtures("few_optimisations")

HEADS = 2
CASES = {
    "multi-head": Case(batch=2, tokens=24, heads=16, kv_heads=16, head_dim=5),
    "grouped": Case(batch=3, tokens=40, heads=32, kv_heads=8, head_dim=6),
    "two KV heads": Case(batch=1, tokens=24, heads=16, kv_heads=2, head_dim=7),
    # Every addition of two gradients rounds, and is seen to.
    "bfloat16": Case(batch=2, tokens=16, heads=8, kv_heads=1, head_dim=6, dtype="bfloat16"),
}
NAMES = ("out", "dq", "dk", "dv")

by_kind = pytest.mark.parametrize("kind", (AxisType.Auto, AxisType.Explicit))


def sdpa(query, key, value):
    """PyTorch's own attention of `[B, S, N, H]`."""
    q, k, v = (x.transpose(1, 2).contiguous() for x in (query, key, value))
    out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).contiguous()


def torch_side(attention, operands):
    """Output and gradients of an attention of torch tensors, from and to NumPy."""
    query, key, value, grad = map(numpy_to_torch, operands)
    leaves = [x.requires_grad_() for x in (query, key, value)]
    out = attention(*leaves)
    return [torch_to_numpy(x) for x in (out, *torch.autograd.grad(out, leaves, grad))]


def jax_side(attention, operands):
    out, pull = jax.vjp(attention, *operands[:3])
    return [out, *pull(operands[3])]


def by_head_slices(operands, degree):
    """PyTorch on each device's heads, one device after another."""
    query, key, value, grad = operands
    copies = max(degree // key.shape[HEADS], 1)
    key, value = (np.repeat(x, copies, HEADS) for x in (key, value))
    slices = (np.split(x, degree, HEADS) for x in (query, key, value, grad))
    parts = [torch_side(sdpa, part) for part in zip(*slices, strict=True)]
    out, dq, dk, dv = (np.concatenate(x, HEADS) for x in zip(*parts, strict=True))
    return out, dq, sum_copies(dk, copies), sum_copies(dv, copies)


def sum_copies(x, copies):
    """The gradients of a KV head that several devices have: added one by one, in their order."""
    B, S, heads, H = x.shape
    by_copy = np.moveaxis(x.reshape(B, S, heads // copies, copies, H), 3, 0)
    total = by_copy[0]
    for other in by_copy[1:]:
        total = total + other
    return total


# Each kind of axes with and without all the devices.
@pytest.mark.parametrize(
    ("degree", "kind"),
    [(1, AxisType.Explicit), (2, AxisType.Auto), (4, AxisType.Explicit), (8, AxisType.Auto)],
)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_pytorch_in_the_jax_pipeline(case, degree, kind):
    mesh = jax.make_mesh((degree,), ("seq",), axis_types=(kind,))
    operands = list(case.inputs().values())
    attend = partial(staged_attention, attention=sdpa, mesh=mesh)
    got = jax_side(attend, [jnp.asarray(x) for x in operands])
    expected = by_head_slices(operands, degree)
    report = compare_bits(
        dict(zip(NAMES, got, strict=True)), dict(zip(NAMES, expected, strict=True))
    )
    assert report.equal, str(report)


def test_the_default_mesh_and_another_axis_name():
    """The result has the sharding of the inputs, also on the Explicit axes of `jax.make_mesh`."""
    mesh = jax.make_mesh((4,), ("ring",))
    operands = list(CASES["grouped"].inputs().values())
    tokens = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "ring"))
    placed = [jax.device_put(x, tokens) for x in operands]
    attend = partial(staged_attention, attention=sdpa, mesh=mesh, axis_name="ring")
    got = jax_side(attend, placed)
    assert compare_bits(tuple(got), by_head_slices(operands, 4)).equal
    assert all(x.sharding.is_equivalent_to(tokens, 4) for x in got)


def test_a_kernel_may_write_into_its_operands():
    """A kernel may scale its query in place where the query needs no gradient."""
    mesh = jax.make_mesh((2,), ("seq",))
    operands = [jnp.asarray(x) for x in CASES["grouped"].inputs().values()]

    def in_place(query, key, value):
        query = query * 2 if query.requires_grad else query.mul_(2)
        return sdpa(query, key, value)

    def apart(query, key, value):
        return sdpa(query * 2, key, value)

    got, expected = (
        jax_side(partial(staged_attention, attention=x, mesh=mesh), operands)
        for x in (in_place, apart)
    )
    assert compare_bits(tuple(got), tuple(expected)).equal


def test_a_pytorch_kernel_that_is_wrong_shows():
    """The comparison fails for a wrong kernel: the same attention, not causal."""
    mesh = jax.make_mesh((4,), ("seq",))
    operands = list(CASES["multi-head"].inputs().values())

    def not_causal(query, key, value):
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()

    attend = partial(staged_attention, attention=not_causal, mesh=mesh)
    got = jax_side(attend, [jnp.asarray(x) for x in operands])
    report = compare_bits(tuple(got), by_head_slices(operands, 4))
    assert all(not leaf.equal for leaf in report.leaves)


@by_kind
def test_pytorch_cannot_be_compiled(kind):
    mesh = jax.make_mesh((2,), ("seq",), axis_types=(kind,))
    query, key, value, _ = (jnp.asarray(x) for x in CASES["multi-head"].inputs().values())
    attend = partial(staged_attention, attention=sdpa, mesh=mesh)
    message = r"^staged_attention runs PyTorch .*outside jax\.jit, vmap and scan"
    with pytest.raises(ValueError, match=message):
        jax.jit(attend)(query, key, value)
    with pytest.raises(ValueError, match=message):
        jax.lax.scan(lambda x, _: (attend(x, key, value), None), query, length=2)


@by_kind
@pytest.mark.parametrize("kv_heads", (6, 3))
def test_heads_that_do_not_divide(kind, kv_heads):
    """Heads that are added for the devices do not come back, nor do their gradients."""
    mesh = jax.make_mesh((4,), ("seq",), axis_types=(kind,))
    case = Case(heads=6, kv_heads=kv_heads)
    query, key, value, grad = map(jnp.asarray, case.inputs().values())
    attend = partial(staged_attention, attention=sdpa, mesh=mesh)
    out, pull = jax.vjp(attend, query, key, value)
    expected, expected_pull = jax.vjp(partial(dense_attention, is_causal=True), query, key, value)
    for a, b in zip((out, *pull(grad)), (expected, *expected_pull(grad)), strict=True):
        # Two kernels in float32.
        np.testing.assert_allclose(a, b, atol=3e-6 * float(jnp.max(jnp.abs(b))), rtol=0)


@pytest.mark.parametrize("name", ("grouped", "two KV heads", "bfloat16"))
def test_jax_in_a_pytorch_process(name):
    attention = partial(dense_attention, is_causal=True)
    operands = list(CASES[name].inputs().values())
    forward = jax.jit(attention)(*operands[:3])
    gradients = jax.jit(lambda *x: jax.vjp(attention, *x[:3])[1](x[3]))(*operands)
    expected = dict(zip(NAMES, (forward, *gradients), strict=True))

    attend = as_torch_attention(attention)
    contiguous = [numpy_to_torch(x) for x in operands]
    strided = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in contiguous]
    assert not any(x.is_contiguous() for x in strided)
    for query, key, value, grad in (contiguous, strided):
        leaves = [x.requires_grad_() for x in (query, key, value)]
        out = attend(*leaves)
        got = out.detach(), *torch.autograd.grad(out, leaves, grad)
        report = compare_bits(dict(zip(NAMES, got, strict=True)), expected)
        assert report.equal, str(report)


def test_the_tensors_of_a_jax_kernel_are_its_own():
    """Output and gradients, written in place by PyTorch, change no array that JAX holds."""
    operands = [numpy_to_torch(x) for x in CASES["multi-head"].inputs().values()]
    leaves = [x.requires_grad_() for x in operands[:3]]
    attend = as_torch_attention(dense_attention)
    out = attend(*leaves)
    before = out.detach().clone()
    gradients = torch.autograd.grad(out, leaves, operands[3])
    kept = [x.clone() for x in gradients]
    with torch.no_grad():
        for x in (out, *gradients):
            x.zero_()
    out = attend(*leaves)
    assert torch.equal(out, before)
    again = torch.autograd.grad(out, leaves, operands[3])
    assert all(torch.equal(x, y) for x, y in zip(again, kept, strict=True))


def test_only_the_inputs_that_need_a_gradient_get_one():
    query, key, value, grad = map(numpy_to_torch, CASES["multi-head"].inputs().values())
    value.requires_grad_()
    out = as_torch_attention(dense_attention)(query, key, value)
    out.backward(grad)
    assert (query.grad, key.grad) == (None, None)
    assert value.grad is not None
    assert value.grad.any()


def test_a_second_derivative_is_refused():
    query, key, value, grad = map(numpy_to_torch, CASES["multi-head"].inputs().values())
    query.requires_grad_()
    grad.requires_grad_()
    out = as_torch_attention(dense_attention)(query, key, value)
    (dq,) = torch.autograd.grad(out, query, grad, create_graph=True)
    with pytest.raises(RuntimeError, match=r"twice|once"):
        dq.sum().backward()


def test_a_second_derivative_is_not_left_out():
    """A second derivative raises in a sum, as of a gradient penalty and a loss."""
    query, key, value, grad = map(numpy_to_torch, CASES["multi-head"].inputs().values())
    query.requires_grad_()
    out = as_torch_attention(dense_attention)(query, key, value)
    (dq,) = torch.autograd.grad(out, query, grad, create_graph=True)
    with pytest.raises(RuntimeError, match=r"twice|once"):
        torch.autograd.grad(out.sum() + dq.square().sum(), query)
