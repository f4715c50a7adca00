"""`sparsify`, which wraps any optax optimizer in sparse training."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from t5x_sparsity.core import packing
from t5x_sparsity.core.config import SparsityConfig
from t5x_sparsity.core.contract import DENSE, Algorithm, Arrays, Plan
from t5x_sparsity.core.optimizer_slots import zero_slots
from t5x_sparsity.core.patterns import Pattern
from t5x_sparsity.core.plan import Rule, update_schedules
from t5x_sparsity.core.train_step import GradientStep, SparsityState, init_state, train_step
from t5x_sparsity.core.trees import flatten, unflatten


class SparsifyState(NamedTuple):
    """State of `sparsify`.

    Attributes:
      count: int32 scalar, train steps taken.
      inner: the wrapped optimizer's state.
      sparsity: masks and their random key.
    """

    count: jax.Array
    inner: optax.OptState
    sparsity: SparsityState


def sparsify(
    tx: optax.GradientTransformation,
    algorithm: Algorithm,
    *,
    sparsity: float = 0.8,
    distribution: str = "uniform",
    pattern: Pattern | None = None,
    rules: Sequence[Rule] = (),
    embedding_sparsity: float | str | None = None,
    seed: int = 0,
    pack_masks: bool = True,
    track_explored: bool = False,
    logical_axes: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optax optimizer so that it trains sparse.

    Weights that the masks prune come out of `optax.apply_updates` exactly 0; nothing else is needed
    in the train loop. Nothing may come after it in an `optax.chain`: wrap it around the others, and
    `optax.apply_if_finite` around it. `apply_masks` zeroes pruned weights before the first step
    too, which is how a run should start; `sparsity_summary` reports.

    Args:
      tx: any optax transformation. `params` must be passed to its `update`.
      algorithm: e.g. `RigL(updates=Periodic(begin=100, end=7500, period=100))`.
      sparsity: of all sparse weights together, in [0, 1).
      distribution: how that is shared among layers: 'uniform', 'er', 'erk'.
      pattern: the shape zeros come in. None: Unstructured.
      rules: levels, patterns and algorithms of weights of their own.
      embedding_sparsity: level of embeddings, 'auto', or None to leave them dense.
      seed: of the masks' random choices.
      pack_masks: store masks eight weights per byte where a weight's shape allows.
      track_explored: remember which weights have ever been kept, another bit per weight.
      logical_axes: tree like params with the logical names of each weight's axes, one tuple of
        names per leaf, where weights are stacks of layers or experts. None: there are no stacks.

    Raises:
      ValueError: a level out of range, an unknown distribution, a rule without effect, a pattern
        that a weight can't take; from `update`, params that are None.
    """
    config = SparsityConfig(
        algorithm=algorithm,
        sparsity=sparsity,
        distribution=distribution,
        pattern=pattern,
        rules=rules,
        embedding_sparsity=embedding_sparsity,
        seed=seed,
        pack_masks=pack_masks,
        track_explored=track_explored,
    )
    axes = None if logical_axes is None else flatten(logical_axes, is_leaf=_is_axis_names)
    wrapped = _Sparsified(optax.with_extra_args_support(tx), config, axes)
    return optax.GradientTransformationExtraArgs(wrapped.init, wrapped.update)


class _Sparsified(NamedTuple):
    """What `sparsify` makes of an optimizer: its two functions.

    Attributes:
      tx: the optimizer inside.
      config: what is sparsified.
      axes: path -> logical names of the weight's axes; None where there are no stacks.
    """

    tx: optax.GradientTransformationExtraArgs
    config: SparsityConfig
    axes: Mapping[str, tuple[str | None, ...] | None] | None

    def init(self, params: Any) -> SparsifyState:
        weights = flatten(params)
        return SparsifyState(
            count=jnp.zeros((), jnp.int32),
            inner=self.tx.init(params),
            sparsity=init_state(self.config, self.plan(weights), weights),
        )

    def update(
        self, updates: Any, state: SparsifyState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, SparsifyState]:
        if params is None:
            raise ValueError(
                "sparsify needs the parameters: call update(grads, state, params), not "
                "update(grads, state)"
            )
        grads, weights = flatten(updates), flatten(params)
        plan = self.plan(weights)

        # the optimizer's changes are carried next to its state: a mask update may replace them
        def gradient_step(weights: Arrays, grads: Arrays, optimizer: Any) -> tuple[Arrays, Any]:
            trees = unflatten(updates, grads), optimizer["state"], unflatten(params, weights)
            changes, inner = self.tx.update(*trees, **extra_args)
            changes = flatten(changes)
            moved = optax.apply_updates(dict(weights), changes)
            return moved, {"state": inner, "changes": changes}

        def step(state: SparsifyState, updates_masks: bool) -> tuple[Any, SparsifyState]:
            changes, state = _step(plan, weights, grads, state, gradient_step, updates_masks)
            return unflatten(updates, changes), state

        due = [schedule.is_update(state.count) for schedule in update_schedules(plan)]
        if due:
            changes, state = lax.cond(
                functools.reduce(operator.or_, due),
                functools.partial(step, updates_masks=True),
                functools.partial(step, updates_masks=False),
                state,
            )
        else:
            changes, state = step(state, False)
        return changes, state._replace(count=optax.safe_increment(state.count))

    def plan(self, weights: Arrays) -> Plan:
        missing = [] if self.axes is None else [p for p in weights if p not in self.axes]
        if missing:
            raise ValueError(
                f"logical_axes must be a tree like params, but has nothing for {missing}; give "
                "each a tuple of names, one an axis, or None"
            )
        return self.config.plan(weights, self.axes)


def _step(
    plan: Plan,
    weights: Arrays,
    grads: Arrays,
    state: SparsifyState,
    gradient_step: GradientStep,
    updates_masks: bool,
) -> tuple[dict[str, jax.Array], SparsifyState]:
    """One train step: what is to be added to each weight, by path, and the state but for its count.

    gradient_step's state is a dict of the inner optimizer's 'state' and of the 'changes' that it
    makes; 'changes' that go in are those that a mask update makes in their place.
    """
    like = jax.eval_shape(gradient_step, weights, grads, {"state": state.inner})[1]["changes"]
    # of the dtypes that the optimizer gives, which need not be the weights'
    nothing = {p: jnp.zeros(x.shape, x.dtype) for p, x in like.items()}
    found = train_step(
        plan,
        state.sparsity,
        step=state.count,
        weights=weights,
        grads=grads,
        optimizer_state={"state": state.inner, "changes": nothing},
        gradient_step=gradient_step,
        updates_masks=updates_masks,
    )
    changes = dict(found.optimizer_state["changes"])
    for p, alive in found.alive.items():
        # what is rounded off at each step must not add up next to the dense weight
        alive = alive & (p not in found.state.slots.get(DENSE, {}))
        changes[p] = _change(changes[p], weights[p], found.weights[p], alive)
    inner = zero_slots(found.optimizer_state["state"], found.reset, weights)
    return changes, state._replace(inner=inner, sparsity=found.state)


def _change(change: jax.Array, old: jax.Array, new: jax.Array, alive: jax.Array) -> jax.Array:
    """What `optax.apply_updates` must add to a weight: exact where it was, or is, pruned."""
    # a change narrower than its weight could not take it all the way
    change = change.astype(jnp.promote_types(change.dtype, old.dtype))
    return jnp.where(alive, change, new.astype(change.dtype) - old.astype(change.dtype))


def _is_axis_names(x: Any) -> bool:
    return x is None or (
        isinstance(x, tuple) and all(name is None or isinstance(name, str) for name in x)
    )


def find_state(state: Any) -> SparsifyState:
    """The state of `sparsify` inside that of optimizers around it.

    Raises:
      ValueError: there is none, or more than one.
    """
    found = [
        x
        for x in jax.tree_util.tree_leaves(state, is_leaf=lambda x: isinstance(x, SparsifyState))
        if isinstance(x, SparsifyState)
    ]
    if len(found) != 1:
        raise ValueError(
            f"expected one state of sparsify in the optimizer state, found {len(found)}; pass what "
            "sparsify(...).init returned, or a state that holds it"
        )
    return found[0]


def apply_masks(params: Any, state: Any) -> Any:
    """Params with the pruned weights set to 0. state: of `sparsify`, or one that holds it."""
    return unflatten(params, packing.apply(flatten(params), find_state(state).sparsity.masks))
