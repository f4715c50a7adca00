"""What several algorithms share: scores, selections, and how many units a ramp keeps."""

import zlib
from collections.abc import Callable, Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp

from t5x_sparsity.core.contract import Algorithm, Arrays, LayerPlan, Plan
from t5x_sparsity.core.selection import Choice, select_masks
from t5x_sparsity.core.stacking import map_stacked

# Masks by path: bool, the weights' shapes.
Masks = dict[str, jax.Array]

P = TypeVar("P")


def grown(before: Arrays, after: Arrays) -> dict[str, jax.Array]:
    """Which weights an update has brought back: bool, the weights' shapes."""
    return {p: after[p] & ~before[p] for p in after}


def start_scores(plan: Plan, weights: Arrays, key: jax.Array | None) -> dict[str, jax.Array]:
    """The scores that a sparse start keeps the largest of: random, or |w| where key is None."""
    return magnitudes(plan, weights) if key is None else random_scores(plan, key)


def random_scores(plan: Plan, key: jax.Array) -> dict[str, jax.Array]:
    """Independent uniform float32 scores in [0, 1), the same on every mesh.

    Each weight has its own random stream, which depends on its path and on no other weight.
    """
    streams = {p: jnp.uint32(zlib.crc32(p.encode())) for p in plan}

    def draw(layer: LayerPlan, streams: jax.Array) -> jax.Array:
        def one(stream: jax.Array) -> jax.Array:
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
    select: Callable[[Mapping[str, Choice]], Masks] = select_masks,
) -> Masks:
    """The masks of the units of largest score, of every weight of a plan.

    >>> import t5x_sparsity as ts
    >>> weights = {"w": jnp.array([[1.0, 4.0], [3.0, 2.0]])}
    >>> plan = ts.SparsityConfig(algorithm=ts.Static(), sparsity=0.5).plan(weights)
    >>> print(choose(plan, weights)["w"])
    [[False  True]
     [ True False]]

    Args:
      plan: of the weights.
      scores: float, the weights' shapes.
      k: units to keep per slice. None: each layer's target.
      where: bool, the weights' shapes; only these may be chosen. None: all.
      keep: bool, the weights' shapes; these, whole units, are always kept and count towards k.
      relaxed: whether to choose by each pattern's relaxed form, by which weights are dropped.
      select: makes the masks from every weight's part in the selection. By default each slice is
        chosen from separately.

    Returns:
      path -> bool, the weight's shape.
    """
    choices = {
        path: Choice(
            pattern=layer.pattern.relaxed if relaxed else layer.pattern,
            scores=scores[path],
            k=layer.kept if k is None else k[path],
            stack_axes=layer.stack_axes,
            where=None if where is None else where[path],
            keep=None if keep is None else keep[path],
            sharding=layer.axes,
        )
        for path, layer in plan.items()
    }
    return select(choices)


def scheduled_kept(plan: Plan, share: jax.Array) -> dict[str, jax.Array]:
    """Units kept per slice, int32, when `share` of each layer's target sparsity is reached.

    Exact at share 0 (all units) and 1 (the target), however large the layer.

    Args:
      plan: of the weights.
      share: float32 scalar in [0, 1].
    """
    kept = {}
    for path, layer in plan.items():
        pruned = layer.units - layer.kept
        now = jnp.round(jnp.float32(pruned) * share).astype(jnp.int32)
        kept[path] = layer.units - jnp.where(share >= 1, jnp.int32(pruned), now)
    return kept


def pattern_of_each(algorithm: Algorithm, plan: Plan, pattern: type[P]) -> dict[str, P]:
    """The pattern of every weight, by path.

    Raises:
      ValueError: some weight's pattern is not of the class `pattern`, which the algorithm needs.
    """
    found: dict[str, P] = {p: x.pattern for p, x in plan.items() if isinstance(x.pattern, pattern)}
    other = [p for p in plan if p not in found]
    if other:
        name = pattern.__name__
        raise ValueError(
            f"{type(algorithm).__name__} needs the pattern {name}, but the weights {other} have "
            f"another; bind SparsityConfig.pattern, or their rule's, to @t5x_sparsity.{name}()"
        )
    return found
