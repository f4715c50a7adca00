"""The contract of an algorithm, and the pieces that several share.

An algorithm is a frozen dataclass of configuration with pure functions: which masks a run starts
with, what they become at an update step and, for the few that need it, what they remember, which
gradients the optimizer sees and which weights the forward pass. All see all of the algorithm's
weights at once, as dicts keyed by path, so that a global method is as easy as a per-layer one and
all weights share one search.
"""

from __future__ import annotations

import enum
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from t5x_sparsity.alike import map_alike
from t5x_sparsity.patterns import Pattern
from t5x_sparsity.plan import LayerPlan, Plan
from t5x_sparsity.schedules import UpdateSchedule
from t5x_sparsity.selection import Choice, select_masks

Arrays = Mapping[str, jax.Array]
Slots = Mapping[str, Arrays]

# The name of the slot that holds dense weights under a mask: the optimizer updates these.
DENSE = "dense"


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


def grown(before: Arrays, after: Arrays) -> dict[str, jax.Array]:
    """The weights that an update has brought back."""
    return {p: after[p] & ~before[p] for p in after}


def prune(arrays: Arrays, masks: Arrays) -> dict[str, jax.Array]:
    """The arrays with 0 where the mask prunes; a product would keep NaN alive."""
    return {p: jnp.where(masks[p], x, jnp.zeros((), x.dtype)) for p, x in arrays.items()}


def dense_masks(plan: Plan) -> dict[str, jax.Array]:
    """Masks that keep everything."""
    return {path: jnp.ones(layer.shape, bool) for path, layer in plan.items()}


def start_scores(plan: Plan, weights: Arrays, key: jax.Array | None) -> dict[str, jax.Array]:
    """What a run that starts sparse keeps the largest of: chance, or |w| of trained weights."""
    return magnitudes(plan, weights) if key is None else random_scores(plan, key)


def random_scores(plan: Plan, key: jax.Array) -> dict[str, jax.Array]:
    """Independent uniform float32 scores, a stream a weight, the same on every mesh.

    A weight's stream depends on its path, so that it doesn't change when other weights come or go.
    """
    streams = {p: jnp.uint32(zlib.crc32(p.encode())) for p in plan}

    def draw(layer: LayerPlan, streams: jax.Array) -> jax.Array:
        def one(stream):
            return jax.random.uniform(jax.random.fold_in(key, stream), layer.shape, jnp.float32)

        return jax.vmap(one)(streams)

    return map_alike(plan, draw, streams)


def choose(
    plan: Plan,
    scores: Arrays,
    k: Mapping[str, int | jax.Array] | None = None,
    *,
    where: Arrays | None = None,
    keep: Arrays | None = None,
    relaxed: bool = False,
) -> dict[str, jax.Array]:
    """`select_masks` over a plan; k is a layer's target where it is not given.

    relaxed chooses by each pattern's relaxed form, which is how weights are dropped.
    """
    return select_masks(choices(plan, scores, k, where=where, keep=keep, relaxed=relaxed))


def choices(
    plan: Plan,
    scores: Arrays,
    k: Mapping[str, int | jax.Array] | None = None,
    *,
    where: Arrays | None = None,
    keep: Arrays | None = None,
    relaxed: bool = False,
) -> dict[str, Choice]:
    """Each weight's part in a selection; see `choose`."""

    def pattern_of(layer) -> Pattern:
        return layer.pattern.relaxed if relaxed else layer.pattern

    return {
        path: Choice(
            pattern=pattern_of(layer),
            scores=scores[path],
            k=layer.kept if k is None else k[path],
            stack_axes=layer.stack_axes,
            where=None if where is None else where[path],
            keep=None if keep is None else keep[path],
            alike=layer.axes,
        )
        for path, layer in plan.items()
    }


def require_pattern(algorithm: Algorithm, plan: Plan, pattern: type) -> None:
    """Raises ValueError unless every weight's pattern is of this class."""
    other = [p for p, layer in plan.items() if not isinstance(layer.pattern, pattern)]
    if other:
        name = pattern.__name__
        raise ValueError(
            f"{type(algorithm).__name__} needs the pattern {name}, but the weights {other} have "
            f"another; bind SparsityConfig.pattern, or their rule's, to @t5x_sparsity.{name}()"
        )


def magnitudes(plan: Plan, arrays: Arrays) -> dict[str, jax.Array]:
    """|x| of every weight's array."""
    return map_alike(plan, lambda _, x: jnp.abs(x), arrays)


def scheduled_kept(plan: Plan, share: jax.Array) -> dict[str, jax.Array]:
    """Units kept per slice when `share` of each layer's target sparsity is reached.

    Exact at share 0 (all) and 1 (the target), however large the layer.
    """
    kept = {}
    for path, layer in plan.items():
        pruned = layer.units - layer.kept
        now = jnp.round(jnp.float32(pruned) * share).astype(jnp.int32)
        kept[path] = layer.units - jnp.where(share >= 1, jnp.int32(pruned), now)
    return kept
