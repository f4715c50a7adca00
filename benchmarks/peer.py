"""JaxPruner's RigL under the host's optimizer, where `import jaxpruner` works; none of it is here.

Its released code does not run on current JAX, nor on a model with weights that it leaves dense. It
is mended in this process only, by one function:

- `jax.tree_map`, which it calls throughout, has been removed from JAX; it is put back.
- Of a weight that stays dense it keeps a mask of None. RigL and SET map over their masks, None
  among them, together with trees that have an array in its place, which fails; so this `tree_map`
  takes a None of its first tree for a leaf, and leaves it None.

It is given our level, our distribution (ERK), our drop fraction and our choice of sparse weights,
so that both do the same work. Its own T5X trainer, which also counts zeros at each step, is not
used. It can't reset the state of Adafactor, so AdamW is the only optimizer to compare under.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Container
from typing import Any

import jax
import optax

from t5x_sparsity import host


def missing() -> list[str]:
    """The packages that it takes and that can't be imported."""
    needed = ("jaxpruner", "chex", "ml_collections")
    return [name for name in needed if importlib.util.find_spec(name) is None]


def _tree_map(fn, tree, *rest, is_leaf=None):
    def apply(x, *others):
        return None if x is None else fn(x, *others)

    def ends(x):
        return x is None or (is_leaf is not None and is_leaf(x))

    return jax.tree.map(apply, tree, *rest, is_leaf=ends)


class _Optimizer(host.optimizers.OptaxWrapper):
    """An optax optimizer with JaxPruner around it: weights are masked after each step."""

    def __init__(self, tx: optax.GradientTransformation, updater: Any):
        super().__init__(updater.wrap_optax(tx))
        self._updater = updater

    def apply_gradient(self, hyper_params, params, state, grads):
        params, state = super().apply_gradient(hyper_params, params, state, grads)
        return self._updater.post_gradient_update(params, state.param_states), state


def rigl(
    sparse: Container[str], *, sparsity: float, period: int, drop_fraction: float, end: int
) -> _Optimizer:
    """AdamW with JaxPruner's RigL, which updates masks at every step that `period` divides.

    sparse: the paths of the weights that are to be sparse.
    """
    jax.tree_map = _tree_map
    import jaxpruner
    import ml_collections

    if host.NAME == "t5x":
        # says to T5X how its state is sharded
        importlib.import_module("jaxpruner.baselines.t5x.optimizers_wrapper")
    updater = jaxpruner.create_updater_from_config(
        ml_collections.ConfigDict(
            {
                "algorithm": "rigl",
                "dist_type": "erk",
                "sparsity": sparsity,
                "update_freq": period,
                "update_start_step": 1,
                "update_end_step": end,
                "drop_fraction": drop_fraction,
                "filter_fn": lambda path, _: "/".join(path) in sparse,
            }
        )
    )
    return _Optimizer(optax.adamw(1e-3), updater)
