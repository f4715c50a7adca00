"""`sparsify`, which wraps any optax optimizer in sparse training."""

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from t5x_sparsity.core import packing
from t5x_sparsity.core.contract import DENSE, Algorithm, Arrays, LayerPlan
from t5x_sparsity.core.optimizer_slots import zero_slots
from t5x_sparsity.core.patterns import Pattern
from t5x_sparsity.core.plan import Rule, SparsityConfig, update_schedules
from t5x_sparsity.core.train_step import SparsityState, init_state, train_step
from t5x_sparsity.core.trees import flatten, unflatten


class SparsifyState(NamedTuple):
    """State of `sparsify`.

    Attributes:
      count: int32 scalar, train steps taken.
      inner: the wrapped optimizer's state.
      sparsity: masks and their random key.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, which no state needs
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

    Weights that the masks prune are exactly 0 after `optax.apply_updates`; the train loop needs
    nothing else. In an `optax.chain` it must be the last: wrap it around the other transformations,
    and `optax.apply_if_finite` around it. A run should start from `apply_masks`, which zeroes the
    pruned weights before the first step. `sparsity_summary` reports.

    >>> import jax.numpy as jnp, optax, t5x_sparsity as ts
    >>> algorithm = ts.RigL(updates=ts.Periodic(begin=100, end=7500, period=100))
    >>> tx = ts.sparsify(optax.adam(1e-3), algorithm, sparsity=0.75)
    >>> params = {"w": jnp.ones((8, 16))}
    >>> state = tx.init(params)
    >>> params = ts.apply_masks(params, state)
    >>> updates, state = tx.update({"w": jnp.ones((8, 16))}, state, params)
    >>> params = optax.apply_updates(params, updates)
    >>> int((params["w"] == 0).sum()), params["w"].size
    (96, 128)

    Args:
      tx: any optax transformation. `params` must be passed to its `update`.
      algorithm: decides which weights are kept.
      sparsity, distribution, pattern, rules, embedding_sparsity, seed, pack_masks, track_explored:
        which weights are sparsified, and to which level; see `SparsityConfig`.
      logical_axes: tree like params with one tuple per leaf, the logical names of its axes; needed
        where weights are stacks of layers or experts. None: there are no stacks.

    Returns:
      A transformation whose state is a `SparsifyState`.

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
    """The two functions of a sparsified optimizer; `axes` is None where there are no stacks."""

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

        # the optimizer's changes are kept next to its state: a mask update may replace them
        def gradient_step(weights: Arrays, grads: Arrays, optimizer: Any) -> tuple[Arrays, Any]:
            trees = unflatten(updates, grads), optimizer["state"], unflatten(params, weights)
            changes, inner = self.tx.update(*trees, **extra_args)
            changes = flatten(changes)
            moved = optax.apply_updates(dict(weights), changes)
            return moved, {"state": inner, "changes": changes}

        def step(state: SparsifyState, updates_masks: bool) -> tuple[Any, SparsifyState]:
            start = {"state": state.inner}
            like = jax.eval_shape(gradient_step, weights, grads, start)[1]["changes"]
            # the optimizer's dtypes need not be the weights'
            nothing = {p: jnp.zeros(x.shape, x.dtype) for p, x in like.items()}
            found = train_step(
                plan,
                state.sparsity,
                step=state.count,
                weights=weights,
                grads=grads,
                optimizer_state={**start, "changes": nothing},
                gradient_step=gradient_step,
                updates_masks=updates_masks,
            )
            changes = dict(found.optimizer_state["changes"])
            for p, alive in found.alive.items():
                # rounding of the steps must not add up to a difference from the dense weight
                alive = alive & (p not in found.state.slots.get(DENSE, {}))
                changes[p] = _change(changes[p], weights[p], found.weights[p], alive)
            inner = zero_slots(found.optimizer_state["state"], found.reset, weights)
            state = state._replace(inner=inner, sparsity=found.state)
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

    def plan(self, weights: Arrays) -> dict[str, LayerPlan]:
        missing = [] if self.axes is None else [p for p in weights if p not in self.axes]
        if missing:
            raise ValueError(
                f"logical_axes must be a tree like params, but has nothing for {missing}; give "
                "each a tuple of names, one an axis, or None"
            )
        return self.config.plan(weights, self.axes)


def _change(change: jax.Array, old: jax.Array, new: jax.Array, alive: jax.Array) -> jax.Array:
    """What `optax.apply_updates` must add to a weight: exact where it was, or is, pruned."""
    # a change of a narrower dtype than its weight could not be exact
    change = change.astype(jnp.promote_types(change.dtype, old.dtype))
    return jnp.where(alive, change, new.astype(change.dtype) - old.astype(change.dtype))


def _is_axis_names(x: Any) -> bool:
    return x is None or (
        isinstance(x, tuple) and all(name is None or isinstance(name, str) for name in x)
    )


def find_state(state: Any) -> SparsifyState:
    """The state of `sparsify` inside the state of optimizers around it.

    Args:
      state: any pytree.

    Raises:
      ValueError: there is none, or more than one.
    """
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, SparsifyState))
    found = [x for x in leaves if isinstance(x, SparsifyState)]
    if len(found) != 1:
        raise ValueError(
            f"expected one state of sparsify in the optimizer state, found {len(found)}; pass what "
            "sparsify(...).init returned, or a state that holds it"
        )
    return found[0]


def apply_masks(params: Any, state: Any) -> Any:
    """The params with 0 where masks prune.

    >>> import jax.numpy as jnp, optax, t5x_sparsity as ts
    >>> tx = ts.sparsify(optax.sgd(0.1), ts.Static(), sparsity=0.75)
    >>> params = {"w": jnp.ones((4, 4)), "bias": jnp.ones(4)}
    >>> sparse = ts.apply_masks(params, tx.init(params))
    >>> float(sparse["w"].sum()), float(sparse["bias"].sum())
    (4.0, 4.0)

    Args:
      params: the tree that `sparsify(...).init` was called with.
      state: what `init` or `update` returned, or a state that holds it.

    Raises:
      ValueError: no state of `sparsify` in `state`, or several.
    """
    return unflatten(params, packing.apply(flatten(params), find_state(state).sparsity.masks))
