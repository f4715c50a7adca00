import dataclasses
import functools
import inspect
from typing import NamedTuple

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from meshes import quick_jit

from t5x_sparsity import (
    SET,
    Constant,
    Dense,
    Magnitude,
    NByM,
    OneShot,
    Periodic,
    RigL,
    Rule,
    SparsityConfig,
    Static,
    apply_masks,
    sparsify,
)
from t5x_sparsity.core import packing
from t5x_sparsity.core.optimizer_slots import zero_slots
from t5x_sparsity.core.trees import flatten, unflatten
from t5x_sparsity.transformation import find_state

# an update at step 2 alone, which swaps half of the weights
RIGL = RigL(updates=OneShot(step=2), drop_fraction=Constant(value=0.5))
# no two leaves, and no leaf and its factored slots, are of one shape
SHAPES = {"block": {"kernel": (8, 12), "bias": (5,)}, "out": (10, 6)}
SPARSE = ("block/kernel", "out")
KEPT = {"block/kernel": 24, "out": 15}


def is_shape(x):
    return isinstance(x, tuple) and all(isinstance(n, int) for n in x)


def normal(seed, shapes=SHAPES, dtype=jnp.float32):
    """A tree of values none of which is 0."""
    rng = np.random.default_rng(seed)

    def draw(shape):
        x = rng.normal(size=shape)
        return jnp.asarray(x + np.sign(x) * 0.01, dtype)

    return jax.tree.map(draw, shapes, is_leaf=is_shape)


def make_step(tx):
    @quick_jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def start(tx, shapes=SHAPES, dtype=jnp.float32):
    params = normal(0, shapes, dtype)
    state = quick_jit(tx.init)(params)
    return apply_masks(params, state), state


def mask_tree(params, state):
    """path -> mask on the host."""
    shapes = {p: x.shape for p, x in flatten(params).items()}
    stored = find_state(state).sparsity.masks
    return {p: np.asarray(packing.unpack(m, shapes[p])) for p, m in stored.items()}


def with_history(state):
    """Slots as if every weight had been trained; those of pruned weights are 0 otherwise."""
    rng = np.random.default_rng(9)
    inner = jax.tree.map(
        lambda x: jnp.asarray(rng.uniform(0.1, 1, x.shape), x.dtype) if x.ndim == 2 else x,
        state.inner,
    )
    return state._replace(inner=inner)


def assert_pruned(params, state):
    found = flatten(params)
    for path, mask in mask_tree(params, state).items():
        values = np.asarray(found[path].astype(jnp.float32))
        assert (values[~mask] == 0).all(), path


def assert_trees_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def kernels(params):
    return jax.tree.map(lambda x: x.ndim == 2, params)


def labels(params):
    return jax.tree_util.tree_map_with_path(
        lambda keys, _: "adam" if "block" in str(keys) else "sgd", params
    )


INNER = {
    "momentum": optax.sgd(0.1, momentum=0.9),
    "adam": optax.adam(0.01),
    "adamw": optax.adamw(0.01, weight_decay=0.1),
    "adafactor": optax.adafactor(0.01, min_dim_size_to_factor=4, momentum=0.9),
    "adafactor, not factored": optax.adafactor(0.01),
    "lion": optax.lion(0.01),
    "rmsprop": optax.rmsprop(0.01, momentum=0.9),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.01)),
    "hyperparams": optax.inject_hyperparams(optax.adam)(learning_rate=0.01),
    "masked": optax.masked(optax.adam(0.01), kernels),
    "several": optax.multi_transform(
        {"adam": optax.adam(0.01), "sgd": optax.sgd(0.1, momentum=0.9)}, labels
    ),
    "accumulating": optax.MultiSteps(optax.adam(0.01), every_k_schedule=2),
}


# those that others of the table stand for
SLOW = ("adamw", "adafactor, not factored", "lion", "rmsprop", "hyperparams", "several")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in INNER]
)
def test_every_optimizer(name):
    inner = INNER[name]
    tx = sparsify(inner, RIGL, sparsity=0.75)
    params, state = start(tx)
    step = make_step(tx)
    inner_step = make_step(optax.with_extra_args_support(inner))
    structure = jax.tree.structure(state)
    types = [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(state)]
    assert_pruned(params, state)
    for t in range(4):
        grads = normal(100 + t)
        if t == 2:
            state = with_history(state)
        before, old, old_state = mask_tree(params, state), params, state
        params, state = step(params, state, grads)
        now = mask_tree(params, state)
        assert {p: int(m.sum()) for p, m in now.items()} == KEPT
        assert_pruned(params, state)
        assert int(state.count) == t + 1
        assert jax.tree.structure(state) == structure
        assert [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(state)] == types
        if t == 2:  # masks instead of weights
            grown = {p: now[p] & ~before[p] for p in now}
            lost = {p: before[p] & ~now[p] for p in now}
            assert all(m.any() for m in grown.values())
            for path, x in flatten(params).items():
                x, was = np.asarray(x), np.asarray(flatten(old)[path])
                if path in now:
                    was = np.where(lost[path], 0, was)
                np.testing.assert_array_equal(x, was)
            assert_slots_zeroed(old_state.inner, state.inner, grown)
        else:
            assert all((now[p] == before[p]).all() for p in now)
            seen = unflatten(
                grads,
                {p: np.where(now.get(p, True), g, 0) for p, g in flatten(grads).items()},
            )
            expected, expected_inner = inner_step(old, old_state.inner, seen)
            for path, x in flatten(params).items():
                want = np.where(now.get(path, True), flatten(expected)[path], 0)
                np.testing.assert_allclose(x, want, rtol=2e-6, atol=1e-7)
            jax.tree.map(
                functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=1e-7),
                state.inner,
                expected_inner,
            )
    assert step._cache_size() == 1


def assert_slots_zeroed(old, new, grown):
    """A slot is told by its shape here, which is a weight's alone."""
    by_shape = {m.shape: m for m in grown.values()}
    slots = 0
    for was, now in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
        was, now = np.asarray(was), np.asarray(now)
        if was.shape in by_shape:
            slots += 1
            mask = by_shape[was.shape]
            assert was.all()
            assert (now[mask] == 0).all()
            np.testing.assert_array_equal(now[~mask], was[~mask])
        else:  # counters, hyperparameters, factored rows and columns
            np.testing.assert_array_equal(now, was)
    assert slots >= 2


class Weights(NamedTuple):
    mu: jax.Array
    nu: jax.Array


SQUARE = (6, 8)
TREES = {
    "flat": {"a": SQUARE, "b": SQUARE},
    "suffixes": {"a": SQUARE, "x": {"a": SQUARE, "y": {"a": SQUARE}}},
    "list": [SQUARE, SQUARE, SQUARE],
    "tuple": (SQUARE, {"0": SQUARE}, SQUARE),
    "frozen": flax.core.freeze({"a": {"kernel": SQUARE}, "b": {"kernel": SQUARE}}),
    "named": Weights(SQUARE, SQUARE),
    "bare": SQUARE,
}


@pytest.mark.parametrize("name", TREES)
def test_any_tree(name):
    tx = sparsify(optax.adam(0.01), RIGL, sparsity=0.75)
    params, state = start(tx, TREES[name])
    step = make_step(tx)
    before = mask_tree(params, state)
    for t in range(3):
        previous = state = with_history(state)
        params, state = step(params, state, normal(100 + t, TREES[name]))
        assert jax.tree.structure(params) == jax.tree.structure(normal(0, TREES[name]))
    now = mask_tree(params, state)
    assert set(now) == set(flatten(params))
    for slot in ("mu", "nu"):
        old, new = (flatten(getattr(s.inner[0], slot)) for s in (previous, state))
        for path in now:
            grown = now[path] & ~before[path]
            assert grown.any() and np.asarray(old[path]).all()
            np.testing.assert_array_equal(new[path], np.where(grown, 0, old[path]))


def test_slots_of_a_dense_weight_whose_path_ends_as_a_sparse_ones():
    shapes = {"a": SQUARE, "embed": {"a": SQUARE}}
    tx = sparsify(optax.adam(0.01), RIGL, sparsity=0.75)
    params, state = start(tx, shapes)
    assert list(state.sparsity.masks) == ["a"]
    step = make_step(tx)
    for t in range(3):
        previous = state = with_history(state)
        params, state = step(params, state, normal(100 + t, shapes))
    dense = [s.inner[0].mu["embed"]["a"] for s in (previous, state)]
    np.testing.assert_array_equal(*dense)
    assert (np.asarray(state.inner[0].mu["a"]) == 0).any()


def test_zero_slots_by_hand():
    grown = {"a": jnp.array([[True, False]]), "b/a": jnp.array([[False, True]])}
    ones = jnp.ones((1, 2))
    slots = {
        "mu": {"a": ones, "b": {"a": ones}, "c": {"a": ones}},
        "b": {"a": {"v": ones, "v_row": jnp.ones(2), "count": jnp.int32(7)}},
        "ba": ones,
        "other": ones,
    }
    found = zero_slots(slots, grown, ["a", "b/a", "c/a"])
    assert found["mu"]["a"].tolist() == [[0, 1]]
    assert found["mu"]["b"]["a"].tolist() == [[1, 0]]
    assert found["mu"]["c"]["a"].tolist() == [[1, 1]]
    assert found["b"]["a"]["v"].tolist() == [[1, 0]]
    assert found["b"]["a"]["v_row"].tolist() == [1, 1]
    assert int(found["b"]["a"]["count"]) == 7
    assert found["ba"] is ones and found["other"] is ones
    assert zero_slots(slots, {}) is slots


@pytest.mark.parametrize(
    "params_dtype,grads_dtype",
    [
        (jnp.bfloat16, jnp.bfloat16),
        (jnp.float32, jnp.bfloat16),
        (jnp.bfloat16, jnp.float32),
        (jnp.float16, jnp.float16),
    ],
)
@pytest.mark.parametrize("algorithm", [RIGL, Magnitude(updates=OneShot(step=1))])
def test_dtypes(algorithm, params_dtype, grads_dtype):
    tx = sparsify(optax.sgd(0.1), algorithm, sparsity=0.75)
    params, state = start(tx, dtype=params_dtype)
    step = make_step(tx)
    for t in range(4):
        params, state = step(params, state, normal(100 + t, dtype=grads_dtype))
        assert all(x.dtype == params_dtype for x in jax.tree.leaves(params))
        assert_pruned(params, state)
    assert {p: int(m.sum()) for p, m in mask_tree(params, state).items()} == KEPT


def test_slots_wider_than_their_weights():
    tx = sparsify(optax.adam(0.01, mu_dtype=jnp.float32), RIGL, sparsity=0.75)
    params, state = start(tx, dtype=jnp.bfloat16)
    step = make_step(tx)
    for t in range(4):
        params, state = step(params, state, normal(100 + t, dtype=jnp.bfloat16))
        assert_pruned(params, state)
    assert state.inner[0].mu["out"].dtype == jnp.float32


def test_kept_weights_get_exactly_the_inner_update():
    # powers of two: nothing is rounded, whatever the compiler fuses
    tx = sparsify(optax.sgd(0.5), RIGL, sparsity=0.75)
    params, state = start(tx)
    params = jax.tree.map(lambda x: jnp.round(x * 16) / 16, params)
    params = apply_masks(params, state)
    grads = jax.tree.map(lambda x: jnp.round(x * 16) / 16, normal(1))
    after, state = make_step(tx)(params, state, grads)
    now = mask_tree(params, state)
    for path, x in flatten(after).items():
        want = flatten(params)[path] - 0.5 * flatten(grads)[path]
        np.testing.assert_array_equal(x, np.where(now.get(path, True), want, 0))


def test_gradient_step_beside_the_mask_update():
    algorithm = dataclasses.replace(RIGL, take_gradient_step=True)
    tx = sparsify(optax.adam(0.01), algorithm, sparsity=0.75)
    params, state = start(tx)
    step = make_step(tx)
    for t in range(3):
        state = with_history(state)
        before, old, old_state = mask_tree(params, state), params, state
        params, state = step(params, state, normal(100 + t))
    now = mask_tree(params, state)
    assert int(state.inner[0].count) == 3
    assert_pruned(params, state)
    for path in SPARSE:
        stayed = now[path] & before[path]
        moved = np.asarray(flatten(params)[path] != flatten(old)[path])
        assert moved[stayed].all()
        grown = now[path] & ~before[path]
        mu = np.asarray(flatten(state.inner[0].mu)[path])
        assert grown.any() and (mu[grown] == 0).all()
        was = np.asarray(flatten(old_state.inner[0].mu)[path])
        assert (mu[stayed] != was[stayed]).all()


def test_momentum_of_pruned_weights_runs_on_under_magnitude():
    tx = sparsify(optax.adam(0.01), Magnitude(updates=Periodic(begin=1, end=5, period=2)))
    dense = optax.adam(0.01)
    params, state = start(tx)
    dense_state = dense.init(params)
    step, dense_step = make_step(tx), make_step(dense)
    before = None
    for t in range(7):
        grads = normal(100 + t)
        _, dense_state = dense_step(params, dense_state, grads)
        params, state = step(params, state, grads)
        assert_pruned(params, state)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=1e-7),
            state.inner[0].mu,
            dense_state[0].mu,
        )
        now = mask_tree(params, state)
        if before is not None:  # what is pruned stays so, though its momentum would move it
            assert not any((now[p] & ~before[p]).any() for p in now)
        before = now
    assert all((np.asarray(flatten(params)[p]) != 0).sum() == now[p].sum() for p in now)
    assert int(now["out"].sum()) == 12


@pytest.mark.parametrize("algorithm", [Static(), Dense()])
def test_masks_that_stay(algorithm):
    tx = sparsify(optax.adam(0.01), algorithm, sparsity=0.75)
    params, state = start(tx)
    first = mask_tree(params, state)
    assert set(first) == (set() if isinstance(algorithm, Dense) else set(SPARSE))
    step = make_step(tx)
    plain, plain_state = params, optax.adam(0.01).init(params)
    plain_step = make_step(optax.adam(0.01))
    for t in range(3):
        params, state = step(params, state, normal(100 + t))
        plain, plain_state = plain_step(plain, plain_state, normal(100 + t))
    assert_trees_equal(mask_tree(params, state), first)
    assert_pruned(params, state)
    if isinstance(algorithm, Dense):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-6), params, plain)


# ---- errors


def test_errors():
    tx = sparsify(optax.sgd(0.1), RIGL)
    params = normal(0)
    state = quick_jit(tx.init)(params)
    with pytest.raises(ValueError, match=r"call update\(grads, state, params\), not update"):
        tx.update(params, state)
    with pytest.raises(ValueError, match="two weights have the path 'a/b', because a key .* '/'"):
        tx.init({"a/b": jnp.ones((2, 2)), "a": {"b": jnp.ones((2, 2))}})
    with pytest.raises(ValueError, match="one state of sparsify in the optimizer state, found 0"):
        apply_masks(params, optax.sgd(0.1).init(params))
    with pytest.raises(ValueError, match="found 2; pass what sparsify"):
        find_state((state, state))
    with pytest.raises(ValueError, match=r"logical_axes must be a tree like params.*\['out'\]"):
        sparsify(optax.sgd(0.1), RIGL, logical_axes={"block": {"kernel": None, "bias": None}}).init(
            params
        )
    with pytest.raises(ValueError, match=r"sparsity \(SPARSITY\) must be .* got 1"):
        sparsify(optax.sgd(0.1), RIGL, sparsity=1)
    with pytest.raises(ValueError, match="unknown sparsity distribution 'x'"):
        SparsityConfig(algorithm=RIGL, distribution="x")
    with pytest.raises(ValueError, match="no effect: it matches no weight. The weights are:"):
        sparsify(optax.sgd(0.1), RIGL, rules=[Rule(path="nowhere")]).init(params)
    with pytest.raises(ValueError, match="weight 'block/kernel': 2:5 needs axis -2"):
        sparsify(optax.sgd(0.1), SET(updates=OneShot(step=1)), pattern=NByM(n=2, m=5)).init(params)


def test_every_field_of_the_configuration_can_be_said():
    said = {
        name: x.default
        for name, x in inspect.signature(sparsify).parameters.items()
        if x.kind is x.KEYWORD_ONLY and name != "logical_axes"
    }
    fields = {f.name: f.default for f in dataclasses.fields(SparsityConfig)}
    del fields["algorithm"]
    assert said == fields


def test_masks_may_be_unpacked_and_what_was_explored_tracked():
    shapes = {"w": (64, 16)}
    _, packed = start(sparsify(optax.sgd(0.1), RIGL), shapes)
    assert packed.sparsity.masks["w"].shape == (8, 16)
    tx = sparsify(optax.sgd(0.1), RIGL, pack_masks=False, track_explored=True)
    params, state = start(tx, shapes)
    assert state.sparsity.masks["w"].shape == (64, 16)
    step, ever = make_step(tx), np.asarray(state.sparsity.masks["w"])
    for seed in range(4):
        params, state = step(params, state, normal(seed, shapes))
        ever = ever | np.asarray(state.sparsity.masks["w"])
        np.testing.assert_array_equal(state.sparsity.slots["explored"]["w"], ever)
    assert ever.sum() > state.sparsity.masks["w"].sum()
