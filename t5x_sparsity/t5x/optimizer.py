"""The optimizer that T5X is given: the run's own, with masks next to its state."""

from __future__ import annotations

import copy
import enum
import operator
import re
from collections.abc import Callable
from typing import Any

import flax.core
import flax.struct
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from t5x_sparsity.core.contract import DENSE, Plan
from t5x_sparsity.core.optimizer_slots import zero_slots
from t5x_sparsity.core.plan import SparsityConfig
from t5x_sparsity.core.train_step import SparsityState, forward_weights, init_state, train_step
from t5x_sparsity.core.trees import flatten, unflatten
from t5x_sparsity.host import optimizers, utils
from t5x_sparsity.t5x.checkpoints import (
    OTHER_MODEL,
    OTHER_OPTIMIZER,
    SPARSITY,
    check_leaves,
    check_masks_will_change,
    check_shapes,
    has_masks,
)

UNDRIVEN = (
    "this run has sparsity's train state but not its trainer, and would train without masks: a "
    "file included after sparsity/*.gin has bound train.trainer_cls again (T5X's run files do). "
    "Include sparsity/*.gin last."
)


class StepKind(enum.StrEnum):
    """Which of the two train steps is compiled."""

    PLAIN = "plain"
    UPDATE = "update"


@flax.struct.dataclass
class SparseOptimizerState:
    """State of the base optimizer, and of sparsity next to it.

    In a checkpoint: `state/step`, `state/param_states/...` as the base lays them out,
    `state/sparsity/masks/<path of the weight>`, `state/sparsity/rng` and, for the algorithms that
    need it, `state/sparsity/<slot>/<path of the weight>`.
    """

    step: Any
    param_states: Any
    sparsity: SparsityState


class SparseOptimizer(optimizers.OptimizerDef):
    """Any T5X optimizer, training sparse.

    It holds configuration and no arrays. `step_kind` is the train step that `apply_gradient` is
    traced for: the sparse trainer makes a copy for each kind, and no other trainer sets it.
    `fills_in` is whether the state is made from scratch, to fill in what a checkpoint lacks.
    """

    def __init__(self, base: optimizers.OptimizerDef, config: SparsityConfig):
        # not OptimizerDef's own __init__: hyper_params are the base's
        self.base = base
        self.config = config
        self.step_kind: StepKind | None = None
        self.fills_in = False
        self._axes: dict[str, tuple[str | None, ...]] | None = None

    def for_step(self, kind: StepKind) -> SparseOptimizer:
        """This optimizer as the given train step needs it."""
        driven = copy.copy(self)
        driven.step_kind = kind
        return driven

    def filling_in(self) -> SparseOptimizer:
        """This optimizer, for a state that may fill in what a checkpoint lacks.

        The masks of such a state belong to weights that the checkpoint replaces, so its state dict
        has None for them; `restore_state` makes those from the weights that were loaded.
        """
        filling = copy.copy(self)
        filling.fills_in = True
        return filling

    @property
    def hyper_params(self):
        return self.base.hyper_params

    def update_hyper_params(self, **overrides):
        return self.base.update_hyper_params(**overrides)

    def set_param_axes(self, param_logical_axes) -> None:
        """Takes the logical axes of every weight from the model."""
        self._axes = {p: tuple(names) for p, names in _flatten_axes(param_logical_axes).items()}
        if hasattr(self.base, "set_param_axes"):
            self.base.set_param_axes(param_logical_axes)

    def plan(self, params) -> Plan:
        """The plan of the sparse weights among `params` (arrays or their shapes).

        A weight that a MultiOptimizer leaves untrained stays dense, unless a rule matches it.
        """
        idle = _untrained(self.base, params)
        weights = {
            p: x
            for p, x in flatten(params).items()
            if p not in idle or any(re.search(rule.path, p) for rule in self.config.rules)
        }
        return self.config.plan(weights, self._axes)

    def init_state(self, params) -> SparseOptimizerState:
        state = self.base.init_state(params)
        return SparseOptimizerState(
            step=jnp.asarray(state.step, jnp.int32),
            param_states=state.param_states,
            sparsity=init_state(self.config, self.plan(params), flatten(params)),
        )

    def create(self, target):
        state = self.init_state(target)
        weights = forward_weights(self.plan(target), state.sparsity, flatten(target))
        return optimizers.Optimizer(self, state, unflatten(target, weights))

    def apply_gradient(self, hyper_params, params, state, grads):
        """One train step's change of weights and optimizer state, and of masks in an update."""
        if self.step_kind is None:
            raise ValueError(UNDRIVEN)

        def gradient_step(weights, grads, base_state):
            new_params, base_state = self.base.apply_gradient(
                hyper_params, unflatten(params, weights), base_state, unflatten(params, grads)
            )
            return flatten(new_params), base_state

        result = train_step(
            self.plan(params),
            state.sparsity,
            step=state.step,
            weights=flatten(params),
            grads=flatten(grads),
            optimizer_state=_base_state(state),
            gradient_step=gradient_step,
            updates_masks=self.step_kind is StepKind.UPDATE,
        )
        # a step that only updates masks is a step too
        step = jnp.asarray(state.step + 1, jnp.int32)
        slots = zero_slots(result.optimizer_state.param_states, result.reset, result.weights)
        return unflatten(params, result.weights), SparseOptimizerState(step, slots, result.state)

    def derive_logical_axes(self, optimizer, param_logical_axes):
        """The base's axes; a mask has its weight's."""
        state = optimizer.state
        base = self.base.derive_logical_axes(
            optimizers.Optimizer(self.base, _base_state(state), optimizer.target),
            param_logical_axes,
        )
        # The host casts a leaf without axes to the checkpoint's dtype, counters included; such
        # leaves are replicated, so say so.
        real = _flat_dict(self.base.state_dict(optimizer.target, _base_state(state)))
        axes = {
            k: PartitionSpec() if v is None and real.get(k) is not None else v
            for k, v in _flat_dict(base.state_dict()).items()
        }
        base = base.restore_state(unflatten_dict(axes, sep="/"))
        weight_axes = _flatten_axes(param_logical_axes)
        sparsity = _state_of(state.sparsity, lambda name, path: weight_axes[path], PartitionSpec())
        state = SparseOptimizerState(PartitionSpec(), base.state.param_states, sparsity)
        return optimizers.Optimizer(self, state, base.target)

    def state_dict(self, target, state):
        """The base's state dict, with the masks at `state/sparsity`."""
        flat = _flat_dict(self.base.state_dict(target, _base_state(state)))
        # Orbax can't read a None back; restore_state fills them in again
        flat = {k: v for k, v in flat.items() if v is not None or not _is_slot(k)}
        flat["state/step"] = state.step
        leaves = sparsity_leaves(state.sparsity)
        flat |= dict.fromkeys(leaves) if self.fills_in else leaves
        return unflatten_dict(flat, sep="/")

    def restore_state(self, opt_target, opt_state, state_dict):
        flat = _flat_dict(state_dict)
        reference = _flat_dict(self.base.state_dict(opt_target, _base_state(opt_state)))
        sparse = {k: v for k, v in flat.items() if k.startswith(SPARSITY)}
        dense = {k: v for k, v in flat.items() if k not in sparse}
        dense |= {k: v for k, v in reference.items() if v is None and _is_slot(k)}
        target, base_state = self.base.restore_state(
            opt_target, _base_state(opt_state), unflatten_dict(dense, sep="/")
        )
        read = {k: v for k, v in sparse.items() if v is not None}
        leaves = jax.tree.leaves(opt_target), jax.tree.leaves(target)
        if self.fills_in and not read and all(map(operator.is_, *leaves)):
            # nothing was loaded, as where T5X replaces the step: the masks are of these weights
            sparsity = opt_state.sparsity
        elif len(read) < len(sparse) and not has_masks(read):
            slots = {k: v for k, v in reference.items() if _is_slot(k)}
            check_shapes(slots, dense, OTHER_OPTIMIZER)
            target, sparsity = self._start_from(opt_target, target, base_state.step)
        else:
            check_leaves(sparsity_leaves(opt_state.sparsity), read, "the state to restore")
            weights = flatten(target)

            def leaf(name, path):
                x = read[f"{SPARSITY}{name}/{path}"]
                return _in_dtype_of(weights[path], x) if name == DENSE else x

            sparsity = _state_of(opt_state.sparsity, leaf, read[f"{SPARSITY}rng"])
        return target, SparseOptimizerState(base_state.step, base_state.param_states, sparsity)

    def _start_from(self, shapes, target, step) -> tuple[Any, SparsityState]:
        """Masked weights and the state of sparsity to start with, from trained weights."""
        weights, plan = flatten(target), self.plan(shapes)
        check_shapes(flatten(shapes), weights, OTHER_MODEL)
        at = int(utils.get_local_data(step))
        check_masks_will_change(plan, at)

        def start(weights):
            state = init_state(self.config, plan, weights, trained=True)
            return forward_weights(plan, state, weights, at), state

        sparse = {p: weights[p] for p in plan}
        # a mask, and whatever an algorithm keeps of a weight, lies where its weight lies
        where = {p: getattr(x, "sharding", None) for p, x in sparse.items()}
        everywhere = next(iter(where.values()), None)
        if isinstance(everywhere, NamedSharding):
            everywhere = NamedSharding(everywhere.mesh, PartitionSpec())
        state = jax.eval_shape(start, sparse)[1]
        placed = _state_of(state, lambda _, p: where[p], everywhere)
        masked, state = jax.jit(start, out_shardings=(where, placed))(sparse)
        return unflatten(target, weights | masked), state


def optimizer_of(train_state) -> optimizers.OptimizerDef | None:
    """The optimizer definition of a train state; None for a state without, as in inference."""
    return getattr(getattr(train_state, "_optimizer", None), "optimizer_def", None)


def with_optimizer(train_state, optimizer_def):
    """The train state, or its axes, under another optimizer definition."""
    return train_state.replace(
        _optimizer=train_state._optimizer.replace(optimizer_def=optimizer_def)
    )


def sparsity_leaves(state: SparsityState) -> dict[str, Any]:
    """The leaves of a sparsity state by their path in a checkpoint."""
    arrays = {"masks": state.masks, **state.slots}
    leaves = {f"{SPARSITY}{name}/{p}": x for name, part in arrays.items() for p, x in part.items()}
    return {**leaves, f"{SPARSITY}rng": state.rng}


def _state_of(like: SparsityState, leaf: Callable[[str, str], Any], rng: Any) -> SparsityState:
    """A state with the same names and paths, each leaf made from 'masks' or its slot, and path."""
    return SparsityState(
        masks={p: leaf("masks", p) for p in like.masks},
        rng=rng,
        slots={name: {p: leaf(name, p) for p in part} for name, part in like.slots.items()},
    )


def _in_dtype_of(weight, x):
    """A dense weight under a mask in its weight's dtype; the host may have read it in another.

    The model sees what is made of it, and no train step may change its weights' dtype.
    """
    # a state of axes has no dtypes
    known = hasattr(x, "astype") and hasattr(weight, "dtype")
    return x.astype(weight.dtype) if known and x.dtype != weight.dtype else x


def _untrained(optimizer, params) -> set[str]:
    """Paths of the weights that no part of a MultiOptimizer trains.

    Of other optimizers nobody can tell: optax freezes by zero updates, as any update may be.
    """
    if not hasattr(optimizer, "traversals"):  # only T5X has a MultiOptimizer
        return set()
    paths = list(flatten(params))
    named = unflatten(params, {p: p for p in paths})
    return set(paths).difference(*(t.iterate(named) for t in optimizer.traversals))


def _base_state(state: SparseOptimizerState):
    return optimizers.OptimizerState(step=state.step, param_states=state.param_states)


def _is_slot(key: str) -> bool:
    return key.startswith("state/param_states/")


def _flat_dict(tree) -> dict[str, Any]:
    return flatten_dict(flax.core.unfreeze(tree), sep="/", keep_empty_nodes=True)


def _flatten_axes(axes) -> dict[str, PartitionSpec]:
    return flatten(axes, is_leaf=lambda x: isinstance(x, PartitionSpec))
