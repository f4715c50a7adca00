"""The train state: parameters, optimizer state, and the parameters' logical axes."""

from collections.abc import Mapping
from typing import Any

from flax import struct, traverse_util
from flax.core import FrozenDict, freeze, unfreeze
from flax.linen import partitioning as flax_partitioning

from t5x_sparsity.embedded import optimizers


class FlaxOptimTrainState(struct.PyTreeNode):
    """Everything a training step changes; `_optimizer` holds it, the rest describes it.

    `params_axes` is the model's own collection of logical axes, or None where it emits none.
    """

    _optimizer: optimizers.Optimizer
    params_axes: FrozenDict | None = None

    @classmethod
    def create(
        cls, optimizer_def: optimizers.OptimizerDef, model_variables: Mapping[str, Any]
    ) -> "FlaxOptimTrainState":
        """Returns the state at step 0 of `model_variables` (`params` and `params_axes`).

        An optimizer with `set_param_axes` is told the axes first. A ValueError: a parameter without
        axes, a model without any where the optimizer asks for them, or other collections.
        """
        collections = dict(freeze(model_variables))
        params = collections.pop("params")
        params_axes = collections.pop("params_axes", None)
        if collections:
            raise ValueError(
                f"The model has the mutable collections {sorted(collections)}; the embedded host "
                "trains parameters only. Use T5X for it."
            )
        _check_axes(params, params_axes)

        if hasattr(optimizer_def, "set_param_axes"):
            if params_axes is None:
                raise ValueError(
                    f"{type(optimizer_def).__name__} needs the logical axes of the parameters, but "
                    "the model has no 'params_axes' collection. Declare its parameters with "
                    "flax.linen.partitioning.param_with_axes, or use another OPTIMIZER."
                )
            optimizer_def.set_param_axes(flax_partitioning.get_axis_names(params_axes))

        return cls(optimizer_def.create(params), params_axes=params_axes)

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
        return self._optimizer.state_dict()

    def restore_state(self, state_dict: Mapping[str, Any]) -> "FlaxOptimTrainState":
        """Returns the state with the leaves of `state_dict`."""
        return self.replace(_optimizer=self._optimizer.restore_state(state_dict))

    def apply_gradient(self, grads: Any, learning_rate: Any) -> "FlaxOptimTrainState":
        """Returns the state one step on."""
        optimizer = self._optimizer.apply_gradient(grads, learning_rate=learning_rate)
        return self.replace(_optimizer=optimizer)

    def replace_params(self, params: Any) -> "FlaxOptimTrainState":
        """Returns the state with other parameters."""
        return self.replace(_optimizer=self._optimizer.replace(target=params))

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
        )


def _check_axes(params: Mapping, axes: Mapping | None) -> None:
    if axes is None:
        return
    named = traverse_util.flatten_dict(unfreeze(flax_partitioning.get_axis_names(axes)), sep="/")
    present = traverse_util.flatten_dict(unfreeze(params), sep="/")
    missing = sorted(set(present) - set(named))
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(present)} leaves of 'params' have no logical axes, among "
            f"them '{missing[0]}'. Declare them with flax.linen.partitioning.param_with_axes."
        )
