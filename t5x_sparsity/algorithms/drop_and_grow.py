"""Sparse from the start to the end: drop the smallest weights, grow others elsewhere."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from t5x_sparsity.algorithms.base import (
    Arrays,
    Update,
    choose,
    magnitudes,
    random_masks,
    random_scores,
)
from t5x_sparsity.plan import Plan
from t5x_sparsity.schedules import Cosine, UpdateSchedule, ValueSchedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class DropAndGrow:
    """Keeps the number of active weights: at an update a fraction is dropped, as many are grown.

    Dropped are the active weights of smallest |w|; what is grown, `grow_scores` says. A weight just
    dropped may grow again. Grown weights start at 0, with zeroed optimizer slots.

    Attributes:
      updates: when masks change.
      drop_fraction: the share of active weights that is swapped, over the progress of updates.
      take_gradient_step: False as in the RigL paper (Algorithm 1): a mask update takes the place of
        the gradient step; True does both.
    """

    updates: UpdateSchedule
    drop_fraction: ValueSchedule = Cosine(initial=0.3)
    take_gradient_step: bool = False

    masks_gradients = True
    grows = True

    @property
    def replaces_gradient_step(self) -> bool:
        return not self.take_gradient_step

    def initial_masks(self, plan: Plan, weights: Arrays, key: jax.Array) -> dict[str, jax.Array]:
        """Random, at the target level."""
        del weights
        return random_masks(plan, key)

    def grow_scores(self, plan: Plan, update: Update) -> dict[str, jax.Array]:
        """float, the weights' shapes: the largest among inactive weights grow."""
        raise NotImplementedError

    def update_masks(self, plan: Plan, update: Update) -> dict[str, jax.Array]:
        fraction = self.drop_fraction(self.updates.progress(update.step))
        left = {
            path: layer.kept - jnp.round(fraction * layer.kept).astype(jnp.int32)
            for path, layer in plan.items()
        }
        keep = choose(plan, magnitudes(update.weights), left, where=update.masks, relaxed=True)
        return choose(plan, self.grow_scores(plan, update), keep=keep)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RigL(DropAndGrow):
    """Grows where the gradient is largest (Evci et al. 2020, arXiv:1911.11134, section 3)."""

    def grow_scores(self, plan: Plan, update: Update) -> dict[str, jax.Array]:
        return magnitudes(update.grads)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SET(DropAndGrow):
    """Grows at random (Mocanu et al. 2018, arXiv:1707.04780, Algorithm 1).

    The paper prunes a fixed fraction of the smallest positive and the largest negative weights at
    every epoch; here, as in later work, the smallest |w| go, at the schedule's steps.
    """

    def grow_scores(self, plan: Plan, update: Update) -> dict[str, jax.Array]:
        return random_scores(plan, update.key)
