"""Masks that prune gradually: pruned weights fade, or groups lose a few weights at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from t5x_sparsity.algorithms.common import Masks, choose, magnitudes, pattern_of_each
from t5x_sparsity.algorithms.straight_through import UnderMask
from t5x_sparsity.core.contract import Arrays, Need, Plan, Update, prune
from t5x_sparsity.core.patterns import NByM
from t5x_sparsity.core.schedules import (
    Polynomial,
    StepValue,
    UpdateSchedule,
    ValueSchedule,
    value_after,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecayingMask(UnderMask):
    """The forward pass uses w (M + d (1 - M)), where d decreases from 1 to 0.

    Kao et al. 2022, arXiv:2209.07617, section 3. M keeps the largest |w| at the target level, and
    is recomputed at every update; after the last, d is 0 and M stays. Gradients follow the chain
    rule, so that those of pruned weights fade with d, as in Google's code (aqt); with
    `straight_through` they don't, as in later code of the authors.

    >>> import t5x_sparsity as ts
    >>> algorithm = DecayingMask(updates=ts.Periodic(begin=0, end=500, period=50))

    Attributes:
      updates: when masks are recomputed.
      decay: d, in [0, 1], over the progress of updates.
      straight_through: whether pruned weights get their gradients in full.
    """

    updates: UpdateSchedule
    decay: ValueSchedule = Polynomial(initial=1.0, final=0.0, power=1.0)
    straight_through: bool = False

    def update_masks(self, plan: Plan, update: Update) -> Masks:
        return choose(plan, magnitudes(plan, update.weights))

    def mask_densities(self, plan: Plan, updated: int | None) -> dict[str, float]:
        if updated is None:
            return dict.fromkeys(plan, 1.0)
        return super().mask_densities(plan, updated)

    def gradients(self, plan: Plan, update: Update) -> Arrays:
        if self.straight_through:
            return update.grads
        return self._faded(update.grads, update.masks, update.step)

    def forward(
        self, plan: Plan, weights: Arrays, masks: Arrays, step: StepValue
    ) -> dict[str, jax.Array]:
        return self._faded(weights, masks, step)

    def densities(self, density: float, step: int) -> tuple[float, float]:
        if self.decay(self.updates.progress(step)) > 0:
            return 1.0, 1.0
        return density, 1.0 if self.straight_through else density

    def _faded(self, arrays: Arrays, masks: Arrays, step: StepValue) -> dict[str, jax.Array]:
        left = self.decay(self.updates.progress(step))

        def fade(x: jax.Array, mask: jax.Array) -> jax.Array:
            # at d = 0 no product, which would keep NaN
            faded = jnp.where(left > 0, x * left.astype(x.dtype), jnp.zeros((), x.dtype))
            return jnp.where(mask, x, faded)

        return {p: fade(x, masks[p]) for p, x in arrays.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StructureDecay(UnderMask):
    """The groups of N:M keep M-1 weights, then M/2, M/4, ..., N, in stages of equal length.

    Kao et al. 2022, arXiv:2209.07617, section 3, the structure-decay form. Weights that a group
    has lost may be kept again, by |w|, at later updates. They get no gradients, as in Google's code
    (aqt); with `straight_through` they do. Every weight's pattern must be NByM.

    Attributes:
      updates: when masks are recomputed.
      straight_through: whether pruned weights get gradients.
    """

    updates: UpdateSchedule
    straight_through: bool = False

    @property
    def dense_gradients(self) -> Need:  # type: ignore[override]  # nobody writes to it
        return Need.ALWAYS if self.straight_through else Need.NEVER

    def initial_masks(self, plan: Plan, weights: Arrays, key: jax.Array | None) -> Masks:
        pattern_of_each(self, plan, NByM)
        return super().initial_masks(plan, weights, key)

    def update_masks(self, plan: Plan, update: Update) -> Masks:
        progress = self.updates.progress(update.step)
        kept = {
            path: _Stages(pattern)(progress) * (plan[path].units // pattern.m)
            for path, pattern in pattern_of_each(self, plan, NByM).items()
        }
        return choose(plan, magnitudes(plan, update.weights), kept)

    def mask_densities(self, plan: Plan, updated: int | None) -> dict[str, float]:
        if updated is None:
            return dict.fromkeys(plan, 1.0)
        return {
            path: value_after(_Stages(pattern), self.updates, updated) / pattern.m
            for path, pattern in pattern_of_each(self, plan, NByM).items()
        }

    def gradients(self, plan: Plan, update: Update) -> Arrays:
        return update.grads if self.straight_through else prune(update.grads, update.masks)


@dataclasses.dataclass(frozen=True)
class _Stages:
    """The weights that a group of `pattern` keeps, int32, over the progress of updates."""

    pattern: NByM

    def __call__(self, progress: jax.Array) -> jax.Array:
        kept = jnp.asarray(stages(self.pattern), jnp.int32)
        stage = jnp.minimum((progress * len(kept)).astype(jnp.int32), len(kept) - 1)
        return kept[stage]


def stages(pattern: NByM) -> tuple[int, ...]:
    """Weights that a group keeps in each stage: M-1, then M/2, M/4, ..., and N.

    >>> stages(NByM(n=1, m=8))
    (7, 4, 2, 1)
    """
    halves = [pattern.m >> i for i in range(1, int(np.log2(pattern.m)) + 1)]
    between = [n for n in (pattern.m - 1, *halves) if n > pattern.n]
    return (*dict.fromkeys(between), pattern.n)
