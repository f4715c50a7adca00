"""Which units of every weight are kept: the largest by score, chosen for all weights at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from t5x_sparsity.core import topk
from t5x_sparsity.core.patterns import Pattern, free_axes
from t5x_sparsity.core.stacking import equal_keys


class Choice(NamedTuple):
    """One weight's part in a selection.

    Attributes:
      pattern: the shape its zeros come in.
      scores: float, the weight's shape.
      k: units to keep per slice: an int, a traced scalar, or a number a slice.
      stack_axes: axes along which slices are chosen apart.
      where: bool, the weight's shape; only these may be chosen. None: all.
      keep: bool, the weight's shape; these, whole units, are kept in any case and count towards k.
      sharding: equal for weights that are sharded alike, which may then be searched as one stack; a
        stack of others would move between devices. None: searched by itself.
    """

    pattern: Pattern
    scores: jax.Array
    k: int | jax.Array
    stack_axes: tuple[int, ...] = ()
    where: jax.Array | None = None
    keep: jax.Array | None = None
    sharding: Hashable | None = None


def select_masks(choices: Mapping[str, Choice]) -> dict[str, jax.Array]:
    """Returns for every weight the mask of what is kept, all weights in one search."""
    stacks = stack_alike(choices)
    found = [None] * len(stacks)
    ranked = [n for n, (_, c) in enumerate(stacks) if not c.pattern.searched]
    searched = [n for n, (_, c) in enumerate(stacks) if c.pattern.searched]
    if ranked:
        scores = topk.materialize([stacks[n][1].scores for n in ranked])
        for n, once in zip(ranked, scores, strict=True):
            c = stacks[n][1]
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
    masks = {}
    for (paths, _), mask in zip(stacks, found, strict=True):
        masks |= {paths[0]: mask} if len(paths) == 1 else {p: mask[i] for i, p in enumerate(paths)}
    return {path: masks[path] for path in choices}


def stack_alike(
    choices: Mapping[str, Choice], *, single: bool = False
) -> list[tuple[list[str], Choice]]:
    """Choices that differ in their numbers only as one, along a new first axis, with their paths.

    All choices share their passes over scores; stacks keep the compiled program small, however many
    layers a model has.

    Args:
      choices: by path.
      single: whether a choice like no other is a stack too, of one.
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
        where=None if first.where is None else jnp.stack([c.where for c in alike]),
        keep=None if first.keep is None else jnp.stack([c.keep for c in alike]),
    )


def select_jointly(
    choices: Mapping[str, Choice], k: topk.Count | int, *, search: Callable | None = None
) -> dict[str, jax.Array]:
    """Returns the masks of the units of largest score over all weights together.

    Units are taken until they hold `k` weights: exactly k where every weight is a unit, else up to
    one unit more. Each choice's own k is ignored, but for weights of a fixed level, which have no
    part in `k`: they are chosen for themselves.

    Args:
      choices: by path; `keep` is not supported.
      k: how many weights to keep, of those without a fixed level.
      search: what finds them, called as `lamp.lamp_masks` is. None: `topk.joint_top_k_masks`.

    Raises:
      ValueError: a pattern chooses within parts of a slice, and so has no one threshold.
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
    order = {path: n for n, path in enumerate(rest)}
    arguments = {
        "where": [choice.where for choice in units],
        "sizes": [c.pattern.sizes(c.scores.shape, c.stack_axes) for _, c in stacks],
        "turns": [[order[p] for p in paths] for paths, _ in stacks],
    }
    if search is None:
        search = topk.joint_top_k_masks
    else:
        arguments["stack_axes"] = [choice.stack_axes for choice in units]
    found = search([choice.scores for choice in units], k, **arguments)
    for (paths, choice), mask in zip(stacks, found, strict=True):
        mask = _expand(choice, mask)
        masks |= {p: mask[i] for i, p in enumerate(paths)}
    return {path: masks[path] for path in choices}


def _pool(choice: Choice) -> Choice:
    """The choice with scores and masks of units in place of those of weights."""
    pattern, axes = choice.pattern, choice.stack_axes

    def pooled(mask):
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
    """The choice with the axes along which its pattern chooses apart as stacked axes."""
    axes = choice.pattern.split_axes(choice.scores.ndim, choice.stack_axes)
    if not axes:
        return choice
    # an even share for each; stacked axes are in order, as k a slice goes by them
    k = choice.k // math.prod(choice.scores.shape[a] for a in axes)
    stack_axes = tuple(sorted((*choice.stack_axes, *axes)))
    if jnp.ndim(k):
        k = jnp.expand_dims(k, tuple(stack_axes.index(a) for a in axes))
    return choice._replace(k=k, stack_axes=stack_axes)


def _missing(choice: Choice) -> tuple[int | jax.Array, jax.Array | None]:
    """How many units to choose besides those kept in any case, and from which."""
    if choice.keep is None:
        return choice.k, choice.where
    free = tuple(free_axes(choice.keep.ndim, choice.stack_axes))
    missing = choice.k - jnp.sum(choice.keep, axis=free, dtype=jnp.int32)
    where = ~choice.keep if choice.where is None else choice.where & ~choice.keep
    return jnp.maximum(missing, 0), where
