"""A model ported from PyTorch to Flax, compared tensor by tensor, and bit by bit where it can be.

    python examples/validate_port.py
    python examples/validate_port.py --bug rotary
    python examples/validate_port.py --model encoder

Both models tell every tensor, layer by layer, and the first that differs is where a bug is. How far
two right models differ is measured: by how far PyTorch's is from itself in float64. Flax's model is
sequence-parallel on eight simulated devices. Needs the extra "test". The exit status is 0 if all
agrees, 1 if anything differs.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Annotated, Any

import jax
import numpy as np
import torch
import typer
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ported_models import Arrays, Bug, Port, llama, pretrained_encoder, with_bug
from rich.console import Console
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from jax_seqpar import bridge, compare, dot_product_attention, exact_attention
from torch_ref.exact import exact_attention as torch_exact_attention

# An attention of `[B, S, N, H]`, with mask, is_causal and scale.
Kernel = Callable[..., torch.Tensor]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Model(StrEnum):
    """The model that is ported."""

    LLAMA = "llama"
    ENCODER = "encoder"


@dataclass(frozen=True)
class Run:
    """Tensors and gradients that a model computed.

    Attributes:
      tensors: by name, in the order of computation; the loss is the last.
      grads: of the loss by the parameter's name in PyTorch, sorted.
      tensor_grads: of the loss by the tensor's name; empty for Flax.
    """

    tensors: Arrays
    grads: Arrays
    tensor_grads: Arrays


class Float64(TorchFunctionMode):
    """Casts to float64 where a model casts to float32, as in norms and rotary embeddings."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        def wide(x: Any) -> Any:
            return torch.float64 if x is torch.float32 else x

        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*map(wide, args), **{name: wide(x) for name, x in (kwargs or {}).items()})


def sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> Any:
    """PyTorch's own attention, for `[B, S, N, H]`."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    options["attn_mask"] = options.pop("mask")
    return scaled_dot_product_attention(q, k, v, enable_gqa=True, **options).transpose(1, 2)


def run_torch(port: Port, kernel: Kernel = sdpa, *, dtype: torch.dtype = torch.float32) -> Run:
    """Runs PyTorch's model, with an attention of `[B, S, N, H]`."""
    seen: dict[str, torch.Tensor] = {}

    def record(name: str, x: torch.Tensor) -> None:
        x.retain_grad()
        seen[name] = x

    with Float64() if dtype is torch.float64 else nullcontext():
        model = type(port.torch_model)(port.torch_model.config).eval()
        model.load_state_dict(port.torch_model.state_dict())
        model = model.to(dtype)
        _record_layers(model, port.hooks, record)
        _record_attention(model, kernel, record)
        batch = {name: torch.from_numpy(x) for name, x in port.batch.items()}
        record("loss", port.torch_loss(model, **batch))
        seen["loss"].backward()
    grads = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    return Run(
        tensors={name: _numbers(x) for name, x in seen.items()},
        grads={name: _numbers(grads[name]) for name in sorted(grads)},
        tensor_grads={name: _numbers(x.grad) for name, x in seen.items() if x.grad is not None},
    )


def _numbers(x: torch.Tensor) -> np.ndarray:
    """Turns a tensor into a NumPy array; 16 bits as float32, as NumPy has no bfloat16."""
    return (x.float() if x.dtype.itemsize == 2 else x).detach().numpy()


def _record_layers(model: Any, hooks: Mapping[str, str], record: Callable[..., None]) -> None:
    layers = range(model.config.num_hidden_layers)
    named = {path.format(i=i): name.format(i=i) for path, name in hooks.items() for i in layers}
    for path, name in named.items():

        def hook(_module: Any, _args: Any, out: Any, name: str = name) -> None:
            record(name, out[0] if isinstance(out, tuple) else out)

        model.get_submodule(path).register_forward_hook(hook)


def _record_attention(model: Any, kernel: Kernel, record: Callable[..., None]) -> None:
    """Query and key as they are attended with, after the rotary embedding."""

    # transformers passes more: a dropout that is 0 in evaluation, and what other attentions read.
    def attend(
        module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **_: Any
    ) -> tuple[torch.Tensor, None]:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        for name, x in {"query": q, "key": k, "value": v}.items():
            record(f"layers.{module.layer_idx}/{name}", x)
        is_causal = mask is None and module.is_causal
        out = kernel(q, k, v, mask=mask, is_causal=is_causal, scale=scaling)
        record(f"layers.{module.layer_idx}/context", out)
        return out, None

    AttentionInterface.register("recorded", attend)
    # Without it the function is given no mask at all.
    AttentionMaskInterface.register("recorded", sdpa_mask)
    model.set_attn_implementation("recorded")


def run_flax(port: Port, mesh: Mesh) -> Run:
    """Runs Flax's model with PyTorch's parameters, in one program."""
    graph, empty = nnx.split(nnx.eval_shape(port.flax_model), nnx.Param)
    with jax.set_mesh(mesh):
        params = bridge.from_torch(
            port.torch_model.state_dict(), port.mapping, sizes=port.sizes, like=empty
        )
        spec = PartitionSpec(port.layout.batch, port.layout.tokens)
        batch = jax.device_put(dict(port.batch), NamedSharding(mesh, spec))

        @jax.jit
        @partial(jax.value_and_grad, has_aux=True)
        def loss(params: Any, batch: Any) -> Any:
            # An OrderedDict leaves jit in the order of computation; keys of a dict would be sorted.
            seen: OrderedDict[str, Any] = OrderedDict()
            value = port.flax_loss(nnx.merge(graph, params), seen.__setitem__, **batch)
            return value, seen

        (value, seen), grads = loss(params, batch)
    # A tied name has no gradient of its own in PyTorch.
    mapping = [line for line in port.mapping if not isinstance(line, bridge.Tied)]
    state = bridge.to_torch_state(grads, mapping, sizes=port.sizes)
    return Run(
        tensors={name: np.asarray(x) for name, x in (seen | {"loss": value}).items()},
        grads={name: state[name].numpy() for name in sorted(state)},
        tensor_grads={},
    )


def exact_layers(port: Port, run: Run, mesh: Mesh) -> compare.BitsReport:
    """Compares every attention and its gradients, each framework with its own exact kernel.

    Args:
      port: the model that ran.
      run: PyTorch's model with `torch_ref.exact`. JAX is given what each of its attentions was, and
        the gradient of the loss there.
      mesh: of the devices that share the tokens.
    """
    options = {"kernel": exact_attention, "layout": port.layout.on(mesh)}
    attention = partial(dot_product_attention, **options, **port.attends)

    @jax.jit
    def attend(query: Any, key: Any, value: Any, grad: Any) -> Any:
        out, pullback = jax.vjp(attention, query, key, value)
        return out, pullback(grad)

    expected, got = {}, {}
    for i in range(port.torch_model.config.num_hidden_layers):
        context, *names = (f"layers.{i}/{name}" for name in ("context", "query", "key", "value"))
        inputs = [*(run.tensors[name] for name in names), run.tensor_grads[context]]
        sharded = jax.device_put(inputs, NamedSharding(mesh, port.layout.partition_spec))
        # One after another: only one program of the mesh is under way.
        got[context], got[f"gradients in layers.{i}"] = jax.block_until_ready(attend(*sharded))
        expected[context] = run.tensors[context]
        expected[f"gradients in layers.{i}"] = tuple(run.tensor_grads[name] for name in names)
    return compare.compare_bits(expected, got)


def relative_error(x: np.ndarray, truth: np.ndarray) -> float:
    """The largest error, relative to the largest magnitude; infinite or NaN where that is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.abs(x - truth).max() / np.abs(truth).max())


@app.command()
def main(
    model: Annotated[Model, typer.Option(help="What is ported.")] = Model.LLAMA,
    bug: Annotated[Bug | None, typer.Option(help="Planted in the Flax model.")] = None,
) -> None:
    """Compares a model in PyTorch with its sequence-parallel port in Flax."""
    right = pretrained_encoder() if model is Model.ENCODER else llama()
    try:
        port = with_bug(right, bug) if bug else right
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    # Threads would wait for one another longer than they compute.
    torch.set_num_threads(1)
    # Flax's own layers leave it to the compiler where arrays lie.
    mesh = jax.make_mesh((8,), ("seq",), axis_types=(AxisType.Auto,))
    truth, expected, got = (
        run_torch(right, dtype=torch.float64),
        run_torch(right),
        run_flax(port, mesh),
    )
    console = Console(width=110)
    found = [
        _compare(console, kind, getattr(truth, kind), getattr(expected, kind), getattr(got, kind))
        for kind in ("tensors", "grads")
    ]
    if first := next(filter(None, found), None):
        console.print(str(first), markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1)
    bits = exact_layers(right, run_torch(right, torch_exact_attention), mesh)
    console.print(f"Attentions alone, each framework with its own exact kernel: {bits}")
    raise typer.Exit(0 if bits.equal else 1)


def _compare(console: Console, kind: str, truth: Arrays, expected: Arrays, got: Arrays) -> Any:
    """Prints the differences of the two, and returns the first divergence, None without one."""
    errors = {name: relative_error(expected[name], truth[name]) for name in truth}
    # A gradient that is 0 is nothing but rounding: a key's bias moves all logits of a query alike.
    told = [name for name, error in errors.items() if error < 1]
    if rest := [name for name in errors if name not in told]:
        for name in rest:
            if reason := _more_than_rounding(expected[name], got[name]):
                return f"{name}: {reason}"
        names = ", ".join(rest)
        console.print(f"Nothing but rounding in both frameworks: {names}", markup=False)
    # A right port errs no more than twice as much as PyTorch, so they are three errors apart.
    rtol = 3 * max(errors[name] for name in told)
    a, b = ({name: run[name] for name in told} for run in (expected, got))
    table = compare.divergence_table(a, b, rtol=rtol)
    table.title = f"{kind}: rtol = {rtol:.2g}, three times PyTorch's largest error"
    console.print(table)
    return compare.first_divergence(a, b, rtol=rtol)


def _more_than_rounding(expected: np.ndarray, got: np.ndarray) -> str | None:
    """Why Flax's array is not 0 but for rounding, where PyTorch's is; None if it is."""
    theirs, ours = (np.abs(x).max() for x in (expected, got))
    if not ours <= 100 * theirs:
        return f"up to {ours:.3g} in Flax, up to {theirs:.3g} in PyTorch, whose error is as large"
    return None


if __name__ == "__main__":
    # Before JAX starts.
    jax.config.update("jax_num_cpu_devices", 8)
    app()
