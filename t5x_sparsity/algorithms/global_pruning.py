"""Pruning from dense to sparse with one threshold over all layers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from t5x_sparsity.algorithms.common import Masks, choose, scheduled_kept
from t5x_sparsity.algorithms.gradual import GradualPruning
from t5x_sparsity.algorithms.lamp import lamp_masks
from t5x_sparsity.algorithms.saliency import Saliency
from t5x_sparsity.core.contract import Arrays, LayerPlan, Plan, Update
from t5x_sparsity.core.exact_sums import ordered_sum
from t5x_sparsity.core.selection import select_jointly
from t5x_sparsity.core.stacking import map_stacked
from t5x_sparsity.core.topk import Count

NORMALIZATIONS = ("norm", "lamp", None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GlobalMagnitude(GradualPruning):
    """Magnitude pruning with one threshold over all weights of the shared budget.

    Weights whose rule gives them a level are pruned to it separately. Each slice of a stack is a
    layer.

    >>> import t5x_sparsity as ts
    >>> algorithm = GlobalMagnitude(updates=ts.OneShot(step=0), normalization="lamp")

    Attributes:
      normalization: how scores of layers are made comparable. 'norm' divides them by their L2 norm
        over the layer + 1e-8; 'lamp' uses LAMP scores instead (Lee et al. 2021, arXiv:2010.07611,
        section 3), which leave every layer at least one weight; None compares raw scores.

    Raises:
      ValueError: an unknown normalization.
    """

    normalization: str | None = "norm"

    is_global = True

    def __post_init__(self) -> None:
        if self.normalization not in NORMALIZATIONS:
            raise ValueError(
                f"normalization (NORMALIZATION) must be one of {NORMALIZATIONS}, got "
                f"{self.normalization!r}"
            )

    def update_masks(self, plan: Plan, update: Update) -> Masks:
        scores = map_stacked(plan, self._comparable, self.scores(plan, update), update.masks)
        share = self.level(self.updates.progress(update.step))
        kept = scheduled_kept(plan, share)
        own = {p: layer for p, layer in plan.items() if not layer.in_budget}
        joint = {p: layer for p, layer in plan.items() if layer.in_budget}
        found = choose(own, scores, kept, where=update.masks)
        search = lamp_masks if self.normalization == "lamp" else None
        select = functools.partial(select_jointly, k=_total_kept(joint, kept), search=search)
        return found | choose(joint, scores, kept, where=update.masks, select=select)

    def _comparable(self, layer: LayerPlan, scores: jax.Array, masks: jax.Array) -> jax.Array:
        """Scores of a stack of weights, comparable among layers; pruned weights count as 0."""
        scores = jnp.where(masks, scores, jnp.zeros((), scores.dtype))
        if self.normalization != "norm":
            return scores
        return jax.vmap(lambda x: _over_norm(x, layer))(scores)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GlobalSaliency(GlobalMagnitude, Saliency):
    """`Saliency` with one threshold over all weights.

    With a single update at the first step it is SNIP (Lee et al. 2018, arXiv:1810.02340,
    Algorithm 1), except for the division by the sum of all scores, which changes no mask.
    """

    def __post_init__(self) -> None:
        GlobalMagnitude.__post_init__(self)
        Saliency.__post_init__(self)


def _over_norm(scores: jax.Array, layer: LayerPlan) -> jax.Array:
    scores = scores.astype(jnp.float32)
    return scores / (jnp.sqrt(ordered_sum(jnp.square(scores), layer.free_axes)) + 1e-8)


def _total_kept(plan: Plan, kept: Arrays) -> Count:
    """Kept weights of all slices together."""
    total = Count.of(0)
    for path, layer in plan.items():
        size, rest = divmod(layer.slice_size, layer.units)
        weights = kept[path] * size
        if rest:  # blocks at the edge of a weight are smaller
            share = jnp.float32(kept[path]) / layer.units
            weights = jnp.round(share * layer.slice_size).astype(jnp.int32)
        total = total + Count.of(weights).times(layer.slices)
    return total
