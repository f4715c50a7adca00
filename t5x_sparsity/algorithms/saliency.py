"""Pruning by an estimate of how much the loss would change, of first or second order."""

import dataclasses

import jax
import jax.numpy as jnp

from t5x_sparsity.algorithms.gradual import GradualPruning
from t5x_sparsity.core.checks import check_integer
from t5x_sparsity.core.contract import Arrays, Plan, Slots, Update
from t5x_sparsity.core.optimizer_slots import second_moments

_SUMS = "gradient_sums"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saliency(GradualPruning):
    """Keeps the weights of largest |w g|, the first-order change of the loss if w were 0.

    Molchanov et al. 2016, arXiv:1611.06440, section 2.2; as a score of single weights, SNIP (Lee et
    al. 2018, arXiv:1810.02340, section 4). w is the weight of the forward pass that g belongs to.

    Attributes:
      gradient_steps: over how many steps gradients are averaged to g, at least 1. The last of them
        is the update's step; steps before the previous update don't count. As in code that prunes
        by several batches, gradients are averaged before the product. Above 1, one float32 per
        weight is stored.

    Raises:
      ValueError: gradient_steps below 1.
    """

    gradient_steps: int = 1

    def __post_init__(self) -> None:
        check_integer("gradient_steps (GRADIENT_STEPS)", self.gradient_steps, least=1)

    def initial_slots(self, plan: Plan, weights: Arrays, masks: Arrays) -> dict[str, Arrays]:
        if self.gradient_steps == 1:
            return {}
        return {_SUMS: {p: jnp.zeros(layer.shape, jnp.float32) for p, layer in plan.items()}}

    def observe(self, plan: Plan, update: Update) -> Slots:
        """Adds this step's gradients, if the next update is near enough that they count."""
        if _SUMS not in update.slots:
            return update.slots
        left = self.updates.until_next(update.step)
        counts, first = left < self.gradient_steps, left == self.gradient_steps - 1

        def added(total: jax.Array, grad: jax.Array) -> jax.Array:
            return jnp.where(first, 0, total) + jnp.where(counts, grad.astype(jnp.float32), 0)

        return {_SUMS: {p: added(x, update.grads[p]) for p, x in update.slots[_SUMS].items()}}

    def scores(self, plan: Plan, update: Update) -> dict[str, jax.Array]:
        # scores of a sum of gradients have the order of those of their mean
        grads = update.slots.get(_SUMS, update.grads)
        return {p: jnp.abs(w * grads[p].astype(w.dtype)) for p, w in update.forward_weights.items()}

    def update_slots(self, plan: Plan, update: Update) -> Slots:
        empty: Slots = jax.tree.map(jnp.zeros_like, dict(update.slots))
        return empty


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
