"""AC/DC: alternating sparse and dense phases."""

import dataclasses

import jax
import jax.numpy as jnp

from t5x_sparsity.algorithms.common import Masks, choose, grown, magnitudes
from t5x_sparsity.core.contract import Algorithm, Arrays, Need, Plan, Update
from t5x_sparsity.core.schedules import Periodic, StepValue


@dataclasses.dataclass(frozen=True, kw_only=True)
class ACDC(Algorithm):
    """Alternating compressed and decompressed training (Peste et al. 2021, arXiv:2106.12379).

    Dense until the first update, which keeps the weights of largest |w|. At the next update all
    weights come back, at 0, and so on alternately. The last update always begins a sparse phase,
    which ends the run (Algorithm 1). The authors' code prunes by one threshold over all layers;
    here each layer has its target.

    >>> import t5x_sparsity as ts
    >>> phases = ts.Periodic(begin=100, end=900, period=200)
    >>> algorithm = ACDC(updates=phases)

    Attributes:
      updates: `begin` ends the dense warm-up, `period` is the length of a phase, `end` begins the
        last sparse phase.
      reset_optimizer: whether the optimizer's slots of all sparse weights are zeroed when weights
        come back, as the authors do with SGD. Adam's step count is not reset: see `AdamFisher`.

    Raises:
      ValueError: updates that are not Periodic.
    """

    updates: Periodic
    reset_optimizer: bool = False

    masks_gradients = True
    dense_gradients = Need.NEVER  # a dense phase has no pruned weights

    def __post_init__(self) -> None:
        if not isinstance(self.updates, Periodic):
            raise ValueError(
                f"ACDC.updates must be Periodic, whose period is the length of a phase, got "
                f"{self.updates!r}"
            )

    def update_masks(self, plan: Plan, update: Update) -> Masks:
        dense = self._begins_dense_phase(update.step)
        sparse = choose(plan, magnitudes(plan, update.weights), where=update.masks)
        return {p: mask | dense for p, mask in sparse.items()}

    def mask_densities(self, plan: Plan, updated: int | None) -> dict[str, float]:
        if updated is None or self._begins_dense_phase(updated):
            return dict.fromkeys(plan, 1.0)
        return super().mask_densities(plan, updated)

    def _begins_dense_phase(self, step: StepValue) -> bool | jax.Array:
        """Whether the update at `step` brings all weights back."""
        phase = (step - self.updates.begin) // self.updates.period
        return (phase % 2 == 1) & (step != self.updates.end)

    def resets(self, before: Arrays, after: Arrays) -> dict[str, jax.Array]:
        if not self.reset_optimizer:
            return {}
        back = grown(before, after)
        return {p: jnp.broadcast_to(jnp.any(x), x.shape) for p, x in back.items()}
