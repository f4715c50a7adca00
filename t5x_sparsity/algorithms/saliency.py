"""Pruning by the first-order change of the loss."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from t5x_sparsity.algorithms.gradual import GradualPruning
from t5x_sparsity.core.checks import check_integer
from t5x_sparsity.core.contract import Arrays, Plan, Slots, Update

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
