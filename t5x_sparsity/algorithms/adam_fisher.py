"""Pruning by Adam's estimate of the Fisher information."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from t5x_sparsity.algorithms.gradual import GradualPruning
from t5x_sparsity.core.contract import Arrays, Plan, Update
from t5x_sparsity.core.optimizer_slots import second_moments


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamFisher(GradualPruning):
    """Keeps the weights of largest w^2 v, where v is Adam's running mean of squared gradients.

    v approximates the diagonal of the Fisher matrix, and the score the increase of the loss if the
    weight were 0 (Singh & Alistarh 2020, arXiv:2004.14340, section 3; the diagonal form of the
    optimal brain surgeon). An optimizer that keeps no v, or only its factors, is a ValueError.

    >>> import t5x_sparsity as ts
    >>> algorithm = AdamFisher(updates=ts.Periodic(begin=500, end=4000, period=100))

    Attributes:
      reset_optimizer: whether an update zeroes the optimizer's slots of all sparse weights. Adam's
        step count is not reset, so the first steps after it are up to (1 - b1) / sqrt(1 - b2) times
        as large.
    """

    reset_optimizer: bool = False

    def scores(self, plan: Plan, update: Update) -> dict[str, jax.Array]:
        moments = second_moments(update.optimizer_state, update.weights, update.paths or None)
        return {p: jnp.square(w) * moments[p].astype(w.dtype) for p, w in update.weights.items()}

    def resets(self, before: Arrays, after: Arrays) -> dict[str, jax.Array]:
        if not self.reset_optimizer:
            return {}
        return {p: jnp.ones(mask.shape, bool) for p, mask in after.items()}
