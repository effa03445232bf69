"""Questions of every test, each against something independent: right element, right value, right
gradient, right communication. (Right bits compares with PyTorch ranks, right refusal is a table.)

Each raises AssertionError. The mutations ask the same questions of broken code.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from cases import MeshCase
from flat_names import keywords_of
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jax_seqpar
from jax_seqpar.compare.numpy_conversion import numpy_to_torch
from jax_seqpar.parity.inputs import Case
from jax_seqpar.plan import all_to_all_bytes, collectives
from jax_seqpar.strategies import ulysses
from torch_ref import rank_layout as torch_layout
from torch_ref.dense import dense_attention as torch_dense_attention

RESHARDS = {
    "sequence_to_heads": (torch_layout.sequence_to_heads, 1, 2),
    "heads_to_sequence": (torch_layout.heads_to_sequence, 2, 1),
}
# For programs that are asked for values to a tolerance: half the time to compile. Only the code of
# each loop is optimised less; partitioning, collectives and fusion are those of any program.
QUICK = {"xla_backend_optimization_level": 0}


def spec(axis: int) -> PartitionSpec:
    """The token axis of `[B, S, N, H]` over "seq" if axis is 1, the head axis if 2."""
    return PartitionSpec(*(None,) * axis, "seq")


def reshard(name: str, degree: int, kind: AxisType = AxisType.Auto) -> Callable[..., Any]:
    """One reshard as a function of the global array."""
    _, before, after = RESHARDS[name]
    mesh = jax.make_mesh((degree,), ("seq",), axis_types=(kind,))

    def per_device(x):
        return getattr(ulysses, name)(x, "seq")

    mapped = jax.shard_map(per_device, mesh=mesh, in_specs=spec(before), out_specs=spec(after))
    if kind == AxisType.Auto:
        return mapped
    return lambda x: mapped(jax.sharding.reshard(x, NamedSharding(mesh, spec(before))))


def right_element(name: str, degree: int, shape: tuple[int, ...]) -> None:
    """Every device holds exactly the elements, in the shape, that the visible-rank oracle says.

    Args:
      shape: of the global array.
    """
    oracle, before, _ = RESHARDS[name]
    labels = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    out = jax.jit(reshard(name, degree))(labels)
    by_rank = torch.stack(torch.from_numpy(labels).chunk(degree, dim=before))
    expected = oracle(by_rank).numpy()
    shards = sorted(out.addressable_shards, key=lambda shard: shard.device.id)
    assert len(shards) == degree
    for rank, shard in enumerate(shards):
        held = np.asarray(shard.data)
        assert held.shape == expected[rank].shape, f"rank {rank} holds {held.shape}"
        assert np.array_equal(held, expected[rank]), f"rank {rank} holds other elements"


def adjoint(name: str, degree: int, shape: tuple[int, ...], dtype: Any = np.float32) -> None:
    """<op x, y> = <x, vjp y>, exactly: small integers, whose products and sums round nowhere."""
    rng = np.random.default_rng(0)
    x, y = (rng.integers(-8, 9, shape).astype(jnp.dtype(dtype)) for _ in range(2))
    out, pull = jax.vjp(jax.jit(reshard(name, degree)), x)
    (dx,) = pull(jnp.asarray(y))
    left, right = ((out, y), (x, dx))
    assert inner(*left) == inner(*right) != 0


def inner(x: Any, y: Any) -> float:
    return float(np.vdot(np.asarray(x, np.float64), np.asarray(y, np.float64)))


def attend(case: Case, where: MeshCase, kind: AxisType = AxisType.Auto, **options: Any):
    """The public function as a function of query, key and value alone."""
    return partial(
        jax_seqpar.dot_product_attention,
        is_causal=case.is_causal,
        layout=where.on(kind),
        **keywords_of(**options),
    )


def output_and_gradients(
    function: Callable[..., Any], compiler_options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """`(query, key, value, grad) -> (out, dq, dk, dv)`, compiled as one program."""

    def run(query, key, value, grad):
        out, pull = jax.vjp(function, query, key, value)
        return (out, *pull(grad))

    return jax.jit(run, compiler_options=compiler_options)


def oracle(case: Case, inputs: dict[str, np.ndarray], **options: Any) -> list[np.ndarray]:
    """Output, dq, dk and dv in float64, by PyTorch."""
    query, key, value, grad = (numpy_to_torch(x).double() for x in inputs.values())
    leaves = [x.requires_grad_() for x in (query, key, value)]
    out = torch_dense_attention(*leaves, is_causal=case.is_causal, **options)
    gradients = torch.autograd.grad(out, leaves, grad)
    return [x.detach().numpy() for x in (out, *gradients)]


def error(got: Any, expected: np.ndarray) -> float:
    return float(np.max(np.abs(np.asarray(got).astype(np.float64) - expected)))


def right_values(case: Case, where: MeshCase, kind: AxisType = AxisType.Auto) -> None:
    """Output and gradients are as near to the float64 oracle as the same kernel on one device.

    The bound is twice that kernel's own largest error: sharding changes no arithmetic but the order
    in which the gradients of a KV head on several devices are added, half a unit in the last place
    of the result for each addition.
    """
    sharded = output_and_gradients(attend(case, where, kind), QUICK)(**case.inputs())
    names = ("out", "dq", "dk", "dv")
    for name, got, (truth, alone) in zip(names, sharded, references(case), strict=True):
        additions = max(where.degree // case.kv_heads - 1, 0)
        unit = float(jnp.finfo(case.dtype).eps) * np.max(np.abs(truth))
        bound = 2 * alone + additions * unit
        assert error(got, truth) <= bound, f"{name}: {error(got, truth):.3g} > {bound:.3g}"


@cache
def references(case: Case) -> list[tuple[np.ndarray, float]]:
    """Oracle and error of the same kernel on one device, for output, dq, dk and dv."""
    inputs = case.inputs()
    alone = partial(jax_seqpar.blockwise_attention, is_causal=case.is_causal)
    single = output_and_gradients(alone, QUICK)(**inputs)
    errors = []
    for x, truth in zip(single, oracle(case, inputs), strict=True):
        # Or an error that the kernel makes on any number of devices would be right.
        assert error(x, truth) <= 16 * float(jnp.finfo(case.dtype).eps) * np.max(np.abs(truth))
        errors.append((truth, error(x, truth)))
    return errors


def compiled(
    function: Callable[..., Any], *args: Any, compiler_options: dict[str, Any] | None = None
) -> str:
    text = jax.jit(function).lower(*args).compile(compiler_options=compiler_options).as_text()
    assert text
    return text


def sharded_inputs(case: Case, where: MeshCase, kind: AxisType = AxisType.Auto) -> list[Any]:
    """Inputs as a model has them: sharded as the layout says, KV heads whole where they are few."""
    mesh = where.mesh(kind)
    operands = []
    for x in case.inputs().values():
        axes = list(where.layout.partition_spec)
        heads = where.layout.heads
        if heads is not None and x.shape[2] % mesh.shape[heads]:
            axes[2] = None
        operands.append(jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes))))
    return operands


def right_communication(
    case: Case,
    where: MeshCase,
    kind: AxisType = AxisType.Auto,
    compiler_options: dict[str, Any] | None = None,
) -> None:
    """Four all-to-alls forward, eight with gradients, nothing else, and no byte too many.

    The one exception: KV heads that several tensor-parallel devices share have their gradients
    summed over those, dk and dv in one all-reduce.
    """
    *inputs, grad = sharded_inputs(case, where, kind)
    function = attend(case, where, kind)
    sequence_parallel = where.layout.tokens is not None
    sizes = dict(zip(where.axes, where.shape, strict=True))
    tensor_parallel = sizes[where.layout.heads] if isinstance(where.layout.heads, str) else 1
    shared = case.kv_heads < tensor_parallel

    forward = compiled(function, *inputs, compiler_options=compiler_options)
    both = compiled(
        output_and_gradients(function), *inputs, grad, compiler_options=compiler_options
    )
    assert collectives(forward) == ({"all-to-all": 4} if sequence_parallel else {})
    expected = {"all-to-all": 8} if sequence_parallel else {}
    if shared:
        expected["all-reduce"] = 1
    assert collectives(both) == expected

    moved = bytes_by_formula(case, where, tensor_parallel) if sequence_parallel else 0
    assert all_to_all_bytes(forward) == moved
    assert all_to_all_bytes(both) == 2 * moved


def bytes_by_formula(case: Case, where: MeshCase, tensor_parallel: int) -> int:
    """2 (N + K') B S H bytes/P per device: query and output, key and value; K' = max(K, P)."""
    batch_parallel = int(np.prod(where.shape)) // where.degree // tensor_parallel
    heads = case.heads // tensor_parallel
    kv_heads = max(case.kv_heads // tensor_parallel, 1, where.degree)
    local = case.batch // batch_parallel * case.tokens // where.degree * case.head_dim
    return 2 * (heads + kv_heads) * local * jnp.dtype(case.dtype).itemsize


@contextmanager
def compilations() -> Iterator[list[str]]:
    """Names of the programs that XLA compiles inside the context."""
    names: list[str] = []
    logger = logging.getLogger("jax")

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith("Finished XLA compilation"):
                names.append(record.getMessage())

    handler, propagate = Listener(), logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        with jax.log_compiles():
            yield names
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


def permuted_bytes(function: Callable[..., Any], *args: Any) -> int:
    """Bytes that a device sends by permutes, by jaxpr: those of a loop as often as it runs."""

    def count(jaxpr: Any, times: int) -> int:
        sent = 0
        for equation in jaxpr.eqns:
            if equation.primitive.name == "ppermute":
                (x,) = equation.invars
                sent += times * x.aval.size * x.aval.dtype.itemsize
            loops = equation.params.get("length", 1)
            inner = jax.tree.leaves(
                list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
            )
            branches = [x for x in inner if hasattr(x, "eqns") or hasattr(x, "jaxpr")]
            if equation.primitive.name in ("cond", "platform_index") and branches:
                branches = branches[:1]  # each platform's branch sends the same
            for x in branches:
                sent += count(getattr(x, "jaxpr", x), times * loops)
        return sent

    return count(jax.make_jaxpr(function)(*args).jaxpr, 1)
