"""From dense to sparse by magnitude."""

from __future__ import annotations

import dataclasses

import jax

from t5x_sparsity.algorithms.base import (
    Arrays,
    Update,
    choose,
    dense_masks,
    magnitudes,
    scheduled_kept,
)
from t5x_sparsity.plan import Plan
from t5x_sparsity.schedules import Polynomial, UpdateSchedule, ValueSchedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Magnitude:
    """Gradual magnitude pruning (Zhu & Gupta 2017, arXiv:1710.01878, section 3).

    An update takes its gradient step, then keeps the weights of largest |w|. The optimizer's
    momentum of pruned weights runs on.

    Attributes:
      updates: when masks change; `OneShot` prunes at once.
      level: the share of each layer's target sparsity, over the progress of updates.
    """

    updates: UpdateSchedule
    level: ValueSchedule = Polynomial(initial=0.0, final=1.0, power=3.0)

    masks_gradients = False
    replaces_gradient_step = False
    grows = False

    def initial_masks(self, plan: Plan, weights: Arrays, key: jax.Array) -> dict[str, jax.Array]:
        del weights, key
        return dense_masks(plan)

    def update_masks(self, plan: Plan, update: Update) -> dict[str, jax.Array]:
        share = self.level(self.updates.progress(update.step))
        # of pruned weights the optimizer has just moved some off 0: they are no candidates
        kept = scheduled_kept(plan, share)
        return choose(plan, magnitudes(update.weights), kept, where=update.masks)
