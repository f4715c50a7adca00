"""SRigL: RigL with a constant fan-in, and neurons that may go altogether."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from t5x_sparsity.algorithms.common import choices, magnitudes, require_pattern
from t5x_sparsity.algorithms.drop_and_grow import RigL
from t5x_sparsity.core.contract import Arrays, Plan, Update
from t5x_sparsity.core.patterns import ConstantFanIn, Unstructured
from t5x_sparsity.core.selection import select_masks
from t5x_sparsity.core.topk import top_k_mask


@dataclasses.dataclass(frozen=True, kw_only=True)
class SRigL(RigL):
    """Structured RigL (Lasby et al. 2023, arXiv:2305.02299, section 3).

    At an update, K active weights are to be swapped in a layer. A weight is salient if its |w| is
    among those that stay or its |g| among the K largest. Neurons with fewer salient weights than
    `ablation_threshold` times their fan-in are ablated: they lose all weights. The layer's weights
    are shared evenly by the other neurons, rounded down, and each drops by |w| and grows by |g| to
    that fan-in. An ablated neuron comes back once enough of its gradients are salient. Every
    weight's pattern must be ConstantFanIn. A neuron left with more than its share keeps the largest
    |w|, where the authors' code takes any. As in that code, an update takes its gradient step too.

    Attributes:
      ablation_threshold: gamma of the paper, in [0, 1]; 0 ablates no neuron. The authors use 0.3
        for convolutions and 0.95 for transformers.
    """

    ablation_threshold: float = 0.95
    take_gradient_step: bool = True

    def __post_init__(self):
        if not 0 <= self.ablation_threshold <= 1:
            raise ValueError(
                f"ablation_threshold (ABLATION_THRESHOLD) must be in [0, 1], got "
                f"{self.ablation_threshold!r}"
            )

    def initial_masks(
        self, plan: Plan, weights: Arrays, key: jax.Array | None
    ) -> dict[str, jax.Array]:
        require_pattern(self, plan, ConstantFanIn)
        return super().initial_masks(plan, weights, key)

    def update_masks(self, plan: Plan, update: Update) -> dict[str, jax.Array]:
        fraction = self.drop_fraction(self.updates.progress(update.step))
        size, slope = magnitudes(plan, update.weights), magnitudes(plan, update.grads)
        active = {p: _count(update.masks[p], _free(layer)) for p, layer in plan.items()}
        swapped = {
            p: jnp.round(fraction * jnp.float32(n)).astype(jnp.int32) for p, n in active.items()
        }
        left = {p: active[p] - swapped[p] for p in plan}
        stay = self._of_layer(plan, size, left, update.masks)
        steep = self._of_layer(plan, slope, swapped, None)
        share = {p: self._fan_in(plan[p], stay[p] | steep[p]) for p in plan}
        kept = self._of_neurons(plan, size, share, where=stay)
        return self._of_neurons(plan, slope, share, keep=kept)

    def _of_layer(self, plan: Plan, scores: Arrays, k: Arrays, where: Arrays | None) -> Arrays:
        asked = choices(plan, scores, k, where=where)
        return select_masks({p: c._replace(pattern=Unstructured()) for p, c in asked.items()})

    def _of_neurons(self, plan: Plan, scores: Arrays, share: Arrays, **which: Arrays) -> Arrays:
        asked = choices(plan, scores, share, **which)
        return select_masks(
            {
                p: c._replace(
                    pattern=Unstructured(),
                    stack_axes=tuple(sorted((*c.stack_axes, _neurons(plan[p])))),
                )
                for p, c in asked.items()
            }
        )

    def _fan_in(self, layer, salient: jax.Array) -> jax.Array:
        """Weights that every neuron is to have: int32, of the stacked dims and the neurons."""
        neurons, free = _neurons(layer), _free(layer)
        number, dense_fan_in = layer.shape[neurons], layer.units // layer.shape[neurons]
        fan_in = layer.kept // number
        found = _count(salient, [a for a in free if a != neurons])
        if not self.ablation_threshold or not fan_in:
            return jnp.full(found.shape, fan_in, jnp.int32)
        axis = sum(a < neurons for a in layer.stack_axes)  # of the neurons among the stacked dims
        others = [a for a in range(found.ndim) if a != axis]
        # the neurons that stay must be able to hold the layer's weights
        needed = top_k_mask(
            found.astype(jnp.float32), -(-layer.kept // dense_fan_in), stack_axes=others
        )
        alive = needed | (found >= max(1, int(self.ablation_threshold * fan_in)))
        number = jnp.sum(alive, axis=axis, keepdims=True, dtype=jnp.int32)
        return jnp.where(alive, jnp.minimum(layer.kept // number, dense_fan_in), 0)


def _free(layer) -> list[int]:
    return [a for a in range(len(layer.shape)) if a not in layer.stack_axes]


def _neurons(layer) -> int:
    """The axis of the output neurons."""
    return _free(layer)[-1]


def _count(mask: jax.Array, axes: list[int]) -> jax.Array:
    return jnp.sum(mask, axis=tuple(axes), dtype=jnp.int32)
