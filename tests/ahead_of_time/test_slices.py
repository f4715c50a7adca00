"""TPU slices that are not here: what libtpu says of them, and of programs for them."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5x_sparsity import host
from t5x_sparsity.ahead_of_time import slices as aot

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)


def get_slice(name):
    """As the host in use takes it."""
    return aot.get_slice(name, one_process=host.NAME == "embedded")


class Partitioner(host.partitioning.PjitPartitioner):
    """A subclass, as a user may have one."""


@needs_libtpu
@pytest.mark.parametrize(
    "name, chips, local, gib",
    [("v5e:2x4", 8, 4, 15.75), ("v4:2x2x2", 8, 4, 30.75), ("v6e:2x2", 4, 4, 31.25)],
)
def test_a_slice(name, chips, local, gib):
    found = aot.get_slice(name)
    assert len(found.devices) == chips and len(found.local_devices) == local
    assert len(aot.get_slice(name, one_process=True).local_devices) == chips
    assert found.hbm_bytes / 2**30 == pytest.approx(gib, abs=0.5)


@needs_libtpu
@pytest.mark.parametrize("name", ["v5e:3x5", "v5litepod-16", "v99:2x2"])
def test_an_unknown_slice(name):
    with pytest.raises(aot.TopologyError, match=f"libtpu knows no TPU slice '{name}' .*v5e:4x4"):
        aot.get_slice(name)


def test_without_libtpu(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(aot.TopologyError, match=r'needs libtpu.*pip install "t5x_sparsity\[aot\]"'):
        aot.get_slice("v5e:2x2")


@needs_libtpu
def test_a_step_fits_or_is_refused():
    devices = aot.get_slice("v5e:2x2")
    mesh = Mesh(list(devices.devices), ("data",))
    step = jax.jit(lambda x: jnp.sum(x @ x.T))

    def compiled(rows):
        sharding = NamedSharding(mesh, PartitionSpec("data"))
        x = jax.ShapeDtypeStruct((rows, 256), jnp.float32, sharding=sharding)
        return aot.compile_step(step, devices, x)

    small = compiled(1024)
    assert small.fits and small.per_chip.argument_bytes == 1024 * 256 // 4 * 4
    assert small.needed_bytes == small.per_chip.peak_bytes < small.available_bytes
    assert small.per_chip.collectives["all-reduce"].count == 1
    large = compiled(2**26)
    assert not large.fits and large.per_chip is None
    assert large.needed_bytes > large.available_bytes == devices.hbm_bytes


def test_an_error_that_is_not_about_memory_is_one():
    class Step:
        def lower(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        aot.compile_step(Step(), aot.Slice("v5e:2x2", (jax.devices()[0],), None))


@pytest.mark.parametrize(
    "message, needed, available",
    [
        ("RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
         "required for HLO temporaries (8.00T) exceeds available HBM (15.75G).", 8 * 2**40,
         15.75 * 2**30),
        ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
         "hbm. Used 17.90G of 15.75G hbm. Exceeded hbm capacity by 2.15G.", 17.9 * 2**30,
         15.75 * 2**30),
        ("RESOURCE_EXHAUSTED: no numbers", None, None),
    ],
)  # fmt: skip
def test_what_a_refusal_says(message, needed, available):
    found = aot.refusal(message)
    assert found == (needed and round(needed), available and round(available))


@needs_libtpu
def test_the_partitioner_makes_its_own_mesh_of_the_slice():
    devices = get_slice("v4:2x2x2")
    partitioner = Partitioner(num_partitions=2)
    mesh = aot.use_slice(partitioner, devices)
    assert dict(mesh.shape) == {"data": 4, "model": 2} and partitioner.mesh is mesh
    assert set(mesh.devices.flat) == set(devices.devices)
    assert isinstance(partitioner, Partitioner) and partitioner.data_mesh_size == 4
    # neighbours share weights
    for pair in mesh.devices:
        a, b = (d.coords for d in pair)
        assert sum(abs(i - j) for i, j in zip(a, b, strict=True)) == 1
    assert jax.devices()[0].platform == "cpu"


@needs_libtpu
def test_a_mesh_that_does_not_divide_the_slice():
    devices = get_slice("v5e:2x4")
    if host.NAME == "embedded":
        with pytest.raises(aot.TopologyError, match=r"8 chips of v5e:2x4.*3 does not divide.*2, 4"):
            aot.use_slice(Partitioner(num_partitions=3), devices)
        return
    # T5X has no default mesh there, and wants a tile
    remedy = r"num_partitions=None .*model_parallel_submesh=\(2,1,1,1\)"
    with pytest.raises(aot.TopologyError, match=remedy):
        aot.use_slice(Partitioner(num_partitions=2), devices)
    aot.use_slice(Partitioner(model_parallel_submesh=(2, 1, 1, 1)), devices)
    with pytest.raises(aot.TopologyError, match=r"must be a factor.*must divide that of \(2, 4, 1"):
        aot.use_slice(Partitioner(model_parallel_submesh=(3, 1, 1, 1)), devices)
