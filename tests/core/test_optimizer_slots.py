import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t5x_sparsity.core.optimizer_slots import second_moments, zero_slots

SHAPES = {"a": (2, 3), "b": {"a": (2, 3), "v": (4,)}, "nu": (3, 2), "list": [(2, 2), (2, 2)]}
PATHS = ["a", "b/a", "b/v", "nu", "list/0", "list/1"]


def is_shape(x):
    return isinstance(x, tuple)


def trees():
    rng = np.random.default_rng(0)

    def draw(shape):
        return jnp.asarray(rng.normal(size=shape).astype(np.float32))

    return [jax.tree.map(draw, SHAPES, is_leaf=is_shape) for _ in range(2)]


def by_path(tree):
    return {
        jax.tree_util.keystr(k, simple=True, separator="/"): x
        for k, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def after_a_step(tx):
    params, grads = trees()
    _, state = tx.update(grads, tx.init(params), params)
    return params, grads, state


OPTIMIZERS = {
    "adam": optax.adam(0.1),
    "adamw": optax.adamw(0.1),
    "chain": optax.chain(optax.clip(1e9), optax.adamw(0.1, weight_decay=0.1)),
    "masked": optax.masked(
        optax.adam(0.1), lambda p: {**jax.tree.map(lambda _: True, p), "a": False}
    ),
    "momentum after adam": optax.chain(optax.scale_by_adam(), optax.trace(0.9)),
    "injected": optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_second_moments(name):
    params, grads, state = after_a_step(OPTIMIZERS[name])
    weights = by_path(params)
    assert sorted(weights) == sorted(PATHS)
    if name == "masked":
        with pytest.raises(ValueError, match=r"no second moment .* of the weights \['a'\]"):
            second_moments(state, weights)
        weights.pop("a")
    found = second_moments(state, weights, PATHS)
    assert sorted(found) == sorted(weights)
    for path, g in by_path(grads).items():
        if path in weights:
            np.testing.assert_allclose(found[path], 0.001 * jnp.square(g), rtol=1e-4)


def test_second_moments_of_some_weights_only():
    params, grads, state = after_a_step(OPTIMIZERS["adam"])
    weights = {"a": by_path(params)["a"]}
    found = second_moments(state, weights, PATHS)
    np.testing.assert_allclose(found["a"], 0.001 * jnp.square(grads["a"]), rtol=1e-4)
    assert list(found) == ["a"]


def test_adafactor_by_hand():
    ones = jnp.ones((2, 3))
    state = {"param_states": {"a": {"v": 2 * ones, "m": 3 * ones, "v_row": jnp.ones(2)}}}
    np.testing.assert_array_equal(second_moments(state, {"a": ones})["a"], 2 * ones)
    factored = {"param_states": {"a": {"v": jnp.zeros(1), "m": ones, "v_row": jnp.ones(2)}}}
    with pytest.raises(
        ValueError, match=r"weights \['a'\], which this .*Adafactor.factored = Fals"
    ):
        second_moments(factored, {"a": ones})


@pytest.mark.parametrize(
    "tx", [optax.sgd(0.1), optax.sgd(0.1, momentum=0.9), optax.lion(0.1)], ids=["sgd", "m", "lion"]
)
def test_optimizers_without_second_moments(tx):
    params, _, state = after_a_step(tx)
    message = (
        r"the optimizer keeps no second moment \(nu or v\) of the weights \['a', 'b/a', .*'nu'\], "
        "which this algorithm needs: train with Adam or AdamW"
    )
    with pytest.raises(ValueError, match=message):
        second_moments(state, by_path(params))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("chosen", [["a"], ["b/a"], ["nu"], ["list/1"], PATHS], ids=str)
def test_zero_slots(name, chosen):
    """The marked entries of the chosen weights' slots are 0, and nothing else has changed."""
    params, _, state = after_a_step(OPTIMIZERS[name])
    weights = by_path(params)
    reset = {p: jnp.arange(weights[p].size).reshape(weights[p].shape) % 2 == 0 for p in chosen}
    found = zero_slots(state, reset, PATHS)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    zeroed = []
    for path, before in by_path(state).items():
        after = by_path(found)[path]
        own = [p for p in PATHS if f"/{path}/".endswith(f"/{p}/")]
        own = max(own, key=len, default=None)
        if own in reset:
            zeroed.append(path)
            np.testing.assert_array_equal(after, jnp.where(reset[own], 0, before))
            assert (np.asarray(before) != 0).any()
        else:
            assert after is before, path
        assert after.dtype == before.dtype
    slots = 3 if name == "momentum after adam" else 2
    expected = [p for p in chosen if not (name == "masked" and p == "a")]
    assert len(zeroed) == slots * len(expected)


def test_slots_of_dense_weights_that_share_a_name_stay():
    params, _, state = after_a_step(OPTIMIZERS["adam"])
    everything = jnp.ones((2, 3), bool)
    named = by_path(zero_slots(state, {"a": everything}, PATHS))
    assert not np.asarray(named["0/mu/a"]).any() and np.asarray(named["0/mu/b/a"]).all()
    # told of no other weight than `a`, it takes every path with an `a` in it for its own
    unnamed = by_path(zero_slots(state, {"a": everything}))
    assert not np.asarray(unnamed["0/mu/b/a"]).any()


def test_what_is_no_slot_stays():
    ones = jnp.ones((2, 3), jnp.bfloat16)
    state = {
        "mu": {"a": ones},
        "a": {"v": ones, "v_row": jnp.ones(2), "count": jnp.int32(7)},
        "aa": ones,
        "step": jnp.int32(1),
    }
    reset = {"a": jnp.array([[True, False, True]] * 2)}
    found = zero_slots(state, reset)
    assert found["mu"]["a"].dtype == jnp.bfloat16
    for slot in (found["mu"]["a"], found["a"]["v"]):
        assert slot.astype(int).tolist() == [[0, 1, 0]] * 2
    assert found["aa"] is ones and found["step"] is state["step"]
    assert found["a"]["v_row"] is state["a"]["v_row"] and int(found["a"]["count"]) == 7
    assert zero_slots(state, {}) is state
    # NaN is forgotten too
    nan = zero_slots({"a": jnp.full((1, 2), jnp.nan)}, {"a": jnp.array([[True, False]])})["a"]
    assert nan[0, 0] == 0 and np.isnan(nan[0, 1])
