"""Weights that are alike, computed on as one."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import t5x_sparsity as ts
from t5x_sparsity import SparsityConfig, Static
from t5x_sparsity.alike import map_alike
from t5x_sparsity.core import init_state, train_step

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
    found = map_alike(plan, double, arrays)
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
    found = map_alike(plan, lambda _, x: x, arrays)
    assert {p: x.dtype for p, x in found.items()} == {p: x.dtype for p, x in arrays.items()}


def test_several_arrays_and_scalars(plan):
    scalars = {p: jnp.float32(n) for n, p in enumerate(SHAPES)}
    ones = {p: jnp.ones(s) for p, s in SHAPES.items()}
    found = map_alike(plan, lambda _, s, x: s[:, None, None] * x, scalars, ones)
    assert [float(x.max()) for x in found.values()] == [0, 1, 2, 3, 4]


def kernels(text):
    """The bodies of the fusions in a compiled program, each once, without the names in them."""
    bodies = re.findall(r"^%(?:fused|wrapped)\S* .*?\{\n(.*?)^\}", text, re.M | re.S)
    return {re.sub(r"%[\w.-]+|, metadata=\{.*?\}", "", body) for body in bodies}


@pytest.mark.parametrize("algorithm", ["RigL", "SET", "Magnitude", "GlobalMagnitude"])
def test_more_layers_make_no_more_kernels(algorithm):
    every = ts.Periodic(begin=0, end=100, period=10)
    config = SparsityConfig(algorithm=getattr(ts, algorithm)(updates=every), sparsity=0.5)

    def compiled(layers):
        shapes = {f"{n}/w": jax.ShapeDtypeStruct((64, 64), jnp.float32) for n in range(layers)}
        plan = config.plan(shapes, dict.fromkeys(shapes, ("embed", "mlp")))
        state = jax.eval_shape(lambda weights: init_state(config, plan, weights), shapes)

        def step(weights, grads, slots, state):
            return train_step(
                plan,
                state,
                step=slots["step"],
                weights=weights,
                grads=grads,
                optimizer_state=slots["mu"],
                gradient_step=lambda weights, grads, mu: (
                    {p: x - 0.1 * grads[p] for p, x in weights.items()},
                    {p: 0.9 * x + grads[p] for p, x in mu.items()},
                ),
                updates_masks=True,
            )

        slots = {"step": jax.ShapeDtypeStruct((), jnp.int32), "mu": shapes}
        return jax.jit(step).lower(shapes, shapes, slots, state).compile().as_text()

    few, many = kernels(compiled(3)), kernels(compiled(9))
    # each layer has one of its own, which reads its mask off the stack of all; and of the few that
    # work on numbers a layer, one or another comes out differently
    assert len(many) <= len(few) + 6 + 3
