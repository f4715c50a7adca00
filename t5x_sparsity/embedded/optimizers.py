"""Optimizers under T5X's interface: the base definition, its state, several at once, wrapped optax.

An `OptimizerDef` holds no arrays; it makes an `OptimizerState` for parameters and applies gradients
to both. `OptaxWrapper` gives any optax transformation that interface, `MultiOptimizer` gives
parameters optimizers of their own.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import serialization, struct, traverse_util
from flax.core import FrozenDict, freeze, unfreeze

from t5x_sparsity.embedded.refusals import missing_from

__getattr__ = missing_from(__name__)

PyTree = Any


@struct.dataclass
class OptimizerState:
    """What an optimizer carries from step to step.

    `step` is an int32 scalar, the number of gradients applied; `param_states` is laid out by the
    optimizer.
    """

    step: Any
    param_states: Any


class OptimizerDef:
    """How parameters are updated; subclasses give `init_state` and `apply_gradient`.

    A subclass that trains partitioned models also gives `derive_logical_axes(optimizer, axes)`, and
    `set_param_axes(axes)` where its state depends on the parameters' logical axes.
    """

    def __init__(self, hyper_params: Any):
        """Keeps `hyper_params`, which must have `replace(**overrides)`."""
        self.hyper_params = hyper_params

    def init_state(self, params: PyTree) -> OptimizerState:
        """Returns the state before the first step."""
        raise NotImplementedError(f"{type(self).__name__} must define init_state")

    def apply_gradient(
        self, hyper_params: Any, params: PyTree, state: OptimizerState, grads: PyTree
    ) -> tuple[PyTree, OptimizerState]:
        """Returns the new parameters and the new state."""
        raise NotImplementedError(f"{type(self).__name__} must define apply_gradient")

    def update_hyper_params(self, **overrides: Any) -> Any:
        """Returns the hyper-parameters with `overrides`; `hyper_params=` replaces them all."""
        hyper_params = overrides.pop("hyper_params", self.hyper_params)
        return hyper_params.replace(**overrides) if overrides else hyper_params

    def create(self, target: PyTree) -> "Optimizer":
        """Returns an `Optimizer` of `target` with a fresh state."""
        return Optimizer(optimizer_def=self, state=self.init_state(target), target=target)

    def state_dict(self, target: PyTree, state: OptimizerState) -> dict[str, Any]:
        """Returns nested dicts of leaves: {'target': ..., 'state': ...}."""
        return {
            "target": serialization.to_state_dict(target),
            "state": serialization.to_state_dict(state),
        }

    def restore_state(
        self, opt_target: PyTree, opt_state: OptimizerState, state_dict: Mapping[str, Any]
    ) -> tuple[PyTree, OptimizerState]:
        """Returns target and state with the leaves of `state_dict`, in the structure given."""
        return (
            serialization.from_state_dict(opt_target, state_dict["target"]),
            serialization.from_state_dict(opt_state, state_dict["state"]),
        )


class Optimizer(struct.PyTreeNode):
    """A target, its optimizer state, and the definition that updates both."""

    optimizer_def: OptimizerDef = struct.field(pytree_node=False)
    state: Any
    target: Any

    def apply_gradient(self, grads: PyTree, **hyper_param_overrides: Any) -> "Optimizer":
        """Returns the optimizer one step on; overrides as in `OptimizerDef.update_hyper_params`."""
        hyper_params = self.optimizer_def.update_hyper_params(**hyper_param_overrides)
        target, state = self.optimizer_def.apply_gradient(
            hyper_params, self.target, self.state, grads
        )
        return self.replace(target=target, state=state)

    def state_dict(self) -> dict[str, Any]:
        """Returns nested dicts of leaves, see `OptimizerDef.state_dict`."""
        return self.optimizer_def.state_dict(self.target, self.state)

    def restore_state(self, state_dict: Mapping[str, Any]) -> "Optimizer":
        """Returns the optimizer with the leaves of `state_dict`."""
        target, state = self.optimizer_def.restore_state(self.target, self.state, state_dict)
        return self.replace(target=target, state=state)


def with_axes(optimizer: Optimizer, param_states: PyTree, param_axes: PyTree) -> Optimizer:
    """Returns `optimizer` with these logical axes for leaves; the step has none."""
    target = serialization.from_state_dict(
        optimizer.target, serialization.to_state_dict(param_axes)
    )
    return optimizer.replace(state=OptimizerState(None, param_states), target=target)


@struct.dataclass
class _OptaxHyperParams:
    # The trainer passes a learning rate to every optimizer; optax has its own, inside.
    learning_rate: float | None = None


class OptaxWrapper(OptimizerDef):
    """An optax transformation as an `OptimizerDef`.

    The learning rate is the transformation's own; what the trainer passes is ignored, as in T5X.
    """

    def __init__(self, optax_optimizer: optax.GradientTransformation):
        """Wraps `optax_optimizer`."""
        self.optax_optimizer = optax_optimizer
        super().__init__(_OptaxHyperParams())

    def init_state(self, params: PyTree) -> OptimizerState:
        """Returns step 0 and the transformation's initial state."""
        return OptimizerState(
            step=jnp.zeros((), jnp.int32), param_states=self.optax_optimizer.init(params)
        )

    def apply_gradient(
        self, hyper_params: Any, params: PyTree, state: OptimizerState, grads: PyTree
    ) -> tuple[PyTree, OptimizerState]:
        """Returns the updated parameters and state; `hyper_params` is ignored."""
        del hyper_params
        updates, param_states = self.optax_optimizer.update(grads, state.param_states, params)
        new_state = OptimizerState(step=state.step + 1, param_states=param_states)
        return optax.apply_updates(params, updates), new_state

    def derive_logical_axes(self, optimizer: Optimizer, param_logical_axes: PyTree) -> Optimizer:
        """Returns `optimizer` with logical axes for leaves, None where a leaf is not sharded."""
        states = optimizer.state.param_states
        states = match_param_axes(states, optimizer.target, param_logical_axes)
        return with_axes(optimizer, states, param_logical_axes)

    def state_dict(self, target: PyTree, state: OptimizerState) -> dict[str, Any]:
        """Returns nested dicts of leaves, without subtrees that hold none (`optax.EmptyState`)."""
        full = super().state_dict(target, state)
        return {**full, "state": _without_empty(full["state"])}

    def restore_state(
        self, opt_target: PyTree, opt_state: OptimizerState, state_dict: Mapping[str, Any]
    ) -> tuple[PyTree, OptimizerState]:
        """As the base, with the empty subtrees put back; a missing leaf is a ValueError."""
        expected = traverse_util.flatten_dict(
            serialization.to_state_dict(opt_state), keep_empty_nodes=True, sep="/"
        )
        given = flatten(state_dict["state"])
        missing = [
            path
            for path, leaf in expected.items()
            if path not in given and leaf is not traverse_util.empty_node
        ]
        if missing:
            raise ValueError(
                f"The optimizer state to restore lacks {len(missing)} of {len(expected)} leaves, "
                f"among them 'state/{missing[0]}': it belongs to another optimizer. "
                "Restore it with the OPTIMIZER it was written by, or start anew."
            )
        empties = {k: v for k, v in expected.items() if v is traverse_util.empty_node}
        filled = traverse_util.unflatten_dict({**empties, **given}, sep="/")
        return super().restore_state(
            opt_target, opt_state, {"target": state_dict["target"], "state": filled}
        )


def _subtree(tree: PyTree, paths: Sequence[str]) -> PyTree:
    """The nested dict of these paths alone, frozen where `tree` is."""
    flat = flatten(tree)
    return unflatten({p: flat[p] for p in paths}, like=tree)


def _laid_out(flat: Mapping[str, Any], like: PyTree) -> PyTree:
    """The tree `like`, with what `flat` has in place of its leaves, and None where it has none."""
    return unflatten({p: flat.get(p) for p in flatten(like)}, like)


class MultiOptimizer(OptimizerDef):
    """Optimizers of their own for parts of the parameters.

    A parameter that no traversal finds is not trained, and has None in place of a state. The
    optimizers must lay out their states as the parameters, as Adafactor does; optax optimizers are
    combined by `optax.multi_transform`, as on T5X. `hyper_params` is a list, one per optimizer.
    """

    def __init__(
        self,
        traversals_and_optimizers: Sequence[tuple[traverse_util.Traversal, OptimizerDef]],
    ):
        """Takes pairs such as `(traverse_util.ModelParamTraversal(filter), Adafactor())`."""
        self.traversals, self.sub_optimizers = zip(*traversals_and_optimizers, strict=True)
        super().__init__([optimizer.hyper_params for optimizer in self.sub_optimizers])

    def update_hyper_params(self, **overrides: Any) -> list[Any]:
        """As the base, with the overrides made in the hyper-parameters of every optimizer."""
        hyper_params = overrides.pop("hyper_params", self.hyper_params)
        return [hp.replace(**overrides) for hp in hyper_params] if overrides else hyper_params

    def set_param_axes(self, param_logical_axes: PyTree) -> None:
        """Gives each optimizer the axes of its own parameters."""
        for optimizer, paths in self._parts(param_logical_axes):
            if hasattr(optimizer, "set_param_axes"):
                optimizer.set_param_axes(_subtree(param_logical_axes, paths))

    def init_state(self, params: PyTree) -> OptimizerState:
        """Returns step 0 and the states of all; two optimizers for one parameter: ValueError."""
        states: dict[str, Any] = {}
        for optimizer, paths in self._parts(params):
            twice = sorted(states.keys() & set(paths))
            if twice:
                raise ValueError(
                    "Multiple optimizers match the same leaves: MultiOptimizer has two or more "
                    f"for {twice}. Let one traversal alone find each parameter."
                )
            states |= self._flat_states(optimizer, optimizer.init_state(_subtree(params, paths)))
        return OptimizerState(jnp.zeros((), jnp.int32), _laid_out(states, like=params))

    def apply_gradient(
        self, hyper_params: Sequence[Any], params: PyTree, state: OptimizerState, grads: PyTree
    ) -> tuple[PyTree, OptimizerState]:
        """Returns the updated parameters and state; what no optimizer has stays as it is."""
        new_params, new_states = flatten(params), {}
        for (optimizer, paths), hp in zip(self._parts(params), hyper_params, strict=True):
            own, own_state = optimizer.apply_gradient(
                hp,
                _subtree(params, paths),
                OptimizerState(state.step, _subtree(state.param_states, paths)),
                _subtree(grads, paths),
            )
            new_params |= flatten(own)
            new_states |= self._flat_states(optimizer, own_state)
        return _laid_out(new_params, like=params), OptimizerState(
            state.step + 1, _laid_out(new_states, like=params)
        )

    def derive_logical_axes(self, optimizer: Optimizer, param_logical_axes: PyTree) -> Optimizer:
        """Returns `optimizer` with logical axes for leaves, as each of its optimizers has them."""
        states: dict[str, Any] = {}
        for sub_optimizer, paths in self._parts(param_logical_axes):
            axes = _subtree(param_logical_axes, paths)
            state = OptimizerState(None, _subtree(optimizer.state.param_states, paths))
            derived = sub_optimizer.derive_logical_axes(
                Optimizer(optimizer_def=sub_optimizer, state=state, target=axes), axes
            )
            states |= flatten(derived.state.param_states)
        return with_axes(optimizer, _laid_out(states, like=param_logical_axes), param_logical_axes)

    def _parts(self, tree: PyTree) -> list[tuple[OptimizerDef, list[str]]]:
        """Each optimizer with the paths of its parameters, of those in `tree`."""
        paths = traverse_util.unflatten_dict({p: p for p in flatten(tree)}, sep="/")
        found = [list(traversal.iterate(paths)) for traversal in self.traversals]
        return list(zip(self.sub_optimizers, found, strict=True))

    def _flat_states(self, optimizer: OptimizerDef, state: OptimizerState) -> dict[str, Any]:
        if not isinstance(state.param_states, Mapping):
            raise ValueError(
                f"MultiOptimizer can not hold the state of {type(optimizer).__name__}, which is "
                "not laid out as the parameters, with one state per parameter. Adafactor's is; "
                "combine optax optimizers by optax.multi_transform in one OptaxWrapper."
            )
        return flatten(state.param_states)


def flatten(tree: PyTree) -> dict[str, Any]:
    """Returns the leaves of nested dicts by path, keys joined by '/'."""
    return traverse_util.flatten_dict(unfreeze(tree), sep="/")


def unflatten(flat: Mapping[str, Any], like: PyTree) -> PyTree:
    """Returns nested dicts of these leaves, frozen where `like` is."""
    tree = traverse_util.unflatten_dict(dict(flat), sep="/")
    return freeze(tree) if isinstance(like, FrozenDict) else tree


def match_param_axes(state: PyTree, params: PyTree, param_axes: PyTree) -> PyTree:
    """Returns `state` with each leaf replaced by the logical axes of its parameter, or by None.

    A leaf belongs to a parameter when its key path ends in the parameter's path (the longest such
    wins) and its shape is the parameter's: so counts, keys and factored moments get None.
    """
    axes = flatten(serialization.to_state_dict(param_axes))
    shapes = {p: x.shape for p, x in flatten(serialization.to_state_dict(params)).items()}

    def axes_of(key_path, leaf):
        names = jax.tree_util.keystr(key_path, simple=True, separator="/").split("/")
        paths = ("/".join(names[start:]) for start in range(len(names)))
        shape = getattr(leaf, "shape", None)
        return next((axes[p] for p in paths if p in axes and shapes[p] == shape), None)

    return jax.tree_util.tree_map_with_path(axes_of, state)


def _without_empty(tree: Any) -> Any:
    if not isinstance(tree, Mapping):
        return tree
    kept = {k: _without_empty(v) for k, v in tree.items()}
    return {k: v for k, v in kept.items() if not (isinstance(v, Mapping) and not v)}


def wrap_optax_optimizer(
    optax_optimizer: Callable[..., optax.GradientTransformation],
) -> Callable[..., OptaxWrapper]:
    """Returns `optax_optimizer` with the result wrapped: same arguments, an `OptaxWrapper`."""

    @functools.wraps(optax_optimizer)
    def wrapped(*args: Any, **kwargs: Any) -> OptaxWrapper:
        return OptaxWrapper(optax_optimizer(*args, **kwargs))

    return wrapped


def chain(transformations: Sequence[optax.GradientTransformation]) -> OptaxWrapper:
    """Returns optax transformations applied in turn, wrapped."""
    return OptaxWrapper(optax.chain(*transformations))


adabelief = wrap_optax_optimizer(optax.adabelief)
adagrad = wrap_optax_optimizer(optax.adagrad)
adam = wrap_optax_optimizer(optax.adam)
adamw = wrap_optax_optimizer(optax.adamw)
dpsgd = wrap_optax_optimizer(optax.contrib.dpsgd)
fromage = wrap_optax_optimizer(optax.fromage)
lamb = wrap_optax_optimizer(optax.lamb)
lars = wrap_optax_optimizer(optax.lars)
lion = wrap_optax_optimizer(optax.lion)
noisy_sgd = wrap_optax_optimizer(optax.noisy_sgd)
radam = wrap_optax_optimizer(optax.radam)
rmsprop = wrap_optax_optimizer(optax.rmsprop)
sgd = wrap_optax_optimizer(optax.sgd)
yogi = wrap_optax_optimizer(optax.yogi)
