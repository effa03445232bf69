"""FLOPs and bytes of calls of kernels that are not XLA's: of Pallas by the grid, and of cuDNN.

A Pallas kernel's body is counted as the program around it, and runs for each block of the grid that
the kernel does not skip. Splash attention computes the blocks of an array, known beforehand.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

# The second of splash attention's scalar operands: 0 for a block that is not computed.
SPLASH_BLOCKS = 1
# Matrix products of cuDNN's attention, in units of those two of the forward pass.
CUDNN = {"dot_product_attention_fwd": 1.0, "dot_product_attention_bwd": 2.5}


@dataclass(frozen=True)
class Kernel:
    """Counts of one call of a kernel.

    Attributes:
      flops, bytes: of the call; bytes are those of operands and results, each once.
      whole_grid: whether it may skip blocks that are counted.
    """

    name: str
    flops: float
    bytes: int
    whole_grid: bool = False


def kernel_of(equation: Any, value: Callable[[Any], Any]) -> Kernel | None:
    """The kernel that an equation calls; None if it calls none.

    Args:
      value: the numbers of a variable that is a constant, None of another.
    """
    name = equation.primitive.name
    if name == "pallas_call":
        return _pallas(equation, value)
    for beginning, products in CUDNN.items():
        if name.startswith(beginning):
            return _cudnn(equation, products)
    return None


def _pallas(equation: Any, value: Callable[[Any], Any]) -> Kernel:
    params = equation.params
    name, grid = _name(params), params["grid_mapping"]
    # A kernel with a cost estimate, as only the kernel knows how often its inner loops run.
    if params.get("cost_estimate") is not None and not name.startswith("splash"):
        return Kernel(name, float(params["cost_estimate"].flops), _moved(equation), whole_grid=True)
    blocks = math.prod(int(n) for n in grid.grid)
    part: float | None = None
    if name.startswith("splash"):
        part = _computed_part(equation, grid.num_index_operands, value)
    flops = _products(params["jaxpr"]) * blocks * (1 if part is None else part)
    return Kernel(name, flops, _moved(equation), whole_grid=part is None)


def _name(params: Any) -> str:
    """Name of the call, else of the kernel's function; JAX 0.10 has both in one place."""
    if "name_and_src_info" in params:
        return params["name_and_src_info"].name
    return params["name"] or params["jaxpr"].debug_info.func_name


def _computed_part(equation: Any, scalars: int, value: Callable[[Any], Any]) -> float | None:
    """Computed part of splash attention's grid, 0 to 1; None if known only when it runs."""
    if scalars <= SPLASH_BLOCKS:
        return 1.0  # without a schedule every block is computed, and masked
    meets = value(equation.invars[SPLASH_BLOCKS])
    return None if meets is None else float(np.mean(np.asarray(meets) != 0))


def _products(jaxpr: Any) -> float:
    """FLOPs of the matrix products of a kernel's body, loops multiplied out."""
    found = 0.0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            summed = math.prod(equation.invars[0].aval.shape[i] for i in contracted)
            found += 2.0 * math.prod(equation.outvars[0].aval.shape) * summed
            continue
        inside = [_products(x) for x in _inner(equation)]
        if equation.primitive.name == "cond":
            inside = [max(inside)]
        found += sum(inside) * equation.params.get("length", 1)
    return found


def _inner(equation: Any) -> Iterator[Any]:
    for given in equation.params.values():
        for x in given if isinstance(given, tuple | list) else (given,):
            if hasattr(x, "eqns") or hasattr(x, "jaxpr"):
                yield x


def _cudnn(equation: Any, products: float) -> Kernel:
    """Call of cuDNN on `[B, T, N, H]` and `[B, S, K, H]`; a causal mask halves the pairs."""
    (B, T, N, H), (_, S, _, _) = (x.aval.shape for x in equation.invars[:2])
    params = equation.params
    pairs = T * S * (0.5 if "causal" in str(params.get("mask_type", "")).lower() else 1.0)
    if params.get("sliding_window_length"):
        pairs = min(pairs, T * params["sliding_window_length"])
    name = equation.primitive.name.removesuffix("_wrapper")
    return Kernel(f"cuDNN {name}", 4.0 * B * N * pairs * H * products, _moved(equation))


def _moved(equation: Any) -> int:
    avals = [x.aval for x in (*equation.invars, *equation.outvars)]
    sized = [x for x in avals if hasattr(x, "shape")]
    return sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in sized)
