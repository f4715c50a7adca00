"""Partitioning over the devices of one machine, by logical axis names.

Parameters carry logical axes ('embed', 'mlp', ...); rules map those to the axes of a mesh, 'data'
and 'model'. A partitioned function runs under that mesh and those rules.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax.linen import partitioning as flax_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5x_sparsity.core.trees import path_of
from t5x_sparsity.embedded.refusals import missing_from, refuse_options
from t5x_sparsity.embedded.train_state import FlaxOptimTrainState

__getattr__ = missing_from(__name__)

LogicalAxisRules = Sequence[tuple[str, str | None]]
PyTree = Any

_REPLICATED = ("relpos_buckets", "abspos_buckets", "length", "layers", "stack", "mlp_activations")


def standard_logical_axis_rules(
    activation_partitioning_dims: int = 1,
    parameter_partitioning_dims: int = 1,
    additional_rules: LogicalAxisRules | None = None,
) -> list[tuple[str, str | None]]:
    """Returns T5X's rules for its models, in order of priority, then `additional_rules`.

    activation_partitioning_dims: 1, or 2 to split 'embed' over 'model' also.
    parameter_partitioning_dims: 1, or 2 to split 'embed' of parameters over 'data' also.
    """
    dims = (activation_partitioning_dims, parameter_partitioning_dims)
    embed = {(1, 1): [None], (2, 1): ["model"], (1, 2): ["data"], (2, 2): ["model", "data"]}
    if dims not in embed:
        raise ValueError(
            "standard_logical_axis_rules.activation_partitioning_dims and "
            f".parameter_partitioning_dims must be 1 or 2, got {dims}."
        )
    rules = [("batch", "data")]
    rules += [(name, "model") for name in ("vocab", "mlp", "heads", "joined_kv")]
    rules += [("kv", None), *(("embed", axis) for axis in embed[dims])]
    return rules + [(name, None) for name in _REPLICATED] + list(additional_rules or ())


class PjitPartitioner:
    """Partitions training over the mesh of all local devices: (data, model).

    num_partitions: size of the 'model' axis; it must divide the number of devices, and the rest is
        the 'data' axis.
    logical_axis_rules: (logical axis, mesh axis or None) in order of priority; None takes
        `standard_logical_axis_rules()`.
    """

    def __init__(
        self,
        num_partitions: int,
        logical_axis_rules: LogicalAxisRules | None = None,
        **only_in_t5x: Any,
    ):
        """Checks the arguments; the mesh is made, and checked, when it is first asked for."""
        refuse_options("partitioning.PjitPartitioner", only_in_t5x)
        self._num_partitions = num_partitions
        if logical_axis_rules is None:
            logical_axis_rules = standard_logical_axis_rules()
        self.logical_axis_rules = tuple(tuple(rule) for rule in logical_axis_rules)
        # How a batch is split: along its first axis.
        self.data_partition_spec = flax_partitioning.logical_to_mesh_axes(
            ("batch",), self.logical_axis_rules
        )

    @property
    def mesh(self) -> Mesh:
        """The mesh: axes 'data' and 'model' over all local devices."""
        devices = np.asarray(jax.local_devices())
        if (self._num_partitions or 0) < 1 or devices.size % self._num_partitions:
            divisors = [n for n in range(1, devices.size + 1) if devices.size % n == 0]
            raise ValueError(
                f"PjitPartitioner.num_partitions = {self._num_partitions} does not divide the "
                f"{devices.size} local devices. Set it to one of {divisors}."
            )
        return Mesh(devices.reshape(-1, self._num_partitions), ("data", "model"))

    @property
    def data_mesh_size(self) -> int:
        """The number of parts that a batch is split into."""
        (axis,) = self.data_partition_spec
        return self.mesh.shape[axis] if axis else 1

    def check_batch_size(self, batch_size: int) -> None:
        """Raises a ValueError unless a batch can be split over the data axis of the mesh."""
        if batch_size % self.data_mesh_size:
            raise ValueError(
                f"A batch of {batch_size} examples can not be split over the data axis of "
                f"{self.data_mesh_size} devices. Set BATCH_SIZE to a multiple of "
                f"{self.data_mesh_size}, or a larger PjitPartitioner.num_partitions."
            )

    def get_logical_axes(self, train_state: FlaxOptimTrainState) -> FlaxOptimTrainState:
        return train_state.as_logical_axes()

    def get_mesh_axes(self, train_state: FlaxOptimTrainState) -> FlaxOptimTrainState:
        """Returns the state with a PartitionSpec of mesh axes, or None, for each leaf.

        An axis that no rule names is not split, as in T5X.
        """

        def to_mesh_axes(path, axes):
            try:
                return flax_partitioning.logical_to_mesh_axes(axes, self.logical_axis_rules)
            except ValueError as error:
                raise ValueError(
                    f"The logical axes {tuple(axes)} of '{path_of(path[1:])}' can not be mapped "
                    f"to the mesh by PjitPartitioner.logical_axis_rules: {error} Give each axis a "
                    "name of its own."
                ) from error

        return jax.tree_util.tree_map_with_path(to_mesh_axes, self.get_logical_axes(train_state))

    def partition(
        self,
        fn: Callable[..., Any],
        in_axis_resources: PyTree,
        out_axis_resources: PyTree,
        static_argnums: int | Sequence[int] = (),
        donate_argnums: int | Sequence[int] = (),
    ) -> Any:
        """Returns `fn` jitted with the given shardings, and traced under the mesh and the rules.

        Resources are trees (or prefixes of them) of PartitionSpec. None for a whole argument or
        result leaves its sharding to the compiler; None within a tree means replicated.
        """
        mesh = self.mesh

        def sharding(spec):
            return NamedSharding(mesh, PartitionSpec() if spec is None else spec)

        def shardings(entry):
            none = lambda x: x is None  # noqa: E731
            return None if entry is None else jax.tree.map(sharding, entry, is_leaf=none)

        ins, outs = (
            tuple(map(shardings, resources))
            if type(resources) in (tuple, list)
            else shardings(resources)
            for resources in (in_axis_resources, out_axis_resources)
        )

        @functools.wraps(fn)
        def under_rules(*args):
            # The abstract mesh, since the concrete one can't be set while a function is traced.
            abstract = jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
            with abstract, flax_partitioning.axis_rules(self.logical_axis_rules):
                return fn(*args)

        return jax.jit(
            under_rules,
            in_shardings=ins,
            out_shardings=outs,
            static_argnums=static_argnums,
            donate_argnums=donate_argnums,
        )

    def compile(self, partitioned_fn: Any, *args: Any) -> Any:
        return partitioned_fn.lower(*args).compile()
