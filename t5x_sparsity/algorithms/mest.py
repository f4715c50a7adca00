"""MEST: drop by magnitude and gradient."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from t5x_sparsity.algorithms.drop_and_grow import DropAndGrow
from t5x_sparsity.core.checks import check_not_negative
from t5x_sparsity.core.contract import Need, Plan, Update


@dataclasses.dataclass(frozen=True, kw_only=True)
class MEST(DropAndGrow):
    """Drops by |w| + gradient_weight |g|, grows at random (Yuan et al. 2021, arXiv:2110.14032).

    The paper's elastic mutation: the share that is swapped decreases over training. g is the
    gradient of the update's step. The authors' released code leaves the gradient's weight at 0,
    which is SET. The paper's soft memory bound, which has more weights than the target between
    updates, is not implemented.

    Attributes:
      gradient_weight: of |g| in the score, at least 0.

    Raises:
      ValueError: a negative gradient_weight.
    """

    gradient_weight: float = 0.01

    dense_gradients = Need.NEVER  # only those of active weights

    def __post_init__(self) -> None:
        check_not_negative("gradient_weight (GRADIENT_WEIGHT)", self.gradient_weight)

    def drop_scores(self, plan: Plan, update: Update) -> dict[str, jax.Array]:
        return {
            p: jnp.abs(w) + self.gradient_weight * jnp.abs(update.grads[p]).astype(w.dtype)
            for p, w in update.weights.items()
        }
