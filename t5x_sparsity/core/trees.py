"""A pytree as a dict by path, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax


def flatten(tree: Any) -> dict[str, Any]:
    """Leaves of any pytree by path, the keys joined by '/', in the tree's own order.

    Raises:
      ValueError: two leaves come out with one path, since a key holds a '/'.
    """
    flat: dict[str, Any] = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        if path in flat:
            raise ValueError(
                f"two weights have the path {path!r}, because a key of the tree holds a '/'; "
                "rename one of them"
            )
        flat[path] = leaf
    return flat


def unflatten(like: Any, flat: Mapping[str, Any]) -> Any:
    """The inverse of `flatten`, with the containers of `like`."""
    paths = jax.tree_util.tree_flatten_with_path(like)[0]
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]
    return jax.tree_util.tree_structure(like).unflatten([flat[name] for name in names])
