"""The shapes that the zeros of a weight come in.

A pattern says which weights are kept or pruned together, its units, and how many of them a sparsity
level keeps. `selection.py` chooses which, by scores, for all weights of a model at once.
"""

from __future__ import annotations

import ast
import dataclasses
import math
from collections.abc import Sequence
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np

from t5x_sparsity.core import exact_sums, topk
from t5x_sparsity.core.checks import check_integer
from t5x_sparsity.core.groups import group_counts

Shape = Sequence[int]
Axes = Sequence[int]
Given = jax.Array | None  # a mask that may be given


def free_axes(ndim: int, stack_axes: Axes) -> list[int]:
    """The axes that are not stacked."""
    return [a for a in range(ndim) if a not in stack_axes]


class Pattern:
    """The contract of a pattern. By default units are single weights, found by one search.

    A new pattern is a frozen dataclass that derives from this. `shape` is the whole weight's where
    `stack_axes` come with it, and otherwise that of one slice, without stacked axes.

    Attributes:
      searched: whether one search over all weights finds the units that are kept. A pattern that
        isn't searched has `choose`, and is never pooled.
    """

    searched: bool = True

    @property
    def relaxed(self) -> Pattern:
        """The pattern by which weights are dropped, before growing completes this one."""
        return self

    @property
    def fixed_level(self) -> float | None:
        """The sparsity that the pattern itself sets, in [0, 1]; None where it takes any."""
        return None

    def validate(self, shape: Shape) -> None:
        """Raises ValueError, without naming the weight, if a slice can't take this pattern."""

    def units(self, shape: Shape) -> int:
        """Units in a slice."""
        return math.prod(shape)

    def kept(self, shape: Shape, sparsity: float) -> int:
        """Units of a slice that are kept at `sparsity`, in [0, 1]; none only where it is 1."""
        return 0 if sparsity == 1 else max(1, round(self.units(shape) * (1 - sparsity)))

    def pool(self, scores: jax.Array, stack_axes: Axes) -> jax.Array:
        """Scores of weights -> scores of units; as many axes, stacked ones untouched."""
        return scores

    def pool_mask(self, mask: jax.Array, stack_axes: Axes) -> jax.Array:
        """A mask of weights -> of units: whether any weight of a unit is marked."""
        return mask

    def split_axes(self, ndim: int, stack_axes: Axes) -> tuple[int, ...]:
        """Axes of the whole weight, besides stacked ones, along which units compete separately."""
        return ()

    def sizes(self, shape: Shape, stack_axes: Axes) -> jax.Array | int:
        """Weights in every unit, int32, broadcast against the units."""
        return 1

    def expand(self, units: jax.Array, shape: Shape, stack_axes: Axes) -> jax.Array:
        """A mask of units -> of weights."""
        return units

    def choose(
        self, scores: jax.Array, k: int | jax.Array, keep: Given, where: Given, stack_axes: Axes
    ) -> jax.Array:
        """The mask of what is kept, for arguments as in `selection.Choice`; if not `searched`."""
        raise NotImplementedError(f"{type(self).__name__} is not searched, and defines no choose")

    def _whole_axis(self, axis: int, shape: Shape, stack_axes: Axes = ()) -> int:
        """The axis of the whole weight that is `axis` of a slice; ValueError if there is none."""
        free = free_axes(len(shape), stack_axes)
        if not -len(free) <= axis < len(free):
            raise ValueError(
                f"{type(self).__name__} axis {axis} is not an axis of a slice of shape "
                f"{tuple(shape[a] for a in free)}"
            )
        return free[axis]


class _Boxes(Pattern):
    """What patterns share whose units are boxes of weights, kept or pruned together."""

    def unit_shape(self, shape: Shape, stack_axes: Axes = ()) -> tuple[int, ...]:
        """Lengths of a unit along each axis; at the weight's edge, units may be shorter."""
        raise NotImplementedError

    def units(self, shape: Shape) -> int:
        return math.prod(-(-n // u) for n, u in zip(shape, self.unit_shape(shape), strict=True))

    def holds(self, mask: np.ndarray, stack_axes: Axes = ()) -> bool:
        """Whether a bool mask of the whole weight keeps and prunes whole units only."""
        # boxes are constant if they are constant along each axis
        for axis, length in enumerate(self.unit_shape(mask.shape, stack_axes)):
            along = np.moveaxis(mask, axis, 0)
            starts = range(0, len(along), length) if length > 1 else ()
            units = (along[start : start + length] for start in starts)
            if not all((unit == unit[:1]).all() for unit in units):
                return False
        return True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unstructured(Pattern):
    """Any weight may be zero: the k of largest score are kept, per slice.

    >>> Unstructured().kept((4, 8), 0.75)
    8
    """

    def holds(self, mask: np.ndarray, stack_axes: Axes = ()) -> bool:
        """Always: any mask is unstructured."""
        return True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block(_Boxes):
    """Blocks of `height` x `width` over a slice's last two axes are kept or pruned together.

    A block's score is its weights' mean or largest |score| (Narang et al. 2017, arXiv:1711.02782,
    section 3.1, takes the largest). Blocks at the edge of a weight may be smaller.

    >>> block = Block(height=2, width=4)
    >>> block.units((8, 16)), block.kept((8, 16), 0.75)
    (16, 4)

    Attributes:
      height: weights along axis -2, at least 1; 0 takes the whole axis.
      width: weights along axis -1, likewise.
      pooling: 'mean' or 'max'.

    Raises:
      ValueError: a size below 0 or an unknown pooling.
    """

    height: int
    width: int
    pooling: str = "mean"

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            also = ", with 0 for the whole axis"
            check_integer(f"Block.{name}", getattr(self, name), least=0, also=also)
        if self.pooling not in ("mean", "max"):
            raise ValueError(f"Block.pooling must be 'mean' or 'max', got {self.pooling!r}")

    def validate(self, shape: Shape) -> None:
        for name, n, size in (("height", self.height, shape[-2]), ("width", self.width, shape[-1])):
            if n > size:
                raise ValueError(
                    f"Block.{name} is {n}, but a slice of shape {tuple(shape)} has {size}; choose "
                    "a smaller block"
                )

    def unit_shape(self, shape: Shape, stack_axes: Axes = ()) -> tuple[int, ...]:
        rows, columns = (self._whole_axis(a, shape, stack_axes) for a in (-2, -1))
        lengths = {rows: self.height or shape[rows], columns: self.width or shape[columns]}
        return tuple(lengths.get(a, 1) for a in range(len(shape)))

    def _split(self, x: jax.Array, stack_axes: Axes) -> tuple[jax.Array, tuple[int, int]]:
        """x as blocks, and the two axes within a block; smaller ones are filled up with 0."""
        unit = self.unit_shape(x.shape, stack_axes)
        rows, columns = free_axes(x.ndim, stack_axes)[-2:]
        for axis in (columns, rows):  # from the last: earlier axes stay
            blocks = -(-x.shape[axis] // unit[axis])
            missing = blocks * unit[axis] - x.shape[axis]
            if missing:
                pad = [(0, missing if a == axis else 0) for a in range(x.ndim)]
                x = jnp.pad(x, pad)
            x = x.reshape(*x.shape[:axis], blocks, unit[axis], *x.shape[axis + 1 :])
        return x, (rows + 1, columns + 2)

    def pool(self, scores: jax.Array, stack_axes: Axes) -> jax.Array:
        blocks, within = self._split(jnp.abs(scores), stack_axes)
        if self.pooling == "max":
            return jnp.max(blocks, axis=within)
        total = jnp.squeeze(exact_sums.ordered_sum(blocks, within), within)
        return total / self.sizes(scores.shape, stack_axes).astype(jnp.float32)

    def pool_mask(self, mask: jax.Array, stack_axes: Axes) -> jax.Array:
        blocks, within = self._split(mask, stack_axes)
        return jnp.any(blocks, axis=within)

    def sizes(self, shape: Shape, stack_axes: Axes) -> jax.Array:
        unit = self.unit_shape(shape, stack_axes)

        def lengths(axis: int) -> jax.Array:
            n, blocks = unit[axis], -(-shape[axis] // unit[axis])
            length = jnp.full(blocks, n, jnp.int32).at[-1].add(shape[axis] - blocks * n)
            return length.reshape([blocks if a == axis else 1 for a in range(len(shape))])

        rows, columns = free_axes(len(shape), stack_axes)[-2:]
        return lengths(rows) * lengths(columns)

    def expand(self, units: jax.Array, shape: Shape, stack_axes: Axes) -> jax.Array:
        unit = self.unit_shape(shape, stack_axes)
        for axis in free_axes(len(shape), stack_axes)[-2:]:
            units = jnp.repeat(units, unit[axis], axis=axis)
            units = jax.lax.slice_in_dim(units, 0, shape[axis], axis=axis)
        return units


@dataclasses.dataclass(frozen=True, kw_only=True)
class Channel(_Boxes):
    """Whole channels along `axis` of a slice are kept or pruned together.

    A channel's score is the sum of |score| over its weights (Li et al. 2017, arXiv:1608.08710,
    section 3.1).

    >>> Channel(axis=-1).kept((128, 512), 0.75)
    128

    Attributes:
      axis: of a slice. Of a Flax kernel [in, out], -1 are output neurons and -2 inputs.
    """

    axis: int = -1

    def validate(self, shape: Shape) -> None:
        self._whole_axis(self.axis, shape)

    def unit_shape(self, shape: Shape, stack_axes: Axes = ()) -> tuple[int, ...]:
        single = (*stack_axes, self._whole_axis(self.axis, shape, stack_axes))
        return tuple(1 if a in single else n for a, n in enumerate(shape))

    def _within(self, ndim: int, stack_axes: Axes) -> tuple[int, ...]:
        """The axes within a channel."""
        free = free_axes(ndim, stack_axes)
        return tuple(a for a in free if a != free[self.axis])

    def pool(self, scores: jax.Array, stack_axes: Axes) -> jax.Array:
        return exact_sums.ordered_sum(scores, self._within(scores.ndim, stack_axes))

    def pool_mask(self, mask: jax.Array, stack_axes: Axes) -> jax.Array:
        return jnp.any(mask, axis=self._within(mask.ndim, stack_axes), keepdims=True)

    def sizes(self, shape: Shape, stack_axes: Axes) -> int:
        return math.prod(self.unit_shape(shape, stack_axes))

    def expand(self, units: jax.Array, shape: Shape, stack_axes: Axes) -> jax.Array:
        return jnp.broadcast_to(units, tuple(shape))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConstantFanIn(Pattern):
    """Every output neuron, along a slice's last axis, keeps the same number of weights.

    It is k = max(1, round((1 - s) fan_in)) (Lasby et al. 2023, arXiv:2305.02299, section 3).

    >>> ConstantFanIn().kept((64, 10), 0.75)  # 16 for each of 10 neurons
    160
    """

    @property
    def relaxed(self) -> Unstructured:
        # dropping leaves no neuron more than it had; growing gives each its k again
        return Unstructured()

    def kept(self, shape: Shape, sparsity: float) -> int:
        return shape[-1] * super().kept(shape[:-1], sparsity)

    def split_axes(self, ndim: int, stack_axes: Axes) -> tuple[int, ...]:
        return (free_axes(ndim, stack_axes)[-1],)

    def holds(self, mask: np.ndarray, stack_axes: Axes = ()) -> bool:
        """Whether all neurons of a slice with any weight keep the same number."""
        *inputs, neurons = free_axes(mask.ndim, stack_axes)
        counts = np.count_nonzero(mask, axis=tuple(inputs), keepdims=True)
        return bool(((counts == 0) | (counts == counts.max(axis=neurons, keepdims=True))).all())


@dataclasses.dataclass(frozen=True, kw_only=True)
class NByM(Pattern):
    """In every group of `m` consecutive weights along `axis`, the `n` of largest score are kept.

    The level is 1 - n/m; while a schedule ramps to it, more than n of a group are kept. Sparse
    tensor cores multiply 2:4 along the reduction axis (Mishra et al. 2021, arXiv:2104.08378,
    section 3).

    >>> NByM(n=2, m=4).fixed_level
    0.5

    Attributes:
      n: weights kept per group, in [1, m].
      m: weights of a group.
      axis: of a slice, a multiple of m long. -2 is the reduction axis of a Flax kernel [in, out].
    """

    n: int
    m: int
    axis: int = -2

    searched = False  # groups are small, and need nothing of each other

    def __post_init__(self) -> None:
        if not 0 < self.n <= self.m:
            raise ValueError(f"NByM needs 0 < n <= m, got n={self.n}, m={self.m}")

    @property
    def relaxed(self) -> Unstructured:
        # no group has more than n, so dropping needs no groups; growing restores n in each
        return Unstructured()

    def validate(self, shape: Shape) -> None:
        self._whole_axis(self.axis, shape)
        if shape[self.axis] % self.m:
            raise ValueError(
                f"{self.n}:{self.m} needs axis {self.axis} to be a multiple of {self.m}, but it "
                f"has {shape[self.axis]} of shape {tuple(shape)}; choose another axis or m"
            )

    @property
    def fixed_level(self) -> float:
        return 1 - self.n / self.m

    def kept(self, shape: Shape, sparsity: float) -> int:
        return math.prod(shape) // self.m * self.n

    def holds(self, mask: np.ndarray, stack_axes: Axes = ()) -> bool:
        """Whether every group keeps exactly n."""
        axis = self._whole_axis(self.axis, mask.shape, stack_axes)
        whole = mask.shape[axis] % self.m == 0
        return whole and bool((group_counts(mask, axis, self.m) == self.n).all())

    def choose(
        self, scores: jax.Array, k: int | jax.Array, keep: Given, where: Given, stack_axes: Axes
    ) -> jax.Array:
        """The largest of every group, those of `keep` first, and only those of `where` or `keep`.

        A group gets its share of the slice's k weights, rounded up: n, where k is `kept`.
        """
        free = free_axes(scores.ndim, stack_axes)
        axis = free[self.axis]
        n = -(-k // (math.prod(scores.shape[a] for a in free) // self.m))
        if not isinstance(n, int) and n.ndim:  # one number per slice
            inner = [a if a <= axis else a + 1 for a in free]
            n = jnp.expand_dims(n, (*inner, axis + 1))
        shape = (*scores.shape[:axis], -1, self.m, *scores.shape[axis + 1 :])
        groups = topk.ordered_keys(scores).reshape(shape)
        tier = jnp.ones(groups.shape, jnp.uint8)
        if where is not None:
            tier = where.reshape(shape).astype(jnp.uint8)
        if keep is not None:
            tier = jnp.where(keep.reshape(shape), jnp.uint8(2), tier)
        place = jax.lax.broadcasted_iota(jnp.int32, groups.shape, axis + 1)
        rank = jnp.zeros(groups.shape, jnp.int32)
        for j in range(self.m):  # a weight's rank: how many of its group come first
            one = jax.lax.slice_in_dim(groups, j, j + 1, axis=axis + 1)
            one_tier = jax.lax.slice_in_dim(tier, j, j + 1, axis=axis + 1)
            tied = (one_tier == tier) & (one == groups)
            before = (one_tier > tier) | ((one_tier == tier) & (one > groups))
            rank += (before | (tied & (j < place))).astype(jnp.int32)
        return ((rank < n) & (tier > 0)).reshape(scores.shape)


BuiltIn = Unstructured | Block | Channel | ConstantFanIn | NByM


def to_text(pattern: Pattern) -> str:
    """A pattern as files name it: its repr, in one line.

    >>> to_text(NByM(n=2, m=4))
    'NByM(n=2, m=4, axis=-2)'
    """
    return " ".join(repr(pattern).split())


def from_text(text: str) -> BuiltIn | None:
    """The pattern that `to_text` wrote; None for any other text, such as a user's own pattern.

    >>> from_text("Channel(axis=-2)")
    Channel(axis=-2)
    """
    known: dict[str, type[BuiltIn]] = {cls.__name__: cls for cls in get_args(BuiltIn)}
    try:
        call = ast.parse(text, mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            return None
        fields = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
        return known[call.func.id](**fields)
    except (KeyError, SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return None
