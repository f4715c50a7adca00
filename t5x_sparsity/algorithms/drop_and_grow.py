"""Sparse from the start to the end: drop the smallest weights, grow others elsewhere."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from t5x_sparsity.algorithms.common import (
    Masks,
    choose,
    grown,
    magnitudes,
    random_scores,
    start_scores,
)
from t5x_sparsity.core.checks import check_not_negative, check_share
from t5x_sparsity.core.contract import Algorithm, Arrays, Need, Plan, Slots, Update
from t5x_sparsity.core.schedules import Cosine, UpdateSchedule, ValueSchedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class DropAndGrow(Algorithm):
    """An update drops a fraction of the active weights, and grows the same number of others.

    The active weights of smallest drop score are dropped, and the others of largest grow score are
    grown. A weight that has just been dropped may grow again, and then keeps its value. Others
    start at 0, with zeroed optimizer slots.

    Attributes:
      updates: when masks change.
      drop_fraction: the share of active weights that is swapped, in [0, 1], over the progress of
        updates.
      take_gradient_step: whether an update step takes its gradient step too; if not, the mask
        update replaces it.
    """

    updates: UpdateSchedule
    drop_fraction: ValueSchedule = Cosine(initial=0.3)
    take_gradient_step: bool = True

    masks_gradients = True

    @property
    def replaces_gradient_step(self) -> bool:  # type: ignore[override]  # nobody writes to it
        return not self.take_gradient_step

    def initial_masks(self, plan: Plan, weights: Arrays, key: jax.Array | None) -> Masks:
        """Masks at the target level: random, or of the largest trained weights."""
        return choose(plan, start_scores(plan, weights, key))

    def drop_scores(self, plan: Plan, update: Update) -> dict[str, jax.Array]:
        """float, the weights' shapes: the smallest of active weights are dropped. Here |w|."""
        return magnitudes(plan, update.weights)

    def grow_scores(self, plan: Plan, update: Update) -> dict[str, jax.Array]:
        """float, the weights' shapes: the largest of the others are grown. Here random."""
        return random_scores(plan, update.key)

    def update_masks(self, plan: Plan, update: Update) -> Masks:
        kept = {path: layer.kept for path, layer in plan.items()}
        fraction = self.drop_fraction(self.updates.progress(update.step))
        drop, grow = self.drop_scores(plan, update), self.grow_scores(plan, update)
        return swap(plan, update.masks, kept, fraction, drop, grow)

    def resets(self, before: Arrays, after: Arrays) -> dict[str, jax.Array]:
        return grown(before, after)


def swap(
    plan: Plan,
    masks: Arrays,
    kept: Mapping[str, int | jax.Array],
    fraction: jax.Array,
    drop_scores: Arrays,
    grow_scores: Arrays,
) -> Masks:
    """Drops `fraction` of the `kept` active units of every slice, and grows the same number."""
    left = {p: kept[p] - jnp.round(fraction * jnp.float32(kept[p])).astype(jnp.int32) for p in plan}
    stay = choose(plan, drop_scores, left, where=masks, relaxed=True)
    return choose(plan, grow_scores, kept, keep=stay)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RigL(DropAndGrow):
    """Grows where the gradient is largest (Evci et al. 2020, arXiv:1911.11134, section 3).

    A mask update replaces the gradient step (Algorithm 1). The authors' code adds noise of 1e-5 to
    |w| to break ties; here the lower index is kept.

    >>> import t5x_sparsity as ts
    >>> updates = ts.Periodic(begin=100, end=0.75, period=100, total_steps=10_000)
    >>> algorithm = RigL(updates=updates, drop_fraction=ts.Cosine(initial=0.3))
    """

    take_gradient_step: bool = False

    dense_gradients = Need.AT_UPDATES

    def grow_scores(self, plan: Plan, update: Update) -> dict[str, jax.Array]:
        return magnitudes(plan, update.grads)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SET(DropAndGrow):
    """Grows at random (Mocanu et al. 2018, arXiv:1707.04780, Algorithm 1).

    The paper prunes a fixed fraction of the smallest positive and the largest negative weights at
    every epoch. Here, as in later work, the smallest |w| are dropped at the schedule's steps.
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class SNFS(DropAndGrow):
    """Sparse networks from scratch: grows where the momentum of the gradient is largest.

    Dettmers & Zettlemoyer 2019, arXiv:1907.04840, section 3. m <- momentum m + (1 - momentum) g is
    stored dense, one float32 per weight, separately from the optimizer's momentum. The paper also
    moves weights between layers, by their mean momentum. Here, as in RigL's comparison, the number
    of weights of each layer is constant.

    Attributes:
      momentum: of the running mean, in [0, 1).

    Raises:
      ValueError: a momentum out of range.
    """

    momentum: float = 0.9

    dense_gradients = Need.ALWAYS

    def __post_init__(self) -> None:
        check_share("momentum (MOMENTUM)", self.momentum, closed=False)

    def initial_slots(self, plan: Plan, weights: Arrays, masks: Arrays) -> dict[str, Arrays]:
        return {"momentum": {p: jnp.zeros(x.shape, jnp.float32) for p, x in plan.items()}}

    def observe(self, plan: Plan, update: Update) -> Slots:
        def moved(mean: jax.Array, grad: jax.Array) -> jax.Array:
            grad = grad.astype(jnp.float32)
            # a single gradient that is not finite would stay in the mean forever
            grad = jnp.where(jnp.isfinite(grad), grad, mean)
            return self.momentum * mean + (1 - self.momentum) * grad

        mean = update.slots["momentum"]
        return {"momentum": {p: moved(mean[p], update.grads[p]) for p in plan}}

    def grow_scores(self, plan: Plan, update: Update) -> dict[str, jax.Array]:
        return magnitudes(plan, update.slots["momentum"])


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
