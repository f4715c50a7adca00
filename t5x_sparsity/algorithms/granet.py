"""GraNet: gradual pruning, with a swap of weights after every update."""

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp

from t5x_sparsity.algorithms.common import Masks, choose, magnitudes, scheduled_kept, start_scores
from t5x_sparsity.algorithms.drop_and_grow import DropAndGrow, swap
from t5x_sparsity.core.checks import check_share
from t5x_sparsity.core.contract import Arrays, Need, Plan, Update
from t5x_sparsity.core.schedules import Cosine, Polynomial, ValueSchedule, value_after

Number = TypeVar("Number", float, jax.Array)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraNet(DropAndGrow):
    """Prunes along a cubic ramp, then drops a fraction and regrows it where |g| is largest.

    Liu et al. 2021, arXiv:2106.10404, section 4. It starts at `initial_sparsity` of all weights,
    with every layer at the same share of its target. The authors' code prunes all layers with one
    threshold on |w|. Here each layer has its own target (their GraNet_uniform), because the weights
    of a transformer's layers differ in scale.

    Attributes:
      initial_sparsity: of all weights together at the start, in [0, 1].
      ramp: the share of the way from there to the target, in [0, 1], over the progress of updates.

    Raises:
      ValueError: an initial_sparsity out of range.
    """

    drop_fraction: ValueSchedule = Cosine(initial=0.5)
    initial_sparsity: float = 0.5
    ramp: ValueSchedule = Polynomial(initial=0.0, final=1.0, power=3.0)

    dense_gradients = Need.AT_UPDATES

    def __post_init__(self) -> None:
        check_share("initial_sparsity (INITIAL_SPARSITY)", self.initial_sparsity)

    def kept(self, plan: Plan, progress: jax.Array) -> dict[str, jax.Array]:
        """Units kept per slice, int32."""
        return scheduled_kept(plan, self._share(plan, self.ramp(progress)))

    def mask_densities(self, plan: Plan, updated: int | None) -> dict[str, float]:
        share = self._share(plan, value_after(self.ramp, self.updates, updated))
        return {p: 1 - layer.level * share for p, layer in plan.items()}

    def _share(self, plan: Plan, ramp: Number) -> Number:
        """The share of each layer's target sparsity at `ramp`, a float or an array."""
        total = sum(layer.size for layer in plan.values())
        target = sum(layer.level * layer.size for layer in plan.values()) / total
        start = min(1.0, self.initial_sparsity / target) if target else 1.0
        return start + (1 - start) * ramp

    def initial_masks(self, plan: Plan, weights: Arrays, key: jax.Array | None) -> Masks:
        return choose(plan, start_scores(plan, weights, key), self.kept(plan, jnp.float32(0)))

    def update_masks(self, plan: Plan, update: Update) -> Masks:
        progress = self.updates.progress(update.step)
        kept, size = self.kept(plan, progress), magnitudes(plan, update.weights)
        pruned = choose(plan, size, kept, where=update.masks)
        fraction = self.drop_fraction(progress)
        return swap(plan, pruned, kept, fraction, size, self.grow_scores(plan, update))

    def grow_scores(self, plan: Plan, update: Update) -> dict[str, jax.Array]:
        return magnitudes(plan, update.grads)
