"""Meshes of CPU devices, and what a compiled program moves between them."""

import functools
import math
import re

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def mesh(x: int, y: int) -> Mesh:
    """A mesh of x * y devices with the axes 'x' and 'y'."""
    devices = np.array(jax.devices()[: x * y]).reshape(x, y)
    return Mesh(devices, ("x", "y"), axis_types=(AxisType.Auto, AxisType.Auto))


def put(mesh: Mesh, array, *spec):
    """The array, sharded."""
    return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))


def assert_moves_no_weight(text: str, largest: int, *, gathers: bool = False) -> None:
    """Asserts of compiled text: no sort, and only all-reduces of at most `largest` numbers.

    gathers: whether numbers of slices, as few, may be gathered too; so they are where slices lie on
    several devices.
    """
    assert "HloModule" in text
    assert not collectives(text, "sort")
    for op in ("all-to-all", "collective-permute", "reduce-scatter", "all-gather"):
        found = collectives(text, op)
        assert (gathers and op == "all-gather") or not found, (op, found)
    for result in collectives(text, "all-reduce") + collectives(text, "all-gather"):
        for dims in re.findall(r"\w+\[([\d,]*)\]", result):
            assert math.prod(int(d) for d in dims.split(",") if d) <= largest, result


def collectives(text: str, op: str) -> list[str]:
    """The result types of every such operation in compiled text."""
    return re.findall(rf"= (.*?) {op}(?:-start)?\(", text)


# For programs of which only the results count: they compile in a third of the time.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
