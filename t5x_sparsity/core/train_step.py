"""The functional core of sparse training: its configuration, its state, and one train step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from t5x_sparsity.core import packing
from t5x_sparsity.core.config import SparsityConfig
from t5x_sparsity.core.contract import DENSE, Algorithm, Arrays, Plan, Update, prune
from t5x_sparsity.core.plan import groups, schedules
from t5x_sparsity.core.stacking import pack_alike, unpack_alike

# Masks must be the same whatever generator the run draws its dropout from.
_KEY_IMPL = "threefry2x32"

# The slot of the weights that have ever been kept, stored as masks are.
EXPLORED = "explored"


class SparsityState(NamedTuple):
    """The state of sparse training, all of it arrays.

    Attributes:
      masks: path -> stored mask, uint8 (see `masks.py`); sparse weights only.
      rng: uint32 [2], data of the threefry key that every random choice derives from.
      slots: name -> path -> what an algorithm remembers of a weight, such as 'dense'; empty for
        most. Each has its weight's axes.
    """

    masks: dict[str, jax.Array]
    rng: jax.Array
    slots: dict[str, dict[str, jax.Array]]


def init_state(
    config: SparsityConfig, plan: Plan, weights: Arrays, *, trained: bool = False
) -> SparsityState:
    """The state a run starts from.

    Args:
      config: of the run.
      plan: of the sparse weights.
      weights: at least the sparse ones, by path.
      trained: whether they are of a dense checkpoint: masks that would start at random then keep
        the largest.
    """
    key = jax.random.key(config.seed, impl=_KEY_IMPL)
    stored, slots = {}, {}
    for algorithm, part in groups(plan):
        own = {p: weights[p] for p in part}
        masks = algorithm.initial_masks(part, own, None if trained else key)
        stored |= {p: packing.pack(masks[p], layer.pack_axis) for p, layer in part.items()}
        for name, arrays in algorithm.initial_slots(part, own, masks).items():
            if name in ("masks", "rng", EXPLORED) or "/" in name:
                raise ValueError(
                    f"{type(algorithm).__name__}.initial_slots names a slot {name!r}, but 'masks', "
                    f"'rng', {EXPLORED!r} and names with '/' are taken; rename it"
                )
            slots.setdefault(name, {}).update(arrays)
    if config.track_explored and stored:
        # a copy: a train step is given both, and may write over either
        slots[EXPLORED] = {p: jnp.copy(stored[p]) for p in plan}
    return SparsityState(
        masks={p: stored[p] for p in plan},
        rng=jax.random.key_data(key),
        slots={name: dict(sorted(arrays.items())) for name, arrays in sorted(slots.items())},
    )


def forward_weights(plan: Plan, state: SparsityState, weights: Arrays, step=0) -> Arrays:
    """All weights as the model sees them at `step`; those that have a dense slot come from it."""
    weights = {**weights, **state.slots.get(DENSE, {})}
    masks = _unpacked(plan, state.masks)
    for algorithm, part in groups(plan):
        own = {p: weights[p] for p in part}
        weights |= algorithm.forward(part, own, masks, jnp.asarray(step, jnp.int32))
    return weights


def _unpacked(plan: Plan, stored: Arrays) -> dict[str, jax.Array]:
    return {p: packing.unpack(stored[p], layer.shape) for p, layer in plan.items()}


class Step(NamedTuple):
    """What a train step comes to.

    Attributes:
      weights: by path, those that the model sees next.
      optimizer_state: the base optimizer's.
      state: of sparsity.
      alive: bool, by path; which weights were kept before the step and still are.
      reset: bool, by path; of which weights the optimizer's slots are to be zeroed.
    """

    weights: dict[str, jax.Array]
    optimizer_state: Any
    state: SparsityState
    alive: dict[str, jax.Array]
    reset: dict[str, jax.Array]


def train_step(
    plan: Plan,
    state: SparsityState,
    *,
    step: jax.Array,
    weights: Arrays,
    grads: Arrays,
    optimizer_state: Any,
    gradient_step: Callable[[Arrays, Arrays, Any], tuple[Arrays, Any]],
    updates_masks: bool,
) -> Step:
    """One train step: the base optimizer's, with sparsity around it.

    Args:
      plan: of the sparse weights.
      state: of sparsity, before the step.
      step: int32 scalar, the train step.
      weights: all, by path, as the forward pass used them.
      grads: all, by path, dense.
      optimizer_state: the base optimizer's, a pytree.
      gradient_step: the base optimizer: (weights, grads, its state) -> (weights, its state).
      updates_masks: whether masks are due. Where algorithms have schedules of their own, the step
        itself finds out which of them are.
    """
    step = jnp.asarray(step, jnp.int32)
    key = jax.random.fold_in(jax.random.wrap_key_data(state.rng, impl=_KEY_IMPL), step)
    parts, masks, slots = groups(plan), _unpacked(plan, state.masks), state.slots
    dense = slots.get(DENSE, {})
    forward, weights = weights, {**weights, **dense}

    def seen_by(part: Plan) -> Update:
        return Update(
            step=step,
            weights=_of(weights, part),
            grads=_of(grads, part),
            masks=_of(masks, part),
            key=key,
            forward_weights=_of(forward, part),
            slots={n: own for n, x in slots.items() if (own := {p: x[p] for p in part if p in x})},
            optimizer_state=optimizer_state,
            paths=tuple(grads),
        )

    visible = dict(grads)
    for algorithm, part in parts:
        slots = _merged(slots, algorithm.observe(part, seen_by(part)))
        visible |= algorithm.gradients(part, seen_by(part))

    due = _due(plan, step) if updates_masks else [False] * len(parts)
    replaced = False
    for (algorithm, _), now in zip(parts, due, strict=True):
        replaced = replaced | (now if algorithm.replaces_gradient_step else False)
    if replaced is not True:
        taken = gradient_step(weights, visible, optimizer_state)
        if replaced is not False:
            taken = jax.tree.map(
                lambda old, new: jnp.where(replaced, old, new), (weights, optimizer_state), taken
            )
        weights, optimizer_state = dict(taken[0]), taken[1]

    after, stored, reset = masks, state.masks, {}
    if updates_masks:
        before = unpack_alike(plan, state.masks)
        after = dict(before)
        for (algorithm, part), now in zip(parts, due, strict=True):
            if now is not False:
                update = seen_by(part)._replace(masks=_of(before, part))
                new, new_slots = _updated(algorithm, part, update, now)
                after |= new
                slots = _merged(slots, new_slots)
        stored = pack_alike(plan, after)
        after = _unpacked(plan, _written(stored, step))
        known = state.slots.get(EXPLORED, {})
        slots = _merged(slots, {EXPLORED: {p: x | stored[p] for p, x in known.items()}})
    for (algorithm, part), now in zip(parts, due, strict=True):
        if now is not False:
            forgotten = algorithm.resets(_of(masks, part), _of(after, part))
            reset |= {p: x & now for p, x in forgotten.items()}

    slots = _merged(slots, {DENSE: {p: weights[p] for p in dense}})
    # a weight that comes back starts at 0, unless its dense value has been kept
    bare = {p: weights[p] for p in plan if p not in dense}
    weights |= prune(bare, masks) if updates_masks else bare
    for algorithm, part in parts:
        weights |= algorithm.forward(part, _of(weights, part), _of(after, part), step + 1)
    alive = {p: after[p] & masks[p] for p in plan}
    return Step(weights, optimizer_state, state._replace(masks=stored, slots=slots), alive, reset)


def _written(stored: dict[str, jax.Array], step: jax.Array) -> dict[str, jax.Array]:
    """The same masks as arrays of their own, which is what comes out of a loop, entered or not.

    A compiler would otherwise select again wherever a mask is used, and make kernels of their own
    for every weight, as each reads another part of a stack. They are to be read within the step;
    what the step returns must be `stored` itself, since XLA for TPU fails where donated masks are
    read beside those that take their place.
    """

    def never(i, masks):
        return {p: x | (i >> 31).astype(jnp.uint8) for p, x in masks.items()}

    return lax.fori_loop(0, (step < 0).astype(jnp.int32), never, stored)


def _of(arrays: Arrays, part: Plan) -> dict[str, jax.Array]:
    return {p: arrays[p] for p in part}


def _due(plan: Plan, step) -> list:
    """For each algorithm whether its masks are due: a bool, traced where schedules differ."""
    several = len(schedules(plan)) > 1
    return [
        a.updates.last is not None and (a.updates.is_update(step) if several else True)
        for a, _ in groups(plan)
    ]


def _updated(algorithm: Algorithm, part: Plan, update: Update, due) -> tuple[Arrays, Any]:
    """The masks and slots of an algorithm after an update step, if it is due."""

    def moved():
        masks = algorithm.update_masks(part, update)
        return masks, dict(algorithm.update_slots(part, update._replace(masks=masks)))

    if due is True:
        return moved()
    return lax.cond(due, moved, lambda: (dict(update.masks), dict(update.slots)))


def _merged(slots: Mapping[str, Arrays], new: Mapping[str, Arrays]) -> dict[str, Arrays]:
    """Slots with what one algorithm has made of its own."""
    return {name: {**arrays, **new.get(name, {})} for name, arrays in slots.items()}
