"""The train state: parameters, optimizer state, and the parameters' logical axes."""

from collections.abc import Mapping
from typing import Any

from flax import struct, traverse_util
from flax.core import FrozenDict, freeze, unfreeze
from flax.linen import partitioning as flax_partitioning

from t5x_sparsity.embedded import optimizers

EMPTY_DICT = freeze({})


class FlaxOptimTrainState(struct.PyTreeNode):
    """Everything a training step changes; `_optimizer` holds it, the rest describes it.

    `params_axes` is the model's own collection of logical axes, or None where it emits none.
    """

    _optimizer: optimizers.Optimizer
    params_axes: FrozenDict | None = None
    flax_mutables: FrozenDict = EMPTY_DICT
    flax_mutables_axes: FrozenDict | None = None

    @classmethod
    def create(
        cls, optimizer_def: optimizers.OptimizerDef, model_variables: Mapping[str, Any]
    ) -> "FlaxOptimTrainState":
        """Returns the state at step 0 of `model_variables` (`params`, `params_axes`, others).

        An optimizer with `set_param_axes` is told the axes first. A parameter without axes, or a
        model without any where the optimizer asks for them, is a ValueError.
        """
        collections = dict(freeze(model_variables))
        params = collections.pop("params")
        params_axes = collections.pop("params_axes", None)
        _check_axes("params", params, params_axes)

        mutables_axes = {k: v for k, v in collections.items() if k.endswith("_axes")}
        mutables = {k: v for k, v in collections.items() if k not in mutables_axes}
        mutables_axes = {k.removesuffix("_axes"): v for k, v in mutables_axes.items()}
        for name, axes in mutables_axes.items():
            _check_axes(name, mutables[name], axes)

        if hasattr(optimizer_def, "set_param_axes"):
            if params_axes is None:
                raise ValueError(
                    f"{type(optimizer_def).__name__} needs the logical axes of the parameters, but "
                    "the model has no 'params_axes' collection. Declare its parameters with "
                    "flax.linen.partitioning.param_with_axes, or use another OPTIMIZER."
                )
            optimizer_def.set_param_axes(flax_partitioning.get_axis_names(params_axes))

        return cls(
            optimizer_def.create(params),
            params_axes=params_axes,
            flax_mutables=freeze(mutables),
            flax_mutables_axes=freeze(mutables_axes) if mutables_axes else None,
        )

    @property
    def step(self) -> Any:
        """The number of gradients applied, an int32 scalar."""
        return self._optimizer.state.step

    @property
    def params(self) -> FrozenDict:
        """The parameters, as the model's `params` collection."""
        return self._optimizer.target

    @property
    def param_states(self) -> Any:
        """The optimizer's state, laid out by the optimizer."""
        return self._optimizer.state.param_states

    def state_dict(self) -> dict[str, Any]:
        """Returns nested dicts of leaves, as a checkpoint holds them."""
        state_dict = self._optimizer.state_dict()
        if self.flax_mutables:
            state_dict["flax_mutables"] = unfreeze(self.flax_mutables)
        return state_dict

    def restore_state(self, state_dict: Mapping[str, Any]) -> "FlaxOptimTrainState":
        """Returns the state with the leaves of `state_dict`."""
        return self.replace(
            _optimizer=self._optimizer.restore_state(state_dict),
            flax_mutables=freeze(dict(state_dict.get("flax_mutables", {}))),
        )

    def apply_gradient(
        self, grads: Any, learning_rate: Any, flax_mutables: FrozenDict = EMPTY_DICT
    ) -> "FlaxOptimTrainState":
        """Returns the state one step on."""
        optimizer = self._optimizer.apply_gradient(grads, learning_rate=learning_rate)
        return self.replace(_optimizer=optimizer, flax_mutables=flax_mutables)

    def replace_params(self, params: Any) -> "FlaxOptimTrainState":
        """Returns the state with other parameters."""
        return self.replace(_optimizer=self._optimizer.replace(target=params))

    def replace_flax_mutables(self, flax_mutables: FrozenDict) -> "FlaxOptimTrainState":
        """Returns the state with other mutable collections."""
        return self.replace(flax_mutables=flax_mutables)

    def replace_step(self, step: Any) -> "FlaxOptimTrainState":
        """Returns the state with another step number; nothing else changes."""
        state_dict = self.state_dict()
        return self.restore_state({**state_dict, "state": {**state_dict["state"], "step": step}})

    def as_logical_axes(self) -> "FlaxOptimTrainState":
        """Returns the state with a logical PartitionSpec, or None, for each leaf."""
        optimizer_def = self._optimizer.optimizer_def
        if not hasattr(optimizer_def, "derive_logical_axes"):
            raise ValueError(
                f"{type(optimizer_def).__name__} has no derive_logical_axes, so its state can not "
                "be partitioned. Give it one, or wrap an optax transformation in OptaxWrapper."
            )
        if self.params_axes is None:
            raise ValueError(
                "The model has no 'params_axes' collection, so its parameters can not be "
                "partitioned. Declare them with flax.linen.partitioning.param_with_axes."
            )
        return FlaxOptimTrainState(
            optimizer_def.derive_logical_axes(
                self._optimizer, flax_partitioning.get_axis_names(self.params_axes)
            ),
            flax_mutables=flax_partitioning.get_axis_names(self.flax_mutables_axes or EMPTY_DICT),
        )


TrainState = FlaxOptimTrainState


def _check_axes(collection: str, variables: Mapping, axes: Mapping | None) -> None:
    if axes is None:
        return
    named = traverse_util.flatten_dict(unfreeze(flax_partitioning.get_axis_names(axes)), sep="/")
    present = traverse_util.flatten_dict(unfreeze(variables), sep="/")
    missing = sorted(set(present) - set(named))
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(present)} leaves of '{collection}' have no logical axes, "
            f"among them '{missing[0]}'. Declare them with flax.linen.partitioning.param_with_axes."
        )
