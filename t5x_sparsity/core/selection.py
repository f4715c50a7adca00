"""Chooses the units of every weight that are kept: those of largest score, for all at once."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from t5x_sparsity.core import topk
from t5x_sparsity.core.patterns import Pattern, free_axes, is_ranked
from t5x_sparsity.core.stacking import equal_keys


class Choice(NamedTuple):
    """One weight's part in a selection.

    Attributes:
      pattern: the shape that its zeros come in.
      scores: float, the weight's shape.
      k: units to keep per slice: an int, a traced scalar, or one number per slice.
      stack_axes: axes along which slices are chosen separately.
      where: bool, the weight's shape; only these may be chosen. None: all.
      keep: bool, the weight's shape; these, whole units, are always kept and count towards k.
      sharding: equal for weights that are sharded alike, which may then be searched as one stack.
        Weights sharded differently would be moved between devices. None: searched by itself.
    """

    pattern: Pattern
    scores: jax.Array
    k: int | jax.Array
    stack_axes: tuple[int, ...] = ()
    where: jax.Array | None = None
    keep: jax.Array | None = None
    sharding: Hashable | None = None


def select_masks(choices: Mapping[str, Choice]) -> dict[str, jax.Array]:
    """The mask of every weight, all found in one search.

    Args:
      choices: by path.

    Returns:
      path -> bool, the weight's shape.
    """
    stacks = stack_alike(choices)
    found: dict[int, jax.Array] = {}
    searched = [n for n, (_, c) in enumerate(stacks) if c.pattern.searched]
    ranked = [n for n in range(len(stacks)) if n not in searched]
    if ranked:
        scores = topk.materialize([stacks[n][1].scores for n in ranked])
        for n, once in zip(ranked, scores, strict=True):
            c = stacks[n][1]
            if is_ranked(c.pattern):
                found[n] = c.pattern.choose(once, c.k, c.keep, c.where, c.stack_axes)
    if searched:
        units = [_stack_parts(_pool(stacks[n][1])) for n in searched]
        missing = [_missing(choice) for choice in units]
        chosen = topk.top_k_masks(
            [choice.scores for choice in units],
            [k for k, _ in missing],
            where=[where for _, where in missing],
            stack_axes=[choice.stack_axes for choice in units],
        )
        for n, choice, mask in zip(searched, units, chosen, strict=True):
            mask = mask if choice.keep is None else mask | choice.keep
            found[n] = _expand(stacks[n][1], mask)
    masks: dict[str, jax.Array] = {}
    for n, (paths, _) in enumerate(stacks):
        mask = found[n]
        masks |= {paths[0]: mask} if len(paths) == 1 else {p: mask[i] for i, p in enumerate(paths)}
    return {path: masks[path] for path in choices}


def stack_alike(
    choices: Mapping[str, Choice], *, single: bool = False
) -> list[tuple[list[str], Choice]]:
    """Stacks choices that differ in values only, along a new first axis.

    All choices share their passes over scores. Stacks keep the compiled program small, however many
    layers a model has.

    Args:
      choices: by path.
      single: whether a choice without another like it becomes a stack of one.

    Returns:
      The paths of each stack, and the stack as one choice.
    """

    def key_of(c: Choice) -> Hashable | None:
        if c.sharding is None:
            return None
        given = c.where is None, c.keep is None
        return c.sharding, c.pattern, c.scores.shape, c.scores.dtype.name, c.stack_axes, given

    stacks = []
    for paths in equal_keys({path: key_of(c) for path, c in choices.items()}):
        alike = [choices[p] for p in paths]
        stacks.append((paths, _stack(alike) if single or len(paths) > 1 else alike[0]))
    return stacks


def _stack(alike: list[Choice]) -> Choice:
    first = alike[0]
    axes = tuple(a % first.scores.ndim for a in first.stack_axes)
    k = first.k
    if not all(isinstance(c.k, int) and c.k == k for c in alike):
        stacked = tuple(first.scores.shape[a] for a in sorted(axes))
        k = jnp.stack([jnp.broadcast_to(jnp.asarray(c.k, jnp.int32), stacked) for c in alike])
    return first._replace(
        scores=jnp.stack([c.scores for c in alike]),
        k=k,
        stack_axes=(0, *(a + 1 for a in axes)),
        where=_stack_given([c.where for c in alike]),
        keep=_stack_given([c.keep for c in alike]),
    )


def _stack_given(masks: Sequence[jax.Array | None]) -> jax.Array | None:
    """The masks as one stack; None where they are None, as all are then."""
    given = [mask for mask in masks if mask is not None]
    return jnp.stack(given) if given else None


class JointSearch(Protocol):
    """A search over all tensors together, such as `lamp.lamp_masks`."""

    def __call__(
        self,
        scores: Sequence[jax.Array],
        k: topk.Count | int | jax.Array,
        *,
        where: Sequence[jax.Array | None],
        sizes: Sequence[jax.Array | int],
        stack_axes: Sequence[Sequence[int]],
        order: Sequence[Sequence[int]],
    ) -> list[jax.Array]:
        """The mask of each tensor."""


def select_jointly(
    choices: Mapping[str, Choice], k: topk.Count | int, *, search: JointSearch | None = None
) -> dict[str, jax.Array]:
    """The masks of the units of largest score over all weights together.

    Units are taken until they hold `k` weights: exactly k where every weight is a unit, otherwise
    up to one unit more. A choice's `k` is ignored, except for patterns of a fixed level: these
    weights are chosen separately, and do not count towards `k`.

    Args:
      choices: by path; `keep` is not supported.
      k: how many weights to keep, of those without a fixed level.
      search: what finds them. None: `topk.joint_top_k_masks`.

    Raises:
      ValueError: a pattern that chooses within parts of a slice, and so can't share one threshold.
    """
    masks = select_masks({p: c for p, c in choices.items() if c.pattern.fixed_level is not None})
    rest = {p: c for p, c in choices.items() if p not in masks}
    split = [p for p, c in rest.items() if c.pattern.split_axes(c.scores.ndim, c.stack_axes)]
    if split:
        raise ValueError(
            f"{rest[split[0]].pattern} chooses part by part, and can't have one threshold over all "
            f"layers, but the weights {split} have it; give them another pattern or algorithm"
        )
    if not rest:
        return masks
    stacks = stack_alike(rest, single=True)
    units = [_pool(choice) for _, choice in stacks]
    position = {path: n for n, path in enumerate(rest)}
    scores = [choice.scores for choice in units]
    where = [choice.where for choice in units]
    sizes = [c.pattern.sizes(c.scores.shape, c.stack_axes) for _, c in stacks]
    order = [[position[p] for p in paths] for paths, _ in stacks]
    if search is None:
        found = topk.joint_top_k_masks(scores, k, where=where, sizes=sizes, order=order)
    else:
        axes = [choice.stack_axes for choice in units]
        found = search(scores, k, where=where, sizes=sizes, stack_axes=axes, order=order)
    for (paths, choice), mask in zip(stacks, found, strict=True):
        mask = _expand(choice, mask)
        masks |= {p: mask[i] for i, p in enumerate(paths)}
    return {path: masks[path] for path in choices}


def _pool(choice: Choice) -> Choice:
    """The choice with scores and masks of units instead of weights."""
    pattern, axes = choice.pattern, choice.stack_axes

    def pooled(mask: jax.Array | None) -> jax.Array | None:
        return None if mask is None else pattern.pool_mask(mask, axes)

    return choice._replace(
        scores=pattern.pool(choice.scores, axes),
        where=pooled(choice.where),
        keep=pooled(choice.keep),
    )


def _expand(choice: Choice, units: jax.Array) -> jax.Array:
    """The mask of weights for one of units."""
    return choice.pattern.expand(units, choice.scores.shape, choice.stack_axes)


def _stack_parts(choice: Choice) -> Choice:
    """The choice with the pattern's `split_axes` as stacked axes."""
    axes = choice.pattern.split_axes(choice.scores.ndim, choice.stack_axes)
    if not axes:
        return choice
    # an even share for each; stacked axes in order, since k has one number per slice in that order
    k = choice.k // math.prod(choice.scores.shape[a] for a in axes)
    stack_axes = tuple(sorted((*choice.stack_axes, *axes)))
    if jnp.ndim(k):
        k = jnp.expand_dims(k, tuple(stack_axes.index(a) for a in axes))
    return choice._replace(k=k, stack_axes=stack_axes)


def _missing(choice: Choice) -> tuple[int | jax.Array, jax.Array | None]:
    """How many units to choose in addition to those always kept, and from which."""
    if choice.keep is None:
        return choice.k, choice.where
    free = tuple(free_axes(choice.keep.ndim, choice.stack_axes))
    missing = choice.k - jnp.sum(choice.keep, axis=free, dtype=jnp.int32)
    where = ~choice.keep if choice.where is None else choice.where & ~choice.keep
    return jnp.maximum(missing, 0), where
