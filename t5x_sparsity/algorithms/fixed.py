"""Masks that never change: dense training by the same path, and a static random mask."""

from __future__ import annotations

import dataclasses

import jax

from t5x_sparsity.algorithms.base import Arrays, Update, dense_masks, random_masks
from t5x_sparsity.plan import Plan
from t5x_sparsity.schedules import Never


@dataclasses.dataclass(frozen=True, kw_only=True)
class Static:
    """A random mask at the target level, kept throughout."""

    updates = Never()
    masks_gradients = True
    replaces_gradient_step = False
    grows = False

    def initial_masks(self, plan: Plan, weights: Arrays, key: jax.Array) -> dict[str, jax.Array]:
        del weights
        return random_masks(plan, key)

    def update_masks(self, plan: Plan, update: Update) -> dict[str, jax.Array]:
        del plan
        return dict(update.masks)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dense:
    """No weight is pruned and no mask is stored: a dense run by the path of the sparse ones."""

    updates = Never()
    masks_gradients = False
    replaces_gradient_step = False
    grows = False

    def initial_masks(self, plan: Plan, weights: Arrays, key: jax.Array) -> dict[str, jax.Array]:
        del weights, key
        return dense_masks(plan)

    def update_masks(self, plan: Plan, update: Update) -> dict[str, jax.Array]:
        del plan
        return dict(update.masks)
