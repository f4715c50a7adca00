"""SRigL: RigL with a constant fan-in, which may ablate whole neurons."""

import dataclasses

import jax
import jax.numpy as jnp

from t5x_sparsity.algorithms.common import Masks, choose, magnitudes, pattern_of_each
from t5x_sparsity.algorithms.drop_and_grow import RigL
from t5x_sparsity.core.checks import check_share
from t5x_sparsity.core.contract import Arrays, LayerPlan, Plan, Update
from t5x_sparsity.core.patterns import ConstantFanIn, Unstructured
from t5x_sparsity.core.topk import top_k_mask


@dataclasses.dataclass(frozen=True, kw_only=True)
class SRigL(RigL):
    """Structured RigL (Lasby et al. 2023, arXiv:2305.02299, section 3).

    An update swaps K active weights of a layer. A weight is salient if its |w| is among those that
    stay or its |g| among the K largest. Neurons with fewer salient weights than
    `ablation_threshold` times their fan-in are ablated: they lose all weights. The other neurons
    share the layer's weights evenly, rounded down, and each drops by |w| and grows by |g| to that
    fan-in. An ablated neuron comes back once enough of its gradients are salient. A neuron left
    with more than its share keeps the largest |w|, where the authors' code keeps any. As in that
    code, an update takes its gradient step too. Every weight's pattern must be ConstantFanIn.

    Attributes:
      ablation_threshold: gamma of the paper, in [0, 1]; 0 ablates no neuron. The authors use 0.3
        for convolutions and 0.95 for transformers.

    Raises:
      ValueError: an ablation_threshold out of range.
    """

    ablation_threshold: float = 0.95
    take_gradient_step: bool = True

    def __post_init__(self) -> None:
        check_share("ablation_threshold (ABLATION_THRESHOLD)", self.ablation_threshold)

    def initial_masks(self, plan: Plan, weights: Arrays, key: jax.Array | None) -> Masks:
        pattern_of_each(self, plan, ConstantFanIn)
        return super().initial_masks(plan, weights, key)

    def update_masks(self, plan: Plan, update: Update) -> Masks:
        fraction = self.drop_fraction(self.updates.progress(update.step))
        size, slope = magnitudes(plan, update.weights), magnitudes(plan, update.grads)
        active = {p: _count(update.masks[p], layer.free_axes) for p, layer in plan.items()}
        swapped = {
            p: jnp.round(fraction * jnp.float32(n)).astype(jnp.int32) for p, n in active.items()
        }
        left = {p: active[p] - swapped[p] for p in plan}
        by_layer = {p: _unstructured(layer, layer.stack_axes) for p, layer in plan.items()}
        stay = choose(by_layer, size, left, where=update.masks)
        steep = choose(by_layer, slope, swapped)
        share = {p: self._fan_in(plan[p], stay[p] | steep[p]) for p in plan}
        by_neuron = {
            p: _unstructured(layer, (*layer.stack_axes, _neurons(layer)))
            for p, layer in plan.items()
        }
        kept = choose(by_neuron, size, share, where=stay)
        return choose(by_neuron, slope, share, keep=kept)

    def _fan_in(self, layer: LayerPlan, salient: jax.Array) -> jax.Array:
        """The weights that every neuron gets: int32, of the stacked dims and the neurons."""
        neurons, free = _neurons(layer), layer.free_axes
        number, dense_fan_in = layer.shape[neurons], layer.units // layer.shape[neurons]
        fan_in = layer.kept // number
        found = _count(salient, [a for a in free if a != neurons])
        if not self.ablation_threshold or not fan_in:
            return jnp.full(found.shape, fan_in, jnp.int32)
        axis = sum(a < neurons for a in layer.stack_axes)  # that of the neurons in `found`
        others = [a for a in range(found.ndim) if a != axis]
        # enough neurons must stay to hold the layer's weights
        needed = top_k_mask(
            found.astype(jnp.float32), -(-layer.kept // dense_fan_in), stack_axes=others
        )
        alive = needed | (found >= max(1, int(self.ablation_threshold * fan_in)))
        left = jnp.sum(alive, axis=axis, keepdims=True, dtype=jnp.int32)
        return jnp.where(alive, jnp.minimum(layer.kept // left, dense_fan_in), 0)


def _unstructured(layer: LayerPlan, stack_axes: tuple[int, ...]) -> LayerPlan:
    """The plan of the same weight, of which any may be kept, per slice along `stack_axes`."""
    return dataclasses.replace(layer, pattern=Unstructured(), stack_axes=tuple(sorted(stack_axes)))


def _neurons(layer: LayerPlan) -> int:
    """The axis of the output neurons."""
    return layer.free_axes[-1]


def _count(mask: jax.Array, axes: list[int]) -> jax.Array:
    return jnp.sum(mask, axis=tuple(axes), dtype=jnp.int32)
