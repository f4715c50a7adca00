"""The masks that a run from trained weights starts with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import quick_jit

import t5x_sparsity as ts
from t5x_sparsity.core import packing
from t5x_sparsity.core.train_step import forward_weights, init_state

UPDATES = ts.Periodic(begin=0, end=10, period=5)
RNG = np.random.default_rng(0)
# ties, and a stack of two layers
WEIGHTS = {
    "wi": jnp.asarray(RNG.integers(-20, 20, (8, 2, 16)), jnp.float32),
    "wo": jnp.asarray(RNG.standard_normal((16, 8)), jnp.bfloat16),
}
AXES = {"wi": ("embed", "layers", "mlp"), "wo": ("mlp", "embed")}

SPARSE_FROM_THE_START = {
    "static": ts.Static(),
    "rigl": ts.RigL(updates=UPDATES),
    "set": ts.SET(updates=UPDATES),
    "mest": ts.MEST(updates=UPDATES),
    "snfs": ts.SNFS(updates=UPDATES),
    "granet": ts.GraNet(updates=UPDATES, initial_sparsity=0.75),
    "magnitude-ste": ts.MagnitudeSTE(updates=UPDATES),
    "random-ste": ts.RandomSTE(updates=UPDATES),
    "top-kast": ts.TopKAST(updates=UPDATES),
}


def largest(x, share):
    """True at the largest |x|, the lower index first among equals."""
    order = np.argsort(-np.abs(x.astype(np.float64)).reshape(-1), kind="stable")
    kept = np.zeros(x.size, bool)
    kept[order[: round(share * x.size)]] = True
    return kept.reshape(x.shape)


def start(algorithm, trained=True, **kwargs):
    config = ts.SparsityConfig(algorithm=algorithm, sparsity=0.75, **kwargs)
    plan = config.plan(WEIGHTS, AXES)
    state = quick_jit(lambda w: init_state(config, plan, w, trained=trained))(WEIGHTS)
    found = {p: np.asarray(packing.unpack(m, WEIGHTS[p].shape)) for p, m in state.masks.items()}
    return plan, state, found


@pytest.mark.parametrize("name", SPARSE_FROM_THE_START)
def test_methods_that_start_sparse_keep_the_largest(name):
    _, _, found = start(SPARSE_FROM_THE_START[name])
    wi, wo = np.asarray(WEIGHTS["wi"]), np.asarray(WEIGHTS["wo"])
    for layer in range(2):
        np.testing.assert_array_equal(found["wi"][:, layer], largest(wi[:, layer], 0.25))
    np.testing.assert_array_equal(found["wo"], largest(wo, 0.25))


@pytest.mark.parametrize("name", ["static", "rigl", "granet", "random-ste"])
def test_from_scratch_they_start_at_random(name):
    _, _, found = start(SPARSE_FROM_THE_START[name], trained=False)
    assert (found["wo"] != largest(np.asarray(WEIGHTS["wo"]), 0.25)).any()


def test_a_ramp_starts_dense():
    _, _, found = start(ts.Magnitude(updates=UPDATES))
    assert all(m.all() for m in found.values())


def test_a_pattern_holds_from_the_start():
    _, _, found = start(ts.SRigL(updates=UPDATES), pattern=ts.ConstantFanIn())
    assert len(set(found["wo"].sum(axis=0))) == 1
    _, _, found = start(ts.Static(), pattern=ts.NByM(n=2, m=4))
    groups = np.abs(np.asarray(WEIGHTS["wo"], np.float32)).reshape(4, 4, 8)
    kept = found["wo"].reshape(4, 4, 8)
    assert (kept.sum(axis=1) == 2).all()
    smallest_kept = np.where(kept, groups, np.inf).min(axis=1)
    assert (smallest_kept >= np.where(kept, 0, groups).max(axis=1)).all()


def test_what_the_model_sees_is_pruned_and_the_key_is_the_seeds():
    plan, state, found = start(ts.Static())
    seen = forward_weights(plan, state, WEIGHTS, 7)
    for path, kept in found.items():
        np.testing.assert_array_equal(seen[path], np.where(kept, np.asarray(WEIGHTS[path]), 0))
    np.testing.assert_array_equal(state.rng, start(ts.Static(), trained=False)[1].rng)
    assert jax.tree.structure(state) == jax.tree.structure(start(ts.Static(), trained=False)[1])
