"""Masks that never change: dense training on the same code path, and a static mask."""

import dataclasses

import jax

from t5x_sparsity.algorithms.common import Masks, choose, start_scores
from t5x_sparsity.core.contract import Algorithm, Arrays, Plan
from t5x_sparsity.core.schedules import Never


@dataclasses.dataclass(frozen=True, kw_only=True)
class Static(Algorithm):
    """A mask at the target level that never changes: random, or of the largest trained weights.

    >>> algorithm = Static()

    Attributes:
      updates: none; it only says where the run starts.
    """

    updates: Never = Never()
    masks_gradients = True

    def initial_masks(self, plan: Plan, weights: Arrays, key: jax.Array | None) -> Masks:
        return choose(plan, start_scores(plan, weights, key))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dense(Algorithm):
    """No weight is pruned and no mask is stored: a dense run on the code path of sparse runs."""

    updates = Never()
    is_dense = True
