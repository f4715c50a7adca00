"""What a run reports about its sparsity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from t5x_sparsity.core.contract import LayerPlan, Plan
from t5x_sparsity.core.trees import flatten
from t5x_sparsity.monitoring.text_table import text_table
from t5x_sparsity.transformation import find_state

TOTAL = "total"


class LayerSummary(NamedTuple):
    """One weight's sparsity.

    Attributes:
      path: of the weight; 'total' for the last row.
      shape: of the weight, () for the total.
      size: weights in all.
      kept: weights not pruned.
      target: sparsity asked for, None where unknown, or where only the total has one.
    """

    path: str
    shape: tuple[int, ...]
    size: int
    kept: int
    target: float | None

    @property
    def sparsity(self) -> float:
        """The actual sparsity, in [0, 1]."""
        return 1 - self.kept / self.size if self.size else 0.0


def kept_counts(stored: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Weights kept by every stored mask, as int32 counts of a few rows (see `total_kept`).

    Traceable, and small enough to read on the host: a weight may hold more than an int32 can count.
    """
    return {p: _row_counts(m) for p, m in stored.items()}


def _row_counts(stored: jax.Array) -> jax.Array:
    bits = jax.lax.population_count(stored)
    rows = max(
        (a for a in range(stored.ndim) if stored.shape[a] <= 256),
        key=lambda a: stored.shape[a],
        # of a huge weight without so short an axis, the shortest that there is
        default=min(range(stored.ndim), key=lambda a: stored.shape[a])
        if 8 * stored.size >= 1 << 31
        else None,
    )
    axes = tuple(a for a in range(stored.ndim) if a != rows)
    return jnp.sum(bits, axis=axes, dtype=jnp.int32).reshape(-1)


def total_kept(counts: Any) -> int:
    """Sums counts on the host, exactly."""
    return int(np.asarray(counts, np.int64).sum())


def summarize(
    shapes: Mapping[str, Sequence[int]], kept: Mapping[str, int], plan: Plan | None = None
) -> list[LayerSummary]:
    """Rows by path, the total last. kept: path -> weights kept, for sparse weights only."""
    rows = [
        LayerSummary(
            path=p,
            shape=tuple(shapes[p]),
            size=math.prod(shapes[p]),
            kept=kept[p],
            target=plan[p].sparsity if plan and not is_global(plan[p]) else None,
        )
        for p in sorted(kept)
    ]
    size = sum(r.size for r in rows)
    target = None
    if plan and size:
        target = sum(plan[r.path].level * r.size for r in rows) / size
    return [*rows, LayerSummary(TOTAL, (), size, sum(r.kept for r in rows), target)]


def is_global(layer: LayerPlan) -> bool:
    """Whether a weight has no level of its own: one threshold decides on it and on others."""
    return layer.in_budget and layer.algorithm is not None and layer.algorithm.is_global


def sparsity_summary(params: Any, state: Any) -> list[LayerSummary]:
    """Per-weight and total sparsity of a run by `sparsify`; reads the device.

    state: what `sparsify(...).init` or `update` returned, or a state that holds it.
    """
    shapes = {p: x.shape for p, x in flatten(params).items()}
    counts = kept_counts(find_state(state).sparsity.masks)
    return summarize(shapes, {p: total_kept(c) for p, c in counts.items()})


def summary_table(rows: Sequence[LayerSummary]) -> str:
    """The rows as text, a line per weight; it takes no library, as optax users have none."""
    return text_table(
        [
            (
                r.path,
                "x".join(map(str, r.shape)),
                f"{r.size:,}",
                f"{r.kept:,}",
                "" if r.target is None else f"{r.target:.4%}",
                f"{r.sparsity:.4%}",
            )
            for r in rows
        ],
        headers=("weight", "shape", "weights", "kept", "target", "actual"),
        align="lrrrrr",
    )
