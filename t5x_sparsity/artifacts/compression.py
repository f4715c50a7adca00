"""Which encoding a weight takes: by the pattern that its run recorded, or by what is found."""

import functools
import math
from collections.abc import Sequence

import numpy as np

from t5x_sparsity.artifacts.encodings import CSR, NM, Bitmask, Blocks, Dense, Encoding
from t5x_sparsity.artifacts.structure import StructureFinder, slices_of
from t5x_sparsity.core import patterns


def choose(
    x: np.ndarray,
    kept: np.ndarray,
    *,
    exactly: bool = True,
    pattern: str = "",
    stack_axes: Sequence[int] = (),
    smallest: bool = False,
) -> Encoding:
    """The smallest encoding of a weight: that of the pattern of its zeros, or CSR.

    A bit mask where neither is smaller than dense; dense where that isn't either.

    Args:
      x: the weight.
      kept: bool, in its shape; where it is stored.
      exactly: whether no other position may be stored, so that `kept` can be read back.
      pattern: as the run recorded it, such as 'NByM(n=2, m=4, axis=-2)'. Where the record doesn't
        hold, patterns are looked for in `kept`.
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
    if kept.ndim:
        candidates.append(CSR())
    if smallest:
        candidates.append(Bitmask())
    size = functools.cache(lambda encoding: encoding.nbytes(kept, x.itemsize))
    for group in (candidates, [Bitmask()]):
        best = min(group, key=size, default=Dense())
        if size(best) < x.nbytes:
            return best
    return Dense()


def from_pattern(pattern: str, shape: Sequence[int], stack_axes: Sequence[int]) -> Encoding | None:
    """The encoding of a pattern by its text; None if it has none of its own."""
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
    free = patterns.free_axes(kept.ndim, stack_axes)
    if not kept.size or not free:
        return []
    finder = StructureFinder(free, fill=not exactly)
    for bits in slices_of(kept, stack_axes):
        finder.add(bits)
    groups = [*finder.filled_groups, *finder.groups]
    found: list[Encoding] = sorted(groups, key=lambda g: (g.axis not in free[-2:], g.axis, g.m))
    # what is alike along each axis is alike in blocks
    block = tuple(finder.runs.get(a, 1) for a in range(kept.ndim))
    return [*found, Blocks(block=block)] if math.prod(block) > 1 else found
