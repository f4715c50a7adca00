"""Updates that score by sums, layers or slots: on a mesh they are the same, and move nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import assert_moves_no_weight, collectives, mesh, put
from plans import make_plan

import t5x_sparsity as ts
from t5x_sparsity.algorithms import Update

UPDATES = ts.Periodic(begin=1, end=9, period=4)
HALF = ts.Constant(value=0.5)
SHAPES = {"one": (64, 2, 32), "two": (64, 32)}
SPECS = {"one": ("y", None, "x"), "two": ("x", "y")}
AXES = {"one": ("embed", "layers", "mlp")}
BOTH, ONE = ("one", "two"), ("one",)

CASES = {
    "granet": (ts.GraNet(updates=UPDATES), None, ONE),
    "srigl": (ts.SRigL(updates=UPDATES, drop_fraction=HALF), ts.ConstantFanIn(), ONE),
    "block mean": (ts.Magnitude(updates=UPDATES), ts.Block(height=4, width=2), ONE),
    "channel": (ts.RigL(updates=UPDATES, drop_fraction=HALF), ts.Channel(), ONE),
    "global norm": (ts.GlobalMagnitude(updates=UPDATES), None, BOTH),
    "lamp": (ts.GlobalMagnitude(updates=UPDATES, normalization="lamp"), None, BOTH),
    "snfs": (ts.SNFS(updates=UPDATES, drop_fraction=HALF), None, ONE),
    "top_kast": (ts.TopKAST(updates=UPDATES), None, ONE),
}


def draw(seed, paths):
    """Columns that hold the same numbers, of many magnitudes, in different orders.

    Their sums tie, and would not if they were floats added in some order.
    """
    rng = np.random.default_rng(seed)
    column = np.float32(rng.normal(size=64) * np.exp(3 * rng.normal(size=64)))
    return {
        p: rng.permuted(np.broadcast_to(column, (*SHAPES[p][1:], 64)), axis=-1).transpose(
            (len(SHAPES[p]) - 1, *range(len(SHAPES[p]) - 1))
        )
        for p in paths
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_same_bit_for_bit_on_a_mesh(name):
    algorithm, pattern, paths = CASES[name]
    plan = make_plan(
        {p: jax.ShapeDtypeStruct(SHAPES[p], jnp.float32) for p in paths},
        sparsity=0.73,  # amid ties
        pattern=pattern,
        axes=AXES,
    )
    weights, grads, history = (draw(seed, paths) for seed in range(3))
    key = jax.random.key(0, impl="threefry2x32")

    @jax.jit
    def start(weights):
        masks = algorithm.initial_masks(plan, weights, key)
        return masks, algorithm.initial_slots(plan, weights, masks)

    @jax.jit
    def step(weights, grads, masks, slots):
        update = Update(jnp.int32(5), weights, grads, masks, key, weights, slots)
        update = update._replace(slots=algorithm.observe(plan, update))
        masks = algorithm.update_masks(plan, update)
        return masks, algorithm.update_slots(plan, update._replace(masks=masks))

    masks, slots = jax.tree.map(np.asarray, start(draw(3, paths)))
    if "momentum" in slots:
        slots = {"momentum": history}
    alone = step(weights, grads, masks, slots)
    devices = mesh(2, 2)

    def placed(tree):
        return {p: put(devices, x, *SPECS[p]) for p, x in tree.items()}

    arguments = (
        placed(weights),
        placed(grads),
        placed(masks),
        {n: placed(x) for n, x in slots.items()},
    )
    program = step.lower(*arguments).compile()
    found = program(*arguments)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(alone), strict=True):
        np.testing.assert_array_equal(x, y)
    assert any((np.asarray(alone[0][p]) != masks[p]).any() for p in paths)
    text = program.as_text()
    assert collectives(text, "all-reduce")
    # numbers of neurons, channels and slices: a 64th of the weights
    assert_moves_no_weight(text, largest=2 * 32, gathers=name == "srigl")
