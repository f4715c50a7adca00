"""The shapes that the zeros of a weight come in.

A pattern says which weights are kept or pruned together, its units, and how many of them a sparsity
level keeps. Which ones depends on scores, for all weights of a model at once: see `selection.py`.
"""

from __future__ import annotations

import ast
import dataclasses
import math
from collections.abc import Sequence
from typing import Protocol, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from t5x_sparsity.core import exact_sums, topk
from t5x_sparsity.core.checks import check_integer
from t5x_sparsity.core.groups import group_counts


class Pattern(Protocol):
    """The contract of a pattern: a frozen dataclass, so that equal patterns compare equal.

    `shape` is that of one slice, without stacked axes, where no `stack_axes` come with it, and the
    whole weight's where they do.
    """

    @property
    def relaxed(self) -> Pattern:
        """The pattern by which weights are dropped, before growing completes this one."""

    def validate(self, shape: Sequence[int]) -> None:
        """Raises ValueError, without naming the weight, if a slice can't take this pattern."""

    @property
    def fixed_level(self) -> float | None:
        """The sparsity that the pattern itself sets, in [0, 1]; None where it takes any."""

    @property
    def searched(self) -> bool:
        """Whether one search over all weights finds the units that are kept.

        A pattern that isn't searched is a `RankedPattern`, and is never pooled.
        """

    def units(self, shape: Sequence[int]) -> int:
        """Units in a slice."""

    def kept(self, shape: Sequence[int], sparsity: float) -> int:
        """Units of a slice that are kept at `sparsity`, in [0, 1]."""

    def pool(self, scores: jax.Array, stack_axes: Sequence[int]) -> jax.Array:
        """Scores of weights -> scores of units; as many axes, stacked ones untouched."""

    def pool_mask(self, mask: jax.Array, stack_axes: Sequence[int]) -> jax.Array:
        """A mask of weights -> of units: whether any weight of a unit is marked."""

    def split_axes(self, ndim: int, stack_axes: Sequence[int]) -> tuple[int, ...]:
        """Axes of the whole weight, besides stacked ones, along which units compete separately."""

    def sizes(self, shape: Sequence[int], stack_axes: Sequence[int]) -> jax.Array | int:
        """Weights in every unit, int32, broadcast against the units."""

    def expand(
        self, units: jax.Array, shape: Sequence[int], stack_axes: Sequence[int]
    ) -> jax.Array:
        """A mask of units -> of weights."""


class RankedPattern(Pattern, Protocol):
    """A pattern that chooses weights by itself, as NByM does, instead of by a search."""

    def choose(
        self,
        scores: jax.Array,
        k: int | jax.Array,
        keep: jax.Array | None,
        where: jax.Array | None,
        stack_axes: Sequence[int],
    ) -> jax.Array:
        """The mask of what is kept, for arguments as in `selection.Choice`."""


def is_ranked(pattern: Pattern) -> TypeGuard[RankedPattern]:
    """Whether the pattern chooses by itself."""
    return not pattern.searched


def free_axes(ndim: int, stack_axes: Sequence[int]) -> list[int]:
    """The axes that are not stacked."""
    return [a for a in range(ndim) if a not in stack_axes]


def _kept(units: int, sparsity: float) -> int:
    """max(1, round(N (1 - s))); none only where s is exactly 1."""
    return 0 if sparsity == 1 else max(1, round(units * (1 - sparsity)))


class _Searched:
    """What most patterns share: any level, and one search for the units of a slice."""

    searched = True

    @property
    def relaxed(self: Pattern) -> Pattern:
        return self

    def validate(self, shape: Sequence[int]) -> None:
        """Any shape will do."""

    @property
    def fixed_level(self) -> float | None:
        return None

    def kept(self: Pattern, shape: Sequence[int], sparsity: float) -> int:
        return _kept(self.units(shape), sparsity)

    def split_axes(self, ndim: int, stack_axes: Sequence[int]) -> tuple[int, ...]:
        return ()


class _Boxes(_Searched):
    """What patterns share whose units are boxes of weights, kept or pruned together."""

    def unit_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Lengths of a unit along the axes of a slice; at its edge, units may be shorter."""
        raise NotImplementedError

    def holds(self, mask: np.ndarray, stack_axes: Sequence[int] = ()) -> bool:
        """Whether a bool mask of the whole weight keeps and prunes whole units only."""
        free = free_axes(mask.ndim, stack_axes)
        # boxes are constant if they are constant along each axis
        for axis, length in zip(free, self.unit_shape([mask.shape[a] for a in free]), strict=True):
            along = np.moveaxis(mask, axis, 0)
            starts = range(0, len(along), length) if length > 1 else ()
            units = (along[start : start + length] for start in starts)
            if not all((unit == unit[:1]).all() for unit in units):
                return False
        return True


class _Weights(_Searched):
    """What patterns share whose units are single weights."""

    def units(self, shape: Sequence[int]) -> int:
        return math.prod(shape)

    def pool(self, scores: jax.Array, stack_axes: Sequence[int]) -> jax.Array:
        return scores

    def pool_mask(self, mask: jax.Array, stack_axes: Sequence[int]) -> jax.Array:
        return mask

    def sizes(self, shape: Sequence[int], stack_axes: Sequence[int]) -> jax.Array | int:
        return 1

    def expand(
        self, units: jax.Array, shape: Sequence[int], stack_axes: Sequence[int]
    ) -> jax.Array:
        return units


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unstructured(_Weights):
    """Any weight may be zero: the k of largest score are kept, per slice.

    >>> Unstructured().kept((4, 8), 0.75)
    8
    """

    def holds(self, mask: np.ndarray, stack_axes: Sequence[int] = ()) -> bool:
        """Always: any mask is unstructured."""
        return True


_WHOLE_AXIS = ", with 0 for the whole axis"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block(_Boxes):
    """Blocks of `height` x `width` over a slice's last two axes are kept or pruned together.

    A block's score is its weights' mean or largest |score|; a block at the edge of a weight that
    the block's size does not divide is smaller. The k blocks of largest score are kept (Narang et
    al. 2017, arXiv:1711.02782, section 3.1, which takes the largest).

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
        check_integer("Block.height", self.height, least=0, also=_WHOLE_AXIS)
        check_integer("Block.width", self.width, least=0, also=_WHOLE_AXIS)
        if self.pooling not in ("mean", "max"):
            raise ValueError(f"Block.pooling must be 'mean' or 'max', got {self.pooling!r}")

    def validate(self, shape: Sequence[int]) -> None:
        for name, n, size in (("height", self.height, shape[-2]), ("width", self.width, shape[-1])):
            if n > size:
                raise ValueError(
                    f"Block.{name} is {n}, but a slice of shape {tuple(shape)} has {size}; choose "
                    "a smaller block"
                )

    def units(self, shape: Sequence[int]) -> int:
        height, width = self._block(shape)
        return math.prod(shape[:-2]) * -(-shape[-2] // height) * -(-shape[-1] // width)

    def _block(self, shape: Sequence[int]) -> tuple[int, int]:
        return self.height or shape[-2], self.width or shape[-1]

    def unit_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        _check_axis("Block", -2, shape)
        return (*[1] * (len(shape) - 2), *self._block(shape))

    def _split(
        self, x: jax.Array, stack_axes: Sequence[int], fill: float
    ) -> tuple[jax.Array, tuple[int, int]]:
        """x as blocks, and the two axes within a block; smaller blocks are filled up."""
        rows, columns = free_axes(x.ndim, stack_axes)[-2:]
        height, width = self._block((x.shape[rows], x.shape[columns]))
        for axis, n in ((columns, width), (rows, height)):  # from the last: earlier axes stay
            blocks = -(-x.shape[axis] // n)
            missing = blocks * n - x.shape[axis]
            if missing:
                pad = [(0, missing if a == axis else 0) for a in range(x.ndim)]
                x = jnp.pad(x, pad, constant_values=fill)
            x = x.reshape(*x.shape[:axis], blocks, n, *x.shape[axis + 1 :])
        return x, (rows + 1, columns + 2)

    def pool(self, scores: jax.Array, stack_axes: Sequence[int]) -> jax.Array:
        blocks, within = self._split(jnp.abs(scores), stack_axes, 0)
        if self.pooling == "max":
            return jnp.max(blocks, axis=within)
        total = jnp.squeeze(exact_sums.ordered_sum(blocks, within), within)
        return total / self.sizes(scores.shape, stack_axes).astype(jnp.float32)

    def pool_mask(self, mask: jax.Array, stack_axes: Sequence[int]) -> jax.Array:
        blocks, within = self._split(mask, stack_axes, False)
        return jnp.any(blocks, axis=within)

    def sizes(self, shape: Sequence[int], stack_axes: Sequence[int]) -> jax.Array:
        def lengths(axis: int, n: int) -> jax.Array:
            blocks = -(-shape[axis] // n)
            length = jnp.full(blocks, n, jnp.int32).at[-1].add(shape[axis] - blocks * n)
            return length.reshape([blocks if a == axis else 1 for a in range(len(shape))])

        rows, columns = free_axes(len(shape), stack_axes)[-2:]
        height, width = self._block((shape[rows], shape[columns]))
        return lengths(rows, height) * lengths(columns, width)

    def expand(
        self, units: jax.Array, shape: Sequence[int], stack_axes: Sequence[int]
    ) -> jax.Array:
        rows, columns = free_axes(len(shape), stack_axes)[-2:]
        height, width = self._block((shape[rows], shape[columns]))
        for axis, n in ((rows, height), (columns, width)):
            units = jax.lax.slice_in_dim(jnp.repeat(units, n, axis=axis), 0, shape[axis], axis=axis)
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

    def validate(self, shape: Sequence[int]) -> None:
        _check_axis("Channel", self.axis, shape)

    def units(self, shape: Sequence[int]) -> int:
        return shape[self.axis]

    def _within(self, ndim: int, stack_axes: Sequence[int]) -> tuple[int, ...]:
        """The axes within a channel."""
        free = free_axes(ndim, stack_axes)
        return tuple(a for a in free if a != free[self.axis])

    def unit_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        _check_axis("Channel", self.axis, shape)
        within = self._within(len(shape), ())
        return tuple(n if a in within else 1 for a, n in enumerate(shape))

    def pool(self, scores: jax.Array, stack_axes: Sequence[int]) -> jax.Array:
        return exact_sums.ordered_sum(scores, self._within(scores.ndim, stack_axes))

    def pool_mask(self, mask: jax.Array, stack_axes: Sequence[int]) -> jax.Array:
        return jnp.any(mask, axis=self._within(mask.ndim, stack_axes), keepdims=True)

    def sizes(self, shape: Sequence[int], stack_axes: Sequence[int]) -> int:
        return math.prod(shape[a] for a in self._within(len(shape), stack_axes))

    def expand(
        self, units: jax.Array, shape: Sequence[int], stack_axes: Sequence[int]
    ) -> jax.Array:
        return jnp.broadcast_to(units, tuple(shape))


def _check_axis(name: str, axis: int, shape: Sequence[int]) -> None:
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"{name} axis {axis} is not an axis of a slice of shape {tuple(shape)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConstantFanIn(_Weights):
    """Every output neuron, along a slice's last axis, keeps the same number of weights.

    It is k = max(1, round((1 - s) fan_in)) (Lasby et al. 2023, arXiv:2305.02299, section 3).

    >>> ConstantFanIn().kept((64, 10), 0.75)  # 16 for each of 10 neurons
    160
    """

    @property
    def relaxed(self) -> Unstructured:
        # dropping leaves no neuron more than it had; growing gives each its k again
        return Unstructured()

    def kept(self, shape: Sequence[int], sparsity: float) -> int:
        return shape[-1] * _kept(math.prod(shape[:-1]), sparsity)

    def split_axes(self, ndim: int, stack_axes: Sequence[int]) -> tuple[int, ...]:
        return (free_axes(ndim, stack_axes)[-1],)

    def holds(self, mask: np.ndarray, stack_axes: Sequence[int] = ()) -> bool:
        """Whether all neurons of a slice with any weight keep the same number."""
        *inputs, neurons = free_axes(mask.ndim, stack_axes)
        counts = np.count_nonzero(mask, axis=tuple(inputs), keepdims=True)
        return bool(((counts == 0) | (counts == counts.max(axis=neurons, keepdims=True))).all())


@dataclasses.dataclass(frozen=True, kw_only=True)
class NByM(_Weights):
    """In every group of `m` consecutive weights along `axis`, the `n` of largest score are kept.

    The level is 1 - n/m, whatever level is asked for. While a schedule ramps to it, more than n of
    a group are kept. Sparse tensor cores multiply 2:4 along the reduction axis (Mishra et al. 2021,
    arXiv:2104.08378, section 3).

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

    def validate(self, shape: Sequence[int]) -> None:
        _check_axis("NByM", self.axis, shape)
        if shape[self.axis] % self.m:
            raise ValueError(
                f"{self.n}:{self.m} needs axis {self.axis} to be a multiple of {self.m}, but it "
                f"has {shape[self.axis]} of shape {tuple(shape)}; choose another axis or m"
            )

    @property
    def fixed_level(self) -> float:
        return 1 - self.n / self.m

    def kept(self, shape: Sequence[int], sparsity: float) -> int:
        return math.prod(shape) // self.m * self.n

    def holds(self, mask: np.ndarray, stack_axes: Sequence[int] = ()) -> bool:
        """Whether every group keeps exactly n."""
        free = free_axes(mask.ndim, stack_axes)
        _check_axis("NByM", self.axis, [mask.shape[a] for a in free])
        axis = free[self.axis]
        if mask.shape[axis] % self.m:
            return False
        return bool((group_counts(mask, axis, self.m) == self.n).all())

    def choose(
        self,
        scores: jax.Array,
        k: int | jax.Array,
        keep: jax.Array | None,
        where: jax.Array | None,
        stack_axes: Sequence[int],
    ) -> jax.Array:
        """The largest of every group, those of `keep` first, and only those of `where` or `keep`.

        A group gets its share of the slice's k weights, rounded up: n, where k is `kept`.
        """
        free = free_axes(scores.ndim, stack_axes)
        axis = free[self.axis]
        groups_of_slice = math.prod(scores.shape[a] for a in free) // self.m
        n = -(-k // groups_of_slice)
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
        chosen = (rank < n) & (tier > 0)
        return chosen.reshape(scores.shape)


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
    known = {cls.__name__: cls for cls in (Unstructured, Block, Channel, ConstantFanIn, NByM)}
    try:
        call = ast.parse(text, mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            return None
        fields = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
        return known[call.func.id](**fields)
    except (KeyError, SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return None
