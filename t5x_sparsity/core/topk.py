"""Exact top-k masks without a sort, and without moving a weight between devices.

A score is mapped to an unsigned key of the same order, and the key is cut into 16-bit digits. The
digits of the k-th largest key are found one bit per pass, the most significant first. A pass
counts, in place, how many digits reach a candidate. Under a sharded `jit` that is a local reduction
and one all-reduce of one number per selection. A mask marks the keys above the k-th. The same
search over flat indices resolves ties, only where there are any. All arithmetic is on integers, so
the masks are the same, bit for bit, on every mesh and platform.

The order is that of a stable descending sort: larger scores first, equal scores (0.0 and -0.0 are
equal) by lower flat index, infinities as numbers, and NaN after everything else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from t5x_sparsity.core.packing import pack_axis

_DIGIT_BITS = 16
_DIGIT_MASK = (1 << _DIGIT_BITS) - 1

# dtype -> (unsigned integer of the same width, bits of infinity)
_FORMATS = {
    "float32": (jnp.uint32, 0x7F800000),
    "bfloat16": (jnp.uint16, 0x7F80),
    "float16": (jnp.uint16, 0x7C00),
}


class Count(NamedTuple):
    """A number of weights below 2**47, more than an int32 can count, as high * 2**16 + low.

    Attributes:
      high: int32.
      low: int32 in [0, 2**16), of the same shape.
    """

    high: jax.Array
    low: jax.Array

    @classmethod
    def of(cls, value: int | jax.Array | Count) -> Count:
        """Converts a Python integer of any size, an integer array, or a Count."""
        if isinstance(value, Count):
            return value
        if isinstance(value, int):
            if value < 0:
                raise ValueError(f"the number to keep must not be negative, got {value}")
            high, low = divmod(value, 1 << _DIGIT_BITS)
            return cls(jnp.int32(high), jnp.int32(low))
        value = jnp.asarray(value)
        if not jnp.issubdtype(value.dtype, jnp.integer):
            raise TypeError(f"the number to keep must be an integer, got {value.dtype}")
        return cls(
            (value >> _DIGIT_BITS).astype(jnp.int32), (value & _DIGIT_MASK).astype(jnp.int32)
        )

    def __add__(self, other: Count) -> Count:  # type: ignore[override]  # a sum, not a tuple
        low = self.low + other.low
        return Count(self.high + other.high + (low >> _DIGIT_BITS), low & _DIGIT_MASK)

    def __sub__(self, other: Count) -> Count:
        low = self.low - other.low
        return Count(self.high - other.high + (low >> _DIGIT_BITS), low & _DIGIT_MASK)

    def times(self, factor: int) -> Count:
        """self * factor, a Python integer below 2**15."""
        low = self.low * factor
        return Count(self.high * factor + (low >> _DIGIT_BITS), low & _DIGIT_MASK)

    def sum(self) -> Count:
        """The total of a vector of fewer than 2**15 counts, as a vector of one."""
        high = jnp.sum(self.high, keepdims=True)
        return Count(high, jnp.zeros(1, jnp.int32)) + Count.of(jnp.sum(self.low, keepdims=True))

    def reaches(self, other: Count) -> jax.Array:
        """self >= other, elementwise."""
        return (self.high > other.high) | ((self.high == other.high) & (self.low >= other.low))


def top_k_mask(
    scores: jax.Array,
    k: int | jax.Array,
    *,
    where: jax.Array | None = None,
    stack_axes: Sequence[int] = (),
) -> jax.Array:
    """The mask of the k largest scores, or of the k largest of every slice: bool, of their shape.

    >>> print(top_k_mask(jnp.array([0.5, 2.0, 1.0, 2.0]), 2))
    [False  True False  True]
    >>> print(top_k_mask(jnp.array([[3.0, 1.0], [0.0, 2.0]]), 1, stack_axes=(0,)))
    [[ True False]
     [False  True]]

    Args:
      scores: float32, bfloat16 or float16, any shape.
      k: how many to keep: a scalar, or one number per slice (shape: the stacked dims, in order).
        May be traced. k above the number of candidates keeps them all.
      where: bool, shape of `scores`; only these are candidates. None: all are.
      stack_axes: axes along which selections are independent, such as scanned layers or experts.

    Raises:
      TypeError: scores of another dtype, or a k that is no integer.
      ValueError: a negative k, or a slice of 2**31 scores or more.
    """
    return top_k_masks([scores], [k], where=[where], stack_axes=[stack_axes])[0]


def top_k_masks(
    scores: Sequence[jax.Array],
    k: Sequence[int | jax.Array],
    *,
    where: Sequence[jax.Array | None] | None = None,
    stack_axes: Sequence[Sequence[int]] | None = None,
) -> list[jax.Array]:
    """`top_k_mask` of several tensors in one search: they share its passes, not a threshold.

    Each argument has an entry per tensor, as for `top_k_mask`, and so has the result.
    """
    scores = materialize(scores)
    where = [None] * len(scores) if where is None else where
    stack_axes = [()] * len(scores) if stack_axes is None else stack_axes
    masks: dict[int, jax.Array] = {}
    for wide in (True, False):  # tensors of one key width share a search
        own = [i for i, s in enumerate(scores) if (s.dtype == jnp.float32) == wide]
        if not own:
            continue
        layout = Layout([scores[i].shape for i in own], [stack_axes[i] for i in own], joint=False)
        needs = layout.gather([Count.of(k[i]) for i in own])
        found = _select([scores[i] for i in own], needs, [where[i] for i in own], layout)
        masks |= dict(zip(own, found, strict=True))
    return [masks[i] for i in range(len(scores))]


def joint_top_k_masks(
    scores: Sequence[jax.Array],
    k: int | jax.Array | Count,
    *,
    where: Sequence[jax.Array | None] | None = None,
    sizes: Sequence[jax.Array | int] | None = None,
    order: Sequence[Sequence[int]] | None = None,
) -> list[jax.Array]:
    """The masks of the k largest scores over all tensors together.

    Ties go to the earlier tensor, then to the lower flat index. Tensors of mixed dtypes are
    compared as float32.

    Args:
      scores: the tensors, with one entry per unit: a weight, or several kept or pruned together.
      k: how many weights to keep; a `Count` where they may be 2**31 or more.
      where: for each tensor, its candidates, or None for all.
      sizes: for each tensor, how many weights its units hold, int32, broadcast against it. None: 1.
        Units are kept, the largest first, until they hold at least k weights.
      order: if given, each entry of `scores` is a stack of tensors along its first axis, and this
        holds the place of each, from 0, in the order by which ties are resolved. None: they are
        single tensors, in this order.
    """
    if not scores:
        return []
    scores = materialize(scores)
    where = [None] * len(scores) if where is None else list(where)
    if any(s.dtype != scores[0].dtype for s in scores):
        scores = [s.astype(jnp.float32) for s in scores]
    axes: list[tuple[int, ...]] = [() if order is None else (0,)] * len(scores)
    layout = Layout([s.shape for s in scores], axes, joint=True, sizes=sizes, order=order)
    return _select(scores, Count(*(c.reshape(1) for c in Count.of(k))), where, layout)


def materialize(scores: Sequence[jax.Array]) -> list[jax.Array]:
    """The same scores as arrays in memory, computed once.

    XLA's `InstructionFusion` copies the computation of a score into each kernel that reads it, and
    each copy may round differently, by fused multiply-adds. A search would then not find what it
    has counted. The result of a loop is never copied that way, but an optimization barrier is
    removed before XLA fuses (`OptimizationBarrierExpander`). `WhileLoopSimplifier` must not see
    that the loop never runs. So it runs once where there is a NaN, and then replaces NaN by NaN.

    Raises:
      TypeError: scores that are not float32, bfloat16 or float16.
    """
    for s in scores:
        _format(s.dtype)
    sized = [s for s in scores if s.size]
    if not sized:  # an empty tensor has no largest score
        return list(scores)
    smallest = min(sized, key=lambda s: s.size)
    rounds = jnp.isnan(jnp.max(smallest)).astype(jnp.int32)

    def one_nan(_: jax.Array, scores: list[jax.Array]) -> list[jax.Array]:
        return [jnp.where(jnp.isnan(s), jnp.asarray(jnp.nan, s.dtype), s) for s in scores]

    found: list[jax.Array] = lax.fori_loop(0, rounds, one_nan, list(scores))
    return found


class Layout:
    """Where each tensor's selections are in the vector of all selections.

    There is one selection per slice of a tensor, or, where they are `joint`, a single one over
    everything. An entry may then count for several weights (`sizes`), and ties are resolved in the
    `order` of the slices.
    """

    def __init__(
        self,
        shapes: Sequence[Sequence[int]],
        stack_axes: Sequence[Sequence[int]],
        *,
        joint: bool,
        sizes: Sequence[jax.Array | int] | None = None,
        order: Sequence[Sequence[int]] | None = None,
    ):
        self.joint = joint
        self.order = None if order is None else np.concatenate(order)
        self.shapes = [tuple(shape) for shape in shapes]
        self.unit_sizes = [1] * len(shapes) if sizes is None else list(sizes)
        self.stack_axes = [
            tuple(sorted(a % len(shape) for a in axes))
            for shape, axes in zip(shapes, stack_axes, strict=True)
        ]
        each = list(zip(self.shapes, self.stack_axes, strict=True))
        self.keepdims = [tuple(n if a in axes else 1 for a, n in enumerate(s)) for s, axes in each]
        self.reduced = [tuple(a for a in range(len(s)) if a not in axes) for s, axes in each]
        self.slices = [tuple(n for a, n in enumerate(s) if a not in axes) for s, axes in each]
        for selected in self.slices:
            if math.prod(selected) >= 1 << 31:
                raise ValueError(
                    f"one selection over shape {selected} spans 2**31 weights or more; split the "
                    "tensor or name its stacked axes"
                )

    def gather(self, numbers: Sequence[Count]) -> Count:
        """One vector of what each tensor has: a scalar, or one number per slice."""
        parts = []
        for number, shape, axes in zip(numbers, self.shapes, self.stack_axes, strict=True):
            stacked = [shape[a] for a in axes]
            parts.append([jnp.broadcast_to(c, stacked).reshape(-1) for c in number])
        return Count(*(jnp.concatenate(column) for column in zip(*parts, strict=True)))

    def spread(self, vector: jax.Array) -> list[jax.Array]:
        """Each tensor's part of the vector, in a shape that broadcasts against the tensor."""
        if self.joint:
            return [vector.reshape((1,) * len(shape)) for shape in self.keepdims]
        out, start = [], 0
        for shape in self.keepdims:
            size = math.prod(shape)
            out.append(lax.slice(vector, (start,), (start + size,)).reshape(shape))
            start += size
        return out

    def count(self, flags: Sequence[jax.Array]) -> Count:
        """How many flags are set in each selection."""
        each = zip(flags, self.stack_axes, self.reduced, self.unit_sizes, strict=True)
        counts = [
            _count(f, stacked, axes)
            if type(size) is int and size == 1
            else jnp.sum(jnp.where(f, size, 0), axis=axes, dtype=jnp.int32)
            for f, stacked, axes, size in each
        ]
        count = Count.of(jnp.concatenate([c.reshape(-1) for c in counts]))
        return count.sum() if self.joint else count


def _count(flags: jax.Array, stack_axes: Sequence[int], reduced: Sequence[int]) -> jax.Array:
    """How many flags are set, int32.

    Eight along one axis are summed as bytes first. That vectorizes, where a sum of int32 does not,
    and makes a CPU count ten times as fast. The axis still splits under the usual shardings.
    """
    axis = pack_axis(flags.shape, stack_axes)
    if axis is not None:
        shape = flags.shape
        flags = flags.reshape(*shape[:axis], shape[axis] // 8, 8, *shape[axis + 1 :])
        flags = jnp.sum(flags, axis=axis + 1, dtype=jnp.uint8)
    return jnp.sum(flags, axis=tuple(reduced), dtype=jnp.int32)


def _select(
    scores: Sequence[jax.Array], needs: Count, where: Sequence[jax.Array | None], layout: Layout
) -> list[jax.Array]:
    """The masks of the `needs` largest of every selection; scores must be materialized."""

    def keys() -> Iterator[jax.Array]:
        for s, w in zip(scores, where, strict=True):
            key = ordered_keys(s)
            yield key if w is None else jnp.where(w, key, jnp.zeros((), key.dtype))

    width = 8 * scores[0].dtype.itemsize
    found = _search(list(keys()), needs, layout, width)
    limits = layout.spread(found.threshold)

    def tied() -> list[jax.Array]:
        # a threshold of 0 means that there are too few candidates
        return [(k == t) & (t > 0) for k, t in zip(keys(), limits, strict=True)]

    places_width = max((math.prod(shape) + 1).bit_length() for shape in layout.slices)

    def places() -> Iterator[jax.Array]:
        for s, axes in zip(scores, layout.stack_axes, strict=True):
            yield _places(s.shape, axes, places_width)

    def last_of_ties() -> list[jax.Array]:
        ties, left = tied(), found.left
        separate = Layout(layout.shapes, layout.stack_axes, joint=False, sizes=layout.unit_sizes)
        if layout.joint:
            left = _share_in_order(left, separate.count(ties), layout.order)
        place = [jnp.where(t, p, jnp.uint32(0)) for t, p in zip(ties, places(), strict=True)]
        return separate.spread(_search(place, left, separate, places_width).threshold)

    def every_tie() -> list[jax.Array]:
        return [jnp.zeros(shape, jnp.uint32) for shape in layout.keepdims]

    several = jnp.any((found.threshold > 0) & found.more)
    lasts = lax.cond(several, last_of_ties, every_tie)
    each = zip(keys(), limits, tied(), places(), lasts, strict=True)
    return [(key > limit) | (tie & (place >= last)) for key, limit, tie, place, last in each]


def _share_in_order(needs: Count, available: Count, positions: np.ndarray | None) -> Count:
    """Shares a number among slices: each gets what is available to it, until nothing is left."""
    positions = np.arange(available.low.shape[0]) if positions is None else positions
    order = np.argsort(positions)
    high, low = available.high[order], available.low[order]
    before = Count(jnp.cumsum(high) - high, jnp.zeros_like(low)) + Count.of(jnp.cumsum(low) - low)
    enough = before.reaches(needs)
    return Count(*(jnp.where(enough, 0, c)[positions] for c in needs - before))


class _Found(NamedTuple):
    """The result of a search, one entry per selection."""

    threshold: jax.Array  # the largest key that enough keys reach; 0 where too few are above 0
    left: Count  # how many of the keys equal to it are wanted
    more: jax.Array  # bool, whether more keys than that equal it


def _search(keys: Sequence[jax.Array], needs: Count, layout: Layout, width: int) -> _Found:
    """Finds the `needs`-th largest key of every selection; keys are below 2**width."""
    if width <= _DIGIT_BITS:
        digits = [k.astype(jnp.uint16) for k in keys]
        last = _digit_search(digits, needs, layout, width)
        left = needs - last.above
        return _Found(last.threshold.astype(keys[0].dtype), left, ~left.reaches(last.equal))
    digits = [(k >> _DIGIT_BITS).astype(jnp.uint16) for k in keys]
    first = _digit_search(digits, needs, layout, width - _DIGIT_BITS)
    left = needs - first.above
    # a key of another first digit counts as 0, below every candidate of a pass
    limits = layout.spread(first.threshold.astype(jnp.uint32))
    digits = [
        jnp.where((k >> _DIGIT_BITS) == t, k & _DIGIT_MASK, 0).astype(jnp.uint16)
        for k, t in zip(keys, limits, strict=True)
    ]
    last = _digit_search(digits, left, layout, _DIGIT_BITS)
    # all keys of the first digit reach a second of 0
    equal: Count = jax.tree.map(
        lambda *c: jnp.where(last.threshold > 0, *c), last.equal, first.equal - last.above
    )
    left = left - last.above
    threshold = first.threshold.astype(jnp.uint32) << _DIGIT_BITS
    threshold = threshold | last.threshold.astype(jnp.uint32)
    return _Found(threshold, left, ~left.reaches(equal))


class _Digit(NamedTuple):
    """A digit that was found, one entry per selection."""

    threshold: jax.Array  # the digit, uint16
    reached: Count  # how many digits are at least it
    above: Count  # how many are larger

    @property
    def equal(self) -> Count:
        """How many digits are equal to it."""
        return self.reached - self.above


def _digit_search(digits: Sequence[jax.Array], needs: Count, layout: Layout, bits: int) -> _Digit:
    """The largest digit that `needs` digits reach; `reached` is meaningless where it is 0."""

    def raise_bit(i: jax.Array, found: _Digit) -> _Digit:
        candidates = found.threshold | (jnp.uint16(1) << jnp.asarray(bits - 1 - i, jnp.uint16))
        limits = layout.spread(candidates)
        counts = layout.count([d >= c for d, c in zip(digits, limits, strict=True)])
        enough = counts.reaches(needs)
        # the last candidate that too few reach is the next digit above the threshold
        higher, same = _Digit(candidates, counts, found.above), found._replace(above=counts)
        found = jax.tree.map(lambda *x: jnp.where(enough, *x), higher, same)
        return found

    none = Count(jnp.zeros_like(needs.high), jnp.zeros_like(needs.low))
    start = _Digit(jnp.zeros(needs.low.shape, jnp.uint16), none, none)
    found: _Digit = lax.fori_loop(0, bits, raise_bit, start)
    return found


def _format(dtype: np.dtype) -> tuple[Any, int]:
    if dtype.name not in _FORMATS:
        raise TypeError(f"scores must be one of {', '.join(_FORMATS)}, got {dtype.name}; cast them")
    return _FORMATS[dtype.name]


def ordered_keys(scores: jax.Array) -> jax.Array:
    """Unsigned keys above 0 in the order of the scores: uint32 of float32, otherwise uint16."""
    uint, infinity = _format(scores.dtype)
    sign = uint(1 << (jnp.iinfo(uint).bits - 1))
    bits = lax.bitcast_convert_type(scores, uint)
    magnitude = bits & ~sign
    key = jnp.where(bits >= sign, ~bits, bits | sign)
    key = jnp.where(magnitude == 0, sign, key)
    return jnp.where(magnitude > uint(infinity), uint(1), key)


def _places(shape: Sequence[int], stack_axes: Sequence[int], width: int) -> jax.Array:
    """uint32 in (0, 2**width - 1) that decrease with the flat index within a slice."""
    index = jnp.zeros(shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(len(shape))):
        if axis not in stack_axes:
            index += lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
            stride *= shape[axis]
    last: jax.Array = jnp.uint32((1 << width) - 2)
    return last - index
