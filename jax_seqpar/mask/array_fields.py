"""Dataclasses of options and arrays: pytrees whose fields name the axes of their arrays."""

from collections.abc import Callable, Iterator
from dataclasses import field, fields
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import numpy as np

Value = TypeVar("Value")
if TYPE_CHECKING:
    AnyArray = jax.Array
else:
    # Arrays of NumPy, too, and shapes, for which a kernel can be chosen. A kernel computes with
    # arrays of JAX alone.
    AnyArray = jax.Array | np.ndarray | jax.ShapeDtypeStruct
# The name of each axis: "batch", "heads", "queries", "keys", or None for any other.
Axes = tuple[str | None, ...]


def array_field(*axes: str | None) -> Any:
    """A field that holds an array, None by default. An axis of size 1 broadcasts."""
    return field(default=None, metadata={"axes": axes})


def pair_field(queries: Axes, keys: Axes) -> Any:
    """A field that holds a pair of arrays, one of the queries and one of the keys."""
    return field(default=None, metadata={"axes": (queries, keys)})


def register(cls: type[Value]) -> type[Value]:
    """Registers a frozen dataclass as a pytree: arrays are leaves, the rest is static.

    `jax.tree_util.register_dataclass` calls the constructor, which validates, with whatever a
    transformation puts in place of the arrays: axis numbers, shardings, None.
    """
    arrays = tuple(f.name for f in fields(cls) if "axes" in f.metadata)  # pyright: ignore
    static = tuple(f.name for f in fields(cls) if "axes" not in f.metadata)  # pyright: ignore

    def flatten(x: Any) -> Any:
        keyed = ((jax.tree_util.GetAttrKey(name), getattr(x, name)) for name in arrays)
        return tuple(keyed), tuple(getattr(x, name) for name in static)

    def unflatten(options: Any, leaves: Any) -> Any:
        values = zip((*static, *arrays), (*options, *leaves), strict=True)
        return _without_validation(cls, dict(values))

    jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
    return cls


def map_arrays(function: Callable[[Any, Axes], Any], value: Value) -> Value:
    """The value with `function(array, axes)` in place of each of its arrays."""
    values = {f.name: getattr(value, f.name) for f in fields(value)}  # pyright: ignore
    for f in fields(value):  # pyright: ignore
        x, axes = values[f.name], f.metadata.get("axes")
        if axes is None or x is None:
            continue
        if isinstance(axes[0], tuple):
            values[f.name] = tuple(function(part, own) for part, own in zip(x, axes, strict=True))
        else:
            values[f.name] = function(x, axes)
    return _without_validation(type(value), values)


def arrays_of(value: Any) -> Iterator[tuple[str, Any]]:
    """The arrays of a value, and pairs of them, by the name of their field."""
    for f in fields(value):
        if "axes" in f.metadata and getattr(value, f.name) is not None:
            yield f.name, getattr(value, f.name)


def options_of(value: Any) -> Iterator[tuple[str, Any]]:
    """The static options that differ from their defaults, by the name of their field."""
    for f in fields(value):
        if "axes" not in f.metadata and getattr(value, f.name) != f.default:
            yield f.name, getattr(value, f.name)


def written(value: Any) -> str:
    """The source text of a value, without its defaults; arrays by dtype and shape."""

    def of(x: Any) -> str:
        parts: Any = x if isinstance(x, tuple) else ()
        if parts and all(hasattr(part, "dtype") for part in parts):
            return f"({', '.join(map(of, parts))})"
        dtype, shape = getattr(x, "dtype", None), getattr(x, "shape", ())
        return repr(x) if dtype is None else f"{dtype}{list(shape)}"

    texts = {**dict(options_of(value)), **dict(arrays_of(value))}
    return f"{type(value).__name__}({', '.join(f'{name}={of(x)}' for name, x in texts.items())})"


def python_number(x: Any) -> Any:
    """The Python number of a NumPy one; anything else as it is."""
    scalar = isinstance(x, np.generic) or (isinstance(x, np.ndarray) and x.ndim == 0)
    return x.item() if scalar else x


def is_number(x: Any) -> bool:
    """Whether x is a Python number (int or float, not a bool)."""
    return isinstance(x, int | float) and not isinstance(x, bool)


def _without_validation(cls: type[Value], values: dict[str, Any]) -> Value:
    x = object.__new__(cls)
    for name, value in values.items():
        object.__setattr__(x, name, value)
    return x
