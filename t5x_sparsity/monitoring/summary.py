"""Summaries of the sparsity of a run, by weight and in total."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from t5x_sparsity.core.contract import Arrays, LayerPlan, Plan
from t5x_sparsity.core.trees import flatten
from t5x_sparsity.monitoring.text_table import text_table
from t5x_sparsity.transformation import find_state

TOTAL = "total"


class LayerSummary(NamedTuple):
    """One weight's sparsity.

    Attributes:
      path: of the weight; 'total' for the last row.
      shape: of the weight, () for the total.
      size: number of weights.
      kept: number of weights that are not pruned.
      target: sparsity asked for, in [0, 1]; None where unknown, or where only the total has one.
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


def kept_counts(stored: Arrays) -> dict[str, jax.Array]:
    """Weights kept by every stored mask, as int32 counts of parts of it, for `total_kept`.

    Traceable, and small enough to be read on the host. There are several counts per weight because
    a weight may hold more than an int32 can count.
    """
    return {p: _row_counts(m) for p, m in stored.items()}


def _row_counts(stored: jax.Array) -> jax.Array:
    bits = jax.lax.population_count(stored)
    rows = max(
        (a for a in range(stored.ndim) if stored.shape[a] <= 256),
        key=lambda a: stored.shape[a],
        # of a huge weight without such an axis, the shortest
        default=min(range(stored.ndim), key=lambda a: stored.shape[a])
        if 8 * stored.size >= 1 << 31
        else None,
    )
    axes = tuple(a for a in range(stored.ndim) if a != rows)
    return jnp.sum(bits, axis=axes, dtype=jnp.int32).reshape(-1)


def total_kept(counts: Any) -> int:
    """The exact sum of counts, on the host."""
    return int(np.asarray(counts, np.int64).sum())


def summarize(
    shapes: Mapping[str, Sequence[int]], kept: Mapping[str, int], plan: Plan | None = None
) -> list[LayerSummary]:
    """One row per sparse weight, by path, and the total last.

    Args:
      shapes: path -> shape, of at least the sparse weights.
      kept: path -> number of weights kept, of sparse weights only.
      plan: of the sparse weights, for their targets.
    """
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
    """Whether a weight shares one threshold with others, and so has no target level."""
    return layer.in_budget and layer.algorithm.is_global


def sparsity_summary(params: Any, state: Any) -> list[LayerSummary]:
    """The sparsity of every sparse weight, and in total, of a run with `sparsify`.

    >>> import jax.numpy as jnp, optax, t5x_sparsity as ts
    >>> tx = ts.sparsify(optax.sgd(0.1), ts.Static(), sparsity=0.75)
    >>> params = {"wi": jnp.ones((8, 16)), "wo": jnp.ones((16, 8)), "scale": jnp.ones(8)}
    >>> rows = ts.sparsity_summary(params, tx.init(params))
    >>> print(ts.summary_table(rows))
    weight      shape    weights    kept    target    actual
    --------  -------  ---------  ------  --------  --------
    wi           8x16        128      32            75.0000%
    wo           16x8        128      32            75.0000%
    total                    256      64            75.0000%

    Args:
      params: the tree that `sparsify(...).init` was called with.
      state: what `init` or `update` returned, or a state that holds it.

    Returns:
      One row per weight, by path, and the total last. Masks are read from the device.

    Raises:
      ValueError: no state of `sparsify` in `state`, or several.
    """
    shapes = {p: x.shape for p, x in flatten(params).items()}
    counts = kept_counts(find_state(state).sparsity.masks)
    return summarize(shapes, {p: total_kept(c) for p, c in counts.items()})


def summary_table(rows: Sequence[LayerSummary]) -> str:
    """The rows as a table in plain text, one line per weight; see `sparsity_summary`."""
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
