"""What `t5x-sparsity inspect` finds out about the weights of checkpoints, a part at a time."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from t5x_sparsity.artifacts.checkpoint import SavedWeight
from t5x_sparsity.artifacts.checkpoint_arrays import Index
from t5x_sparsity.artifacts.found_patterns import Found, PatternFinder
from t5x_sparsity.artifacts.kept_bits import KeptBits
from t5x_sparsity.core.matrix_axes import MatrixAxes

# The most bytes of bits, one per weight, that are held of a weight; a single slice is the least.
BITS_BYTES = 64 * 2**20
# Numbers are compared in float64, of which a few times as many are held.
COMPARED_BYTES = 16 * 2**20

Progress = Callable[[int], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightFacts:
    """What was found out about a weight.

    Attributes:
      weight: as the checkpoint has it.
      kept: weights that the mask keeps; without a mask in the whole checkpoint, those of a matrix
        that aren't zero; else all.
      nonzero: weights that aren't zero; None where that was not looked at.
      kept_zeros: weights that are zero where the mask keeps, such as those just grown.
      pruned_nonzeros: weights that aren't zero where the mask prunes; there should be none.
      found: what its zeros look like; None for what is dense or no matrix.
    """

    weight: SavedWeight
    kept: int
    nonzero: int | None = None
    kept_zeros: int = 0
    pruned_nonzeros: int = 0
    found: Found | None = None

    @property
    def path(self) -> str:
        """Of the weight."""
        return self.weight.path

    @property
    def size(self) -> int:
        """Weights in all."""
        return self.weight.array.size

    @property
    def is_sparse(self) -> bool:
        """Whether it has a mask, or zeros that count as one."""
        return self.weight.mask is not None or self.kept < self.size

    @property
    def sparsity(self) -> float:
        """Share of weights pruned, in [0, 1]."""
        return 1 - self.kept / self.size if self.size else 0.0

    @property
    def pattern(self) -> str:
        """The pattern found, in words."""
        if self.found is not None:
            return self.found.pattern
        if self.kept in (0, self.size):
            return "dense" if self.kept else "all zero"
        return "unstructured"

    @property
    def differs(self) -> bool:
        """Whether its zeros are not (yet) in the pattern that the record says."""
        return self.found is not None and self.found.follows is False


def look_at(weight: SavedWeight, progress: Progress = lambda n: None) -> WeightFacts:
    """Looks at a weight; a dense one isn't read.

    Args:
      weight: of a checkpoint.
      progress: is told how many bytes have been read, as they are.

    Raises:
      CheckpointError: the weight or its mask is damaged.
    """
    array, axes, has_mask = weight.array, weight.axes, weight.mask is not None
    if not (has_mask or weight.zeros_are_pruned) or not array.shape:
        progress(array.nbytes)
        return WeightFacts(weight=weight, kept=array.size)
    finder = PatternFinder(axes, (has_mask and weight.record.pattern) or None)
    nonzero = kept_count = kept_zeros = pruned_nonzeros = 0
    slice_shape = [array.shape[a] for a in (*axes.inputs, *axes.outputs)]
    at_once = max(1, 8 * BITS_BYTES // max(1, math.prod(slice_shape)))
    for group in _groups(array.shape, axes.stack, at_once):
        slices: dict[tuple[int, ...], KeptBits] = {}
        for index, x in array.parts(group):
            is_set = x != 0
            kept = weight.kept(x, index)
            nonzero += np.count_nonzero(is_set)
            kept_count += np.count_nonzero(kept)
            kept_zeros += np.count_nonzero(kept & ~is_set)
            pruned_nonzeros += np.count_nonzero(is_set & ~kept)
            _add(slices, kept, index, axes, slice_shape)
            progress(x.nbytes)
        for bits in slices.values():
            finder.add(bits)
    return WeightFacts(
        weight=weight,
        kept=int(kept_count),
        nonzero=int(nonzero),
        kept_zeros=int(kept_zeros),
        pruned_nonzeros=int(pruned_nonzeros),
        found=finder.result() if axes.inputs and axes.outputs else None,
    )


def _groups(shape: Sequence[int], stack: Sequence[int], most: int) -> Iterator[Index]:
    """Indices of at most so many whole slices each."""
    lengths = list(shape)
    for axis in reversed(stack):
        lengths[axis] = max(1, min(shape[axis], most))
        most //= lengths[axis]
    cuts = [
        [slice(a, min(a + n, size)) for a in range(0, size, max(1, n))]
        for size, n in zip(shape, lengths, strict=True)
    ]
    return itertools.product(*cuts)


def _add(
    slices: dict[tuple[int, ...], KeptBits],
    kept: np.ndarray,
    index: Index,
    axes: MatrixAxes,
    slice_shape: Sequence[int],
) -> None:
    """Adds a part of a weight to the slices that it is of."""
    free = (*axes.inputs, *axes.outputs)
    inner = [index[a] for a in free]
    kept = kept.transpose(*axes.stack, *free)
    for at in np.ndindex(*kept.shape[: len(axes.stack)]):
        place = tuple(index[a].start + i for a, i in zip(axes.stack, at, strict=True))
        if place not in slices:
            slices[place] = KeptBits(slice_shape, len(axes.outputs))
        slices[place].add(kept[at], inner)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """A weight in two checkpoints, A and B, or several weights together.

    Attributes:
      path: of the weight; 'total' for several.
      shape: of the weight, () for several.
      size: weights in all.
      kept: weights that A keeps.
      other_kept: weights that B keeps.
      both: weights that both keep.
      moved: sum of (b - a)^2 over all weights.
      norm: sum of a^2.
    """

    path: str
    shape: tuple[int, ...]
    size: int
    kept: int
    other_kept: int
    both: int
    moved: float
    norm: float

    @property
    def is_sparse(self) -> bool:
        """Whether either prunes anything."""
        return min(self.kept, self.other_kept) < self.size

    @property
    def overlap(self) -> float | None:
        """Weights that both keep, of those that either keeps; None if neither keeps any."""
        either = self.kept + self.other_kept - self.both
        return self.both / either if either else None

    @property
    def share_kept(self) -> float | None:
        """Weights that both keep, of those that A keeps."""
        return self.both / self.kept if self.kept else None

    @property
    def churn(self) -> float | None:
        """Weights that B keeps and A prunes, of those that B keeps."""
        return 1 - self.both / self.other_kept if self.other_kept else None

    @property
    def change(self) -> float | None:
        """||b - a|| / ||a||, in L2; None where it is no finite number."""
        if not self.moved:
            return 0.0
        found = math.sqrt(self.moved / self.norm) if self.norm else math.inf
        return found if math.isfinite(found) else None


def compare(
    weight: SavedWeight, other: SavedWeight, progress: Progress = lambda n: None
) -> Comparison:
    """Compares a weight of two checkpoints, which has one shape in both.

    Raises:
      CheckpointError: the weight or a mask is damaged.
    """
    kept_count = other_count = both = 0
    moved = norm = 0.0
    for index, x in weight.array.parts(max_bytes=COMPARED_BYTES):
        y = other.array.read(index)
        kept, other_kept = weight.kept(x, index), other.kept(y, index)
        kept_count += np.count_nonzero(kept)
        other_count += np.count_nonzero(other_kept)
        both += np.count_nonzero(kept & other_kept)
        x = x.astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            norm += float(np.sum(np.square(x)))
            moved += float(np.sum(np.square(y.astype(np.float64) - x)))
        progress(weight.array.dtype.itemsize * x.size)
    return Comparison(
        path=weight.path,
        shape=weight.array.shape,
        size=weight.array.size,
        kept=int(kept_count),
        other_kept=int(other_count),
        both=int(both),
        moved=moved,
        norm=norm,
    )


def total(rows: Sequence[Comparison]) -> Comparison:
    """Several weights together."""
    added = ("size", "kept", "other_kept", "both", "moved", "norm")
    sums = {name: sum(getattr(r, name) for r in rows) for name in added}
    return Comparison(path="total", shape=(), **sums)
