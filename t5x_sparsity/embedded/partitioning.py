"""Partitioning over the devices of one machine, by logical axis names.

Parameters carry logical axes ('embed', 'mlp', ...); rules map those to the axes of a mesh, 'data'
and 'model'. A partitioned function runs under that mesh and those rules.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util
from flax.linen import partitioning as flax_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5x_sparsity.embedded.refusals import missing_from, refuse, refuse_options
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


class DataLayout(NamedTuple):
    """Which part of a global batch this process reads: on one machine, all of it."""

    batch_size: int
    shard_id: int = 0
    num_shards: int = 1
    is_first_host_in_replica_set: bool = True


class PartitionedCallable:
    """A jitted function that is called, and lowered, under a mesh and logical axis rules."""

    def __init__(self, jitted: Any, mesh: Mesh, logical_axis_rules: LogicalAxisRules):
        self._jitted, self._mesh, self._rules = jitted, mesh, logical_axis_rules

    def __call__(self, *args: Any) -> Any:
        """Runs the function, compiling it at the first call."""
        return self._under_rules(self._jitted, *args)

    def lower(self, *args: Any) -> Any:
        """Returns the lowered function for arguments of these shapes; nothing runs."""
        return self._under_rules(self._jitted.lower, *args)

    def _under_rules(self, fn: Callable, *args: Any) -> Any:
        # The abstract mesh, since the concrete one can't be set while another function is traced.
        mesh = jax.sharding.use_abstract_mesh(self._mesh.abstract_mesh)
        with mesh, flax_partitioning.axis_rules(self._rules):
            return fn(*args)


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
        self._logical_axis_rules = tuple(tuple(rule) for rule in logical_axis_rules)
        (self._data_axis,) = flax_partitioning.logical_to_mesh_axes(
            ("batch",), self._logical_axis_rules
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
    def logical_axis_rules(self) -> LogicalAxisRules:
        return self._logical_axis_rules

    @property
    def data_partition_spec(self) -> PartitionSpec:
        """How a batch is split: along its first axis."""
        return PartitionSpec(self._data_axis)

    @property
    def data_mesh_size(self) -> int:
        """The number of parts that a batch is split into."""
        return self.mesh.shape[self._data_axis] if self._data_axis else 1

    def get_data_layout(
        self, batch_size: int | None = None, host_index: int | None = None
    ) -> DataLayout:
        """Returns the layout of a batch of `batch_size`, by default one example per part."""
        refuse("get_data_layout.host_index", host_index or 0, 0, "is one process")
        batch_size = batch_size or self.data_mesh_size
        if batch_size % self.data_mesh_size:
            raise ValueError(
                f"A batch of {batch_size} examples can not be split over the data axis of "
                f"{self.data_mesh_size} devices. Set BATCH_SIZE to a multiple of "
                f"{self.data_mesh_size}, or a larger PjitPartitioner.num_partitions."
            )
        return DataLayout(int(batch_size))

    def get_logical_axes(self, train_state: FlaxOptimTrainState) -> FlaxOptimTrainState:
        """Returns the state with a logical PartitionSpec, or None, for each leaf."""
        return train_state.as_logical_axes()

    def get_mesh_axes(self, train_state: FlaxOptimTrainState) -> FlaxOptimTrainState:
        """Returns the state with a PartitionSpec of mesh axes, or None, for each leaf.

        An axis that no rule names is not split, as in T5X.
        """
        logical = self.get_logical_axes(train_state)
        flat = traverse_util.flatten_dict(logical.state_dict(), keep_empty_nodes=True, sep="/")
        mesh_axes = {path: self._to_mesh_axes(path, axes) for path, axes in flat.items()}
        return logical.restore_state(traverse_util.unflatten_dict(mesh_axes, sep="/"))

    def partition(
        self,
        fn: Callable[..., Any],
        in_axis_resources: PyTree,
        out_axis_resources: PyTree,
        static_argnums: int | Sequence[int] = (),
        donate_argnums: int | Sequence[int] = (),
    ) -> PartitionedCallable:
        """Returns `fn` jitted with the given shardings of arguments and results.

        Resources are trees (or prefixes of them) of PartitionSpec. None for a whole argument or
        result leaves its sharding to the compiler; None within a tree means replicated.
        """
        mesh = self.mesh

        def sharding(spec):
            return NamedSharding(mesh, PartitionSpec() if spec is None else spec)

        def shardings(entry):
            is_spec = lambda x: x is None or isinstance(x, PartitionSpec)  # noqa: E731
            return None if entry is None else jax.tree.map(sharding, entry, is_leaf=is_spec)

        ins, outs = (
            tuple(map(shardings, resources))
            if type(resources) in (tuple, list)
            else shardings(resources)
            for resources in (in_axis_resources, out_axis_resources)
        )
        jitted = jax.jit(
            fn,
            in_shardings=ins,
            out_shardings=outs,
            static_argnums=static_argnums,
            donate_argnums=donate_argnums,
        )
        return PartitionedCallable(jitted, mesh, self._logical_axis_rules)

    def compile(self, partitioned_fn: PartitionedCallable, *args: Any) -> Any:
        return partitioned_fn.lower(*args).compile()

    def _to_mesh_axes(self, path: str, axes: Any) -> Any:
        if axes is None or axes is traverse_util.empty_node:
            return axes
        try:
            return flax_partitioning.logical_to_mesh_axes(axes, self._logical_axis_rules)
        except ValueError as error:
            raise ValueError(
                f"The logical axes {tuple(axes)} of '{path}' can not be mapped to the mesh by "
                f"PjitPartitioner.logical_axis_rules: {error} Give each axis a name of its own."
            ) from error
