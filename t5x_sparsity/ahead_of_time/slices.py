"""Train steps compiled ahead of time for TPU slices that are not here, by libtpu alone."""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5x_sparsity.ahead_of_time import TPU_ENVIRONMENT
from t5x_sparsity.ahead_of_time.patches import jax_devices
from t5x_sparsity.ahead_of_time.program import CompiledStep, describe
from t5x_sparsity.core.names import one_line

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class TopologyError(ValueError):
    """There is no such slice, the mesh doesn't fit it, or libtpu is missing."""


@dataclasses.dataclass(frozen=True)
class Slice:
    """A TPU slice, as libtpu describes it."""

    name: str  #: by which it was asked for
    devices: tuple[Any, ...]  #: all of them; a process has `local_devices` of them
    hbm_bytes: int | None  #: of a device, usable by a program; None where libtpu doesn't say
    one_process: bool = False  #: whether one process has all devices, as on the embedded host

    @property
    def kind(self) -> str:
        return self.devices[0].device_kind

    @property
    def local_devices(self) -> list[Any]:
        return [d for d in self.devices if self.one_process or d.process_index == 0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compilation:
    """The result of compiling one step."""

    compile_seconds: float  #: tracing included
    needed_bytes: int | None  #: of a chip; None where libtpu refused it without a number
    available_bytes: int | None  #: of a chip; None where libtpu doesn't say
    per_chip: CompiledStep | None  #: what it takes; None where it was refused for memory

    @property
    def fits(self) -> bool:
        return self.per_chip is not None


def get_slice(name: str, *, one_process: bool = False) -> Slice:
    """The slice of a name such as 'v5e:4x4'; see `Slice` for `one_process`.

    Raises:
      TopologyError: libtpu is not installed, or knows none of this name.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise TopologyError(
            "compiling for a TPU slice needs libtpu, which isn't installed; install it by "
            'pip install "t5x_sparsity[aot]", or leave --topology out'
        )
    for key, value in TPU_ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    # as JAX has it on v4: a chip is one device
    options = {"chip_config_name": "megacore"} if name.lower().startswith("v4:") else {}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except Exception as e:
        raise TopologyError(
            f"libtpu knows no TPU slice {name!r} ({one_line(e)}); give one such as v4:2x2x2, "
            "v5e:4x4, v5p:2x2x2 or v6e:4x4"
        ) from e
    devices = Slice(name, tuple(found.devices), None, one_process)
    # libtpu names the memory of a device when it refuses a program that needs more
    sharding = NamedSharding(Mesh(np.array(found.devices[:1]), ("x",)), PartitionSpec())
    far_too_large = jax.ShapeDtypeStruct((2**40,), np.float32, sharding=sharding)
    with contextlib.suppress(Exception):  # a plan goes on without it
        refused = compile_step(jax.jit(lambda x: x + 1), devices, far_too_large)
        devices = dataclasses.replace(devices, hbm_bytes=refused.available_bytes)
    return devices


def refusal(message: str) -> tuple[int | None, int | None]:
    """(bytes needed, bytes available) of a program refused for memory, as far as it says."""
    size = r"([\d.]+)([KMGT]?)i?B?"
    for pattern in (
        rf"memory required[^(]*\({size}\) exceeds available HBM \({size}\)",
        rf"[Uu]sed {size} of {size} hbm",
        rf"requires {size}[^.]*?only {size}",
    ):
        if match := re.search(pattern, message):
            needed, unit, available, unit_available = match.groups()
            return (
                round(float(needed) * _UNITS[unit]),
                round(float(available) * _UNITS[unit_available]),
            )
    return None, None


def on_slice(devices: Slice) -> contextlib.AbstractContextManager[None]:
    """A context in which JAX names the slice's devices; nothing can run on them."""
    return jax_devices(devices.devices, devices.local_devices)


def use_slice(partitioner: Any, devices: Slice) -> Mesh:
    """Gives the partitioner the mesh that it would make on the slice, and returns the mesh.

    Raises:
      TopologyError: it makes none there.
    """
    try:
        with on_slice(devices):
            mesh = partitioner.mesh
    except (AssertionError, ValueError) as e:
        said = one_line(e).rstrip(".") or "its parts don't divide the slice"
        raise TopologyError(
            f"the partitioner makes no mesh of the {len(devices.devices)} chips of "
            f"{devices.name}: {said}{_remedy(partitioner, devices)}"
        ) from e
    cls = type(partitioner)
    partitioner.__class__ = type(cls.__name__, (cls,), {"mesh": property(lambda self: mesh)})
    return mesh


def _remedy(partitioner: Any, devices: Slice) -> str:
    """How T5X's partitioner can be given a mesh; the embedded host's says so itself."""
    option = "--gin.partitioning.PjitPartitioner"
    if not hasattr(partitioner, "_model_parallel_submesh"):
        return ""
    asked = partitioner._model_parallel_submesh
    ways = math.prod(asked) if asked else getattr(partitioner, "_num_partitions", None) or 1
    bounds = [max(d.coords[i] for d in devices.devices) + 1 for i in range(3)]
    bounds.append(max(d.core_on_chip for d in devices.devices) + 1)
    found = _submesh(ways, bounds)
    if found is None:
        return f". Each part of {option}.model_parallel_submesh must divide that of {tuple(bounds)}"
    tile = str(found).replace(" ", "")
    return f'. Add {option}.num_partitions=None "{option}.model_parallel_submesh={tile}"'


def _submesh(ways: int, bounds: Sequence[int]) -> tuple[int, ...] | None:
    """A tile of `ways` chips that divides the slice."""
    if not bounds:
        return () if ways == 1 else None
    for n in range(bounds[0], 0, -1):
        if bounds[0] % n == ways % n == 0:
            rest = _submesh(ways // n, bounds[1:])
            if rest is not None:
                return (n, *rest)
    return None


def placed(shapes: Any, axes: Any, mesh: Mesh) -> Any:
    """The shapes of a train state with the sharding that its axes give each leaf."""

    def is_axes(x):
        return x is None or isinstance(x, PartitionSpec)

    specs = dict(jax.tree_util.tree_leaves_with_path(axes, is_leaf=is_axes))

    def place(keys, x):
        sharding = NamedSharding(mesh, specs.get(keys) or PartitionSpec())
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, shapes)


def compile_step(step: Any, devices: Slice, *arguments: Any) -> Compilation:
    """Compiles what has `lower`, for abstract arguments that are placed on the slice."""
    begun = time.monotonic()
    found, available = None, devices.hbm_bytes
    try:
        with on_slice(devices):
            lowered = step.lower(*arguments)
        found = describe(lowered.compile())
        needed = found.peak_bytes
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        needed, said = refusal(str(e))
        available = said or available
    return Compilation(
        compile_seconds=time.monotonic() - begun,
        needed_bytes=needed,
        available_bytes=available,
        per_chip=found,
    )
