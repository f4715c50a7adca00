"""Optimizers of optimizers under the trainer, on a mesh of four devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_t5
from flax import traverse_util
from jax.sharding import PartitionSpec
from optimizer_table import CASES, adafactor, multi

from t5x_sparsity.core import packing
from t5x_sparsity.core.trees import flatten


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["masked", pytest.param("multi-frozen", marks=tiny_t5.t5x_only), "multi-steps"]
)
def test_it_trains_sparse_under_the_trainer(name):
    trainer = tiny_t5.trainer(
        tiny_t5.rigl(), name, tiny_t5.MeshPartitioner(2, 2), build=tiny_t5.stacked_model
    )
    dense = CASES[name].dense
    # copies: the first step takes the buffers
    start = {p: np.array(x) for p, x in flatten(trainer.train_state.params).items()}
    stored = jax.tree.map(np.array, trainer.train_state._optimizer.state.sparsity.masks)
    tiny_t5.run(trainer, 3)  # with an update at 2
    optimizer = trainer.train_state._optimizer
    weights, plan = flatten(optimizer.target), optimizer.optimizer_def.plan(optimizer.target)
    kernels = {p for p in weights if "embedding" not in p}
    frozen = {p for p in weights if dense and re.search(dense, p)}
    assert set(optimizer.state.sparsity.masks) == kernels - frozen != set()
    for path, before in start.items():
        assert np.array_equal(before, weights[path]) == (path in frozen), path
    for path, mask in optimizer.state.sparsity.masks.items():
        assert mask.sharding.spec == weights[path].sharding.spec
        old, new = (
            np.asarray(packing.unpack(jnp.asarray(m), plan[path].shape))
            for m in (stored[path], mask)
        )
        assert (new.sum((0, 2)) == plan[path].kept).all() and (old != new).any()
        assert (np.asarray(weights[path])[~new] == 0).all()
        slots = [
            x for s, x in flatten(optimizer.state.param_states).items()
            if f"/{path}/" in f"/{s}/" and x.shape == new.shape
        ]  # fmt: skip
        assert len(slots) == CASES[name].slots
        for slot in slots:
            assert slot.sharding.spec == weights[path].sharding.spec
            assert (np.asarray(slot)[new & ~old] == 0).all()
    # what a checkpoint holds: no leaf is None, and each comes back
    flat = traverse_util.flatten_dict(trainer.train_state.state_dict(), sep="/")
    assert all(x is not None for x in flat.values())
    back = trainer.train_state.restore_state(trainer.train_state.state_dict())
    assert jax.tree.structure(back) == jax.tree.structure(trainer.train_state)
    trainer.close()


@tiny_t5.t5x_only
def test_a_multi_optimizer_is_its_parts():
    def parts():
        first = adafactor(beta1=0.9, factored=False)
        return ("wi", first), ("norm", adafactor(multiply_by_parameter_scale=False))

    def drawn(seed):
        shapes = {"wi": (8, 4), "wo": (4, 8), "norm": (8,)}
        rng = np.random.default_rng(seed)
        return {p: jnp.asarray(rng.normal(size=s), jnp.float32) for p, s in shapes.items()}

    def stepped(optimizer, params, grads):
        optimizer.set_param_axes({p: axes[p] for p in params})
        state = optimizer.create(params)
        for _ in range(2):
            state = state.apply_gradient(grads, learning_rate=0.1)
        return state

    axes = {"wi": ("embed", "mlp"), "wo": ("mlp", "embed"), "norm": ("embed",)}
    axes = {p: PartitionSpec(*names) for p, names in axes.items()}
    params, grads = drawn(0), drawn(1)
    together = stepped(multi(*parts()), params, grads)
    assert int(together.state.step) == 2
    assert together.state.param_states["wo"] is None and together.target["wo"] is params["wo"]
    for path, optimizer in parts():
        alone = stepped(optimizer, {path: params[path]}, {path: grads[path]})
        for a, b in (
            (alone.target, together.target),
            (alone.state.param_states, together.state.param_states),
        ):
            jax.tree.map(np.testing.assert_array_equal, a[path], b[path])


@tiny_t5.t5x_only
def test_two_optimizers_for_one_weight_are_refused():
    both = multi(("wi", adafactor()), ("w", adafactor()))
    with pytest.raises(ValueError, match="Multiple optimizers match the same leaves"):
        both.init_state({"wi": jnp.ones((2, 2)), "wo": jnp.ones((2, 2))})
