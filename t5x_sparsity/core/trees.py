"""A pytree as a dict by path, and back."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

# Arrays by the path of their weight, the keys to it joined by '/'.
Arrays = Mapping[str, jax.Array]


def path_of(keys: tuple[Any, ...]) -> str:
    """The path of a leaf, whose keys JAX gives as a KeyPath: the keys joined by '/'."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def flatten(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """The leaves of any pytree by path, in the tree's own order.

    >>> flatten({"mlp": {"wi": 1, "wo": 2}, "layers": [3]})
    {'layers/0': 3, 'mlp/wi': 1, 'mlp/wo': 2}

    is_leaf: what else counts as a leaf, as in `jax.tree.leaves`.

    Raises:
      ValueError: two leaves have the same path, because a key holds a '/'.
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
    return jax.tree.unflatten(jax.tree.structure(like), [flat[path] for path in paths])
