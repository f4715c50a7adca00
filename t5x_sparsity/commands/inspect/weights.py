"""What `t5x-sparsity inspect` finds out about the weights of checkpoints, a part at a time.

Facts are dicts of plain values, as JSON shows them; docs/inspect.md says what each key means.
"""

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from t5x_sparsity.artifacts.checkpoint import SavedWeight, sparsity
from t5x_sparsity.artifacts.checkpoint_arrays import Index, cuts
from t5x_sparsity.artifacts.found_patterns import NOTHING, PatternFinder
from t5x_sparsity.artifacts.structure import KeptBits
from t5x_sparsity.commands.output import progress

# The most bytes of bits, one per weight, that are held of a weight; a single slice is the least.
BITS_BYTES = 64 * 2**20
# Numbers are compared in float64, of which a few times as many are held.
COMPARED_BYTES = 16 * 2**20

Facts = dict[str, Any]
Done = Callable[[int], None]


def look_at_all(weights: Collection[SavedWeight]) -> list[Facts]:
    """The facts of each weight, by path; a bar on a terminal shows how far it is.

    Raises:
      CheckpointError: a weight or its mask is damaged.
    """
    with progress("reading", sum(w.array.nbytes for w in weights)) as done:
        return [look_at(w, done) for w in sorted(weights, key=lambda w: w.path)]


def look_at(weight: SavedWeight, done: Done) -> Facts:
    """The facts of a weight; a dense one isn't read. `done` is told how many bytes are done.

    Raises:
      CheckpointError: the weight or its mask is damaged.
    """
    array, axes, has_mask = weight.array, weight.axes, weight.mask is not None
    counts = {"kept": array.size, "nonzero": None, "kept_zeros": 0, "pruned_nonzeros": 0}
    found: Facts = {}
    if array.shape and (has_mask or weight.zeros_are_pruned):
        counts, found = _read(weight, done)
    else:
        done(array.nbytes)
    kept = counts["kept"]
    pattern = "unstructured"
    if kept in (0, array.size):
        pattern = "dense" if kept else "all zero"
    return {
        "path": weight.path,
        "shape": list(array.shape),
        "dtype": array.dtype.name,
        "stack_axes": list(axes.stack),
        "input_axes": list(axes.inputs),
        "output_axes": list(axes.outputs),
        "has_mask": has_mask,
        "is_sparse": has_mask or kept < array.size,
        "size": array.size,
        **counts,
        "sparsity": sparsity(kept, array.size),
        "target": weight.record.sparsity,
        **{name: found.get(name) for name in ("rows", "columns", "dead_rows", "dead_columns")},
        "pattern": found.get("pattern", pattern),
        **{name: found.get(name) for name in NOTHING},
        "recorded_pattern": weight.record.pattern or None,
        "recorded_algorithm": weight.record.algorithm or None,
        "follows_record": found.get("follows"),
    }


def _read(weight: SavedWeight, done: Done) -> tuple[Mapping[str, int], Facts]:
    """Counts of a weight's values, and what its zeros look like if it is a matrix."""
    array, axes = weight.array, weight.axes
    free, lead = (*axes.inputs, *axes.outputs), range(len(axes.stack))
    slice_shape = [array.shape[a] for a in free]
    at_once = max(1, 8 * BITS_BYTES // max(1, math.prod(slice_shape)))
    finder = PatternFinder(axes, (weight.mask and weight.record.pattern) or None)
    counts = Counter(kept=0, nonzero=0, kept_zeros=0, pruned_nonzeros=0)
    for group in _groups(array.shape, axes.stack, at_once):
        slices = defaultdict(lambda: KeptBits(slice_shape, len(axes.outputs)))
        for index, x in array.parts(group):
            is_set = x != 0
            kept = weight.kept(x, index)
            counts.update(
                kept=np.count_nonzero(kept),
                nonzero=np.count_nonzero(is_set),
                kept_zeros=np.count_nonzero(kept & ~is_set),
                pruned_nonzeros=np.count_nonzero(is_set & ~kept),
            )
            for at in np.ndindex(*(kept.shape[a] for a in axes.stack)):
                place = tuple(index[a].start + i for a, i in zip(axes.stack, at, strict=True))
                # no name for the part, which would hold it while the next one is read
                slices[place].add(np.moveaxis(kept, axes.stack, lead)[at], [index[a] for a in free])
            done(x.nbytes)
        for bits in slices.values():
            finder.add(bits)
    counts = {name: int(n) for name, n in counts.items()}
    return counts, finder.result() if axes.inputs and axes.outputs else {}


def _groups(shape: Sequence[int], stack: Sequence[int], most: int) -> Iterator[Index]:
    """Indices of at most so many whole slices each."""
    lengths = list(shape)
    for axis in reversed(stack):
        lengths[axis] = max(1, min(shape[axis], most))
        most //= lengths[axis]
    regions = [slice(0, n) for n in shape]
    return itertools.product(*map(cuts, regions, (max(1, n) for n in lengths)))


def compare(weight: SavedWeight, other: SavedWeight, done: Done) -> Counter:
    """Sums over a weight of two checkpoints, which has one shape in both.

    size: weights in all; kept, other_kept, both: those kept; moved: of (y - x)^2; norm: of x^2.

    Raises:
      CheckpointError: the weight or a mask is damaged.
    """
    sums = Counter(size=weight.array.size, kept=0, other_kept=0, both=0, moved=0.0, norm=0.0)
    for index, x in weight.array.parts(max_bytes=COMPARED_BYTES):
        y = other.array.read(index)
        kept, other_kept = weight.kept(x, index), other.kept(y, index)
        nbytes, x = x.nbytes, x.astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            sums.update(
                kept=int(np.count_nonzero(kept)),
                other_kept=int(np.count_nonzero(other_kept)),
                both=int(np.count_nonzero(kept & other_kept)),
                moved=float(np.sum(np.square(y.astype(np.float64) - x))),
                norm=float(np.sum(np.square(x))),
            )
        done(nbytes)
    return sums


def comparison(path: str, shape: Sequence[int], parts: Iterable[Counter]) -> Facts:
    """The facts of a weight in two checkpoints, or of several weights together."""
    sums = Counter(size=0, kept=0, other_kept=0, both=0, moved=0.0, norm=0.0)
    for part in parts:
        sums.update(part)
    kept, other_kept, both = sums["kept"], sums["other_kept"], sums["both"]
    either = kept + other_kept - both
    moved, norm = sums["moved"], sums["norm"]
    change = math.sqrt(moved / norm) if norm else math.inf if moved else 0.0
    return {
        "path": path,
        "shape": shape,
        "size": sums["size"],
        "kept": kept,
        "other_kept": other_kept,
        "both": both,
        "overlap": both / either if either else None,
        "share_kept": both / kept if kept else None,
        "churn": 1 - both / other_kept if other_kept else None,
        "change": change if math.isfinite(change) else None,
        "is_sparse": min(kept, other_kept) < sums["size"],
    }
