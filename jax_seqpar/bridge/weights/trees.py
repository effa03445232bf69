"""Trees of parameters as dotted paths, and back; leaves put where another tree has them."""

import re
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, NamedSharding


def leaves_by_path(tree: Any) -> tuple[dict[str, Any], Any]:
    """Leaves by dotted path, and the structure."""
    found, structure = jax.tree_util.tree_flatten_with_path(tree)
    leaves: dict[str, Any] = {}
    for keys, leaf in found:
        path = _dotted(keys)
        if path in leaves:
            raise ValueError(
                f"The tree has two leaves of one path, {path}. Write keys without dots."
            )
        leaves[path] = leaf
    return leaves, structure


def _dotted(path: tuple[Any, ...]) -> str:
    # A mapping does not write the box of a Param of nnx, or of a Partitioned of linen.
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator=".")


def nested(arrays: Mapping[str, Any]) -> dict[Any, Any]:
    """Nested dicts of dotted paths."""
    tree: dict[Any, Any] = {}
    for path, x in arrays.items():
        *parents, last = path.split(".")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                break
        if not isinstance(node, dict) or last in node:
            raise ValueError(
                f"{path} is a path through another path, or the start of one. "
                f"Write paths that end at different places."
            )
        node[last] = x
    return _numbered(tree)


def _numbered(node: Any) -> Any:
    """The tree with integers for keys where all keys of a dict are numbers."""
    if not isinstance(node, dict):
        return node
    numbers = all(re.fullmatch("0|[1-9][0-9]*", key) for key in node)
    return {int(key) if numbers else key: _numbered(child) for key, child in node.items()}


def placed(x: jax.Array, path: str, leaf: Any) -> jax.Array:
    """The array with the sharding of a leaf of another tree, if that leaf is committed to one."""
    sharding = getattr(leaf, "sharding", None)
    if sharding is None or not getattr(leaf, "committed", True):
        return x
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, AbstractMesh):
        # eval_shape knows the axes of a mesh and not its devices, with which JAX would make an
        # array that cannot be read.
        mesh = jax.sharding.get_mesh()
        if mesh.abstract_mesh != sharding.mesh:
            raise ValueError(
                f"like has {path} on an abstract mesh, {sharding.mesh}, without devices. "
                f"Write `with jax.set_mesh(mesh):` around from_torch."
            )
        sharding = NamedSharding(mesh, sharding.spec)
    return jax.device_put(x, sharding)
