"""Counts the kept weights of groups, with NumPy alone, for masks in files."""

import numpy as np


def group_counts(mask: np.ndarray, axis: int, m: int) -> np.ndarray:
    """How many weights every group of m along an axis keeps, unsigned; the axis is 1/m as long."""
    axis %= mask.ndim
    split = mask.reshape(*mask.shape[:axis], mask.shape[axis] // m, m, *mask.shape[axis + 1 :])
    counts = np.zeros((*split.shape[: axis + 1], *split.shape[axis + 2 :]), np.min_scalar_type(m))
    for j in range(m):  # much faster than reducing a short axis
        counts += split[(slice(None),) * (axis + 1) + (j,)]
    return counts
