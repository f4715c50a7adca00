"""The contract of an algorithm, and the pieces that several share.

An algorithm is a frozen dataclass of configuration with pure functions: which masks a run starts
with, what they become at an update step and, for the few that need it, what they remember, which
gradients the optimizer sees and which weights the forward pass. All see all of the algorithm's
weights at once, as dicts keyed by path, so that a global method is as easy as a per-layer one and
all weights share one search.
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
from t5x_sparsity.core.patterns import Pattern
from t5x_sparsity.core.schedules import UpdateSchedule

Arrays = Mapping[str, jax.Array]
Slots = Mapping[str, Arrays]

# The name of the slot that holds dense weights under a mask: the optimizer updates these.
DENSE = "dense"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """What is done to one weight.

    Attributes:
      path: keys to the weight, joined by '/'.
      shape: of the whole weight, stacked axes included.
      axes: logical axis names, None where unknown.
      stack_axes: axes along which slices (layers, experts) are sparsified apart.
      pattern: the shape its zeros come in.
      sparsity: target level of every slice, in [0, 1].
      pack_axis: axis its mask is packed along, None for a byte a weight.
      algorithm: what decides on its mask; None where a plan is used without one.
      in_budget: whether its level is a share of the run's, and not one of its own.
    """

    path: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...] | None
    stack_axes: tuple[int, ...]
    pattern: Pattern
    sparsity: float
    pack_axis: int | None
    algorithm: Algorithm | None = None
    in_budget: bool = False

    @property
    def slice_shape(self) -> tuple[int, ...]:
        return tuple(n for a, n in enumerate(self.shape) if a not in self.stack_axes)

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """`slice_shape`, with heads and their width as the one dim they are to a matrix product."""
        free = [a for a in range(len(self.shape)) if a not in self.stack_axes]
        names = [self.axes[a] if a < len(self.axes or ()) else None for a in free]
        dims = list(self.slice_shape)
        for i in reversed(range(len(dims) - 1)):
            if names[i : i + 2] == ["heads", "kv"]:
                dims[i : i + 2] = [dims[i] * dims[i + 1]]
        return tuple(dims)

    @property
    def output_axes(self) -> tuple[int, ...]:
        """The axes of the whole weight that tell its output neurons apart: the last, or two."""
        return matrix_axes(len(self.shape), self.stack_axes, self.axes).outputs

    @property
    def slice_size(self) -> int:
        return math.prod(self.slice_shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def slices(self) -> int:
        return math.prod(self.shape[a] for a in self.stack_axes)

    @property
    def units(self) -> int:
        """Units of a slice: weights, or what the pattern prunes together."""
        return self.pattern.units(self.slice_shape)

    @property
    def kept(self) -> int:
        """Units of a slice that the target level keeps."""
        return self.pattern.kept(self.slice_shape, self.sparsity)

    @property
    def level(self) -> float:
        """The sparsity that `kept` comes to, in [0, 1]."""
        return 1 - self.kept / self.units

    @property
    def mask_shape(self) -> tuple[int, ...]:
        return packed_shape(self.shape, self.pack_axis)


Plan = Mapping[str, LayerPlan]


class Update(NamedTuple):
    """What an algorithm may look at in a train step; all dicts hold its own sparse weights only.

    Attributes:
      step: int32 scalar, the train step.
      weights: as the optimizer has them; at a mask update after this step's gradient step, if it
        takes one. Weights that a mask prunes need not be 0 here.
      grads: dense gradients of the loss at `forward_weights`.
      masks: bool, the weights' shapes; True where kept.
      key: a threefry key of this step's own.
      forward_weights: those that the forward pass used.
      slots: what the algorithm remembers: name -> path -> array, as `initial_slots` laid it out.
      optimizer_state: the base optimizer's, a pytree, as of `weights`.
      paths: of all weights of the model, other algorithms' and dense ones too.
    """

    step: jax.Array
    weights: Arrays
    grads: Arrays
    masks: Arrays
    key: jax.Array
    forward_weights: Arrays | None = None
    slots: Slots = {}
    optimizer_state: Any = None
    paths: tuple[str, ...] = ()


class Need(enum.Enum):
    """When gradients of pruned weights must be computed, for the count of FLOPs."""

    NEVER = "no"
    AT_UPDATES = "at updates"
    ALWAYS = "always"


class Algorithm:
    """The contract of an algorithm. The defaults are those of a mask that starts, and stays, dense.

    A new one is a frozen dataclass that derives from this, with `updates` and `update_masks`.

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

        key is None where the weights are trained ones, of a dense checkpoint; an algorithm that
        starts with random masks then starts with those of the largest weights (`start_scores`).
        """
        del weights, key
        return dense_masks(plan)

    def update_masks(self, plan: Plan, update: Update) -> dict[str, jax.Array]:
        """The masks after an update step."""
        del plan
        return dict(update.masks)

    def initial_slots(self, plan: Plan, weights: Arrays, masks: Arrays) -> dict[str, Arrays]:
        """Arrays to remember, by name and path; each of its weight's shape or of its stored mask's.

        A slot named 'dense' holds weights that live on under the mask: the optimizer updates them,
        and the model sees what `forward` makes of them.
        """
        del plan, weights, masks
        return {}

    def observe(self, plan: Plan, update: Update) -> Slots:
        """The slots after the gradients of any step are known, before the gradient step."""
        del plan
        return update.slots

    def gradients(self, plan: Plan, update: Update) -> Arrays:
        """The gradients that the optimizer sees."""
        del plan
        if not self.masks_gradients:
            return update.grads
        return prune(update.grads, update.masks)

    def update_slots(self, plan: Plan, update: Update) -> Slots:
        """The slots after a mask update; update.masks are the new ones."""
        del plan
        return update.slots

    def resets(self, before: Arrays, after: Arrays) -> dict[str, jax.Array]:
        """Of which weights a mask update zeroes the optimizer's slots: bool, by path."""
        del before, after
        return {}

    def forward(
        self, plan: Plan, weights: Arrays, masks: Arrays, step: jax.Array
    ) -> dict[str, jax.Array]:
        """The weights that the model sees at `step`: pruned ones are exactly 0."""
        del plan, step
        return prune(weights, masks)

    def mask_densities(self, plan: Plan, updated: int | None) -> dict[str, float]:
        """The share of each weight that its mask keeps after the update at step `updated`.

        It is what FLOPs, target metrics and warnings of ramps go by; an algorithm whose level
        changes over a run overrides it, next to `update_masks`. Here the target level throughout.
        Of neurons or layers that share a number by their scores, it is the even share.

        Args:
          plan: of the weights that this algorithm decides on.
          updated: the step of the last update, on the host; None before the first.

        Returns:
          path -> a Python float in [0, 1].
        """
        del updated
        return {path: 1 - layer.level for path, layer in plan.items()}

    def densities(self, density: float, step: int) -> tuple[float, float]:
        """The shares of a weight's entries that a train step computes with, each in [0, 1].

        Args:
          density: the share that the mask keeps.
          step: the train step, on the host.

        Returns:
          That of the forward pass, and that of the weight's own gradient.
        """
        needed = self.dense_gradients is Need.ALWAYS or (
            self.dense_gradients is Need.AT_UPDATES and bool(self.updates.is_update(step))
        )
        return density, 1.0 if needed else density


def prune(arrays: Arrays, masks: Arrays) -> dict[str, jax.Array]:
    """The arrays with 0 where the mask prunes; a product would keep NaN alive."""
    return {p: jnp.where(masks[p], x, jnp.zeros((), x.dtype)) for p, x in arrays.items()}


def dense_masks(plan: Plan) -> dict[str, jax.Array]:
    """Masks that keep everything."""
    return {path: jnp.ones(layer.shape, bool) for path, layer in plan.items()}
