"""MEST: drop by magnitude and gradient."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from t5x_sparsity.algorithms.drop_and_grow import DropAndGrow
from t5x_sparsity.core.contract import Need, Plan, Update


@dataclasses.dataclass(frozen=True, kw_only=True)
class MEST(DropAndGrow):
    """Drops by |w| + gradient_weight |g|, grows at random (Yuan et al. 2021, arXiv:2110.14032).

    The paper's elastic mutation: the share that is swapped falls over training. g is the gradient
    of the update's own step. The authors' released code leaves the gradient's weight at 0, which is
    SET; the paper's soft memory bound, more weights than the target between updates, is not here.

    Attributes:
      gradient_weight: of |g| in the score, not negative.
    """

    gradient_weight: float = 0.01

    dense_gradients = Need.NEVER  # of active weights alone

    def __post_init__(self):
        if not self.gradient_weight >= 0:
            raise ValueError(
                f"gradient_weight (GRADIENT_WEIGHT) must not be negative, got "
                f"{self.gradient_weight!r}"
            )

    def drop_scores(self, plan: Plan, update: Update) -> dict[str, jax.Array]:
        return {
            p: jnp.abs(w) + self.gradient_weight * jnp.abs(update.grads[p]).astype(w.dtype)
            for p, w in update.weights.items()
        }
