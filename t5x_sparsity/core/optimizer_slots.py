"""What an optimizer remembers of single weights, whichever optimizer it is.

A slot is a leaf of the optimizer's state that mirrors a weight: it has the weight's shape, and its
path has the weight's path in it, as in `mu/<path>` of Adam or `<path>/v` of Adafactor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from t5x_sparsity.core.trees import path_of

Arrays = Mapping[str, jax.Array]

# keys under which optimizers keep a running mean of squared gradients: optax, T5X's Adafactor
_SECOND_MOMENTS = ("nu", "v")


def zero_slots(state: Any, reset: Arrays, paths: Iterable[str] | None = None) -> Any:
    """Zeroes what an optimizer remembers of the marked weights.

    Factored rows and columns, which belong to no weight alone, stay.

    Args:
      state: the optimizer's.
      reset: bool, by path; True where a weight is to be forgotten.
      paths: of all weights, dense ones too, so that a slot of `b/a` is not taken for one of `a`.
        None: those of `reset`.
    """
    paths = list(reset if paths is None else paths)

    def zero(keys, slot):
        path = _weight_of(f"/{path_of(keys)}/", paths)
        if path not in reset or jnp.shape(slot) != reset[path].shape:
            return slot
        return jnp.where(reset[path], jnp.zeros((), slot.dtype), slot)

    return jax.tree_util.tree_map_with_path(zero, state) if reset else state


def second_moments(
    state: Any, weights: Arrays, paths: Iterable[str] | None = None
) -> dict[str, jax.Array]:
    """The running means of squared gradients of the weights, by path.

    They are the leaves under a key `nu` (optax) or `v` (Adafactor). A factored second moment is
    none of a single weight.

    Args:
      state: the optimizer's.
      weights: by path; those whose second moments are wanted.
      paths: of all weights, dense ones too. None: those of `weights`.

    Raises:
      ValueError: the optimizer keeps none for some weight.
    """
    paths = list(weights if paths is None else paths)
    found: dict[str, jax.Array] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = f"/{path_of(keys)}/"
        path = _weight_of(name, paths)
        if path not in weights or jnp.shape(leaf) != weights[path].shape:
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
    """The path that ends last in the slot's; of several, the longest.

    What comes first in a slot's path are keys of the optimizer, which may be those of a weight.
    """
    hits = [
        (name.rfind(f"/{p}/") + len(p), p.count("/"), p) for p in paths if not p or f"/{p}/" in name
    ]
    return max(hits)[-1] if hits else None
