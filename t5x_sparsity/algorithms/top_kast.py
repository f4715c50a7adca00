"""Top-KAST: a sparse forward pass, and gradients for a larger set of weights."""

import dataclasses

import jax
import jax.numpy as jnp

from t5x_sparsity.algorithms.common import Masks, choose, magnitudes, scheduled_kept
from t5x_sparsity.algorithms.straight_through import UnderMask
from t5x_sparsity.core import packing
from t5x_sparsity.core.checks import check_not_negative
from t5x_sparsity.core.contract import DENSE, Arrays, Need, Plan, Slots, Update
from t5x_sparsity.core.schedules import Constant, UpdateSchedule, ValueSchedule
from t5x_sparsity.core.stacking import pack_stacked

_BACKWARD = "backward"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopKAST(UnderMask):
    """Always-sparse training (Jayakumar et al. 2021, arXiv:2106.03517, section 2).

    The forward pass uses A, the weights of largest |w| at the target level; gradients go to B, the
    largest at a lower level, so that weights of B may enter A. A penalty is added to the loss:
    regularizer w^2 / 2 on A, and regularizer w^2 / (2 density) on B without A, which makes it
    harder for weights outside A to enter it. It is the L2 form of the paper's penalty, whose
    formula has |w|. The last update sets B to A: exploration ends. Weights outside B get no
    gradient, but the optimizer's momentum and weight decay still change them.

    >>> import t5x_sparsity as ts
    >>> algorithm = TopKAST(updates=ts.Periodic(begin=0, end=0.75, period=100, total_steps=5000))

    Attributes:
      updates: when A and B are recomputed.
      backward: the share of each layer's target sparsity that B has, in [0, 1], over the progress
        of updates. 0.625 of a sparsity of 0.8 is 0.5.
      regularizer: strength of the penalty, at least 0.

    Raises:
      ValueError: a negative regularizer.
    """

    updates: UpdateSchedule
    backward: ValueSchedule = Constant(value=0.625)
    regularizer: float = 1e-4

    dense_gradients = Need.NEVER

    def __post_init__(self) -> None:
        check_not_negative("regularizer (REGULARIZER)", self.regularizer)

    def initial_masks(self, plan: Plan, weights: Arrays, key: jax.Array | None) -> Masks:
        return choose(plan, magnitudes(plan, weights))

    def initial_slots(self, plan: Plan, weights: Arrays, masks: Arrays) -> dict[str, Arrays]:
        chosen = self._backward(plan, weights, masks, jnp.float32(0))
        return {**super().initial_slots(plan, weights, masks), _BACKWARD: chosen}

    def _backward(
        self, plan: Plan, weights: Arrays, masks: Arrays, progress: jax.Array
    ) -> dict[str, jax.Array]:
        """B, stored as masks are."""
        share = jnp.where(progress >= 1, jnp.float32(1), self.backward(progress))
        chosen = choose(plan, magnitudes(plan, weights), scheduled_kept(plan, share), keep=masks)
        return pack_stacked(plan, chosen)

    def update_masks(self, plan: Plan, update: Update) -> Masks:
        return choose(plan, magnitudes(plan, update.weights))

    def update_slots(self, plan: Plan, update: Update) -> Slots:
        progress = self.updates.progress(update.step)
        chosen = self._backward(plan, update.weights, update.masks, progress)
        return {DENSE: update.slots[DENSE], _BACKWARD: chosen}

    def densities(self, density: float, step: int) -> tuple[float, float]:
        progress = self.updates.progress(step)
        share = 1.0 if progress >= 1 else float(self.backward(progress))
        return density, 1 - share * (1 - density)

    def gradients(self, plan: Plan, update: Update) -> dict[str, jax.Array]:
        found = {}
        for path, g in update.grads.items():
            w, mask = update.weights[path].astype(g.dtype), update.masks[path]
            density = max(1 - plan[path].level, 1 / plan[path].units)
            penalty = self.regularizer * jnp.where(mask, w, w / density)
            explored = packing.unpack(update.slots[_BACKWARD][path], g.shape)
            found[path] = jnp.where(explored, g + penalty, jnp.zeros((), g.dtype))
        return found
