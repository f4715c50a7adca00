"""Optimizers of the embedded host: wrapped optax, its state dicts and logical axes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import FrozenDict, freeze
from jax.sharding import PartitionSpec as P

from t5x_sparsity.core.trees import flatten
from t5x_sparsity.embedded import optimizers

AXES = freeze({"a": {"kernel": P("embed", "mlp")}, "kernel": P("mlp", "embed"), "b": P("embed")})


def params_of(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"a": {"kernel": (3, 4)}, "kernel": (4, 3), "b": (3,)}
    return freeze(
        jax.tree.map(
            lambda s: jnp.asarray(rng.normal(size=s), jnp.float32),
            shapes,
            is_leaf=lambda x: isinstance(x, tuple),
        )
    )


def axes_of(definition, params=None, axes=AXES):
    optimizer = definition.create(params_of() if params is None else params)
    return optimizer, definition.derive_logical_axes(optimizer, axes)


NAMES = [("adam", (1e-3,)), ("adamw", (1e-3,)), ("lion", (1e-3,)), ("sgd", (1e-3, 0.9))]
WRAPPED = ["adabelief", "adagrad", "lamb", "lars", "radam", "rmsprop", "yogi"]


@pytest.mark.parametrize("name", WRAPPED)
def test_other_optimizers_of_optax_are_wrapped(name):
    message = f"optimizers has no '{name}': .* Use T5X for it, or wrap an optax optimizer in optim"
    with pytest.raises(AttributeError, match=message):
        getattr(optimizers, name)
    check_steps_and_axes(optimizers.OptaxWrapper(getattr(optax, name)(1e-3)), name, (1e-3,))


@pytest.mark.parametrize("name, args", NAMES)
def test_named_optimizer_is_optax_and_every_leaf_has_its_axes(name, args):
    check_steps_and_axes(getattr(optimizers, name)(*args), name, args)


def check_steps_and_axes(definition, name, args):
    params = params_of()
    grads = params_of(1)
    optimizer, axes = axes_of(definition)
    stepped = optimizer.apply_gradient(grads, learning_rate=123.0)

    tx = getattr(optax, name)(*args)
    updates, _ = tx.update(grads, tx.init(params), params)
    expected = optax.apply_updates(params, updates)
    jax.tree.map(np.testing.assert_array_equal, stepped.target, expected)
    assert stepped.state.step == 1 and stepped.state.step.dtype == jnp.int32
    assert isinstance(stepped.target, FrozenDict)

    def check(leaf, spec):
        assert spec is None if leaf.ndim == 0 else len(spec) == leaf.ndim

    state_axes = axes.state.param_states
    jax.tree.map(check, optimizer.state.param_states, state_axes)
    assert axes.target == AXES and axes.state.step is None


def test_step_starts_at_int32_zero():
    state = optimizers.adam(1e-3).init_state(params_of())
    assert state.step.dtype == jnp.int32 and state.step == 0


def test_axes_follow_the_longest_matching_path_and_the_shape():
    optimizer, axes = axes_of(optimizers.chain([optax.adam(1e-3)]))
    mu = axes.state.param_states[0][0].mu
    assert mu["a"]["kernel"] == P("embed", "mlp")
    assert mu["kernel"] == P("mlp", "embed")
    del optimizer

    # A factored moment has the parameter's path, and another shape: it is replicated.
    definition = optimizers.OptaxWrapper(optax.adafactor(1e-3, min_dim_size_to_factor=2))
    _, axes = axes_of(definition)
    factored = axes.state.param_states[0]
    assert factored.v_row["a"]["kernel"] is None
    assert factored.v["a"]["kernel"] is None
    assert factored.v["b"] == P("embed")


@pytest.mark.parametrize(
    "tx",
    [
        optax.masked(optax.adam(1e-3), {"a": {"kernel": True}, "kernel": False, "b": False}),
        optax.MultiSteps(optax.adamw(1e-3), 2).gradient_transformation(),
        optax.apply_if_finite(optax.sgd(1e-3, momentum=0.9), 3),
        optax.inject_hyperparams(optax.adam)(learning_rate=1e-3),
        optax.multi_transform(
            {"x": optax.adam(1e-3), "y": optax.sgd(1e-2)},
            {"a": {"kernel": "x"}, "kernel": "y", "b": "x"},
        ),
    ],
    ids=["masked", "multi_steps", "apply_if_finite", "inject_hyperparams", "multi_transform"],
)
def test_nested_transformations_keep_structure_and_round_trip(tx):
    params = params_of().unfreeze()
    definition = optimizers.OptaxWrapper(tx)
    optimizer, axes = axes_of(definition, params, AXES.unfreeze())
    sharded = [spec for spec in jax.tree.leaves(axes.state.param_states) if spec is not None]
    weights = [x for x in jax.tree.leaves(optimizer.state.param_states) if x.ndim > 0]
    assert len(sharded) == len(weights) > 0

    stepped = optimizer.apply_gradient(params_of(1).unfreeze())
    restored = optimizer.restore_state(stepped.state_dict())
    assert jax.tree.structure(restored) == jax.tree.structure(stepped)
    jax.tree.map(np.testing.assert_array_equal, restored, stepped)


def test_state_dict_has_the_leaves_and_restores_a_state_without_any():
    optimizer = optimizers.adamw(1e-3).create(params_of())
    state_dict = optimizer.state_dict()
    assert list(state_dict) == ["target", "state"]
    leaves = flatten(state_dict["state"]["param_states"])
    assert {path.split("/")[0] for path in leaves} == {"0"}
    sgd = optimizers.sgd(1e-3).create(params_of())
    assert set(flatten(sgd.state_dict()["state"])) == {"step"}
    assert jax.tree.structure(sgd.restore_state(sgd.state_dict())) == jax.tree.structure(sgd)


def test_another_optimizers_state_is_refused():
    adam = optimizers.adam(1e-3).create(params_of())
    sgd = optimizers.sgd(1e-3).create(params_of())
    with pytest.raises(ValueError, match="do not match"):
        adam.restore_state(sgd.state_dict())


def test_hyper_params_are_replaced_whole_or_in_part():
    definition = optimizers.adam(1e-3)
    assert definition.update_hyper_params(learning_rate=2.0).learning_rate == 2.0
    assert definition.update_hyper_params(hyper_params="all") == "all"
    assert definition.hyper_params.learning_rate is None
