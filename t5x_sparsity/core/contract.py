"""The contract of an algorithm.

An algorithm is a frozen dataclass of configuration with pure functions. They say which masks a run
starts with and what an update makes of them. A few algorithms also say what they remember, which
gradients the optimizer sees, and which weights the forward pass sees. Each function gets all of the
algorithm's weights at once, as dicts by path, so that a global method is as easy to write as a
per-layer one and all weights share one search.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from t5x_sparsity.core.matrix_axes import matrix_axes
from t5x_sparsity.core.packing import packed_shape
from t5x_sparsity.core.patterns import Pattern, free_axes
from t5x_sparsity.core.schedules import StepValue, UpdateSchedule
from t5x_sparsity.core.trees import Arrays as Arrays

Slots = Mapping[str, Arrays]

DENSE = "dense"  # the slot of dense weights under a mask, see `Algorithm.initial_slots`


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """What is done to one weight.

    Attributes:
      path: keys to the weight, joined by '/'.
      shape: of the whole weight, stacked axes included.
      axes: logical axis names, None where unknown.
      stack_axes: axes along which slices (layers, experts) are sparsified separately.
      pattern: the shape that its zeros come in.
      sparsity: target level of every slice, in [0, 1].
      pack_axis: axis along which its mask is packed, None for one byte per weight.
      algorithm: what decides on its mask.
      in_budget: whether its level comes from the run's budget, not from a rule or its pattern.
    """

    path: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...] | None
    stack_axes: tuple[int, ...]
    pattern: Pattern
    sparsity: float
    pack_axis: int | None
    algorithm: Algorithm
    in_budget: bool = False

    @property
    def free_axes(self) -> list[int]:
        """The axes that are not stacked."""
        return free_axes(len(self.shape), self.stack_axes)

    @property
    def slice_shape(self) -> tuple[int, ...]:
        """The shape of one slice, in which masks are chosen: stacked axes are left out."""
        return tuple(self.shape[a] for a in self.free_axes)

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """`slice_shape` with heads and their width as one dim, as a matrix product has them."""
        axes = self.axes or ()
        names = [axes[a] if a < len(axes) else None for a in self.free_axes]
        dims = list(self.slice_shape)
        for i in reversed(range(len(dims) - 1)):
            if names[i : i + 2] == ["heads", "kv"]:
                dims[i : i + 2] = [dims[i] * dims[i + 1]]
        return tuple(dims)

    @property
    def output_axes(self) -> tuple[int, ...]:
        """The axes of the whole weight that index its output neurons: the last, or heads x kv."""
        return matrix_axes(len(self.shape), self.stack_axes, self.axes).outputs

    @property
    def slice_size(self) -> int:
        """Weights of a slice."""
        return math.prod(self.slice_shape)

    @property
    def size(self) -> int:
        """Weights in all."""
        return math.prod(self.shape)

    @property
    def slices(self) -> int:
        """How many slices there are."""
        return math.prod(self.shape[a] for a in self.stack_axes)

    @property
    def units(self) -> int:
        """Units of a slice: weights, or groups that the pattern prunes together."""
        return self.pattern.units(self.slice_shape)

    @property
    def kept(self) -> int:
        """Units of a slice that the target level keeps."""
        return self.pattern.kept(self.slice_shape, self.sparsity)

    @property
    def level(self) -> float:
        """The sparsity with exactly `kept` units, in [0, 1]; `sparsity` before rounding."""
        return 1 - self.kept / self.units

    @property
    def mask_shape(self) -> tuple[int, ...]:
        """The shape of the stored mask."""
        return packed_shape(self.shape, self.pack_axis)


Plan = Mapping[str, LayerPlan]


class Update(NamedTuple):
    """What an algorithm sees in a train step; all dicts hold its own sparse weights only.

    Attributes:
      step: int32 scalar, the train step.
      weights: as the optimizer has them: at a mask update, after this step's gradient step if there
        is one. Weights that a mask prunes need not be 0 here.
      grads: dense gradients of the loss at `forward_weights`.
      masks: bool, the weights' shapes.
      key: a threefry key, another one at every step.
      forward_weights: those that the forward pass used.
      slots: as from `Algorithm.initial_slots`.
      optimizer_state: the base optimizer's, a pytree, at the time of `weights`.
      paths: of all weights of the model, including other algorithms' and dense ones.
    """

    step: jax.Array
    weights: Arrays
    grads: Arrays
    masks: Arrays
    key: jax.Array
    forward_weights: Arrays = {}
    slots: Slots = {}
    optimizer_state: Any = None
    paths: tuple[str, ...] = ()


class Need(enum.Enum):
    """When gradients of pruned weights must be computed; FLOPs are counted by it."""

    NEVER = "no"
    AT_UPDATES = "at updates"
    ALWAYS = "always"


class Algorithm:
    """The contract of an algorithm. By default masks start, and stay, dense.

    A new algorithm is a frozen dataclass that derives from this, with `updates` and `update_masks`:

    >>> import dataclasses, jax, jax.numpy as jnp, optax, t5x_sparsity as ts
    >>> @dataclasses.dataclass(frozen=True, kw_only=True)
    ... class LargestMovement(ts.Algorithm):
    ...     '''Keeps the weights that grow: those of largest -w g.'''
    ...
    ...     updates: ts.OneShot
    ...     masks_gradients = True
    ...
    ...     def update_masks(self, plan, update):
    ...         scores = {p: -w * update.grads[p] for p, w in update.weights.items()}
    ...         return ts.algorithms.choose(plan, scores)
    >>> tx = ts.sparsify(optax.sgd(0.1), LargestMovement(updates=ts.OneShot(step=0)), sparsity=0.5)
    >>> params = {"w": jnp.array([[1.0, -2.0], [3.0, 4.0]])}
    >>> grads = {"w": jnp.array([[-1.0, -1.0], [1.0, -1.0]])}
    >>> updates, state = tx.update(grads, tx.init(params), params)
    >>> print(optax.apply_updates(params, updates)["w"])
    [[1.1 0. ]
     [0.  4.1]]

    Attributes:
      updates: when masks change.
      masks_gradients: whether the optimizer sees gradients of pruned weights as 0.
      replaces_gradient_step: whether an update step changes masks instead of weights.
      dense_gradients: when gradients of pruned weights must be computed.
      is_global: whether layers have no level of their own, only all of them together.
      is_dense: whether weights are left dense, and no mask is stored.
    """

    updates: UpdateSchedule  # no default here, or every algorithm would silently have it
    masks_gradients: bool = False
    replaces_gradient_step: bool = False
    dense_gradients: Need = Need.NEVER
    is_global: bool = False
    is_dense: bool = False

    def initial_masks(
        self, plan: Plan, weights: Arrays, key: jax.Array | None
    ) -> dict[str, jax.Array]:
        """The masks a run starts with: bool, the weights' shapes.

        key is None where the weights come from a trained, dense checkpoint. An algorithm that would
        start with random masks then keeps the largest weights (`start_scores`).
        """
        return dense_masks(plan)

    def update_masks(self, plan: Plan, update: Update) -> dict[str, jax.Array]:
        """The masks after an update step: bool, the weights' shapes."""
        return dict(update.masks)

    def initial_slots(self, plan: Plan, weights: Arrays, masks: Arrays) -> dict[str, Arrays]:
        """Arrays to remember: name -> path -> array, of the weight's or its stored mask's shape.

        A slot named 'dense' holds dense weights under the mask: the optimizer updates these, and
        the model sees what `forward` makes of them.
        """
        return {}

    def observe(self, plan: Plan, update: Update) -> Slots:
        """The slots after the gradients of a step, any step, and before its gradient step."""
        return update.slots

    def gradients(self, plan: Plan, update: Update) -> Arrays:
        """The gradients that the optimizer sees."""
        if not self.masks_gradients:
            return update.grads
        return prune(update.grads, update.masks)

    def update_slots(self, plan: Plan, update: Update) -> Slots:
        """The slots after a mask update; `update.masks` are the new ones."""
        return update.slots

    def resets(self, before: Arrays, after: Arrays) -> dict[str, jax.Array]:
        """Where a mask update zeroes the optimizer's slots: bool, by path, the weights' shapes.

        before, after: the masks before the update, and after it.
        """
        return {}

    def forward(
        self, plan: Plan, weights: Arrays, masks: Arrays, step: StepValue
    ) -> dict[str, jax.Array]:
        """The weights that the model sees at `step`: pruned ones are exactly 0."""
        return prune(weights, masks)

    def mask_densities(self, plan: Plan, updated: int | None) -> dict[str, float]:
        """The share of each weight that its mask keeps, by path: Python floats in [0, 1].

        FLOPs, target metrics and warnings about ramps are computed from it. An algorithm whose
        level changes over a run overrides it, next to `update_masks`; here it is the target level
        throughout. Where scores decide how neurons or layers share a number, it is the even share.

        updated: the step of the last update, on the host; None before the first.
        """
        return {path: 1 - layer.level for path, layer in plan.items()}

    def densities(self, density: float, step: int) -> tuple[float, float]:
        """The shares of a weight that the forward pass uses, and that its gradient is computed of.

        Args:
          density: the share that the mask keeps, in [0, 1] as are the results.
          step: the train step, on the host.
        """
        needed = self.dense_gradients is Need.ALWAYS or (
            self.dense_gradients is Need.AT_UPDATES and bool(self.updates.is_update(step))
        )
        return density, 1.0 if needed else density


def prune(arrays: Arrays, masks: Arrays) -> dict[str, jax.Array]:
    """The arrays with 0 where the mask prunes.

    >>> print(prune({"w": jnp.array([1.0, jnp.nan])}, {"w": jnp.array([True, False])})["w"])
    [1. 0.]
    """
    # not a product with the mask, which would keep NaN
    return {p: jnp.where(masks[p], x, jnp.zeros((), x.dtype)) for p, x in arrays.items()}


def dense_masks(plan: Plan) -> dict[str, jax.Array]:
    """Masks that keep everything."""
    return {path: jnp.ones(layer.shape, bool) for path, layer in plan.items()}
