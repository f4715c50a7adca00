"""Edges at which a method once went wrong, or would without a word."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from meshes import quick_jit
from plans import make_plan

import t5x_sparsity as ts
from t5x_sparsity.core import packing
from t5x_sparsity.core.optimizer_slots import zero_slots
from t5x_sparsity.core.plan import Rule

NOW = ts.OneShot(step=0)


def updated(tx, params, grads):
    """Params and the state after one step."""
    state = tx.init(params)

    @quick_jit
    def step(params, state):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step(params, state)


def mask_of(state, path, shape):
    return np.asarray(packing.unpack(state.sparsity.masks[path], shape))


def test_adam_fisher_takes_each_weights_own_moment():
    params = {"kernel": jnp.ones((4, 4)), "z": {"kernel": jnp.ones((4, 4))}}
    rising = jnp.arange(1.0, 17).reshape(4, 4)
    grads = {"kernel": rising, "z": {"kernel": rising[::-1, ::-1]}}
    tx = ts.sparsify(
        optax.adam(1e-3),
        ts.AdamFisher(updates=NOW),
        sparsity=0.75,
        rules=[Rule(path="z/kernel", sparsity=None)],
    )
    _, state = updated(tx, params, grads)
    assert np.flatnonzero(mask_of(state, "kernel", (4, 4))).tolist() == [12, 13, 14, 15]


def test_an_index_of_the_optimizer_is_no_weight():
    params = [jnp.ones((4, 4)), (jnp.ones((4, 4)), jnp.ones(4))]
    state = optax.chain(optax.clip(1.0), optax.adamw(0.1)).init(params)
    state = jax.tree.map(jnp.ones_like, state)
    found = zero_slots(state, {"1/0": jnp.ones((4, 4), bool)}, ["0", "1/0", "1/1"])
    adam = found[1][0]
    assert (adam.mu[0] == 1).all() and (adam.nu[0] == 1).all()
    assert (adam.mu[1][0] == 0).all() and (adam.nu[1][0] == 0).all()


def test_dense_weights_under_a_mask_can_be_donated():
    params = {"a": jnp.ones((8, 8))}
    tx = ts.sparsify(optax.sgd(0.1), ts.MagnitudeSTE(updates=NOW), sparsity=0.5)
    state = tx.init(params)

    def step(params, state):
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    params, state = jax.jit(step, donate_argnums=(0, 1))(params, state)
    assert int((np.asarray(params["a"]) != 0).sum()) == 32


@pytest.mark.parametrize("normalization", ["norm", "lamp", None])
@pytest.mark.parametrize(("scale", "level"), [(10.0, 1.0), (0.01, 0.0), (10.0, 0.75)])
def test_a_rules_level_holds_under_one_threshold(normalization, scale, level):
    rng = np.random.default_rng(0)
    params = {p: rng.normal(size=(8, 8)).astype(np.float32) for p in ("a", "b")}
    params["b"] *= scale
    algorithm = ts.GlobalMagnitude(updates=NOW, normalization=normalization)
    tx = ts.sparsify(
        optax.sgd(0.0), algorithm, sparsity=0.5, rules=[Rule(path="b", sparsity=level)]
    )
    _, state = updated(tx, params, params)
    assert mask_of(state, "a", (8, 8)).sum() == 32
    assert mask_of(state, "b", (8, 8)).sum() == round(64 * (1 - level))


def test_a_gradient_that_is_not_finite_does_not_stay_in_the_momentum():
    params = {"a": jnp.ones((8, 8))}
    tx = ts.sparsify(optax.sgd(0.0), ts.SNFS(updates=NOW), sparsity=0.5)
    grads = {"a": jnp.ones((8, 8)).at[0].set(jnp.nan)}
    _, state = updated(tx, params, grads)
    momentum = np.asarray(state.sparsity.slots["momentum"]["a"])
    assert (momentum[0] == 0).all()
    np.testing.assert_allclose(momentum[1:], 0.1, rtol=1e-6)


@pytest.mark.parametrize("name", ["masks", "rng", "a/b"])
def test_a_slot_may_not_take_a_name_that_is_taken(name):
    class Named(ts.Algorithm):
        updates = NOW

        def initial_slots(self, plan, weights, masks):
            return {name: dict(weights)}

    tx = ts.sparsify(optax.sgd(0.1), Named())
    with pytest.raises(ValueError, match=f"Named.initial_slots names a slot '{name}'.*rename it"):
        tx.init({"a": jnp.ones((8, 8))})


def test_an_embedding_level_that_the_pattern_has_not_is_an_error():
    shapes = {"token_embedder/embedding": jax.ShapeDtypeStruct((8, 8), jnp.float32)}
    with pytest.raises(ValueError, match=r"EMBEDDING_SPARSITY\) asks for 0.9.*Unstructured"):
        make_plan(shapes, sparsity=0.5, pattern=ts.NByM(n=2, m=4), embedding_sparsity=0.9)


def test_a_rule_that_is_dense_and_has_an_algorithm_is_an_error():
    with pytest.raises(ValueError, match="leaves its weights dense.*leave one of them out"):
        Rule(path="a", sparsity=None, algorithm=ts.RigL(updates=NOW))
    assert Rule(path="a", sparsity=None, algorithm=ts.Dense()).sparsity is None
