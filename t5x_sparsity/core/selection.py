"""Which units of every weight are kept: the largest by score, chosen for all weights at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from t5x_sparsity.core import topk
from t5x_sparsity.core.patterns import Pattern, free_axes


class Choice(NamedTuple):
    """One weight's part in a selection.

    Attributes:
      pattern: the shape its zeros come in.
      scores: float, the weight's shape.
      k: units to keep per slice: an int, a traced scalar, or a number a slice.
      stack_axes: axes along which slices are chosen apart.
      where: bool, the weight's shape; only these may be chosen. None: all.
      keep: bool, the weight's shape; these, whole units, are kept in any case and count towards k.
      alike: equal for weights that are sharded alike, which may then be searched as one stack; a
        stack of weights that are not would move them. None: searched by itself.
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
    masks: dict[str, jax.Array] = {}
    stacks = [
        (paths, _stack([choices[p] for p in paths]) if len(paths) > 1 else choices[paths[0]])
        for paths in _alike(choices)
    ]
    fixed = [n for n, (_, c) in enumerate(stacks) if c.pattern.fixed_level is not None]
    search = [n for n in range(len(stacks)) if n not in fixed]
    found: dict[int, jax.Array] = {}
    if fixed:
        scores = topk.settled([stacks[n][1].scores for n in fixed])
        for n, settled in zip(fixed, scores, strict=True):
            choice = stacks[n][1]
            found[n] = choice.pattern.choose(
                settled, choice.k, choice.keep, choice.where, choice.stack_axes
            )
    if search:
        units = [_split(_of_units(stacks[n][1])) for n in search]
        asked = [_fill_request(choice) for choice in units]
        chosen = topk.top_k_masks(
            [choice.scores for choice in units],
            [k for k, _ in asked],
            where=[where for _, where in asked],
            stack_axes=[choice.stack_axes for choice in units],
        )
        for n, choice, mask in zip(search, units, chosen, strict=True):
            mask = mask if choice.keep is None else mask | choice.keep
            scores, axes = stacks[n][1].scores, stacks[n][1].stack_axes
            found[n] = choice.pattern.expand(mask, scores.shape, axes)
    for n, (paths, _) in enumerate(stacks):
        masks |= {p: found[n][i] if len(paths) > 1 else found[n] for i, p in enumerate(paths)}
    return {path: masks[path] for path in choices}


def _alike(choices: Mapping[str, Choice]) -> list[list[str]]:
    """The paths of choices that can be one stack.

    All choices share their passes over scores; stacks keep the compiled program small, however many
    layers a model has.
    """
    members: dict[Hashable, list[str]] = {}
    for path, c in choices.items():
        key = path
        if c.alike is not None:
            given = c.where is None, c.keep is None
            key = (c.alike, c.pattern, c.scores.shape, c.scores.dtype.name, c.stack_axes, given)
        members.setdefault(key, []).append(path)
    return list(members.values())


def _stack(alike: list[Choice]) -> Choice:
    """One choice of several alike, along a new first axis."""
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
    stacks = [(paths, _stack([rest[p] for p in paths])) for paths in _alike(rest)]
    units = [_of_units(choice) for _, choice in stacks]
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
        mask = choice.pattern.expand(mask, choice.scores.shape, choice.stack_axes)
        masks |= {p: mask[i] for i, p in enumerate(paths)}
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
