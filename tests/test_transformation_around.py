"""`sparsify` inside other optimizers, under transformations, on a mesh, and at its edges."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from meshes import mesh, put, quick_jit
from test_transformation import (
    KEPT,
    RIGL,
    SHAPES,
    assert_pruned,
    assert_trees_equal,
    kernels,
    make_step,
    mask_tree,
    normal,
    start,
)

from t5x_sparsity import (
    SET,
    Constant,
    NByM,
    OneShot,
    RigL,
    Rule,
    SparsityConfig,
    Static,
    apply_masks,
    sparsify,
)
from t5x_sparsity.core.train_step import init_state, train_step
from t5x_sparsity.core.trees import flatten, unflatten
from t5x_sparsity.transformation import find_state


def run_updates(tx, steps=4, shapes=SHAPES):
    params, state = start(tx, shapes)
    step = make_step(tx)
    for t in range(steps):
        params, state = step(params, state, normal(100 + t, shapes))
        assert_pruned(params, state)
    return params, state


def test_inside_multi_steps():
    tx = optax.MultiSteps(sparsify(optax.adam(0.01), RIGL, sparsity=0.75), 2)
    params, state = run_updates(tx, 6)  # updates 0, 1, and 2, which swaps masks
    assert int(find_state(state).count) == 3
    assert {p: int(m.sum()) for p, m in mask_tree(params, state).items()} == KEPT
    first = mask_tree(*start(tx))
    assert any((first[p] != m).any() for p, m in mask_tree(params, state).items())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.masked(tx, kernels),
        lambda tx: optax.multi_transform(
            {"adam": tx, "sgd": optax.sgd(0.1)},
            lambda p: jax.tree.map(lambda x: "adam" if x.ndim == 2 else "sgd", p),
        ),
        lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
        lambda tx: optax.apply_if_finite(tx, 3),
    ],
    ids=["masked", "multi_transform", "chain", "apply_if_finite"],
)
def test_inside_other_optimizers(wrap):
    tx = wrap(sparsify(optax.adam(0.01), RIGL, sparsity=0.75))
    params, state = run_updates(tx)
    assert {p: int(m.sum()) for p, m in mask_tree(params, state).items()} == KEPT
    assert int(find_state(state).inner[0].count) == 3


@pytest.mark.slow
def test_scan_jit_and_neither_agree():
    tx = sparsify(optax.sgd(0.1, momentum=0.9), RIGL, sparsity=0.75)
    params, state = start(tx)
    grads = jax.tree.map(lambda *x: jnp.stack(x), *[normal(100 + t) for t in range(4)])

    @quick_jit
    def scanned(params, state):
        def body(carry, g):
            params, state = carry
            updates, state = tx.update(g, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(body, (params, state), grads)[0]

    found, found_state = scanned(params, state)
    step = make_step(tx)
    one, one_state = params, state
    eager, eager_state = params, state
    for t in range(4):
        one, one_state = step(one, one_state, normal(100 + t))
        with jax.disable_jit():
            updates, eager_state = tx.update(normal(100 + t), eager_state, eager)
            eager = optax.apply_updates(eager, updates)
    for params, state in [(one, one_state), (eager, eager_state)]:
        assert_trees_equal(state.sparsity, found_state.sparsity)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), params, found)


def test_donated_buffers():
    tx = sparsify(optax.adam(0.01), RIGL, sparsity=0.75)
    params, state = start(tx)
    expected = run_updates(tx)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for t in range(4):
        params, state = step(params, state, normal(100 + t))
    assert_trees_equal(state.sparsity, expected[1].sparsity)


def test_on_a_mesh_the_state_keeps_its_sharding():
    devices = mesh(2, 2)
    host = {"a": np.asarray(normal(0, (64, 32))), "b": np.asarray(normal(1, (64, 16)))}
    params = {"a": put(devices, host["a"], "x", "y"), "b": put(devices, host["b"], None, "x")}
    algorithm = RigL(updates=OneShot(step=0), drop_fraction=Constant(value=0.5))
    tx = sparsify(optax.adam(0.01), algorithm)
    state = quick_jit(tx.init)(params)
    state = state._replace(
        sparsity=state.sparsity._replace(
            masks={
                p: jax.device_put(m, params[p].sharding) for p, m in state.sparsity.masks.items()
            }
        )
    )

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    alone, alone_state = step(host, quick_jit(tx.init)(host), host)
    found, new_state = step(params, state, params)
    assert_trees_equal(new_state.sparsity, alone_state.sparsity)
    assert_trees_equal(found, alone)
    for path, w in params.items():
        mask = new_state.sparsity.masks[path]
        assert mask.size * 8 == w.size
        for x in (mask, found[path], new_state.inner[0].mu[path]):
            assert x.sharding.is_equivalent_to(w.sharding, 2), path


@pytest.mark.parametrize("pattern", [None, NByM(n=2, m=4)])
def test_strict_promotion(pattern):
    tx = sparsify(optax.sgd(0.5), RIGL, pattern=pattern)
    params = {"w": jnp.ones((64, 12)), "b": jnp.ones(12)}
    with jax.numpy_dtype_promotion("strict"):
        state = jax.eval_shape(tx.init, params)
        jax.eval_shape(tx.update, params, state, params)


def test_patterns_and_stacks():
    shapes = {"layers": (3, 8, 12), "scale": (3, 8), "out": (8, 6)}
    names = {"layers": ("layers", "embed", "mlp"), "scale": ("layers", "embed"), "out": None}
    tx = sparsify(
        optax.adam(0.01),
        RIGL,
        sparsity=0.75,
        rules=[Rule(path="out", pattern=NByM(n=1, m=4))],
        logical_axes=names,
    )
    params, state = run_updates(tx, shapes=shapes)
    found = mask_tree(params, state)
    assert set(found) == {"layers", "out"}
    assert found["layers"].sum(axis=(1, 2)).tolist() == [24, 24, 24]
    assert (found["out"].reshape(2, 4, 6).sum(axis=1) == 1).all()


def test_logical_axes_of_a_tuple_of_weights():
    tx = sparsify(
        optax.sgd(0.1), Static(), logical_axes=(("layers", "embed"), ("embed", "mlp"), None)
    )
    params = (jnp.ones((3, 8)), jnp.ones((3, 8)), jnp.ones((4, 8)))
    state = jax.eval_shape(tx.init, params)
    assert set(state.sparsity.masks) == {"1", "2"}


def test_seeds():
    params = normal(0)

    def first(seed, sparsity=0.75):
        tx = sparsify(optax.sgd(0.1), Static(), sparsity=sparsity, seed=seed)
        return mask_tree(params, quick_jit(tx.init)(params))

    assert_trees_equal(first(3), first(3))
    assert (first(3)["out"] != first(4)["out"]).any()
    with jax.default_prng_impl("rbg"):
        assert_trees_equal(first(3), first(3))
        rbg = first(3)
    assert_trees_equal(rbg, first(3))


def test_every_update_draws_anew_and_alike():
    config = SparsityConfig(
        algorithm=SET(updates=OneShot(step=9), drop_fraction=Constant(value=0.5)), sparsity=0.75
    )
    weights = {"w": normal(0, (8, 12))}
    plan = config.plan(weights)
    state = init_state(config, plan, weights)

    @quick_jit
    def update(state, step):
        return train_step(
            plan,
            state,
            step=step,
            weights=weights,
            grads=weights,
            optimizer_state=(),
            gradient_step=lambda weights, grads, optimizer: (weights, optimizer),
            updates_masks=True,
        ).state

    first, again, next_one = (update(state, jnp.int32(t)) for t in (1, 1, 2))
    assert_trees_equal(first, again)
    assert_trees_equal(first.rng, state.rng)
    assert (first.masks["w"] != next_one.masks["w"]).any()


def test_extra_arguments_reach_the_optimizer():
    def update(updates, state, params=None, *, scale, **extra):
        del params, extra
        return jax.tree.map(lambda g: g * scale, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update)
    tx = sparsify(inner, RIGL, sparsity=0.75)
    params, state = start(tx)
    grads = normal(1)
    updates, _ = quick_jit(tx.update)(grads, state, params, scale=2.0)
    np.testing.assert_array_equal(updates["block"]["bias"], 2 * grads["block"]["bias"])


def test_nothing_to_prune():
    tx = sparsify(optax.adam(0.01), RIGL)
    for params in ({}, {"bias": jnp.ones(4)}, {"scale": 1.0, "n": np.int32(3)}):
        state = tx.init(params)
        assert state.sparsity.masks == {}
        assert_trees_equal(apply_masks(params, state), params)
    params = {"bias": jnp.ones(4)}
    updates, state = tx.update(params, tx.init(params), params)
    assert int(state.count) == 1 and updates["bias"].shape == (4,)


def test_flatten_and_back():
    tree = {"b": [1, (2, 3)], "a": {"c": 4}, "none": None}
    flat = flatten(tree)
    assert flat == {"a/c": 4, "b/0": 1, "b/1/0": 2, "b/1/1": 3}
    assert unflatten(tree, flat) == tree
    assert flatten(5) == {"": 5}
