"""The partitioner: rules, mesh, data layout, partitioned functions, and the train state's axes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import seqio
from flax.linen import partitioning as flax_partitioning
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from t5x_sparsity.embedded import (
    adafactor,
    models,
    network,
    optimizers,
    partitioning,
    train_state,
)


def variables(axes=("embed", "mlp")):
    return {
        "params": {"dense": {"kernel": jnp.ones((4, 8))}},
        "params_axes": {"dense": {"kernel_axes": flax_partitioning.AxisMetadata(axes)}},
    }


def state_of(definition=None, **kwargs):
    definition = definition or optimizers.adam(1e-3)
    return train_state.FlaxOptimTrainState.create(definition, variables(**kwargs))


def test_rules_are_in_order_of_priority():
    rules = partitioning.standard_logical_axis_rules(additional_rules=[("expert", "data")])
    assert rules[0] == ("batch", "data") and rules[-1] == ("expert", "data")
    assert dict(rules)["mlp"] == "model" and dict(rules)["embed"] is None
    two = partitioning.standard_logical_axis_rules(2, 2)
    assert [v for k, v in two if k == "embed"] == ["model", "data"]
    with pytest.raises(ValueError, match=r"must be 1 or 2, got \(1, 3\)"):
        partitioning.standard_logical_axis_rules(1, 3)


def test_mesh_covers_all_devices():
    partitioner = partitioning.PjitPartitioner(num_partitions=1)
    assert dict(partitioner.mesh.shape) == {"data": jax.local_device_count(), "model": 1}
    assert partitioner.data_partition_spec == P("data")


def test_bad_partitions_are_one_clear_error():
    message = "PjitPartitioner of the embedded host has no model_parallel_submesh: .* use T5X"
    with pytest.raises(TypeError, match=message):
        partitioning.PjitPartitioner(num_partitions=1, model_parallel_submesh=(1, 1, 1, 1))
    with pytest.raises(ValueError, match="num_partitions = None does not divide"):
        _ = partitioning.PjitPartitioner(num_partitions=None).mesh
    count = jax.local_device_count()
    with pytest.raises(ValueError, match=f"does not divide the {count} local devices. Set it to"):
        _ = partitioning.PjitPartitioner(num_partitions=count + 1).mesh


class FixedMesh(partitioning.PjitPartitioner):
    """A partitioner whose mesh is given, as a subclass may do."""

    shape = (4, 2)

    @property
    def mesh(self):
        """A stand-in with the shape that is asked for."""
        return type(
            "FakeMesh", (), {"shape": dict(zip(("data", "model"), self.shape, strict=True))}
        )


def test_batch_size_goes_through_the_mesh():
    partitioner = FixedMesh(num_partitions=2)
    partitioner.check_batch_size(8)
    assert partitioner.data_mesh_size == 4
    with pytest.raises(ValueError, match="batch of 6 examples.*data axis of 4 .*BATCH_SIZE"):
        partitioner.check_batch_size(6)
    replicated = FixedMesh(num_partitions=2, logical_axis_rules=[("batch", None)])
    replicated.check_batch_size(6)


def test_mesh_axes_of_a_train_state():
    partitioner = partitioning.PjitPartitioner(num_partitions=1)
    axes = partitioner.get_mesh_axes(state_of())
    assert axes.step is None
    assert axes.params["dense"]["kernel"] == P(None, "model")
    adam = axes.param_states[0]
    assert adam.mu["dense"]["kernel"] == P(None, "model") and adam.count is None


def test_axis_names_that_can_not_be_mapped_name_the_weight():
    partitioner = partitioning.PjitPartitioner(num_partitions=1)
    message = r"\('mlp', 'mlp'\) of '.*dense/kernel' can not.*logical_axis_rules"
    with pytest.raises(ValueError, match=message):
        partitioner.get_mesh_axes(state_of(axes=("mlp", "mlp")))
    unknown = partitioner.get_mesh_axes(state_of(axes=("colour", "mlp")))
    assert unknown.params["dense"]["kernel"] == P(None, "model")


def test_partitioned_step_keeps_state_and_types():
    partitioner = partitioning.PjitPartitioner(num_partitions=1)
    definition = optimizers.adam(1e-3)
    state = state_of(definition)
    axes = partitioner.get_mesh_axes(state)

    def step(state, batch):
        grads = jax.tree.map(lambda p: p * batch.sum(), state.params)
        return state.apply_gradient(grads, learning_rate=0.1), {"sum": batch.sum()}

    partitioned = partitioner.partition(
        step,
        in_axis_resources=(axes, partitioner.data_partition_spec),
        out_axis_resources=(axes, None),
        donate_argnums=(0,),
    )
    batch = np.ones((jax.local_device_count(), 2), np.float32)
    expected, _ = step(state, batch)
    compiled = partitioner.compile(partitioned, state, batch)
    assert "hlo" in partitioned.lower(state, batch).as_text()
    got, metrics = partitioned(state_of(definition), batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, expected)
    assert jax.tree.structure(got) == jax.tree.structure(state)
    assert metrics["sum"] == batch.sum()
    again, _ = compiled(got, batch)
    assert again.step == 2
    assert again.params["dense"]["kernel"].sharding.spec == P(None, "model")


def test_whole_state_as_result_and_static_arguments():
    partitioner = partitioning.PjitPartitioner(num_partitions=1)
    fn = partitioner.partition(
        lambda x, flag: {"a": x if flag else -x, "b": x},
        in_axis_resources=(P("data"),),
        out_axis_resources={"a": P("data"), "b": None},
        static_argnums=(1,),
    )
    x = np.ones((jax.local_device_count(),), np.float32)
    out = fn(x, False)
    assert out["a"].sharding.spec == P("data") and out["b"].sharding.spec == P()
    assert float(out["a"][0]) == -1.0
    free = partitioner.partition(lambda x: x + 1, in_axis_resources=None, out_axis_resources=None)
    assert float(free(x)[0]) == 2.0


def test_logical_rules_and_mesh_hold_inside_a_partitioned_function():
    partitioner = partitioning.PjitPartitioner(num_partitions=1)
    seen = {}

    def fn(x):
        seen["rules"] = flax_partitioning.get_axis_rules()
        seen["mesh"] = jax.sharding.get_abstract_mesh()
        return flax_partitioning.with_sharding_constraint(x, ("batch", "mlp"))

    partitioner.partition(fn, in_axis_resources=None, out_axis_resources=None)(jnp.ones((4, 4)))
    assert tuple(seen["rules"]) == partitioner.logical_axis_rules
    assert seen["mesh"].axis_names == ("data", "model")
    assert not flax_partitioning.get_axis_rules()


def test_train_state_round_trip_and_replacements():
    state = state_of(adafactor.Adafactor(min_dim_size_to_factor=2, beta1=0.9))
    assert state.step == 0 and state.step.dtype == jnp.int32
    stepped = state.apply_gradient(state.params, learning_rate=0.5)
    restored = state.restore_state(stepped.state_dict())
    jax.tree.map(np.testing.assert_array_equal, restored, stepped)
    moved = stepped.replace_step(jnp.asarray(7, jnp.int32))
    assert moved.step == 7
    jax.tree.map(np.testing.assert_array_equal, moved.params, stepped.params)
    assert set(state.state_dict()) == {"target", "state"}


def test_mutable_collections_are_refused():
    extra = {"stats": {"mean": jnp.zeros(3)}}
    with pytest.raises(ValueError, match=r"mutable collections \['stats'\].* Use T5X for it"):
        train_state.FlaxOptimTrainState.create(optimizers.adam(1e-3), {**variables(), **extra})


def test_states_that_can_not_be_partitioned_say_so():
    bare = {"params": variables()["params"]}
    with pytest.raises(ValueError, match="1 of 1 leaves of 'params' have no.*'dense/kernel'"):
        train_state.FlaxOptimTrainState.create(adafactor.Adafactor(), bare)
    missing = variables()
    missing["params"]["dense"]["bias"] = jnp.ones(8)
    with pytest.raises(ValueError, match="1 of 2 leaves of 'params' have no.*'dense/bias'"):
        train_state.FlaxOptimTrainState.create(optimizers.adam(1e-3), missing)


def train_on_mesh(partitions, dims):
    """Returns the losses of two steps of a small decoder, and the shape of a shard of its MLP."""
    config = network.TransformerConfig(
        vocab_size=32,
        emb_dim=16,
        num_heads=8,
        head_dim=4,
        mlp_dim=32,
        mlp_activations=("gelu", "linear"),
        dropout_rate=0.0,
        num_layers=1,
    )
    model = models.DecoderOnlyModel(
        network.DecoderWrapper(config), seqio.ByteVocabulary(0), optimizers.sgd(1e-2)
    )
    tokens = np.random.default_rng(0).integers(1, 32, (8, 8)).astype(np.int32)
    batch = dict.fromkeys(("decoder_input_tokens", "decoder_target_tokens"), tokens)
    partitioner = partitioning.PjitPartitioner(
        num_partitions=partitions,
        logical_axis_rules=partitioning.standard_logical_axis_rules(dims, dims),
    )

    def create(rng):
        variables = model.get_initial_variables(rng, {k: v.shape for k, v in batch.items()})
        return train_state.FlaxOptimTrainState.create(model.optimizer_def, variables)

    def step(state, batch):
        loss, grads = jax.value_and_grad(lambda p: model.loss_fn(p, batch, None)[0])(state.params)
        return state.apply_gradient(grads, learning_rate=None), loss

    axes = partitioner.get_mesh_axes(jax.eval_shape(create, jax.random.PRNGKey(0)))
    state = partitioner.partition(create, None, axes)(jax.random.PRNGKey(0))
    shardings = jax.tree.map(lambda x: x.sharding, state)
    step = partitioner.partition(step, (axes, partitioner.data_partition_spec), (axes, None))
    losses = []
    for _ in range(2):
        state, loss = step(state, batch)
        losses.append(float(loss))
    assert jax.tree.map(lambda x: x.sharding, state) == shardings
    kernel = state.params["decoder"]["layers_0"]["mlp"]["wi_0"]["kernel"]
    return losses, kernel.sharding.shard_shape(kernel.shape)


@pytest.mark.slow
@pytest.mark.skipif(jax.local_device_count() != 8, reason="needs 8 devices, as conftest.py sets")
def test_meshes_train_alike():
    first, whole = train_on_mesh(1, 1)
    assert first[1] < first[0] and whole == (16, 32)
    for partitions, dims, shape in ((8, 1, (16, 4)), (4, 2, (8, 8))):
        losses, shard = train_on_mesh(partitions, dims)
        assert shard == shape
        np.testing.assert_allclose(losses, first, rtol=1e-5)


def test_mesh_is_interned_and_named():
    mesh = partitioning.PjitPartitioner(num_partitions=1).mesh
    assert isinstance(mesh, Mesh)
    assert NamedSharding(mesh, P("data", "model")).mesh.axis_names == ("data", "model")
