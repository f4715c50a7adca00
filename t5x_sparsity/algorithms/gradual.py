"""Pruning from dense to sparse along a schedule, each layer to its own target."""

import dataclasses

import jax

from t5x_sparsity.algorithms.common import (
    Masks,
    choose,
    magnitudes,
    pattern_of_each,
    random_scores,
    scheduled_kept,
)
from t5x_sparsity.core.contract import Algorithm, Arrays, Plan, Update
from t5x_sparsity.core.patterns import NByM
from t5x_sparsity.core.schedules import Polynomial, UpdateSchedule, ValueSchedule, value_after


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradualPruning(Algorithm):
    """An update takes its gradient step, then keeps the active weights of largest score.

    Masks start dense, and a pruned weight stays pruned. The optimizer keeps its momentum.

    Attributes:
      updates: when masks change; `OneShot` prunes in one update.
      level: the share of each layer's target sparsity, in [0, 1], over the progress of updates.
    """

    updates: UpdateSchedule
    level: ValueSchedule = Polynomial(initial=0.0, final=1.0, power=3.0)

    def scores(self, plan: Plan, update: Update) -> dict[str, jax.Array]:
        """float, the weights' shapes: the largest are kept. Here |w|."""
        return magnitudes(plan, update.weights)

    def update_masks(self, plan: Plan, update: Update) -> Masks:
        kept = scheduled_kept(plan, self.level(self.updates.progress(update.step)))
        # pruned weights are no candidates; the optimizer may just have moved them off 0
        return choose(plan, self.scores(plan, update), kept, where=update.masks)

    def mask_densities(self, plan: Plan, updated: int | None) -> dict[str, float]:
        share = 0.0 if updated is None else value_after(self.level, self.updates, updated)
        return {p: 1 - layer.level * share for p, layer in plan.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Magnitude(GradualPruning):
    """Gradual magnitude pruning (Zhu & Gupta 2017, arXiv:1710.01878, section 3).

    >>> import t5x_sparsity as ts
    >>> algorithm = Magnitude(updates=ts.Periodic(begin=500, end=4000, period=100))
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomPruning(GradualPruning):
    """Prunes weights at random: the baseline for the other scores."""

    def scores(self, plan: Plan, update: Update) -> dict[str, jax.Array]:
        return random_scores(plan, update.key)


@dataclasses.dataclass(frozen=True, kw_only=True)
class IterativeNM(GradualPruning):
    """Ramps to N:M; the n largest weights of every group are never pruned.

    Other weights are pruned by |w|, anywhere in a slice, until only those n per group are left.
    Named after an extension of JaxPruner (Lee et al. 2023, arXiv:2304.14082), which fails when
    called. Every weight's pattern must be NByM.
    """

    def initial_masks(self, plan: Plan, weights: Arrays, key: jax.Array | None) -> Masks:
        pattern_of_each(self, plan, NByM)
        return super().initial_masks(plan, weights, key)

    def update_masks(self, plan: Plan, update: Update) -> Masks:
        scores = self.scores(plan, update)
        winners = choose(plan, scores, where=update.masks)
        kept = scheduled_kept(plan, self.level(self.updates.progress(update.step)))
        return choose(plan, scores, kept, where=update.masks, keep=winners, relaxed=True)
