"""What a run reports about its masks: numbers by name, images and histograms.

Names are `<quantity>/<path of the weight>` and `<quantity>/total`; TensorBoard groups them by
quantity. Functions of arrays are traceable, and their results small enough to be read on the host
once per stats period.
"""

import math
from collections.abc import Mapping, Sequence, Set

import jax
import jax.numpy as jnp
import numpy as np

from t5x_sparsity.core import packing
from t5x_sparsity.core.contract import Arrays, LayerPlan, Plan
from t5x_sparsity.core.plan import by_algorithm
from t5x_sparsity.core.schedules import last_update
from t5x_sparsity.monitoring.flops import RunFlops
from t5x_sparsity.monitoring.summary import TOTAL, is_global, kept_counts

# The most cells of an image along an axis.
IMAGE_CELLS = 128


def mask_counts(stored: Arrays, before: Arrays, explored: Arrays) -> jax.Array:
    """Counts of every weight: float32 [4, weights], in the order of their paths.

    The rows count what is kept, what was grown and what was dropped since `before`, and what has
    ever been kept; the last row is 0 where `explored` is empty. Float32 rounds counts above 2^24,
    which is fine for a curve. All masks are as they are stored.
    """
    paths = sorted(stored)
    rows = [
        {p: stored[p] for p in paths},
        {p: stored[p] & ~before[p] for p in paths},
        {p: before[p] & ~stored[p] for p in paths},
        {p: explored[p] for p in paths} if explored else {},
    ]
    counts = [
        [jnp.sum(count.astype(jnp.float32)) for count in kept_counts(row).values()] for row in rows
    ]
    return jnp.array([row or [0.0] * len(paths) for row in counts], jnp.float32)


def scheduled_sparsities(plan: Plan, step: int) -> dict[str, float]:
    """The target sparsity after the updates before `step`: by path, and 'total'.

    Layers that share one threshold have no target; they count in the total only.
    """
    levels, total, size = {}, 0.0, 0
    for algorithm, part in by_algorithm(plan):
        kept = algorithm.mask_densities(part, last_update(algorithm.updates, step))
        for path, layer in part.items():
            level = 1 - kept[path]
            total += level * layer.size
            size += layer.size
            if not is_global(layer):
                levels[path] = level
    return {**levels, TOTAL: total / size} if size else {}


def mask_scalars(
    plan: Plan,
    counts: np.ndarray,
    *,
    targets: Mapping[str, float],
    updated: Set[str],
    explored: bool = False,
) -> dict[str, float]:
    """The numbers of one stats period.

    `sparsity/...`, `sparsity_target/...` and `mask_explored/...`, the share ever kept, are in
    [0, 1]. For weights whose mask was updated, `mask_grown/...` and `mask_dropped/...` are counts,
    and `mask_churn/...` is the share of what is kept now that wasn't before, in [0, 1]. The totals
    of these three are over such weights only.

    Args:
      plan: of the sparse weights.
      counts: what `mask_counts` returned.
      targets: what `scheduled_sparsities` returned.
      updated: paths of the weights whose mask was updated between the two masks of `counts`.
      explored: whether `counts` has what was ever kept.
    """
    columns = {p: counts[:, i].astype(np.float64) for i, p in enumerate(sorted(plan))}
    scalars = {f"sparsity_target/{p}": float(level) for p, level in targets.items()}
    for name, paths in _rows(list(columns)):
        kept, _, _, ever = sum(columns[p] for p in paths)
        size = sum(plan[p].size for p in paths)
        scalars[f"sparsity/{name}"] = float(1 - kept / size)
        if explored:
            scalars[f"mask_explored/{name}"] = float(ever / size)
    for name, paths in _rows(sorted(updated)):
        kept, grown, dropped, _ = sum(columns[p] for p in paths)
        scalars[f"mask_grown/{name}"] = float(grown)
        scalars[f"mask_dropped/{name}"] = float(dropped)
        scalars[f"mask_churn/{name}"] = float(grown / kept) if kept else 0.0
    return scalars


def _rows(paths: Sequence[str]) -> list[tuple[str, Sequence[str]]]:
    """Names with their paths: each weight, and all together."""
    return [*((p, [p]) for p in paths), (TOTAL, paths)] if paths else []


def flops_scalars(flops: RunFlops) -> dict[str, float]:
    """`flops/...`: of training so far and of a forward pass; sparse, dense and their ratio."""
    scalars = {}
    for kind, sparse, dense in (
        ("training", flops.training, flops.dense_training),
        ("inference", flops.forward, flops.dense_forward),
    ):
        scalars |= {f"flops/{kind}": sparse, f"flops/{kind}_dense": dense}
        if dense:
            scalars[f"flops/{kind}_share"] = sparse / dense
    return scalars


def mask_pictures(plan: Plan, stored: Arrays) -> dict[str, tuple[jax.Array, jax.Array]]:
    """For each weight's first slice, the share kept per cell, and the fan-in of each neuron.

    Returns:
      path -> (float32 [rows, columns] in [0, 1], float32 [outputs]). Rows are inputs and columns
      output neurons, up to IMAGE_CELLS of each; a small weight has one cell per entry.
    """
    return {p: _picture(plan[p], stored[p]) for p in stored}


def _picture(layer: LayerPlan, stored: jax.Array) -> tuple[jax.Array, jax.Array]:
    mask = packing.unpack(stored, layer.shape)
    for axis in reversed(layer.stack_axes):
        mask = jax.lax.index_in_dim(mask, 0, axis, keepdims=False)
    n = len(layer.output_axes)
    inputs, outputs = mask.shape[:-n], mask.shape[-n:]
    rows, row_sizes = _cells(inputs)
    columns, column_sizes = _cells(outputs)
    # products with ones and zeros, so that each device sums its shard
    letters = "abcdefgh"[: mask.ndim]
    kept = jnp.einsum(
        f"x{letters[:-n]},{letters},y{letters[-n:]}->xy",
        rows,
        mask.astype(jnp.bfloat16),
        columns,
        preferred_element_type=jnp.float32,
    )
    sizes = np.outer(row_sizes, column_sizes).astype(np.float32)
    fan_in = jnp.sum(mask, axis=tuple(range(len(inputs))), dtype=jnp.int32)
    return kept / sizes, fan_in.reshape(-1).astype(jnp.float32)


def _cells(shape: Sequence[int]) -> tuple[jax.Array, np.ndarray]:
    """bfloat16 [cells, *shape], 1 for a cell's entries, consecutive in C order; their numbers."""
    size = math.prod(shape)
    most = -(-size // IMAGE_CELLS)
    sizes = np.diff([*range(0, size, most), size])
    index = jax.lax.iota(jnp.int32, size) // most
    cells = jax.lax.iota(jnp.int32, len(sizes))
    return (cells[:, None] == index).astype(jnp.bfloat16).reshape(-1, *shape), sizes


def pictured(plan: Plan, most: int = 12) -> list[str]:
    """Paths of the weights with images: all, or `most` of them, evenly spaced."""
    paths = list(plan)
    if len(paths) <= most:
        return paths
    return [paths[round(i * (len(paths) - 1) / (most - 1))] for i in range(most)]
