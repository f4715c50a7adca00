"""The functional core of sparse training: its state, and one train step."""

import functools
import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from t5x_sparsity.core import packing
from t5x_sparsity.core.contract import DENSE, Algorithm, Arrays, Plan, Slots, Update, prune
from t5x_sparsity.core.plan import SparsityConfig, by_algorithm, update_schedules
from t5x_sparsity.core.schedules import StepValue
from t5x_sparsity.core.stacking import pack_stacked, unpack_stacked

# Masks must be the same whatever generator the run draws its dropout from.
_KEY_IMPL = "threefry2x32"

# The slot of the weights that have ever been kept, stored as masks are.
EXPLORED = "explored"

# (weights, grads, its state) -> (weights, its state)
GradientStep = Callable[[Arrays, Arrays, Any], tuple[Arrays, Any]]

# An algorithm whose masks may change in a step, the plan of its weights, and whether they do change
# now: bool, which may be traced. None where there is one schedule only, so that they do.
_Due = tuple[Algorithm, Plan, bool | jax.Array | None]


class SparsityState(NamedTuple):
    """The state of sparse training, all of it arrays.

    Attributes:
      masks: path -> stored mask, uint8 (see `packing.py`); sparse weights only.
      rng: uint32 [2], data of the threefry key that every random choice derives from.
      slots: name -> path -> what an algorithm remembers of a weight, with the weight's axes.
    """

    masks: Arrays
    rng: jax.Array
    slots: Slots


def init_state(
    config: SparsityConfig, plan: Plan, weights: Arrays, *, trained: bool = False
) -> SparsityState:
    """The state a run starts from.

    Args:
      weights: at least the sparse ones, by path.
      trained: whether they come from a dense checkpoint. Masks that would start at random then
        keep the largest.

    Raises:
      ValueError: an algorithm's slot has a reserved name.
    """
    key = jax.random.key(config.seed, impl=_KEY_IMPL)
    stored: dict[str, jax.Array] = {}
    slots: dict[str, dict[str, jax.Array]] = {}
    for algorithm, part in by_algorithm(plan):
        own = in_this_plan(weights, part)
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


def forward_weights(
    plan: Plan, state: SparsityState, weights: Arrays, step: StepValue = 0
) -> dict[str, jax.Array]:
    """All weights as the model sees them at `step`; those with a dense slot are read from it."""
    weights = {**weights, **state.slots.get(DENSE, {})}
    return _forward(plan, weights, _unpacked(plan, state.masks), jnp.asarray(step, jnp.int32))


def _forward(plan: Plan, weights: Arrays, masks: Arrays, step: jax.Array) -> dict[str, jax.Array]:
    seen = dict(weights)
    for algorithm, part in by_algorithm(plan):
        own = in_this_plan(seen, part), in_this_plan(masks, part)
        seen |= algorithm.forward(part, *own, step)
    return seen


def _unpacked(plan: Plan, stored: Arrays) -> dict[str, jax.Array]:
    return {p: packing.unpack(stored[p], layer.shape) for p, layer in plan.items()}


class Step(NamedTuple):
    """The result of a train step.

    Attributes:
      weights: by path, those that the model sees next.
      optimizer_state: the base optimizer's.
      state: of sparsity.
      alive: bool, by path; which weights were kept before the step and still are.
      reset: bool, by path; where the optimizer's slots are to be zeroed.
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
    gradient_step: GradientStep,
    updates_masks: bool,
) -> Step:
    """One train step: the base optimizer's, with sparsity around it.

    The gradient phase comes first, then the mask phase if masks are due.

    Args:
      step: int32 scalar, the train step.
      weights: all, by path, as the forward pass used them.
      grads: all, by path, dense.
      optimizer_state: the base optimizer's, a pytree.
      gradient_step: of the base optimizer.
      updates_masks: whether masks of any algorithm are due; of which ones, the step finds out.
    """
    step = jnp.asarray(step, jnp.int32)
    dense = state.slots.get(DENSE, {})
    whole = Update(
        step=step,
        weights={**weights, **dense},
        grads=grads,
        masks=_unpacked(plan, state.masks),
        key=jax.random.fold_in(jax.random.wrap_key_data(state.rng, impl=_KEY_IMPL), step),
        forward_weights=weights,
        slots=state.slots,
        optimizer_state=optimizer_state,
        paths=tuple(grads),
    )
    due = _due(plan, step) if updates_masks else []
    whole = _gradient_phase(plan, whole, gradient_step, due)
    seen = dict(whole.weights)
    reset: dict[str, jax.Array] = {}
    stored, masks, slots = state.masks, whole.masks, whole.slots
    if updates_masks:
        stored, masks, slots, reset = _mask_phase(plan, whole, state, due)
        # a weight that comes back starts at 0, unless its dense value has been kept
        seen |= prune({p: seen[p] for p in plan if p not in dense}, whole.masks)
    slots = _merged(slots, {DENSE: in_this_plan(whole.weights, dense)})
    return Step(
        weights=_forward(plan, seen, masks, step + 1),
        optimizer_state=whole.optimizer_state,
        state=state._replace(masks=stored, slots=slots),
        alive={p: masks[p] & whole.masks[p] for p in plan},
        reset=reset,
    )


def _due(plan: Plan, step: jax.Array) -> list[_Due]:
    one_schedule = len(update_schedules(plan)) == 1
    return [
        (algorithm, part, None if one_schedule else algorithm.updates.is_update(step))
        for algorithm, part in by_algorithm(plan)
        if algorithm.updates.last is not None
    ]


def _gradient_phase(
    plan: Plan, whole: Update, gradient_step: GradientStep, due: list[_Due]
) -> Update:
    """Shows the gradients to the algorithms, and takes the base optimizer's step.

    Returns `whole` with the weights, slots and optimizer state after the step. An algorithm that is
    due may take the step's place, for all weights.
    """
    visible = dict(whole.grads)
    for algorithm, part in by_algorithm(plan):
        slots = _merged(whole.slots, algorithm.observe(part, _seen_by(part, whole)))
        whole = whole._replace(slots=slots)
        visible |= algorithm.gradients(part, _seen_by(part, whole))

    replacing = [now for algorithm, _, now in due if algorithm.replaces_gradient_step]
    conditions = [now for now in replacing if now is not None]
    if len(conditions) < len(replacing):  # one replaces it in every mask update
        return whole
    before = dict(whole.weights), whole.optimizer_state
    after = gradient_step(before[0], visible, whole.optimizer_state)
    if conditions:
        replaced = functools.reduce(operator.or_, conditions)
        after = jax.tree.map(lambda old, new: jnp.where(replaced, old, new), before, after)
    return whole._replace(weights=dict(after[0]), optimizer_state=after[1])


def _mask_phase(
    plan: Plan, whole: Update, state: SparsityState, due: list[_Due]
) -> tuple[Arrays, Arrays, Slots, dict[str, jax.Array]]:
    """Updates the masks that are due, and the slots that go with them.

    Returns the masks, as they are stored and as bool; the slots; and `Step.reset`.
    """
    before = unpack_stacked(plan, state.masks)
    new, slots = dict(before), whole.slots
    for algorithm, part, now in due:
        update = _seen_by(part, whole)._replace(masks=in_this_plan(before, part))
        own, own_slots = _update_if(now, algorithm, part, update)
        new |= own
        slots = _merged(slots, own_slots)
    stored = pack_stacked(plan, new)
    after = _unpacked(plan, _materialize(stored, whole.step))
    explored = state.slots.get(EXPLORED, {})
    slots = _merged(slots, {EXPLORED: {p: x | stored[p] for p, x in explored.items()}})
    reset: dict[str, jax.Array] = {}
    for algorithm, part, now in due:
        own = algorithm.resets(in_this_plan(whole.masks, part), in_this_plan(after, part))
        reset |= own if now is None else {p: x & now for p, x in own.items()}
    return stored, after, slots, reset


def _update_if(
    now: bool | jax.Array | None, algorithm: Algorithm, part: Plan, update: Update
) -> tuple[Arrays, Slots]:
    """An algorithm's masks and slots after the step; now: as in `_Due`."""

    def updated() -> tuple[Arrays, Slots]:
        masks = algorithm.update_masks(part, update)
        return masks, dict(algorithm.update_slots(part, update._replace(masks=masks)))

    if now is None:
        return updated()
    found: tuple[Arrays, Slots] = lax.cond(
        now, updated, lambda: (dict(update.masks), dict(update.slots))
    )
    return found


def _materialize(stored: Arrays, step: jax.Array) -> dict[str, jax.Array]:
    """The same masks as arrays in memory, computed once, as by `topk.materialize`.

    Otherwise each kernel that reads a mask would have its own copy of the end of the selection, and
    no two weights the same kernel, as each is another part of a stack. The loop never runs, but
    XLA can't tell. What the step returns must be `stored` itself: XLA for TPU fails where donated
    masks are read next to the masks that replace them.
    """

    def never(i: jax.Array, masks: Arrays) -> dict[str, jax.Array]:
        return {p: x | (i >> 31).astype(jnp.uint8) for p, x in masks.items()}

    found: dict[str, jax.Array] = lax.fori_loop(0, (step < 0).astype(jnp.int32), never, stored)
    return found


def in_this_plan(arrays: Arrays, plan: Iterable[str]) -> dict[str, jax.Array]:
    """The arrays of the plan's paths, in its order; none may be missing."""
    return {p: arrays[p] for p in plan}


def _seen_by(part: Plan, whole: Update) -> Update:
    """The part of an update of all weights that one algorithm sees."""
    own = {name: {p: x[p] for p in part if p in x} for name, x in whole.slots.items()}
    return whole._replace(
        weights=in_this_plan(whole.weights, part),
        grads=in_this_plan(whole.grads, part),
        masks=in_this_plan(whole.masks, part),
        forward_weights=in_this_plan(whole.forward_weights, part),
        slots={name: x for name, x in own.items() if x},
    )


def _merged(slots: Slots, new: Slots) -> dict[str, Arrays]:
    """All slots, with the new ones of one algorithm."""
    return {name: {**arrays, **new.get(name, {})} for name, arrays in slots.items()}
