"""Weights kept of groups, in NumPy alone, for masks that lie on disk."""

from __future__ import annotations

import numpy as np


def group_counts(mask: np.ndarray, axis: int, m: int) -> np.ndarray:
    """How many are kept in every run of m along an axis, unsigned; that axis is 1/m as long."""
    axis %= mask.ndim
    split = mask.reshape(*mask.shape[:axis], mask.shape[axis] // m, m, *mask.shape[axis + 1 :])
    counts = np.zeros((*split.shape[: axis + 1], *split.shape[axis + 2 :]), np.min_scalar_type(m))
    for j in range(m):  # much faster than to reduce a short axis
        counts += split[(slice(None),) * (axis + 1) + (j,)]
    return counts
