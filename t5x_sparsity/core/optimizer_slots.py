"""What any optimizer remembers of each weight: its slots.

A slot is a leaf of the optimizer's state that mirrors a weight: it has the weight's shape, and its
path contains the weight's path, as in `mu/<path>` of Adam or `<path>/v` of Adafactor.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from t5x_sparsity.core.trees import Arrays, path_of

# keys under which optimizers keep a running mean of squared gradients: optax, T5X's Adafactor
_SECOND_MOMENTS = ("nu", "v")


def zero_slots(state: Any, reset: Arrays, paths: Iterable[str] | None = None) -> Any:
    """Zeroes what an optimizer remembers of the marked weights.

    Factored rows and columns stay, as each belongs to several weights.

    >>> state = {"mu": {"w": jnp.array([1.0, 2.0])}}
    >>> print(zero_slots(state, {"w": jnp.array([True, False])})["mu"]["w"])
    [0. 2.]

    Args:
      state: the optimizer's, a pytree.
      reset: bool, by path, the weights' shapes; True where slots are zeroed.
      paths: of all weights, including dense ones, so that a slot of `b/a` is not taken for one of
        `a`. None: those of `reset`.
    """
    paths = list(reset if paths is None else paths)

    def zero(keys: tuple[Any, ...], slot: jax.Array) -> jax.Array:
        path = _weight_of(f"/{path_of(keys)}/", paths)
        if path is None or path not in reset or jnp.shape(slot) != reset[path].shape:
            return slot
        return jnp.where(reset[path], jnp.zeros((), slot.dtype), slot)

    return jax.tree_util.tree_map_with_path(zero, state) if reset else state


def second_moments(
    state: Any, weights: Arrays, paths: Iterable[str] | None = None
) -> dict[str, jax.Array]:
    """The running means of squared gradients of the weights, by path.

    They are the leaves under a key `nu` (optax) or `v` (Adafactor), except factored ones.

    Args:
      state, paths: as of `zero_slots`.
      weights: by path; those whose second moments are wanted.

    Raises:
      ValueError: the optimizer keeps no second moment of some weight.
    """
    paths = list(weights if paths is None else paths)
    found: dict[str, jax.Array] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = f"/{path_of(keys)}/"
        path = _weight_of(name, paths)
        if path is None or path not in weights or jnp.shape(leaf) != weights[path].shape:
            continue
        if any(key in _SECOND_MOMENTS for key in name.replace(f"/{path}/", "/", 1).split("/")):
            found[path] = leaf
    missing = sorted(p for p in weights if p not in found)
    if missing:
        raise ValueError(
            f"the optimizer keeps no second moment (nu or v) of the weights {missing}, which this "
            "algorithm needs: train with Adam or AdamW, or with an Adafactor that is not factored "
            "(adafactor.Adafactor.factored = False)"
        )
    return found


def _weight_of(name: str, paths: list[str]) -> str | None:
    """The weight's path that ends last in the slot's path; of several, the longest.

    A slot's path starts with keys of the optimizer, which may look like the path of a weight.
    """
    hits = [
        (name.rfind(f"/{p}/") + len(p), p.count("/"), p) for p in paths if not p or f"/{p}/" in name
    ]
    return max(hits)[-1] if hits else None
