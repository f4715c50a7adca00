"""Dense weights trained under a mask, with the gradients at the masked weights."""

import dataclasses

import jax
import jax.numpy as jnp

from t5x_sparsity.algorithms.common import Masks, choose, magnitudes, scheduled_kept, start_scores
from t5x_sparsity.core.checks import check_not_negative
from t5x_sparsity.core.contract import DENSE, Algorithm, Arrays, Need, Plan, Update
from t5x_sparsity.core.schedules import Constant, UpdateSchedule, ValueSchedule, value_after


class UnderMask(Algorithm):
    """An algorithm that keeps dense weights under the mask; the optimizer updates those."""

    dense_gradients = Need.ALWAYS

    def initial_slots(self, plan: Plan, weights: Arrays, masks: Arrays) -> dict[str, Arrays]:
        # copies: a train loop may donate the weights and this state together
        return {DENSE: {p: jnp.array(w, copy=True) for p, w in weights.items()}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StraightThrough(UnderMask):
    """The forward pass uses w M(w); its gradient is applied to all of w.

    Bengio et al. 2013, arXiv:1308.3432, section 4; for masks, Mallya et al. 2018, arXiv:1801.06519.

    Attributes:
      updates: when masks are recomputed.
      level: the share of each layer's target sparsity, in [0, 1], over the progress of updates.
    """

    updates: UpdateSchedule
    level: ValueSchedule = Constant(value=1.0)

    def scores(self, plan: Plan, weights: Arrays, key: jax.Array | None) -> dict[str, jax.Array]:
        """float, the weights' shapes: the largest are kept. Here |w|."""
        return magnitudes(plan, weights)

    def initial_masks(self, plan: Plan, weights: Arrays, key: jax.Array | None) -> Masks:
        kept = scheduled_kept(plan, self.level(jnp.float32(0)))
        return choose(plan, self.scores(plan, weights, key), kept)

    def update_masks(self, plan: Plan, update: Update) -> Masks:
        kept = scheduled_kept(plan, self.level(self.updates.progress(update.step)))
        return choose(plan, self.scores(plan, update.weights, update.key), kept)

    def mask_densities(self, plan: Plan, updated: int | None) -> dict[str, float]:
        share = value_after(self.level, self.updates, updated)
        return {p: 1 - layer.level * share for p, layer in plan.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MagnitudeSTE(StraightThrough):
    """Straight-through training under the mask of the largest |w|.

    >>> import t5x_sparsity as ts
    >>> algorithm = MagnitudeSTE(updates=ts.Periodic(begin=0, end=5000, period=10))
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomSTE(StraightThrough):
    """Straight-through training under random masks, drawn at every update."""

    def scores(self, plan: Plan, weights: Arrays, key: jax.Array | None) -> dict[str, jax.Array]:
        return start_scores(plan, weights, key)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SRSTE(StraightThrough):
    """Sparse-refined straight-through training (Zhou et al. 2021, arXiv:2102.04010, section 3.2).

    The gradient of pruned weights is g + decay * w, which moves them towards 0, so that fewer
    weights enter and leave the mask. The term is part of the gradient: as in the authors' code, the
    optimizer's momentum and scaling apply to it. Proposed for N:M; any pattern works.

    Attributes:
      decay: lambda of the paper, at least 0.

    Raises:
      ValueError: a negative decay.
    """

    decay: float = 2e-4

    def __post_init__(self) -> None:
        check_not_negative("decay (PRUNED_WEIGHT_DECAY)", self.decay)

    def gradients(self, plan: Plan, update: Update) -> dict[str, jax.Array]:
        return {
            p: g + jnp.where(update.masks[p], 0, self.decay * update.weights[p]).astype(g.dtype)
            for p, g in update.grads.items()
        }
