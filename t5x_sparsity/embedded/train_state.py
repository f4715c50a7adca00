"""The train state: parameters, optimizer state, and the parameters' logical axes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax import struct
from flax.core import FrozenDict, freeze
from flax.linen import partitioning as flax_partitioning

from t5x_sparsity.core.trees import flatten
from t5x_sparsity.embedded import optimizers


class FlaxOptimTrainState(struct.PyTreeNode):
    """Everything a training step changes, and the model's own collection of logical axes."""

    _optimizer: optimizers.Optimizer
    params_axes: FrozenDict | None = None

    @classmethod
    def create(
        cls, optimizer_def: optimizers.OptimizerDef, model_variables: Mapping[str, Any]
    ) -> FlaxOptimTrainState:
        """Returns the state at step 0 of `model_variables` (`params` and `params_axes`).

        An optimizer with `set_param_axes` is told the axes first. A parameter without axes, or
        other collections, are a ValueError.
        """
        collections = dict(freeze(model_variables))
        params = collections.pop("params")
        params_axes = collections.pop("params_axes", FrozenDict())
        if collections:
            raise ValueError(
                f"The model has the mutable collections {sorted(collections)}; the embedded host "
                "trains parameters only. Use T5X for it."
            )
        axes, paths = flax_partitioning.get_axis_names(params_axes), flatten(params)
        missing = sorted(set(paths) - set(flatten(axes)))
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(paths)} leaves of 'params' have no logical axes, among "
                f"them '{missing[0]}'. Declare them with flax.linen.partitioning.param_with_axes."
            )
        if hasattr(optimizer_def, "set_param_axes"):
            optimizer_def.set_param_axes(axes)
        return cls(optimizer_def.create(params), params_axes=params_axes)

    @property
    def step(self) -> Any:
        """The number of gradients applied, an int32 scalar."""
        return self._optimizer.state.step

    @property
    def params(self) -> FrozenDict:
        return self._optimizer.target

    @property
    def param_states(self) -> Any:
        return self._optimizer.state.param_states

    def state_dict(self) -> dict[str, Any]:
        """Returns nested dicts of leaves, as a checkpoint holds them."""
        return self._optimizer.state_dict()

    def restore_state(self, state_dict: Mapping[str, Any]) -> FlaxOptimTrainState:
        return self.replace(_optimizer=self._optimizer.restore_state(state_dict))

    def apply_gradient(self, grads: Any, learning_rate: Any) -> FlaxOptimTrainState:
        optimizer = self._optimizer.apply_gradient(grads, learning_rate=learning_rate)
        return self.replace(_optimizer=optimizer)

    def replace_step(self, step: Any) -> FlaxOptimTrainState:
        """Returns the state with another step number; nothing else changes."""
        state_dict = self.state_dict()
        return self.restore_state({**state_dict, "state": {**state_dict["state"], "step": step}})

    def as_logical_axes(self) -> FlaxOptimTrainState:
        """Returns the state with a logical PartitionSpec, or None, for each leaf."""
        axes = flax_partitioning.get_axis_names(self.params_axes)
        derive = self._optimizer.optimizer_def.derive_logical_axes
        return FlaxOptimTrainState(derive(self._optimizer, axes))
