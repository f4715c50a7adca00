"""Chooses the units of every weight that are kept: those of largest score, for all at once."""

import functools
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
    """The mask of every weight, by path: bool, the weight's shape. All are found in one search."""
    ranked = stack_alike({p: c for p, c in choices.items() if not c.pattern.searched})
    scores = topk.materialize([c.scores for _, c in ranked])
    masks = [
        c.pattern.choose(once, c.k, c.keep, c.where, c.stack_axes)
        for once, (_, c) in zip(scores, ranked, strict=True)
    ]
    searched = stack_alike({p: c for p, c in choices.items() if c.pattern.searched})
    units = [_stack_parts(_pool(c)) for _, c in searched]
    missing = [_missing(c) for c in units]
    chosen = topk.top_k_masks(
        [c.scores for c in units],
        [k for k, _ in missing],
        where=[where for _, where in missing],
        stack_axes=[c.stack_axes for c in units],
    )
    for (_, whole), c, mask in zip(searched, units, chosen, strict=True):
        mask = mask if c.keep is None else mask | c.keep
        masks.append(whole.pattern.expand(mask, whole.scores.shape, whole.stack_axes))
    found: dict[str, jax.Array] = {}
    for (paths, _), mask in zip([*ranked, *searched], masks, strict=True):
        found |= {paths[0]: mask} if len(paths) == 1 else {p: mask[i] for i, p in enumerate(paths)}
    return {path: found[path] for path in choices}


def stack_alike(
    choices: Mapping[str, Choice], *, single: bool = False
) -> list[tuple[list[str], Choice]]:
    """Stacks choices that differ in values only, along a new first axis.

    Stacks keep the compiled program small, however many layers a model has.

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
    # a mask that is None for one is None for all
    arrays = [(c.scores, c.where, c.keep) for c in alike]
    scores, where, keep = jax.tree.map(lambda *each: jnp.stack(each), *arrays)
    stack_axes = (0, *(a + 1 for a in axes))
    return first._replace(scores=scores, k=k, stack_axes=stack_axes, where=where, keep=keep)


def select_jointly(
    choices: Mapping[str, Choice],
    k: topk.Count | int,
    *,
    search: Callable[..., list[jax.Array]] | None = None,
) -> dict[str, jax.Array]:
    """The masks of the units of largest score over all weights together.

    Units are taken until they hold `k` weights: exactly k where every weight is a unit, otherwise
    up to one unit more. A choice's `k` is ignored, except for patterns of a fixed level: these
    weights are chosen separately, and do not count towards `k`.

    Args:
      choices: by path; `keep` is not supported.
      k: how many weights to keep, of those without a fixed level.
      search: what finds them: `topk.joint_top_k_masks` where it is None, or a function of the same
        arguments and of each tensor's `stack_axes`, such as `lamp.lamp_masks`.

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
    axes = [c.stack_axes for c in units]
    find = topk.joint_top_k_masks if search is None else functools.partial(search, stack_axes=axes)
    found = find(
        [c.scores for c in units],
        k,
        where=[c.where for c in units],
        sizes=[c.pattern.sizes(c.scores.shape, c.stack_axes) for _, c in stacks],
        order=[[position[p] for p in paths] for paths, _ in stacks],
    )
    for (paths, choice), mask in zip(stacks, found, strict=True):
        mask = choice.pattern.expand(mask, choice.scores.shape, choice.stack_axes)
        masks |= {p: mask[i] for i, p in enumerate(paths)}
    return {path: masks[path] for path in choices}


def _pool(choice: Choice) -> Choice:
    """The choice with scores and masks of units instead of weights."""
    pattern, axes = choice.pattern, choice.stack_axes
    return choice._replace(
        scores=pattern.pool(choice.scores, axes),
        where=None if choice.where is None else pattern.pool_mask(choice.where, axes),
        keep=None if choice.keep is None else pattern.pool_mask(choice.keep, axes),
    )


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
