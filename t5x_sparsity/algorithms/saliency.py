"""Pruning by the first-order change of the loss."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from t5x_sparsity.algorithms.gradual import GradualPruning
from t5x_sparsity.core.contract import Arrays, Plan, Slots, Update

_SUMS = "gradient_sums"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saliency(GradualPruning):
    """Keeps the weights of largest |w g|, the first-order change of the loss if w were 0.

    Molchanov et al. 2016, arXiv:1611.06440, section 2.2; as a score of single weights, SNIP (Lee et
    al. 2018, arXiv:1810.02340, section 4). w is the weight of the forward pass that g belongs to.

    Attributes:
      gradient_steps: g is the mean of the gradients of so many steps, the update's own the last,
        but of none before the update before it; at least 1. As in code that prunes by several
        batches, gradients are averaged before the product. Above 1 it keeps a float32 array a
        weight.
    """

    gradient_steps: int = 1

    def __post_init__(self):
        steps = self.gradient_steps
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(
                f"gradient_steps (GRADIENT_STEPS) must be an integer of at least 1, got {steps!r}"
            )

    def initial_slots(self, plan: Plan, weights: Arrays, masks: Arrays) -> dict[str, Arrays]:
        if self.gradient_steps == 1:
            return {}
        return {_SUMS: {p: jnp.zeros(layer.shape, jnp.float32) for p, layer in plan.items()}}

    def observe(self, plan: Plan, update: Update) -> Slots:
        """Adds this step's gradients, if an update is so near that they count."""
        if _SUMS not in update.slots:
            return update.slots
        left = self.updates.until_next(update.step)
        counts, first = left < self.gradient_steps, left == self.gradient_steps - 1

        def added(total, grad):
            return jnp.where(first, 0, total) + jnp.where(counts, grad.astype(jnp.float32), 0)

        return {_SUMS: {p: added(x, update.grads[p]) for p, x in update.slots[_SUMS].items()}}

    def scores(self, plan: Plan, update: Update) -> dict[str, jax.Array]:
        # a sum of gradients orders as their mean does
        grads = update.slots.get(_SUMS, update.grads)
        return {p: jnp.abs(w * grads[p].astype(w.dtype)) for p, w in update.forward_weights.items()}

    def update_slots(self, plan: Plan, update: Update) -> Slots:
        return jax.tree.map(jnp.zeros_like, dict(update.slots))
