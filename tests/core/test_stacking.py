"""Weights that are alike, computed on as one."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import t5x_sparsity as ts
from t5x_sparsity import SparsityConfig, Static
from t5x_sparsity.ahead_of_time import slices as aot
from t5x_sparsity.core.optimizer_slots import zero_slots
from t5x_sparsity.core.stacking import map_stacked
from t5x_sparsity.core.train_step import init_state, train_step

SHAPES = {"a": (64, 16), "b": (64, 32), "c": (64, 16), "d": (64, 16), "e": (64, 16)}
AXES = {
    "a": ("embed", "mlp"),
    "b": ("embed", "mlp"),
    "c": ("mlp", "embed"),
    "d": ("embed", "mlp"),
    "e": None,
}


@pytest.fixture
def plan():
    shapes = {p: jax.ShapeDtypeStruct(s, jnp.float32) for p, s in SHAPES.items()}
    return SparsityConfig(algorithm=Static(), sparsity=0.5).plan(shapes, AXES)


def test_weights_of_one_shape_and_sharding_share_a_call(plan):
    calls = []

    def double(layer, x):
        calls.append((layer.axes, x.shape))
        return 2 * x

    arrays = {p: np.random.RandomState(0).randn(*s).astype("float32") for p, s in SHAPES.items()}
    found = map_stacked(plan, double, arrays)
    assert list(found) == list(SHAPES)
    for p, x in found.items():
        np.testing.assert_array_equal(x, 2 * arrays[p])
    assert sorted(calls, key=str) == sorted(
        [
            (("embed", "mlp"), (2, 64, 16)),
            (("embed", "mlp"), (1, 64, 32)),
            (("mlp", "embed"), (1, 64, 16)),
            (None, (1, 64, 16)),
        ],
        key=str,
    )


def test_what_differs_in_dtype_is_called_apart(plan):
    arrays = {p: jnp.zeros(s, jnp.bfloat16 if p == "d" else jnp.float32) for p, s in SHAPES.items()}
    found = map_stacked(plan, lambda _, x: x, arrays)
    assert {p: x.dtype for p, x in found.items()} == {p: x.dtype for p, x in arrays.items()}


def test_several_arrays_and_scalars(plan):
    scalars = {p: jnp.float32(n) for n, p in enumerate(SHAPES)}
    ones = {p: jnp.ones(s) for p, s in SHAPES.items()}
    found = map_stacked(plan, lambda _, s, x: s[:, None, None] * x, scalars, ones)
    assert [float(x.max()) for x in found.values()] == [0, 1, 2, 3, 4]


def kernels(text):
    """The bodies of the fusions in a compiled program, each once, without the names in them."""
    bodies = re.findall(r"^%(?:fused|wrapped)\S* .*?\{\n(.*?)^\}", text, re.M | re.S)
    return {re.sub(r"%[\w.-]+|, metadata=\{.*?\}", "", body) for body in bodies}


def update_step(algorithm, layers, shape):
    """A mask update under momentum, jitted, and the shapes of what it takes."""
    every = ts.Periodic(begin=0, end=100, period=10)
    config = SparsityConfig(algorithm=getattr(ts, algorithm)(updates=every), sparsity=0.5)
    weights = {f"{n}/w": jax.ShapeDtypeStruct(shape, jnp.float32) for n in range(layers)}
    plan = config.plan(weights, dict.fromkeys(weights, ("embed", "mlp")))
    state = jax.eval_shape(lambda w: init_state(config, plan, w), weights)

    def step(weights, momentum, state, grads, at):
        def gradient_step(weights, grads, momentum):
            momentum = {p: 0.9 * x + grads[p] for p, x in momentum.items()}
            return {p: x - 0.1 * momentum[p] for p, x in weights.items()}, momentum

        found = train_step(
            plan,
            state,
            step=at,
            weights=weights,
            grads=grads,
            optimizer_state=momentum,
            gradient_step=gradient_step,
            updates_masks=True,
        )
        momentum = zero_slots(found.optimizer_state, found.reset)
        return found.weights, momentum, found.state

    at = jax.ShapeDtypeStruct((), jnp.int32)
    return jax.jit(step, donate_argnums=(0, 1, 2)), (weights, weights, state, weights, at)


@pytest.mark.parametrize("algorithm", ["RigL", "SET", "Magnitude", "GlobalMagnitude"])
def test_more_layers_make_no_more_kernels(algorithm):
    def compiled(layers):
        run, arguments = update_step(algorithm, layers, (64, 64))
        return run.lower(*arguments).compile().as_text()

    few, many = kernels(compiled(3)), kernels(compiled(9))
    # each layer has one of its own, which reads its mask off the stack of all; and of the few that
    # work on numbers a layer, one or another comes out differently
    assert len(many) <= len(few) + 6 + 3


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("algorithm", ["RigL", "SET", "Magnitude", "GlobalMagnitude"])
def test_it_compiles_for_tpu(algorithm):
    """XLA for TPU has taken donated masks, read beside the new ones, for a cycle."""
    devices = aot.get_slice("v5e:2x2")
    mesh = Mesh(np.array(devices.devices).reshape(2, 2), ("data", "model"))
    run, arguments = update_step(algorithm, 2, (1024, 512))

    def placed(x):
        spec = PartitionSpec(None, "model") if x.ndim == 2 else PartitionSpec()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    found = aot.compile_step(run, devices, *jax.tree.map(placed, arguments)).per_chip
    assert set(found.collectives) <= {"all-reduce"}
    assert sum(x.bytes for x in found.collectives.values()) < 64 * 1024
