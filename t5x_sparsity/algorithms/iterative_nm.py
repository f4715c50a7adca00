"""Pruning from dense to N:M through unstructured sparsity."""

from __future__ import annotations

import dataclasses

import jax

from t5x_sparsity.algorithms.common import Masks, choose, pattern_of_each, scheduled_kept
from t5x_sparsity.algorithms.gradual import GradualPruning
from t5x_sparsity.core.contract import Arrays, Plan, Update
from t5x_sparsity.core.patterns import NByM


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
