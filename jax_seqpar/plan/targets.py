"""Targets of a plan: a function and shapes, one attention, a decoder, or a function of a file.

A target travels to the process of the compiler, so it is a value that can be pickled, and builds
its function there, under the mesh.
"""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding

from ..attention import dot_product_attention
from ..mesh_layout import MeshLayout
from ..strategies import Strategy, StrategyChoice, Ulysses, choose_strategy
from .decoder import Decoder, shaped


@runtime_checkable
class Target(Protocol):
    """Protocol of a function to plan, with its shapes."""

    @property
    def name(self) -> str: ...
    @property
    def tokens(self) -> int | None: ...

    def build(self) -> tuple[Any, tuple[Any, ...]]:
        """The function and the shapes of its arguments, called under `jax.set_mesh`."""
        ...

    def sized(self, tokens: int) -> "Target":
        """The same of sequences of so many tokens."""
        ...


@runtime_checkable
class HasStrategy(Target, Protocol):
    """A target whose attention's strategy may be chosen."""

    @property
    def strategy(self) -> Strategy: ...

    def choice(self, layout: MeshLayout) -> StrategyChoice: ...
    def with_strategy(self, strategy: Strategy) -> "Target": ...


@dataclass(frozen=True)
class Given:
    """A function and the shapes of its arguments."""

    function: Any
    shapes: tuple[Any, ...]
    tokens: None = None

    @property
    def name(self) -> str:
        function = self.function
        while isinstance(function, partial):
            function = function.func
        return getattr(function, "__name__", repr(function))

    def build(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.shapes

    def sized(self, tokens: int) -> "Given":
        raise ValueError(
            f"{self.name} has shapes of its own, so there is none of {tokens} tokens. Write a "
            f"function of the tokens, and FILE:function."
        )

    def __reduce__(self) -> Any:
        """Pickles a function that `jax.jit` decorates by name: pickle looks for the one inside."""
        module, name = (getattr(self.function, x, None) for x in ("__module__", "__name__"))
        if getattr(sys.modules.get(module or ""), name or "", None) is self.function:
            return _given_by_name, (module, name, self.shapes)
        return Given, (self.function, self.shapes)

    def mesh(self) -> Mapping[str, int] | None:
        """The mesh of the first shape that has a sharding."""
        for x in jax.tree.leaves(self.shapes):
            if isinstance(getattr(x, "sharding", None), NamedSharding):
                return dict(x.sharding.mesh.shape)
        return None


def _given_by_name(module: str, name: str, shapes: tuple[Any, ...]) -> Given:
    return Given(getattr(importlib.import_module(module), name), shapes)


@dataclass(frozen=True)
class AttentionLayer:
    """Causal attention of query, key and value, with gradients or without."""

    tokens: int
    batch: int = 1
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: Any = jnp.bfloat16
    train: bool = False
    layout: MeshLayout = MeshLayout()
    strategy: Strategy = Ulysses()
    kernel: Any = None

    @property
    def name(self) -> str:
        return "layer, forward and gradients" if self.train else "layer, forward"

    def sized(self, tokens: int) -> "AttentionLayer":
        return replace(self, tokens=tokens)

    def build(self) -> tuple[Any, tuple[Any, ...]]:
        options = {"kernel": self.kernel, "strategy": self.strategy, "layout": self.layout}
        attend = partial(dot_product_attention, is_causal=True, **options)

        def forward(query: Array, key: Array, value: Array) -> Array:
            with jax.named_scope("attention"):
                return attend(query, key, value)

        def both(query: Array, key: Array, value: Array, grad: Array) -> tuple[Array, ...]:
            out, pull = jax.vjp(forward, query, key, value)
            return out, *pull(grad)

        query, key = self.shapes()
        return (both, (query, key, key, query)) if self.train else (forward, (query, key, key))

    def shapes(self) -> tuple[Any, Any]:
        """Query, and key or value."""
        query, key = (
            shaped(
                (self.batch, self.tokens, n, self.head_dim), self.dtype, self.layout.partition_spec
            )
            for n in (self.heads, self.kv_heads)
        )
        return query, key

    def choice(self, layout: MeshLayout) -> StrategyChoice:
        query, key = self.shapes()
        options: Any = {"kernel": self.kernel, "gradients": self.train, "is_causal": True}
        return choose_strategy(query, key, key, layout=layout, **options)

    def with_strategy(self, strategy: Strategy) -> "AttentionLayer":
        return replace(self, strategy=strategy)


@dataclass(frozen=True)
class DecoderStep:
    """A train step of `jax_seqpar.plan.Decoder`, or its loss."""

    decoder: Decoder

    @property
    def name(self) -> str:
        what = "train step" if self.decoder.train else "loss"
        layers = "1 layer" if self.decoder.layers == 1 else f"{self.decoder.layers} layers"
        return f"decoder of {layers}, {what}"

    @property
    def tokens(self) -> int:
        return self.decoder.tokens

    @property
    def strategy(self) -> Strategy:
        return self.decoder.strategy

    def sized(self, tokens: int) -> "DecoderStep":
        return DecoderStep(replace(self.decoder, tokens=tokens))

    def build(self) -> tuple[Any, tuple[Any, ...]]:
        return self.decoder.build()

    def choice(self, layout: MeshLayout) -> StrategyChoice:
        names = ("tokens", "batch", "heads", "kv_heads", "head_dim", "dtype", "train", "kernel")
        sizes = {name: getattr(self.decoder, name) for name in names}
        return AttentionLayer(**sizes, layout=self.decoder.layout).choice(layout)

    def with_strategy(self, strategy: Strategy) -> "DecoderStep":
        return DecoderStep(replace(self.decoder, strategy=strategy))


@dataclass(frozen=True)
class FromFile:
    """Target that a function of a file returns: a function to plan, and a tuple of its shapes.

    The file's function is called under the mesh, with the number of tokens unless that is None: a
    `NamedSharding(jax.sharding.get_abstract_mesh(), spec)` says how an argument is sharded.
    """

    file: str
    function: str
    tokens: int | None = None

    @property
    def name(self) -> str:
        return f"{Path(self.file).name}:{self.function}"

    def sized(self, tokens: int) -> "FromFile":
        return replace(self, tokens=tokens)

    def build(self) -> tuple[Any, tuple[Any, ...]]:
        make = self._function()
        arguments = () if self.tokens is None else (self.tokens,)
        try:
            inspect.signature(make).bind(*arguments)
        except TypeError as error:
            if self.tokens is None:
                raise ValueError(
                    f"{self.name} takes a number of tokens ({error}). Write --tokens 128K."
                ) from error
            raise ValueError(
                f"{self.name} has no parameter for a number of tokens ({error}), got "
                f"{self.tokens}. Write def {self.function}(tokens), or leave out --tokens, "
                f"--largest and --sweep tokens."
            ) from error
        found = make(*arguments)
        if not isinstance(found, tuple) or len(found) != 2 or not callable(found[0]):
            self._refuse_return(type(found).__name__)
        if not isinstance(found[1], tuple | list):
            self._refuse_return(f"a function and {type(found[1]).__name__}")
        return found[0], tuple(found[1])

    def _refuse_return(self, returned: str) -> NoReturn:
        raise ValueError(
            f"{self.name} returns {returned} where a function and the shapes of "
            f"its arguments are needed. Return (function, (shape, shape))."
        )

    def _function(self) -> Any:
        path = Path(self.file)
        if not path.is_file():
            raise ValueError(f"there is no file {self.file!r}. Write FILE.py:function.")
        sys.path.insert(0, str(path.parent.resolve()))
        spec: Any = importlib.util.spec_from_file_location(path.stem, path)
        if spec is None:
            raise ValueError(f"{self.file!r} is not a file of Python. Write FILE.py:function.")
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
        if not callable(getattr(module, self.function, None)):
            raise ValueError(
                f"{self.file!r} has no function {self.function!r}. Write the name of one of its "
                f"functions."
            )
        return getattr(module, self.function)
