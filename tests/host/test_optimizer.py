"""The optimizer that the host is given, over every optimizer that T5X has."""

import functools
import re

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import optimizer_table
import pytest
import tiny_t5
from flax import traverse_util
from jax.sharding import PartitionSpec
from optimizer_table import CASES, REFUSED

import t5x_sparsity as ts
from t5x_sparsity import host
from t5x_sparsity.core import packing
from t5x_sparsity.core.train_step import init_state, train_step
from t5x_sparsity.core.trees import flatten, unflatten
from t5x_sparsity.t5x import SparseOptimizer
from t5x_sparsity.t5x.optimizer import SparseOptimizerState, StepKind

HYPER = {"learning_rate": 0.1}
AXES = flax.core.freeze(
    {
        "mlp": {
            "wi": {"kernel": PartitionSpec("embed", "mlp")},
            "wo": {"kernel": PartitionSpec("mlp", "embed")},
        },
        "norm": {"scale": PartitionSpec("embed")},
    }
)
NAMES = [
    pytest.param(n, marks=tiny_t5.t5x_only) if n in optimizer_table.T5X_ONLY else n
    for n in sorted(CASES)
]


def parameters(seed=0):
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return flax.core.freeze(
        {
            "mlp": {"wi": {"kernel": draw(64, 128)}, "wo": {"kernel": draw(128, 64)}},
            "norm": {"scale": draw(64)},
        }
    )


def made(name, config=None):
    optimizer = SparseOptimizer(CASES[name].make(), config or tiny_t5.rigl())
    optimizer.set_param_axes(AXES)
    return optimizer


@functools.cache
def core_start(*dense):
    """(weights, state of sparsity) by the functional core, with these weights dense."""
    config, weights = tiny_t5.rigl(), flatten(parameters())
    plan = config.plan({p: x for p, x in weights.items() if p not in dense})
    state = init_state(config, plan, weights)
    return unflatten(parameters(), packing.apply(weights, state.masks)), state


@functools.cache
def core_update(*dense):
    """The masks after one update from the start, by the functional core."""
    target, state = core_start(*dense)
    plan = tiny_t5.rigl().plan({p: x for p, x in flatten(target).items() if p in state.masks})
    return train_step(
        plan,
        state,
        step=jnp.int32(2),
        weights=flatten(target),
        grads=flatten(parameters(9)),
        optimizer_state=(),
        gradient_step=None,  # RigL's update takes its place
        updates_masks=True,
    ).state.masks


def dense_of(name):
    """The weights that are not trained."""
    pattern = CASES[name].dense
    return tuple(p for p in flatten(parameters()) if pattern and re.search(pattern, p))


def started(name):
    """As `create` makes it, less the compiling of what all optimizers have alike."""
    optimizer = made(name)
    target, sparsity = core_start(*dense_of(name))
    param_states = optimizer.base.init_state(target).param_states
    state = SparseOptimizerState(step=jnp.int32(0), param_states=param_states, sparsity=sparsity)
    return host.optimizers.Optimizer(optimizer, state, target)


def applied(kind):
    """A compiled step of this kind."""

    def step(optimizer, grads):
        driven = optimizer.optimizer_def.for_step(kind)
        hyper = driven.update_hyper_params(**HYPER)
        target, state = driven.apply_gradient(hyper, optimizer.target, optimizer.state, grads)
        return optimizer.replace(target=target, state=state)

    return jax.jit(step)


def values(tree):
    """Leaves by path, on the host."""

    def value(x):
        is_key = jnp.issubdtype(jnp.asarray(x).dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if is_key else x)

    return {p: value(x) for p, x in flatten(tree).items()}


def visible(tree):
    """Every number a 1, so that a zero can only come from what is done next."""
    return jax.tree.map(
        lambda x: jnp.ones_like(x) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


def weight_of(slot, state):
    """The path of the weight that a leaf of `param_states` mirrors."""
    for path, weight in flatten(state.target).items():
        leaf = flatten(state.state.param_states)[slot]
        if f"/{path}/" in f"/{slot}/" and jnp.shape(leaf) == weight.shape:
            return path
    return None


@pytest.mark.parametrize(
    "name", ["adafactor-factored", pytest.param("multi-frozen", marks=tiny_t5.t5x_only)]
)
def test_start_is_masked(name):
    made_state, state = jax.jit(made(name).create)(parameters()), started(name)
    assert type(made_state.target) is type(parameters())
    assert jax.tree.structure(made_state.state) == jax.tree.structure(state.state)
    for path, x in values(state).items():
        np.testing.assert_array_equal(values(made_state)[path], x, err_msg=path)
    stored = made_state.state.sparsity.masks
    assert set(stored) == {"mlp/wi/kernel", "mlp/wo/kernel"} - set(dense_of(name))
    for path, mask in stored.items():
        kernel = flatten(made_state.target)[path]
        assert np.array_equal(np.asarray(kernel) != 0, packing.unpack(mask, kernel.shape))


@pytest.mark.parametrize("name", NAMES)
def test_plain_steps_are_the_bases_own_on_what_is_kept(name):
    start = state = started(name)
    base, stored = state.optimizer_def.base, state.state.sparsity.masks

    @jax.jit
    def expected(target, base_state, grads):
        seen = unflatten(grads, packing.apply(flatten(grads), stored))
        hyper = base.update_hyper_params(**HYPER)
        target, base_state = base.apply_gradient(hyper, target, base_state, seen)
        return unflatten(target, packing.apply(flatten(target), stored)), base_state

    step = applied(StepKind.PLAIN)
    own = state.target, host.optimizers.OptimizerState(state.state.step, state.state.param_states)
    for i in (1, 2):  # MultiSteps takes one step in two
        state, own = step(state, parameters(i)), expected(*own, parameters(i))
    assert jax.tree.structure(state) == jax.tree.structure(start)
    for ours, theirs in ((state.target, own[0]), (state.state.param_states, own[1].param_states)):
        theirs = values(theirs)
        for path, x in values(ours).items():
            np.testing.assert_array_equal(x, theirs[path], err_msg=path)
    assert int(state.state.step) == 2 and state.state.step.dtype == jnp.int32
    before = values(start.target)
    frozen = [p for p, x in values(state.target).items() if np.array_equal(x, before[p])]
    not_trained = {"norm/scale"} if name == "multi-transform" else set(dense_of(name))
    assert set(frozen) == not_trained
    for path, mask in state.state.sparsity.masks.items():
        np.testing.assert_array_equal(mask, stored[path])


@pytest.mark.parametrize("name", NAMES)
def test_update_step_zeroes_slots_of_grown_weights_alone(name):
    state = started(name)
    state = state.replace(
        state=state.state.replace(step=jnp.int32(2), param_states=visible(state.state.param_states))
    )
    after = applied(StepKind.UPDATE)(state, parameters(9))
    assert int(after.state.step) == 3
    # the plugin adds nothing to what the functional core does
    for path, mask in core_update(*dense_of(name)).items():
        np.testing.assert_array_equal(after.state.sparsity.masks[path], mask)
    weights, new_weights = values(state.target), values(after.target)
    old, new = (
        {
            p: np.asarray(packing.unpack(m, weights[p].shape))
            for p, m in s.state.sparsity.masks.items()
        }
        for s in (state, after)
    )
    assert old and all((new[p] & ~old[p]).any() for p in old)
    # a mask update takes the place of the gradient step
    for path, before in weights.items():
        kept = old[path] & new[path] if path in old else True
        np.testing.assert_array_equal(new_weights[path], np.where(kept, before, 0), err_msg=path)
    mirrors = dict.fromkeys(old, 0)
    slots = values(state.state.param_states)
    for slot, x in values(after.state.param_states).items():
        path = weight_of(slot, state)
        if path in old:
            mirrors[path] += 1
            np.testing.assert_array_equal(x == 0, new[path] & ~old[path], err_msg=slot)
        else:
            np.testing.assert_array_equal(x, slots[slot], err_msg=slot)
    assert set(mirrors.values()) == {CASES[name].slots}


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_keeps_the_bases_paths_and_adds_masks(name):
    optimizer = made(name)
    state = jax.eval_shape(optimizer.create, parameters())
    flat = traverse_util.flatten_dict(state.state_dict(), sep="/")
    base = jax.eval_shape(optimizer.base.create, parameters())
    base_flat = traverse_util.flatten_dict(base.state_dict(), sep="/")
    kernels = {"mlp/wi/kernel", "mlp/wo/kernel"} - set(dense_of(name))
    added = {"state/sparsity/rng"} | {f"state/sparsity/masks/{p}" for p in kernels}
    # what has no state has no leaf: Orbax can't read a None back
    assert set(flat) == {k for k, v in base_flat.items() if v is not None} | added
    assert all(v is not None for v in flat.values())
    assert flat["state/sparsity/masks/mlp/wi/kernel"].shape in [(8, 128), (64, 16)]


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_round_trip(name):
    optimizer = made(name)
    abstract = jax.eval_shape(optimizer.create, parameters())

    def filled(start):
        numbers = iter(range(start, start + 1000))
        leaves, treedef = jax.tree.flatten(abstract)
        arrays = [
            x if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
            else np.full(x.shape, next(numbers) % 251, x.dtype)
            for x in leaves
        ]  # fmt: skip
        return treedef.unflatten(arrays)

    state = filled(1)
    restored = filled(77).restore_state(state.state_dict())
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert a is b or np.array_equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_every_leaf_has_axes_and_masks_and_slots_have_their_weights(name):
    optimizer = made(name)
    state = jax.eval_shape(optimizer.create, parameters())
    axes = optimizer.derive_logical_axes(state, AXES)
    flat_axes = traverse_util.flatten_dict(axes.state_dict(), sep="/")
    flat_state = traverse_util.flatten_dict(state.state_dict(), sep="/")
    assert set(flat_axes) == set(flat_state)
    # the host casts a leaf whose axes are None to the checkpoint's dtype
    assert [k for k, v in flat_axes.items() if v is None] == []
    weight_axes = tiny_t5.specs(AXES)
    assert axes.state.sparsity.masks == {p: weight_axes[p] for p in state.state.sparsity.masks}
    slot_axes = tiny_t5.specs(axes.state.param_states)
    for slot in flatten(state.state.param_states):
        path = weight_of(slot, state)
        if path in state.state.sparsity.masks:
            assert slot_axes[slot] == weight_axes[path], slot
    assert jax.tree.structure(state) == jax.tree.structure(
        axes, is_leaf=lambda x: isinstance(x, PartitionSpec)
    )


@tiny_t5.t5x_only
@pytest.mark.parametrize("algorithm", [None, ts.Static()], ids=["rigl", "static"])
def test_a_rule_prunes_what_no_optimizer_trains(algorithm):
    """To its level; the algorithm decides on the mask as on any other."""
    rule = ts.Rule(path="wo", sparsity=0.5, algorithm=algorithm)
    optimizer = made("multi-frozen", tiny_t5.rigl(rules=[rule]))
    state = jax.jit(optimizer.create)(parameters())
    # the budget is that of trained weights
    levels = {p: layer.level for p, layer in optimizer.plan(state.target).items()}
    assert levels == {"mlp/wi/kernel": pytest.approx(0.8, abs=1e-2), "mlp/wo/kernel": 0.5}
    weights = values(state.target)["mlp/wo/kernel"]
    state = applied(StepKind.PLAIN)(state, parameters(1))
    np.testing.assert_array_equal(values(state.target)["mlp/wo/kernel"], weights)
    assert (weights != 0).sum() == weights.size // 2
    after = applied(StepKind.UPDATE)(state, parameters(9))
    mask = np.asarray(packing.unpack(after.state.sparsity.masks["mlp/wo/kernel"], weights.shape))
    assert mask.sum() == weights.size // 2
    assert np.array_equal(mask, weights != 0) == (algorithm is not None)
    restored = after.restore_state(after.state_dict())
    assert jax.tree.structure(restored) == jax.tree.structure(after)


def test_restore_of_other_rules_says_so():
    stored = started("adamw").state_dict()
    other = made("adamw", tiny_t5.rigl(rules=[ts.Rule(path="wo", sparsity=None)]))
    fresh = jax.eval_shape(other.create, parameters())
    with pytest.raises(ValueError, match="made with other rules of sparsity.*mlp/wo/kernel"):
        fresh.restore_state(stored)


@pytest.mark.parametrize("name", ["adamw", pytest.param("multi", marks=tiny_t5.t5x_only)])
def test_without_the_sparse_trainer_it_does_not_train(name):
    with pytest.raises(ValueError, match=r"not its trainer.*Include sparsity/\*\.gin last"):
        started(name).apply_gradient(parameters(), **HYPER)


def test_restore_of_a_dense_state_says_so():
    optimizer = made("adamw")
    fresh = jax.eval_shape(optimizer.create, parameters())
    stored = jax.eval_shape(optimizer.base.create, parameters()).state_dict()
    with pytest.raises(ValueError, match="has no masks: a dense run"):
        fresh.restore_state(stored)


def failure(optimizer):
    """What comes of one step, without arrays: the exception, or None."""
    try:
        if hasattr(optimizer, "set_param_axes"):
            optimizer.set_param_axes(AXES)
        state = jax.eval_shape(optimizer.create, parameters())
        optimizer.derive_logical_axes(state, AXES)
        jax.eval_shape(lambda s, g: s.apply_gradient(g, **HYPER), state, parameters())
    except Exception as e:
        return type(e), str(e)
    return None


@tiny_t5.t5x_only
@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_t5x_does_not_train_dense_fails_with_its_own_error(name):
    dense = failure(REFUSED[name]())
    sparse = failure(SparseOptimizer(REFUSED[name](), tiny_t5.rigl()).for_step(StepKind.PLAIN))
    assert dense is not None and sparse == dense
    assert failure(SparseOptimizer(CASES["adam"].make(), tiny_t5.rigl())) is not None  # not driven
