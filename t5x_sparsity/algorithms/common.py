"""The pieces that several algorithms share: scores, choices, and how many units a ramp keeps."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from t5x_sparsity.core.contract import Algorithm, Arrays, LayerPlan, Plan
from t5x_sparsity.core.patterns import Pattern
from t5x_sparsity.core.selection import Choice, select_masks
from t5x_sparsity.core.stacking import map_stacked


def grown(before: Arrays, after: Arrays) -> dict[str, jax.Array]:
    """The weights that an update has brought back."""
    return {p: after[p] & ~before[p] for p in after}


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

    return map_stacked(plan, draw, streams)


def magnitudes(plan: Plan, arrays: Arrays) -> dict[str, jax.Array]:
    """|x| of every weight's array."""
    return map_stacked(plan, lambda _, x: jnp.abs(x), arrays)


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
            sharding=layer.axes,
        )
        for path, layer in plan.items()
    }


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


def require_pattern(algorithm: Algorithm, plan: Plan, pattern: type) -> None:
    """Raises ValueError unless every weight's pattern is of this class."""
    other = [p for p, layer in plan.items() if not isinstance(layer.pattern, pattern)]
    if other:
        name = pattern.__name__
        raise ValueError(
            f"{type(algorithm).__name__} needs the pattern {name}, but the weights {other} have "
            f"another; bind SparsityConfig.pattern, or their rule's, to @t5x_sparsity.{name}()"
        )
