"""Exact top-k masks without a sort, and without moving a weight between devices.

A score is mapped to an unsigned key of the same order, the key is cut into 16-bit digits, and the
digits of the k-th largest key are found one bit a pass, most significant first. A pass counts, in
place, how many keys reach a candidate: under a sharded `jit` that is a local reduction and one
all-reduce of a number a selection. Ties are settled by the same search over flat indices, and only
where there are any. Everything is integer arithmetic, so that the masks are the same bit for bit on
every mesh and platform.

The order is that of a stable descending sort: larger scores first, equal scores (0.0 and -0.0 are
equal) by lower flat index, infinities as numbers, and NaN after everything else.

Masks are True where a score is kept.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

_DIGIT_BITS = 16
_DIGIT_MASK = (1 << _DIGIT_BITS) - 1

# dtype -> (unsigned integer of the same width, bits of infinity)
_FORMATS = {
    "float32": (jnp.uint32, 0x7F800000),
    "bfloat16": (jnp.uint16, 0x7F80),
    "float16": (jnp.uint16, 0x7C00),
}


class Count(NamedTuple):
    """A number of weights below 2**47, as high * 2**16 + low, without 64-bit integers.

    A selection over a whole model may span more weights than an int32 can count.
    """

    high: jax.Array  # int32
    low: jax.Array  # int32 in [0, 2**16)

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

    def __add__(self, other: Count) -> Count:
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
    """Returns the mask of the k largest scores, or of the k largest of every slice.

    Args:
      scores: float32, bfloat16 or float16, any shape.
      k: how many to keep, a scalar, or one number a slice (shape: the stacked dims, in order).
        May be traced. k above the number of candidates keeps them all.
      where: bool, shape of `scores`; only these are candidates. None: all are.
      stack_axes: axes along which selections are independent, such as scanned layers or experts.

    Returns:
      bool, shape of `scores`.
    """
    return top_k_masks([scores], [k], where=[where], stack_axes=[stack_axes])[0]


def top_k_masks(
    scores: Sequence[jax.Array],
    k: Sequence[int | jax.Array],
    *,
    where: Sequence[jax.Array | None] | None = None,
    stack_axes: Sequence[Sequence[int]] | None = None,
    alike: Sequence[Hashable | None] | None = None,
) -> list[jax.Array]:
    """`top_k_mask` of several tensors in one search: they share every pass, not their threshold.

    Args:
      scores: the tensors.
      k: for each, how many to keep.
      where: for each, its candidates, or None for all.
      stack_axes: for each, the axes along which its selections are independent.
      alike: for each, what tells how it is sharded, such as its logical axes. Tensors that are
        alike, of one shape and dtype, are searched as one stack, which keeps the compiled program
        small however many layers a model has. None: a tensor is searched by itself, since a stack
        of tensors that are sharded differently would move them.

    Returns:
      For each, its mask: bool, the tensor's shape.
    """
    scores = settled(scores)
    where = [None] * len(scores) if where is None else where
    stack_axes = [()] * len(scores) if stack_axes is None else stack_axes
    alike = [None] * len(scores) if alike is None else alike
    stacks: dict[Hashable, list[int]] = {}
    for i, (s, w, axes, kind) in enumerate(zip(scores, where, stack_axes, alike, strict=True)):
        key = i if kind is None else (kind, s.shape, s.dtype.name, tuple(axes), w is None)
        stacks.setdefault(key, []).append(i)

    masks: dict[int, jax.Array] = {}
    for wide in (True, False):  # tensors of one key width share a search
        members = [m for m in stacks.values() if (scores[m[0]].dtype == jnp.float32) == wide]
        if not members:
            continue
        shapes = [(len(m), *scores[m[0]].shape) for m in members]
        slices = [(0, *(a % scores[m[0]].ndim + 1 for a in stack_axes[m[0]])) for m in members]
        layout = Layout(shapes, slices, joint=False)
        needs = layout.gather(
            [
                Count(*(jnp.stack(c) for c in zip(*numbers, strict=True)))
                for numbers in (
                    [_per_slice(k[i], scores[i].shape, stack_axes[i]) for i in m] for m in members
                )
            ]
        )
        found = _select(
            [jnp.stack([scores[i] for i in m]) for m in members],
            needs,
            [None if where[m[0]] is None else jnp.stack([where[i] for i in m]) for m in members],
            layout,
        )
        for m, stack in zip(members, found, strict=True):
            masks.update((i, stack[position]) for position, i in enumerate(m))
    return [masks[i] for i in range(len(scores))]


def _per_slice(k: int | jax.Array, shape: Sequence[int], stack_axes: Sequence[int]) -> Count:
    """k as one number a slice of a tensor, in the shape of its stacked dims."""
    stacked = tuple(shape[a] for a in sorted(a % len(shape) for a in stack_axes))
    return Count(*(jnp.broadcast_to(c, stacked) for c in Count.of(k)))


def joint_top_k_masks(
    scores: Sequence[jax.Array],
    k: int | jax.Array | Count,
    *,
    where: Sequence[jax.Array | None] | None = None,
    sizes: Sequence[jax.Array | int] | None = None,
) -> list[jax.Array]:
    """Returns the masks of the k largest scores over all tensors together.

    Ties go to the earlier tensor, then to the lower flat index. Tensors of mixed dtypes are
    compared as float32. k may be a `Count` where more than 2**31 weights are spanned.

    Args:
      scores: the tensors, an entry a unit: a weight, or several that live and die together.
      k: how many weights to keep.
      where: for each tensor, its candidates, or None for all.
      sizes: for each tensor, how many weights its units hold, int32, broadcast against it. None: a
        weight a unit. The first units that reach k together are kept, so at least k weights are,
        and fewer than k without the last unit.
    """
    if not scores:
        return []
    scores = settled(scores)
    where = [None] * len(scores) if where is None else list(where)
    if any(s.dtype != scores[0].dtype for s in scores):
        scores = [s.astype(jnp.float32) for s in scores]
    layout = Layout([s.shape for s in scores], [()] * len(scores), joint=True, sizes=sizes)
    return _select(scores, Count(*(c.reshape(1) for c in Count.of(k))), where, layout)


def settled(scores: Sequence[jax.Array]) -> list[jax.Array]:
    """The same scores, computed once.

    A compiler may compute what leads to a score again wherever the score is read, and round it
    differently there, by fused multiply-adds. A search would then not find what it has counted.
    What a loop returns is read, not computed again; an optimization barrier is gone before XLA
    fuses.
    """
    tops = [jnp.max(s).astype(jnp.float32) for s in scores if s.size]
    if not tops:  # an empty tensor has no largest score
        return list(scores)
    # always a round or two, but nothing that a compiler knows, or the loop would go
    rounds = jnp.where(jnp.isnan(jnp.max(jnp.stack(tops))), 2, 1)
    start = [jnp.zeros_like(s) for s in scores]
    return lax.fori_loop(0, rounds, lambda _, __: list(scores), start)


class Layout:
    """Where each tensor's selections stand in the vector of all of them.

    One selection a slice of a tensor; a single one over everything where they are `joint`, in
    which case an entry may count for several weights.
    """

    def __init__(self, shapes, stack_axes, *, joint: bool, sizes=None):
        self.joint = joint
        self.unit_sizes = [1] * len(shapes) if sizes is None else list(sizes)
        self.stack_axes = [
            tuple(sorted(a % len(shape) for a in axes))
            for shape, axes in zip(shapes, stack_axes, strict=True)
        ]
        self.stacked = [
            tuple(shape[a] for a in axes)
            for shape, axes in zip(shapes, self.stack_axes, strict=True)
        ]
        self.keepdims = [
            tuple(n if a in axes else 1 for a, n in enumerate(shape))
            for shape, axes in zip(shapes, self.stack_axes, strict=True)
        ]
        self.reduced = [
            tuple(a for a in range(len(shape)) if a not in axes)
            for shape, axes in zip(shapes, self.stack_axes, strict=True)
        ]
        self.sizes = [math.prod(s) for s in self.stacked]
        for shape, axes in zip(shapes, self.reduced, strict=True):
            selected = tuple(shape[a] for a in axes)
            if math.prod(selected) >= 1 << 31:
                raise ValueError(
                    f"one selection over shape {selected} spans 2**31 weights or more; split the "
                    "tensor or name its stacked axes"
                )

    def gather(self, numbers: Sequence[Count]) -> Count:
        """One vector of what is given a tensor: a scalar, or a number a slice."""
        parts = [
            [jnp.broadcast_to(c, stacked).reshape(-1) for c in n]
            for n, stacked in zip(numbers, self.stacked, strict=True)
        ]
        return Count(*(jnp.concatenate(column) for column in zip(*parts, strict=True)))

    def spread(self, vector: jax.Array) -> list[jax.Array]:
        """The part of the vector that is each tensor's, so shaped that it broadcasts over it."""
        if self.joint:
            return [vector.reshape(shape) for shape in self.keepdims]
        out, start = [], 0
        for size, shape in zip(self.sizes, self.keepdims, strict=True):
            out.append(lax.slice(vector, (start,), (start + size,)).reshape(shape))
            start += size
        return out

    def count(self, flags: Sequence[jax.Array]) -> Count:
        """How many flags are set in each selection."""
        counts = [
            jnp.sum(
                f if type(size) is int and size == 1 else jnp.where(f, size, 0),
                axis=axes,
                dtype=jnp.int32,
            ).reshape(-1)
            for f, axes, size in zip(flags, self.reduced, self.unit_sizes, strict=True)
        ]
        count = Count.of(jnp.concatenate(counts))
        return count.sum() if self.joint else count


def _select(scores, needs: Count, where, layout: Layout) -> list[jax.Array]:
    active = [
        jnp.ones(s.shape, bool) if w is None else w for s, w in zip(scores, where, strict=True)
    ]
    digits = [score_digits(s) for s in scores]
    chosen, active, left = _search(digits, needs, active, layout)
    excess = jnp.any(~left.reaches(layout.count(active)))

    def first_of_ties(active):
        indices = [
            _index_digits(s.shape, axes, number=i if layout.joint else None)
            for i, (s, axes) in enumerate(zip(scores, layout.stack_axes, strict=True))
        ]
        levels = max(len(d) for d in indices)
        indices = [[jnp.zeros_like(d[0])] * (levels - len(d)) + d for d in indices]
        above, last, _ = _search(indices, left, active, layout)
        return [a | b for a, b in zip(above, last, strict=True)]

    ties = lax.cond(excess, first_of_ties, lambda active: active, active)
    wanted = layout.spread(needs.reaches(Count.of(1)))
    return [(c | t) & w for c, t, w in zip(chosen, ties, wanted, strict=True)]


def _search(digits, needs: Count, active, layout: Layout):
    """Narrows `active` to the entries that equal the k-th largest in every digit.

    `digits` holds, for every tensor, its uint16 digits from the most significant on. Returns what
    lies above the k-th (`chosen`), what equals it (`active`), and how many of those are needed.
    """
    chosen = [jnp.zeros(a.shape, bool) for a in active]
    for level in zip(*digits, strict=True):
        # an entry out of the race counts as digit 0, which no candidate of a pass ever is
        masked = [jnp.where(a, d, jnp.uint16(0)) for a, d in zip(active, level, strict=True)]

        def raise_bit(i, thresholds, masked=masked, needs=needs):
            bit = jnp.uint16(1 << (_DIGIT_BITS - 1)) >> jnp.asarray(i, jnp.uint16)
            candidates = thresholds | bit
            counts = layout.count(
                [d >= c for d, c in zip(masked, layout.spread(candidates), strict=True)]
            )
            return jnp.where(counts.reaches(needs), candidates, thresholds)

        start = jnp.zeros(needs.low.shape, jnp.uint16)
        thresholds = lax.fori_loop(0, _DIGIT_BITS, raise_bit, start)
        split = layout.spread(thresholds)
        above = [m > t for m, t in zip(masked, split, strict=True)]
        needs = needs - layout.count(above)
        chosen = [c | a for c, a in zip(chosen, above, strict=True)]
        active = [a & (d == t) for a, d, t in zip(active, level, split, strict=True)]
    return chosen, active, needs


def score_digits(scores: jax.Array) -> list[jax.Array]:
    """uint16 digits of keys that order as the scores do, the most significant first."""
    if scores.dtype.name not in _FORMATS:
        raise TypeError(
            f"scores must be one of {', '.join(_FORMATS)}, got {scores.dtype.name}; cast them"
        )
    uint, infinity = _FORMATS[scores.dtype.name]
    width = jnp.iinfo(uint).bits
    sign = uint(1 << (width - 1))
    bits = lax.bitcast_convert_type(scores, uint)
    magnitude = bits & ~sign
    key = jnp.where(bits >= sign, ~bits, bits | sign)
    key = jnp.where(magnitude == 0, sign, key)
    key = jnp.where(magnitude > uint(infinity), uint(0), key)
    return [
        (key >> uint(shift)).astype(jnp.uint16) for shift in range(width - _DIGIT_BITS, -1, -16)
    ]


def _index_digits(shape, stack_axes, *, number: int | None) -> list[jax.Array]:
    """uint16 digits of keys that fall as the flat index within a slice rises."""
    index = jnp.zeros(shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(len(shape))):
        if axis not in stack_axes:
            index += lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
            stride *= shape[axis]
    key = ~index
    shifts = (16, 0) if stride > 1 << _DIGIT_BITS else (0,)
    digits = [(key >> jnp.uint32(shift)).astype(jnp.uint16) for shift in shifts]
    if number is not None:
        digits.insert(0, jnp.full(shape, _DIGIT_MASK - number, jnp.uint16))
    return digits
