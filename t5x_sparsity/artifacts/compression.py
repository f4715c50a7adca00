"""Exact compression of sparse weights by the pattern of their zeros.

Values are moved as bits and never computed with, so that NaN, infinities, -0 and every dtype come
back as they were; whatever isn't stored comes back as +0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from t5x_sparsity.artifacts.encodings import (
    CSR,
    NM,
    Arrays,
    Bitmask,
    Blocks,
    Dense,
    Encoding,
    check,
)
from t5x_sparsity.artifacts.kept_bits import slices_of
from t5x_sparsity.artifacts.structure import StructureFinder

# the values' name, next to the arrays that place them
VALUES = "values"


def encode(x: np.ndarray, kept: np.ndarray, encoding: Encoding) -> Arrays:
    """The arrays of a weight; 'values' have its dtype.

    kept: bool, in x's shape; where x is stored. It must be all that isn't 0.
    """
    return {VALUES: encoding.values(x, kept), **encoding.index(kept)}


def decode(arrays: Mapping[str, np.ndarray], encoding: Encoding, shape: Sequence[int]):
    """The weight, in the dtype of its values.

    Raises:
      ValueError: the arrays contradict each other.
    """
    if isinstance(encoding, Dense):
        check(arrays[VALUES].shape == tuple(shape), "its values contradict its shape")
        return arrays[VALUES]
    positions, values = stored(arrays, encoding, shape)
    x = np.zeros(math.prod(shape), values.dtype)
    x[positions] = values
    return x.reshape(shape)


def stored(
    arrays: Mapping[str, np.ndarray], encoding: Encoding, shape: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """(positions in the flat weight, values) of what is stored, in the order of the file.

    Raises:
      ValueError: the arrays contradict each other.
    """
    positions = encoding.positions(shape, arrays)
    check(
        positions.shape == arrays[VALUES].shape,
        f"it has {arrays[VALUES].shape} values for {positions.shape} positions",
    )
    inside = positions >= 0
    positions, values = positions[inside], arrays[VALUES][inside]
    seen = np.zeros(math.prod(shape), bool)
    seen[positions] = True
    check(np.count_nonzero(seen) == positions.size, "one position has several values")
    return positions, values


def stored_bytes(x: np.ndarray, kept: np.ndarray, encoding: Encoding) -> int:
    """Bytes of all arrays of a weight, without encoding it."""
    values, index_bytes = encoding.size(kept)
    return values * x.dtype.itemsize + index_bytes


def bound_bytes(encoding: Encoding, shape: Sequence[int], kept: int, itemsize: int) -> int:
    """What no exact code of this pattern can go below on average, if values don't compress.

    The values of the positions kept, and log2 of the number of ways to choose these positions.
    """
    return kept * itemsize + math.ceil(encoding.pattern_bits(shape, kept) / 8)


def choose(
    x: np.ndarray,
    kept: np.ndarray,
    *,
    exactly: bool = True,
    pattern: str = "",
    stack_axes: Sequence[int] = (),
    smallest: bool = False,
) -> Encoding:
    """The encoding of a weight by the pattern of its zeros.

    The smallest of the pattern's own and CSR; a bit mask where neither is smaller than dense; dense
    where that isn't either.

    Args:
      x: the weight.
      kept: bool, in its shape; where it is stored.
      exactly: whether no other position may be stored, so that `kept` can be read back.
      pattern: as the run recorded it, such as 'NByM(n=2, m=4, axis=-2)'. It is looked for in `kept`
        where the record doesn't hold.
      stack_axes: the axes along which slices are pruned apart.
      smallest: take a bit mask wherever it is smaller.
    """
    if kept.all():
        return Dense()
    recorded = from_pattern(pattern, kept.shape, stack_axes)
    if recorded is not None and recorded.fits(kept, exactly=exactly):
        candidates = [recorded]
    else:
        candidates = find(kept, exactly=exactly, stack_axes=stack_axes)
    if CSR().fits(kept):
        candidates.append(CSR())
    if smallest:
        candidates.append(Bitmask())
    for group in (candidates, [Bitmask()]):
        sizes = [stored_bytes(x, kept, e) for e in group]
        if sizes and min(sizes) < x.nbytes:
            return group[sizes.index(min(sizes))]
    return Dense()


def from_pattern(pattern: str, shape: Sequence[int], stack_axes: Sequence[int]) -> Encoding | None:
    """The encoding of a pattern by its repr; None if it has none of its own."""
    from t5x_sparsity.core import patterns  # here, as it imports JAX

    known = patterns.from_text(pattern)
    free = patterns.free_axes(len(shape), stack_axes)
    try:
        if isinstance(known, patterns.NByM):
            return NM(n=known.n, m=known.m, axis=free[known.axis])
        if isinstance(known, patterns.Block | patterns.Channel):
            lengths = dict(zip(free, known.unit_shape([shape[a] for a in free]), strict=True))
            return Blocks(block=tuple(lengths.get(a, 1) for a in range(len(shape))))
    except (ValueError, IndexError, TypeError):
        pass  # a weight that can't take the pattern
    return None


def find(
    kept: np.ndarray, *, exactly: bool = True, stack_axes: Sequence[int] = ()
) -> list[Encoding]:
    """Encodings by the structure of `kept`; N:M along the last two axes of a slice comes first."""
    free = [a for a in range(kept.ndim) if a not in stack_axes]
    if not kept.size or not free:
        return []
    finder = StructureFinder(free, fill=not exactly)
    for bits in slices_of(kept, stack_axes):
        finder.add(bits)
    groups = [*finder.filled_groups, *finder.groups]
    groups.sort(key=lambda g: (g.axis not in free[-2:], g.axis, g.m))
    found: list[Encoding] = [NM(n=g.n, m=g.m, axis=g.axis) for g in groups]
    # what is alike along each axis is alike in blocks
    runs = finder.runs
    block = tuple(runs.get(a, 1) for a in range(kept.ndim))
    return [*found, Blocks(block=block)] if math.prod(block) > 1 else found
