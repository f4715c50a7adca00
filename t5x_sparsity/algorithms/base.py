"""The contract of an algorithm, and the pieces that several share.

An algorithm is a frozen dataclass of configuration with two pure functions: which masks a run
starts with, and what they become at an update step. Both see all sparse weights at once, as dicts
keyed by path, so that a global method is as easy as a per-layer one and all weights share one
search.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from t5x_sparsity.patterns import Choice, select_masks
from t5x_sparsity.plan import Plan
from t5x_sparsity.schedules import UpdateSchedule

Arrays = Mapping[str, jax.Array]


class Update(NamedTuple):
    """What an algorithm may look at when it updates masks; all dicts hold the sparse weights only.

    Attributes:
      step: int32 scalar, the train step.
      weights: after this step's gradient step, if it takes one.
      grads: dense gradients of the loss at the weights that the forward pass used.
      masks: bool, the weights' shapes; True where kept.
      key: a threefry key of this step's own.
    """

    step: jax.Array
    weights: Arrays
    grads: Arrays
    masks: Arrays
    key: jax.Array


class Algorithm(Protocol):
    """The contract of an algorithm.

    Attributes:
      updates: when masks change.
      masks_gradients: whether the base optimizer sees gradients of pruned weights as 0.
      replaces_gradient_step: whether an update step changes masks instead of weights.
      grows: whether an update may bring weights back; their optimizer slots are then zeroed.
    """

    updates: UpdateSchedule
    masks_gradients: bool
    replaces_gradient_step: bool
    grows: bool

    def initial_masks(self, plan: Plan, weights: Arrays, key: jax.Array) -> dict[str, jax.Array]:
        """The masks a run starts with: bool, the weights' shapes."""

    def update_masks(self, plan: Plan, update: Update) -> dict[str, jax.Array]:
        """The masks after an update step."""


def dense_masks(plan: Plan) -> dict[str, jax.Array]:
    """Masks that keep everything."""
    return {path: jnp.ones(layer.shape, bool) for path, layer in plan.items()}


def random_masks(plan: Plan, key: jax.Array) -> dict[str, jax.Array]:
    """Uniformly random masks at the target level, exact per slice."""
    return choose(plan, random_scores(plan, key))


def random_scores(plan: Plan, key: jax.Array) -> dict[str, jax.Array]:
    """Independent uniform float32 scores, a stream a weight, the same on every mesh.

    A weight's stream depends on its path, so that it doesn't change when other weights come or go.
    """
    return {
        path: jax.random.uniform(
            jax.random.fold_in(key, zlib.crc32(path.encode())), layer.shape, jnp.float32
        )
        for path, layer in plan.items()
    }


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
    return select_masks(
        {
            path: Choice(
                pattern=layer.pattern.relaxed if relaxed else layer.pattern,
                scores=scores[path],
                k=layer.kept if k is None else k[path],
                stack_axes=layer.stack_axes,
                where=None if where is None else where[path],
                keep=None if keep is None else keep[path],
                alike=layer.axes,
            )
            for path, layer in plan.items()
        }
    )


def magnitudes(arrays: Arrays) -> dict[str, jax.Array]:
    """|x| of every array."""
    return {path: jnp.abs(x) for path, x in arrays.items()}


def scheduled_kept(plan: Plan, share: jax.Array) -> dict[str, jax.Array]:
    """Weights kept per slice when `share` of each layer's target sparsity is reached.

    Exact at share 0 (all) and 1 (the target), however large the layer.
    """
    kept = {}
    for path, layer in plan.items():
        pruned = layer.slice_size - layer.kept
        now = jnp.round(jnp.float32(pruned) * share).astype(jnp.int32)
        kept[path] = layer.slice_size - jnp.where(share >= 1, jnp.int32(pruned), now)
    return kept
