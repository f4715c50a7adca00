"""Optimizers under T5X's interface: the base definition, its state, and wrapped optax.

An `OptimizerDef` holds no arrays; it makes an `OptimizerState` for parameters and applies gradients
to both. `OptaxWrapper` gives any optax transformation that interface.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import serialization, struct

from t5x_sparsity.core.trees import flatten, path_of, unflatten
from t5x_sparsity.embedded.refusals import missing_from

__getattr__ = missing_from(__name__, ", or wrap an optax optimizer in optimizers.OptaxWrapper")

PyTree = Any


@struct.dataclass
class OptimizerState:
    """What an optimizer carries from step to step."""

    step: Any  # int32 scalar, the number of gradients applied
    param_states: Any  # laid out by the optimizer


@struct.dataclass
class HyperParams:
    """What may change from step to step. An optax transformation has its own learning rate."""

    learning_rate: Any = None


class OptimizerDef:
    """How parameters are updated; subclasses give `init_state` and `apply_gradient`.

    A subclass that trains partitioned models also gives `derive_logical_axes(optimizer, axes)`, and
    `set_param_axes(axes)` where its state depends on the parameters' logical axes.
    """

    def __init__(self, hyper_params: Any = HyperParams()):  # noqa: B008 - it is immutable
        self.hyper_params = hyper_params

    def init_state(self, params: PyTree) -> OptimizerState:
        raise NotImplementedError

    def apply_gradient(
        self, hyper_params: Any, params: PyTree, state: OptimizerState, grads: PyTree
    ) -> tuple[PyTree, OptimizerState]:
        raise NotImplementedError

    def update_hyper_params(self, **overrides: Any) -> Any:
        """Returns the hyper-parameters with `overrides`; `hyper_params=` replaces them all."""
        hyper_params = overrides.pop("hyper_params", self.hyper_params)
        return hyper_params.replace(**overrides) if overrides else hyper_params

    def create(self, target: PyTree) -> Optimizer:
        """Returns an `Optimizer` of `target` with a fresh state."""
        return Optimizer(optimizer_def=self, state=self.init_state(target), target=target)

    def state_dict(self, target: PyTree, state: OptimizerState) -> dict[str, Any]:
        """Returns nested dicts of leaves: {'target': ..., 'state': ...}."""
        return serialization.to_state_dict({"target": target, "state": state})

    def restore_state(
        self, opt_target: PyTree, opt_state: OptimizerState, state_dict: Mapping[str, Any]
    ) -> tuple[PyTree, OptimizerState]:
        """Returns target and state with the leaves of `state_dict`, in the structure given."""
        like = {"target": opt_target, "state": opt_state}
        restored = serialization.from_state_dict(like, state_dict)
        return restored["target"], restored["state"]


class Optimizer(struct.PyTreeNode):
    """A target, its optimizer state, and the definition that updates both."""

    optimizer_def: OptimizerDef = struct.field(pytree_node=False)
    state: Any
    target: Any

    def apply_gradient(self, grads: PyTree, **hyper_param_overrides: Any) -> Optimizer:
        """Returns the optimizer one step on; overrides as in `OptimizerDef.update_hyper_params`."""
        definition = self.optimizer_def
        hyper_params = definition.update_hyper_params(**hyper_param_overrides)
        target, state = definition.apply_gradient(hyper_params, self.target, self.state, grads)
        return self.replace(target=target, state=state)

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer_def.state_dict(self.target, self.state)

    def restore_state(self, state_dict: Mapping[str, Any]) -> Optimizer:
        target, state = self.optimizer_def.restore_state(self.target, self.state, state_dict)
        return self.replace(target=target, state=state)


def with_axes(optimizer: Optimizer, param_states: PyTree, param_axes: PyTree) -> Optimizer:
    """Returns `optimizer` with these logical axes for leaves; the step has none."""
    target = unflatten(optimizer.target, flatten(param_axes))
    return optimizer.replace(state=OptimizerState(None, param_states), target=target)


class OptaxWrapper(OptimizerDef):
    """An optax transformation as an `OptimizerDef`.

    The learning rate is the transformation's own; what the trainer passes is ignored, as in T5X.
    """

    def __init__(self, optax_optimizer: optax.GradientTransformation):
        self.optax_optimizer = optax_optimizer
        super().__init__()

    def init_state(self, params: PyTree) -> OptimizerState:
        return OptimizerState(jnp.zeros((), jnp.int32), self.optax_optimizer.init(params))

    def apply_gradient(
        self, hyper_params: Any, params: PyTree, state: OptimizerState, grads: PyTree
    ) -> tuple[PyTree, OptimizerState]:
        del hyper_params
        updates, param_states = self.optax_optimizer.update(grads, state.param_states, params)
        new_state = OptimizerState(step=state.step + 1, param_states=param_states)
        return optax.apply_updates(params, updates), new_state

    def derive_logical_axes(self, optimizer: Optimizer, param_logical_axes: PyTree) -> Optimizer:
        """Returns `optimizer` with the logical axes of its parameter for each leaf, or None.

        A leaf belongs to a parameter when its key path ends in the parameter's path (the longest
        such wins) and its shape is the parameter's: so counts, keys and factored moments get None.
        """
        axes, params = flatten(param_logical_axes), flatten(optimizer.target)

        def axes_of(key_path, leaf):
            names = path_of(key_path).split("/")
            paths = ("/".join(names[start:]) for start in range(len(names)))
            shape = getattr(leaf, "shape", None)
            return next((axes[p] for p in paths if p in axes and params[p].shape == shape), None)

        states = jax.tree_util.tree_map_with_path(axes_of, optimizer.state.param_states)
        return with_axes(optimizer, states, param_logical_axes)


def _wrapped(make: Callable[..., optax.GradientTransformation]) -> Callable[..., OptaxWrapper]:
    @functools.wraps(make)
    def wrapped(*args: Any, **kwargs: Any) -> OptaxWrapper:
        return OptaxWrapper(make(*args, **kwargs))

    return wrapped


def chain(transformations: Sequence[optax.GradientTransformation]) -> OptaxWrapper:
    """Returns optax transformations applied in turn, wrapped."""
    return OptaxWrapper(optax.chain(*transformations))


adam = _wrapped(optax.adam)
adamw = _wrapped(optax.adamw)
lion = _wrapped(optax.lion)
sgd = _wrapped(optax.sgd)
