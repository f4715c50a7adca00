"""Which units of every weight are kept: the largest by score, chosen for all weights at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from t5x_sparsity import select
from t5x_sparsity.patterns import Pattern, free_axes


class Choice(NamedTuple):
    """One weight's part in a selection.

    Attributes:
      pattern: the shape its zeros come in.
      scores: float, the weight's shape.
      k: units to keep per slice: an int, a traced scalar, or a number a slice.
      stack_axes: axes along which slices are chosen apart.
      where: bool, the weight's shape; only these may be chosen. None: all.
      keep: bool, the weight's shape; these, whole units, are kept in any case and count towards k.
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
    masks, search = {}, {}
    fixed = [p for p, c in choices.items() if c.pattern.fixed_level is not None]
    if fixed:
        scores = select.settled([choices[p].scores for p in fixed])
        for path, settled in zip(fixed, scores, strict=True):
            choice = choices[path]
            masks[path] = choice.pattern.choose(
                settled, choice.k, choice.keep, choice.where, choice.stack_axes
            )
    for path, choice in choices.items():
        if path not in masks:
            search[path] = _split(_of_units(choice))
    if search:
        asked = {path: _fill_request(choice) for path, choice in search.items()}
        found = select.top_k_masks(
            [choice.scores for choice in search.values()],
            [k for k, _ in asked.values()],
            where=[where for _, where in asked.values()],
            stack_axes=[choice.stack_axes for choice in search.values()],
            alike=[choice.alike for choice in search.values()],
        )
        for (path, choice), units in zip(search.items(), found, strict=True):
            units = units if choice.keep is None else units | choice.keep
            scores, axes = choices[path].scores, choices[path].stack_axes
            masks[path] = choice.pattern.expand(units, scores.shape, axes)
    return {path: masks[path] for path in choices}


def select_jointly(
    choices: Mapping[str, Choice], k: select.Count | int, *, search: Callable | None = None
) -> dict[str, jax.Array]:
    """Returns the masks of the units of largest score over all weights together.

    Units are taken until they hold `k` weights: exactly k where every weight is a unit, else up to
    one unit more. Each choice's own k is ignored, but for weights of a fixed level, which have no
    part in `k`: they are chosen for themselves.

    Args:
      choices: by path; `keep` is not supported.
      k: how many weights to keep, of those without a fixed level.
      search: what finds them, called as `lamp.lamp_masks` is. None: `select.joint_top_k_masks`.

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
    units = [_of_units(choice) for choice in rest.values()]
    arguments = {
        "where": [choice.where for choice in units],
        "sizes": [c.pattern.sizes(c.scores.shape, c.stack_axes) for c in rest.values()],
    }
    if search is None:
        search = select.joint_top_k_masks
    else:
        arguments["stack_axes"] = [choice.stack_axes for choice in units]
    found = search([choice.scores for choice in units], k, **arguments)
    for (path, choice), mask in zip(rest.items(), found, strict=True):
        masks[path] = choice.pattern.expand(mask, choice.scores.shape, choice.stack_axes)
    return {path: masks[path] for path in choices}


def _of_units(choice: Choice) -> Choice:
    """The choice with scores and masks of units in place of those of weights."""
    pattern, axes = choice.pattern, choice.stack_axes

    def pooled(mask):
        return None if mask is None else pattern.pool_mask(mask, axes)

    return choice._replace(
        scores=pattern.pool(choice.scores, axes),
        where=pooled(choice.where),
        keep=pooled(choice.keep),
        alike=None if choice.alike is None else (choice.alike, pattern),
    )


def _split(choice: Choice) -> Choice:
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


def _fill_request(choice: Choice):
    """How many to choose beside those kept in any case, and from which."""
    if choice.keep is None:
        return choice.k, choice.where
    free = tuple(free_axes(choice.keep.ndim, choice.stack_axes))
    missing = choice.k - jnp.sum(choice.keep, axis=free, dtype=jnp.int32)
    where = ~choice.keep if choice.where is None else choice.where & ~choice.keep
    return jnp.maximum(missing, 0), where
