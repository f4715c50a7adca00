"""The optimizer that the host is given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rig
from flax import traverse_util
from jax.sharding import PartitionSpec

import t5x_sparsity as ts
from t5x_sparsity import host, masks
from t5x_sparsity.core import flatten, train_step, unflatten
from t5x_sparsity.plugin import SparseOptimizer
from t5x_sparsity.plugin.optimizer import StepKind

HYPER = {"learning_rate": 0.1}


def parameters(seed=0):
    import flax.core

    keys = jax.random.split(jax.random.key(seed), 3)
    return flax.core.freeze(
        {
            "mlp": {
                "wi": {"kernel": jax.random.normal(keys[0], (64, 128))},
                "wo": {"kernel": jax.random.normal(keys[1], (128, 64))},
            },
            "norm": {"scale": jnp.ones(64)},
        }
    )


AXES = {
    "mlp": {
        "wi": {"kernel": PartitionSpec("embed", "mlp")},
        "wo": {"kernel": PartitionSpec("mlp", "embed")},
    },
    "norm": {"scale": PartitionSpec("embed")},
}


def made(name, config=None):
    import flax.core

    optimizer = SparseOptimizer(rig.OPTIMIZERS[name](), config or rig.rigl())
    optimizer.set_param_axes(flax.core.freeze(AXES))
    return optimizer


def applied(optimizer, kind, state, grads):
    driven = optimizer.for_step(kind)
    hyper = driven.update_hyper_params(**HYPER)
    return driven.apply_gradient(hyper, state.target, state.state, grads)


@pytest.fixture(params=sorted(rig.OPTIMIZERS))
def name(request):
    return request.param


def test_start_is_masked(name):
    state = made(name).create(parameters())
    kernel = state.target["mlp"]["wi"]["kernel"]
    mask = masks.unpack(state.state.sparsity.masks["mlp/wi/kernel"], kernel.shape)
    assert np.array_equal(np.asarray(kernel) != 0, np.asarray(mask))
    assert type(state.target) is type(parameters())


def test_plain_step_is_the_bases_own_on_what_is_kept(name):
    optimizer = made(name)
    state = optimizer.create(parameters())
    grads = parameters(1)
    new_params, new_state = jax.jit(lambda s, g: applied(optimizer, StepKind.PLAIN, s, g))(
        state, grads
    )
    stored = state.state.sparsity.masks
    seen = unflatten(grads, masks.apply(flatten(grads), stored))
    base_state = host.OptimizerState(state.state.step, state.state.param_states)
    hyper = optimizer.base.update_hyper_params(**HYPER)
    expected, expected_state = jax.jit(lambda *a: optimizer.base.apply_gradient(hyper, *a))(
        state.target, base_state, seen
    )
    expected = masks.apply(flatten(expected), stored)
    for path, value in flatten(new_params).items():
        np.testing.assert_array_equal(value, expected[path], err_msg=path)
    assert int(new_state.step) == 1 and new_state.step.dtype == jnp.int32
    for a, b in zip(
        jax.tree.leaves(new_state.param_states),
        jax.tree.leaves(expected_state.param_states),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    for path, m in new_state.sparsity.masks.items():
        np.testing.assert_array_equal(m, stored[path])


def test_update_step_zeroes_slots_of_grown_weights_alone(name):
    optimizer = made(name)
    state = optimizer.create(parameters())
    step = jax.jit(lambda s, g: applied(optimizer, StepKind.PLAIN, s, g))
    for i in range(2):
        target, inner = step(state, parameters(i + 1))
        state = host.Optimizer(optimizer, inner, target)
    # every slot made visible, so that a zero can only come from the update
    visible = jax.tree.map(
        lambda x: jnp.ones_like(x) if jnp.issubdtype(x.dtype, jnp.floating) else x,
        state.state.param_states,
    )
    state = host.Optimizer(optimizer, state.state.replace(param_states=visible), state.target)
    target, after = jax.jit(lambda s, g: applied(optimizer, StepKind.UPDATE, s, g))(
        state, parameters(9)
    )
    assert int(after.step) == int(state.state.step) + 1
    slots_seen = 0
    flat_slots = flatten(after.param_states)
    for path, weight in flatten(state.target).items():
        mirrors = {
            k: v
            for k, v in flat_slots.items()
            if f"/{path}/" in f"/{k}/" and v.shape == weight.shape
        }
        if path not in after.sparsity.masks:
            assert all((np.asarray(v) == 1).all() for v in mirrors.values())
            continue
        old = masks.unpack(state.state.sparsity.masks[path], weight.shape)
        new = masks.unpack(after.sparsity.masks[path], weight.shape)
        grown = np.asarray(new & ~old)
        assert grown.any()
        for slot in mirrors.values():
            np.testing.assert_array_equal(np.asarray(slot) == 0, grown)
            slots_seen += 1
        # a mask update takes the place of the gradient step
        kept = np.asarray(old & new)
        np.testing.assert_array_equal(
            flatten(target)[path], np.where(kept, np.asarray(weight), 0), err_msg=path
        )
    if name != "adafactor-factored":
        assert slots_seen >= 2


def test_masks_equal_the_functional_cores(name):
    """The plugin adds nothing to what `sparsify` does from the same weights and gradients."""
    optimizer = made(name)
    state = optimizer.create(parameters())
    grads = parameters(5)
    _, after = jax.jit(lambda s, g: applied(optimizer, StepKind.UPDATE, s, g))(state, grads)
    plan = optimizer.plan(state.target)
    expected = train_step(
        plan,
        state.state.sparsity,
        step=jnp.int32(0),
        weights=flatten(state.target),
        grads=flatten(grads),
        optimizer_state=(),
        gradient_step=None,  # RigL's update takes its place
        updates_masks=True,
    )
    for path, mask in after.sparsity.masks.items():
        np.testing.assert_array_equal(mask, expected.state.masks[path])


def test_state_dict_keeps_the_bases_paths_and_adds_masks(name):
    optimizer = made(name)
    state = optimizer.create(parameters())
    flat = traverse_util.flatten_dict(state.state_dict(), sep="/")
    base = optimizer.base.create(parameters())
    base_flat = traverse_util.flatten_dict(base.state_dict(), sep="/")
    added = {
        "state/sparsity/rng",
        "state/sparsity/masks/mlp/wi/kernel",
        "state/sparsity/masks/mlp/wo/kernel",
    }
    assert set(flat) == set(base_flat) | added
    assert all(v is not None for v in flat.values())
    size = 64 * 128
    assert flat["state/sparsity/masks/mlp/wi/kernel"].nbytes * 8 == size


def test_state_dict_round_trip(name):
    optimizer = made(name)
    state = optimizer.create(parameters())
    restored = optimizer.create(parameters(3)).restore_state(state.state_dict())
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)


def test_restore_of_other_rules_says_so(name):
    optimizer = made(name)
    stored = optimizer.create(parameters()).state_dict()
    other = made(name, rig.rigl(rules=[ts.Rule(path="wo", sparsity=None)]))
    with pytest.raises(ValueError, match="made with other rules of sparsity.*mlp/wo/kernel"):
        other.create(parameters()).restore_state(stored)


def test_every_leaf_has_axes_and_masks_have_their_weights(name):
    import flax.core

    optimizer = made(name)
    state = jax.eval_shape(optimizer.create, parameters())
    axes = optimizer.derive_logical_axes(state, flax.core.freeze(AXES))
    flat_axes = traverse_util.flatten_dict(axes.state_dict(), sep="/")
    flat_state = traverse_util.flatten_dict(state.state_dict(), sep="/")
    assert set(flat_axes) == set(flat_state)
    # the host casts a leaf whose axes are None to the checkpoint's dtype
    assert [k for k, v in flat_axes.items() if v is None] == []
    assert tuple(axes.state.sparsity.masks["mlp/wi/kernel"]) == ("embed", "mlp")
    assert jax.tree.structure(state) == jax.tree.structure(
        axes, is_leaf=lambda x: isinstance(x, PartitionSpec)
    )


def test_without_the_sparse_trainer_it_does_not_train(name):
    optimizer = made(name)
    state = optimizer.create(parameters())
    with pytest.raises(ValueError, match=r"not its trainer.*Include sparsity/\*\.gin last"):
        state.apply_gradient(parameters(), **HYPER)


def test_restore_of_a_dense_state_says_so():
    optimizer = made("adamw")
    stored = optimizer.base.create(parameters()).state_dict()
    with pytest.raises(ValueError, match="no masks: a dense run has made it"):
        optimizer.create(parameters()).restore_state(stored)
