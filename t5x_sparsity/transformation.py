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
from t5x_sparsity.core.contract import DENSE, Algorithm
from t5x_sparsity.core.optimizer_slots import zero_slots
from t5x_sparsity.core.patterns import Pattern
from t5x_sparsity.core.plan import Rule, schedules
from t5x_sparsity.core.train_step import SparsityState, init_state, train_step
from t5x_sparsity.core.trees import flatten, unflatten

Arrays = Mapping[str, jax.Array]


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
      logical_axes: tree like params with the logical names of each weight's axes, a tuple of names
        a leaf, where weights are stacks of layers or experts. None: there are no stacks.

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
    )
    inner = optax.with_extra_args_support(tx)
    axes = None
    if logical_axes is not None:
        axes = {
            jax.tree_util.keystr(path, simple=True, separator="/"): names
            for path, names in jax.tree_util.tree_flatten_with_path(
                logical_axes, is_leaf=_is_axis_names
            )[0]
        }

    def make_plan_of(weights):
        missing = [] if axes is None else [p for p in weights if p not in axes]
        if missing:
            raise ValueError(
                f"logical_axes must be a tree like params, but has nothing for {missing}; give "
                "each a tuple of names, one an axis, or None"
            )
        return config.plan(weights, axes)

    def init(params):
        weights = flatten(params)
        return SparsifyState(
            count=jnp.zeros((), jnp.int32),
            inner=inner.init(params),
            sparsity=init_state(config, make_plan_of(weights), weights),
        )

    def update(updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError(
                "sparsify needs the parameters: call update(grads, state, params), not "
                "update(grads, state)"
            )
        grads, weights = flatten(updates), flatten(params)
        plan = make_plan_of(weights)

        # the optimizer's changes are carried beside its state: a mask update may take their place
        def gradient_step(weights, grads, optimizer):
            changes, inner_state = inner.update(
                unflatten(updates, grads),
                optimizer["state"],
                unflatten(params, weights),
                **extra_args,
            )
            changes = flatten(changes)
            moved = optax.apply_updates(dict(weights), changes)
            return moved, {"state": inner_state, "changes": changes}

        def stepped(operands, updates_masks):
            inner_state, sparsity_state = operands
            optimizer = {"state": inner_state, "changes": None}
            like = jax.eval_shape(gradient_step, weights, grads, optimizer)[1]["changes"]
            # of the dtypes that the optimizer gives, which need not be the weights'
            optimizer["changes"] = {p: jnp.zeros(x.shape, x.dtype) for p, x in like.items()}
            result = train_step(
                plan,
                sparsity_state,
                step=state.count,
                weights=weights,
                grads=grads,
                optimizer_state=optimizer,
                gradient_step=gradient_step,
                updates_masks=updates_masks,
            )
            changes = dict(result.optimizer_state["changes"])
            for p, alive in result.alive.items():
                # what is rounded off at each step must not add up beside the dense weight
                alive = alive & (p not in result.state.slots.get(DENSE, {}))
                changes[p] = _change(changes[p], weights[p], result.weights[p], alive)
            inner_state = zero_slots(result.optimizer_state["state"], result.reset, weights)
            return changes, inner_state, result.state

        operands = (state.inner, state.sparsity)
        moving = schedules(plan)
        if moving:
            result = lax.cond(
                functools.reduce(operator.or_, [s.is_update(state.count) for s in moving]),
                lambda x: stepped(x, True),
                lambda x: stepped(x, False),
                operands,
            )
        else:
            result = stepped(operands, False)
        new_updates, inner_state, sparsity_state = result
        return unflatten(updates, new_updates), SparsifyState(
            count=optax.safe_increment(state.count), inner=inner_state, sparsity=sparsity_state
        )

    return optax.GradientTransformationExtraArgs(init, update)


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
