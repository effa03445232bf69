"""One kernel in both pipelines: a PyTorch attention in JAX's, a JAX attention in PyTorch's.

With the same kernel on both sides every remaining difference is the pipelines' own.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from .._checks import check_arrays
from .._extras import require_torch
from ..kernels.kernel import check_local_output
from ..strategies.heads import plan_heads
from ..strategies.reshard import heads_to_sequence, sequence_to_heads
from .convert import to_jax, to_torch

LocalAttention = Callable[..., Array]
TorchAttention = Callable[[Any, Any, Any], Any]


def staged_attention(
    query: Shaped[Array, "B T N H"],
    key: Shaped[Array, "B S K H"],
    value: Shaped[Array, "B S K H"],
    *,
    attention: TorchAttention,
    mesh: Mesh,
    axis_name: str = "seq",
) -> Shaped[Array, "B T N H"]:
    """Ulysses attention in JAX around a PyTorch kernel; differentiable, outside `jax.jit`.

    The reshards are compiled, the kernel runs between them on each device's shard: a callback
    inside a program with collectives deadlocks where cores are few.

    Args:
      query, key, value: global arrays, tokens sharded over `axis_name`.
      attention: called with torch tensors `[B, T, N/P, H]`, `[B, S, K/P, H]` on one device; returns
        the query's shape. Its gradients are PyTorch's, from a second forward pass, so it must give
        the same twice: without dropout.
      mesh: a mesh of devices that PyTorch shares memory with: CPU.
      axis_name: the mesh axis of the tokens.

    Raises:
      ValueError: under `jax.jit`, or for sizes that do not fit.
    """
    tokens, heads = PartitionSpec(None, axis_name), PartitionSpec(None, None, axis_name)
    check_arrays(query, key, value)
    plan = plan_heads(query.shape[2], key.shape[2], mesh.shape[axis_name])
    shard_map = partial(jax.shard_map, mesh=mesh)

    @jax.jit
    @shard_map(in_specs=(tokens,) * 3, out_specs=heads)
    def gather(query: Array, key: Array, value: Array) -> Any:
        spread = (plan.pad_queries(query, 2), plan.spread_keys(key), plan.spread_keys(value))
        return tuple(sequence_to_heads(x, axis_name) for x in spread)

    @jax.jit
    @shard_map(in_specs=heads, out_specs=tokens)
    def scatter(out: Array) -> Array:
        return plan.unpad_queries(heads_to_sequence(out, axis_name), 2)

    sharded = (jax.device_put(x, NamedSharding(mesh, tokens)) for x in (query, key, value))
    q, k, v = gather(*sharded)
    out = _on_shards(attention)(q, k, v)
    check_local_output(out, q, v)
    return scatter(out)


def as_torch_attention(attention: LocalAttention) -> TorchAttention:
    """A JAX attention as a PyTorch function of `[B, T, N, H]`, `[B, S, K, H]`; differentiable once.

    It is compiled by itself. Pass it to `torch_ref.ulysses.DistributedAttention`, batch-first.

    Args:
      attention: a JAX function of query, key and value; options bound beforehand.
    """
    torch = require_torch()
    forward = jax.jit(attention)
    backward = jax.jit(lambda q, k, v, grad: jax.vjp(attention, q, k, v)[1](grad))

    class JaxAttention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, query, key, value):
            ctx.save_for_backward(query, key, value)
            return to_torch(forward(*to_jax(_plain(query, key, value)))).clone()

        @staticmethod
        def backward(ctx, *grad):
            return JaxAttentionGradient.apply(*ctx.saved_tensors, *grad)

    # A function of its own, so that a second derivative is an error and not a missing term.
    class JaxAttentionGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *operands):
            return tuple(x.clone() for x in to_torch(backward(*to_jax(_plain(*operands)))))

        @staticmethod
        def backward(ctx, *grads):
            raise RuntimeError(
                "as_torch_attention can be differentiated once, not twice. For second derivatives "
                "stay in one framework: write jax.hessian of the attention itself."
            )

    return JaxAttention.apply


def _plain(*tensors: Any) -> tuple[Any, ...]:
    return tuple(x.detach().contiguous() for x in tensors)


def _on_shards(attention: TorchAttention) -> LocalAttention:
    """The kernel, applied shard by shard; forward and backward each run PyTorch once per shard."""
    torch = require_torch()

    def run(query: Any, key: Any, value: Any) -> Any:
        with torch.no_grad():
            # Copies: what a kernel writes into its operands the backward pass would read.
            return attention(*(x.clone() for x in (query, key, value)))

    def run_backward(query: Any, key: Any, value: Any, grad: Any) -> tuple[Any, ...]:
        inputs = [x.clone().requires_grad_() for x in (query, key, value)]
        with torch.enable_grad():
            return torch.autograd.grad(attention(*inputs), inputs, grad)

    @jax.custom_vjp
    def local(query: Array, key: Array, value: Array) -> Array:
        (out,) = _map_shards(lambda *x: (run(*x),), query, key, value)
        return out

    def local_fwd(*inputs: Array) -> tuple[Array, tuple[Array, ...]]:
        return local(*inputs), inputs

    def local_bwd(inputs: tuple[Array, ...], grad: Array) -> tuple[Array, ...]:
        return _map_shards(run_backward, *inputs, grad)

    local.defvjp(local_fwd, local_bwd)
    return local


def _map_shards(fn: Callable[..., tuple[Any, ...]], *arrays: Array) -> tuple[Array, ...]:
    """`fn` of torch tensors on every addressable shard; each result sharded like the operands."""
    if any(isinstance(x, Tracer) for x in arrays):
        raise ValueError(
            f"staged_attention runs PyTorch between compiled programs, so it cannot be traced. Got "
            f"tracers of {', '.join(str(jax.typeof(x)) for x in arrays)}. Call it outside jax.jit, "
            f"vmap and scan; jax.grad and jax.vjp are fine."
        )
    pieces = []
    for shards in zip(*(x.addressable_shards for x in arrays), strict=True):
        results = to_jax(fn(*to_torch(tuple(shard.data for shard in shards))))
        pieces.append([jax.device_put(x, shards[0].device) for x in results])
    sharding = arrays[0].sharding
    return tuple(
        jax.make_array_from_single_device_arrays(_global_shape(parts, arrays), sharding, parts)
        for parts in map(list, zip(*pieces, strict=True))
    )


def _global_shape(parts: list[Array], arrays: tuple[Array, ...]) -> tuple[int, ...]:
    """Global shape of an array whose heads are sharded as the heads of the operands."""
    devices = arrays[0].shape[2] // arrays[0].addressable_shards[0].data.shape[2]
    B, S, N, H = parts[0].shape
    return B, S, N * devices, H
