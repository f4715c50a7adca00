"""What shape the zeros of a weight come in.

A pattern says which weights live and die together, and how many of them a sparsity level keeps. The
choice itself is by score, largest first, and made for all weights of a model at once in
`select_masks`, so that they share the passes of one search.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from t5x_sparsity import select


class Pattern(Protocol):
    """The contract of a pattern. Shapes are those of one slice: stacked axes are taken out."""

    @property
    def relaxed(self) -> Pattern:
        """The pattern by which weights are dropped, before `fill` completes this one."""

    def validate(self, shape: Sequence[int]) -> None:
        """Raises ValueError, without naming the weight, if a slice can't take this pattern."""

    @property
    def fixed_level(self) -> float | None:
        """The sparsity that the pattern itself sets, in [0, 1]; None where it takes any."""

    def kept(self, shape: Sequence[int], sparsity: float) -> int:
        """Weights of a slice that are kept at `sparsity`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unstructured:
    """Any weight may be zero: the k of largest score are kept, per slice."""

    @property
    def relaxed(self) -> Unstructured:
        return self

    def validate(self, shape: Sequence[int]) -> None:
        del shape

    @property
    def fixed_level(self) -> None:
        return None

    def kept(self, shape: Sequence[int], sparsity: float) -> int:
        """max(1, round(N (1 - s))); none only where s is exactly 1."""
        if sparsity == 1:
            return 0
        return max(1, round(math.prod(shape) * (1 - sparsity)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class NByM:
    """In every run of `m` consecutive weights along `axis`, the `n` of largest score are kept.

    The level is 1 - n/m, whatever level is asked for. The default axis, -2, is the reduction axis
    of a Flax kernel [in, out], along which sparse tensor cores want their 2:4 (Mishra et al. 2021,
    arXiv:2104.08378, section 3).
    """

    n: int
    m: int
    axis: int = -2

    def __post_init__(self):
        if not 0 < self.n <= self.m:
            raise ValueError(f"NByM needs 0 < n <= m, got n={self.n}, m={self.m}")

    @property
    def relaxed(self) -> Unstructured:
        # a group never holds more than n, so dropping needs no groups; `fill` restores n in each
        return Unstructured()

    def validate(self, shape: Sequence[int]) -> None:
        if not -len(shape) <= self.axis < len(shape):
            raise ValueError(f"NByM axis {self.axis} is not an axis of a slice of shape {shape}")
        if shape[self.axis] % self.m:
            raise ValueError(
                f"{self.n}:{self.m} needs axis {self.axis} to be a multiple of {self.m}, but it "
                f"has {shape[self.axis]} of shape {tuple(shape)}; choose another axis or m"
            )

    @property
    def fixed_level(self) -> float:
        return 1 - self.n / self.m

    def kept(self, shape: Sequence[int], sparsity: float) -> int:
        del sparsity
        return math.prod(shape) // self.m * self.n

    def choose(self, scores, keep, where, stack_axes) -> jax.Array:
        """The n largest of every group; what `keep` marks comes first, what `where` bars last."""
        free = [a for a in range(scores.ndim) if a not in stack_axes]
        axis = free[self.axis]
        shape = (*scores.shape[:axis], -1, self.m, *scores.shape[axis + 1 :])
        groups = _ordered(scores).reshape(shape)
        tier = jnp.ones(groups.shape, jnp.uint8)
        if where is not None:
            tier = where.reshape(shape).astype(jnp.uint8)
        if keep is not None:
            tier = jnp.where(keep.reshape(shape), jnp.uint8(2), tier)
        place = jax.lax.broadcasted_iota(jnp.int32, groups.shape, axis + 1)
        rank = jnp.zeros(groups.shape, jnp.int32)
        for j in range(self.m):  # the rank is how many of the group come before
            one = jax.lax.slice_in_dim(groups, j, j + 1, axis=axis + 1)
            one_tier = jax.lax.slice_in_dim(tier, j, j + 1, axis=axis + 1)
            tied = (one_tier == tier) & (one == groups)
            before = (one_tier > tier) | ((one_tier == tier) & (one > groups))
            rank += (before | (tied & (j < place))).astype(jnp.int32)
        chosen = (rank < self.n) & (tier > 0)
        return chosen.reshape(scores.shape)


def _ordered(scores: jax.Array) -> jax.Array:
    """uint32 keys in the order of the scores, as the search compares them."""
    digits = select.score_digits(scores)
    key = digits[0].astype(jnp.uint32)
    for digit in digits[1:]:
        key = (key << 16) | digit.astype(jnp.uint32)
    return key


class Choice(NamedTuple):
    """One weight's part in a selection.

    Attributes:
      pattern: the shape its zeros come in.
      scores: float, the weight's shape.
      k: weights to keep per slice, an int or a traced scalar. Ignored by patterns of fixed level.
      stack_axes: axes along which slices are chosen apart.
      where: bool, the weight's shape; only these may be chosen. None: all.
      keep: bool, the weight's shape; these are kept in any case, and count towards k.
      alike: equal for weights that are sharded alike, which may then be searched as one stack.
    """

    pattern: Pattern
    scores: jax.Array
    k: int | jax.Array
    stack_axes: tuple[int, ...] = ()
    where: jax.Array | None = None
    keep: jax.Array | None = None
    alike: Hashable | None = None


def select_masks(choices: Mapping[str, Choice]) -> dict[str, jax.Array]:
    """Returns for every weight the mask of what is kept, all weights in one search."""
    masks, search = {}, []
    for path, choice in choices.items():
        if isinstance(choice.pattern, NByM):
            masks[path] = choice.pattern.choose(
                choice.scores, choice.keep, choice.where, choice.stack_axes
            )
        else:
            search.append(path)
    if search:
        asked = [_fill_request(choices[p]) for p in search]
        found = select.top_k_masks(
            [choices[p].scores for p in search],
            [k for k, _ in asked],
            where=[where for _, where in asked],
            stack_axes=[choices[p].stack_axes for p in search],
            alike=[choices[p].alike for p in search],
        )
        for path, mask in zip(search, found, strict=True):
            keep = choices[path].keep
            masks[path] = mask if keep is None else mask | keep
    return {path: masks[path] for path in choices}


def _fill_request(choice: Choice):
    """How many to choose beside those kept in any case, and from which."""
    if choice.keep is None:
        return choice.k, choice.where
    free = tuple(a for a in range(choice.keep.ndim) if a not in choice.stack_axes)
    missing = choice.k - jnp.sum(choice.keep, axis=free, dtype=jnp.int32)
    where = ~choice.keep if choice.where is None else choice.where & ~choice.keep
    return jnp.maximum(missing, 0), where
