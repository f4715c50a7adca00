"""A pytree as a dict by path, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax


def path_of(keys: jax.tree_util.KeyPath) -> str:
    """The path of a leaf: its keys joined by '/'."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def flatten(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """Leaves of any pytree by path, the keys joined by '/', in the tree's own order.

    is_leaf: what else counts as a leaf, as in `jax.tree.leaves`.

    Raises:
      ValueError: two leaves have the same path, since a key holds a '/'.
    """
    flat: dict[str, Any] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf):
        path = path_of(keys)
        if path in flat:
            raise ValueError(
                f"two weights have the path {path!r}, because a key of the tree holds a '/'; "
                "rename one of them"
            )
        flat[path] = leaf
    return flat


def unflatten(like: Any, flat: Mapping[str, Any]) -> Any:
    """The inverse of `flatten`, with the containers of `like`."""
    paths = [path_of(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(like)]
    return jax.tree.structure(like).unflatten([flat[path] for path in paths])
