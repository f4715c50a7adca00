"""Checkpoints: what is on disk, what is restored, and what is refused."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import micro_model as micro
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from t5x_sparsity.core.trees import flatten
from t5x_sparsity.embedded import checkpoints, partitioning, utils


class State:
    """A train state of any nested dict, with T5X's interface as far as checkpoints need it."""

    def __init__(self, tree):
        self.tree = tree

    @property
    def step(self):
        return self.tree["state"]["step"]

    def state_dict(self):
        return self.tree

    def restore_state(self, tree):
        return State(tree)


class Partitioner:
    """One device; every leaf without axes."""

    mesh = micro.OneDevice().mesh

    def get_mesh_axes(self, state):
        return State(jax.tree.map(lambda x: None, state.state_dict()))


def tree(step=12345, width=3, **extra):
    rng = np.random.default_rng(0)
    return {
        "target": {"a": {"kernel": jnp.asarray(rng.normal(size=(4, width)), jnp.float32)}},
        "state": {
            "step": jnp.int32(step),
            "param_states": {
                "count": jnp.int32(step),
                "mu": jnp.full((4, width), 1.001, jnp.float32),
            },
            **extra,
        },
    }


def sparse(step=1):
    return tree(step, sparsity={"masks": {"a": {"kernel": jnp.arange(4, dtype=jnp.uint8)}}})


def restore(like, path, plan=None, **kwargs):
    plan = plan or checkpoints.plan_restore(path, like)
    return checkpoints.restore(path, plan, State(like), Partitioner(), **kwargs).state_dict()


def saved(directory, like, **kwargs):
    manager = checkpoints.make_manager(str(directory))
    assert checkpoints.save(manager, State(like), **kwargs)
    manager.close()
    return checkpoints.checkpoint_path(str(directory), int(like["state"]["step"]))


def flat(nested):
    return {k: np.asarray(v) for k, v in flatten(nested).items()}


def same(a, b):
    a, b = flat(a), flat(b)
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_layout_and_round_trip(tmp_path):
    state = sparse(12345)
    path = saved(tmp_path, state)
    assert path == str(tmp_path / "checkpoint_12345")
    assert set(checkpoints.saved_leaves(path)) == {
        "target/a/kernel",
        "state/step",
        "state/param_states/count",
        "state/param_states/mu",
        "state/sparsity/masks/a/kernel",
    }
    assert os.path.isdir(os.path.join(path, "state"))
    same(restore(state, path), state)


def test_bfloat16_is_for_weights_only(tmp_path):
    state = sparse(12345)
    path = saved(tmp_path, state, dtype="bfloat16")
    dtypes = {name: str(leaf.dtype) for name, leaf in checkpoints.saved_leaves(path).items()}
    assert dtypes["target/a/kernel"] == "bfloat16"
    assert dtypes["state/param_states/mu"] == "float32"
    assert dtypes["state/step"] == "int32"
    back = restore(state, path)
    assert back["target"]["a"]["kernel"].dtype == jnp.float32
    expected = state["target"]["a"]["kernel"].astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_array_equal(back["target"]["a"]["kernel"], expected)
    same({"state": back["state"]}, {"state": state["state"]})

    read = restore(state, path, dtype="bfloat16")
    assert read["target"]["a"]["kernel"].dtype == jnp.bfloat16
    same({"state": read["state"]}, {"state": state["state"]})


def test_none_and_empty_leaves_come_from_the_model(tmp_path):
    state = tree(7, frozen=None, empty={})
    path = saved(tmp_path, state)
    assert "state/frozen" not in checkpoints.saved_leaves(path)
    back = restore(state, path)
    assert back["state"]["frozen"] is None and back["state"]["empty"] == {}


def test_keep_and_saving_twice(tmp_path):
    manager = checkpoints.make_manager(str(tmp_path), keep=2)
    done = [checkpoints.save(manager, State(tree(step))) for step in (1, 2, 3, 3)]
    assert done == [True, True, True, False]
    manager.close()
    assert checkpoints.all_steps(str(tmp_path)) == [2, 3]
    assert checkpoints.latest_step(str(tmp_path)) == 3
    assert checkpoints.latest_step(str(tmp_path / "none")) is None


def test_save_copies_before_it_returns(tmp_path):
    state = tree(1)
    kept = flat(state)
    manager = checkpoints.make_manager(str(tmp_path))
    checkpoints.save(manager, State(state))
    for leaf in jax.tree.leaves(state):
        leaf.delete()
    manager.close()
    got = restore(tree(), checkpoints.checkpoint_path(str(tmp_path), 1))
    assert all(np.array_equal(kept[name], flat(got)[name]) for name in kept)


@pytest.mark.parametrize("name", ["run[lr=0.1]", "a*b", "what?"])
def test_steps_are_found_whatever_the_folder_is_called(tmp_path, name):
    (tmp_path / name / "checkpoint_7" / "state").mkdir(parents=True)
    assert checkpoints.all_steps(str(tmp_path / name)) == [7]


def test_torn_folders_are_passed_over_and_cleared(tmp_path):
    saved(tmp_path, tree(1))
    torn = tmp_path / "checkpoint_2.orbax-checkpoint-tmp" / "state.orbax-checkpoint-tmp"
    torn.mkdir(parents=True)
    half_deleted = tmp_path / "checkpoint_0" / "dataset"
    half_deleted.mkdir(parents=True)
    assert checkpoints.all_steps(str(tmp_path)) == [1]
    assert torn.exists()
    manager = checkpoints.make_manager(str(tmp_path), keep=2)
    for step in (2, 3):
        checkpoints.save(manager, State(tree(step)))
    manager.close()
    assert checkpoints.all_steps(str(tmp_path)) == [2, 3]
    assert not (tmp_path / "checkpoint_2.orbax-checkpoint-tmp").exists()
    assert not (tmp_path / "checkpoint_0").exists()


def test_position_in_the_data(tmp_path):
    path = saved(tmp_path / "with", tree(1), batches=41)
    assert checkpoints.saved_batches(path) == 41
    assert checkpoints.saved_batches(saved(tmp_path / "without", tree(1))) is None
    # T5X has the state of a tf.data iterator there
    path = saved(tmp_path / "t5x", tree(1))
    iterator = Path(path) / "dataset" / "train_ds-00000-of-00001.index"
    iterator.parent.mkdir()
    iterator.write_text("")
    assert checkpoints.saved_batches(path) is None


def refused(path, expected, **kwargs):
    with pytest.raises(ValueError) as caught:
        checkpoints.plan_restore(path, expected, **kwargs)
    return str(caught.value)


def test_mismatch_is_one_message_with_counts_and_shapes(tmp_path):
    found = tree(1, rms={str(i): jnp.zeros(2) for i in range(7)})
    path = saved(tmp_path, found)
    expected = tree(1, width=5, v_row=jnp.zeros(3))
    message = refused(path, expected)
    assert message.startswith(
        f"The checkpoint {path} doesn't fit this run: it was written by another model or "
        "optimizer. Use another MODEL_DIR"
    )
    lines = message.splitlines()[1:]
    assert lines == [
        "1 leaves missing in the checkpoint:",
        "  state/v_row: expected float32[3]",
        "7 leaves in the checkpoint only:",
        *[f"  state/rms/{i}: found float32[2]" for i in range(5)],
        "  ... and 2 more",
        "2 leaves of another shape:",
        "  state/param_states/mu: expected float32[4, 5], found float32[4, 3]",
        "  target/a/kernel: expected float32[4, 5], found float32[4, 3]",
    ]


def test_sparse_checkpoint_in_a_dense_run(tmp_path, caplog):
    path = saved(tmp_path, sparse())
    with caplog.at_level("WARNING", "absl"):
        plan = checkpoints.plan_restore(path, tree())
    assert f"1 arrays of {path} are not of this run and are left out" in caplog.text
    assert "state/sparsity/masks/a/kernel" in caplog.text
    same(restore(tree(), path, plan), tree(1))


def test_assignment_and_fallback(tmp_path):
    path = saved(tmp_path, tree(9))
    expected = sparse(0)
    expected["target"] = {"b": {"kernel": jnp.zeros((4, 3))}}
    config = utils.RestoreCheckpointConfig(
        path=path,
        assignment_map=(
            ("target/b/kernel", "target/a/kernel"),
            ("state/sparsity/.*", None),
        ),
        fallback_to_scratch=True,
    )
    plan = checkpoints.plan_restore(
        path, expected, config.transformations, fallback_to_scratch=True
    )
    back = restore(expected, path, plan, fallback_state=expected)
    got, old = flat(back), flat(tree(9))
    np.testing.assert_array_equal(got["target/b/kernel"], old["target/a/kernel"])
    np.testing.assert_array_equal(got["state/sparsity/masks/a/kernel"], np.arange(4))
    assert got["state/step"] == 9
    two = {"target": {"b": {"kernel": jnp.zeros((4, 3)), "kernel2": jnp.zeros((4, 3))}}}
    config = utils.RestoreCheckpointConfig(assignment_map=[("target/.*", "target/a/kernel")])
    message = refused(path, two, transformations=config.transformations)
    assert message == "Several leaves of the run are read from target/a/kernel: use T5X for it."


def test_no_checkpoint_is_named(tmp_path):
    with pytest.raises(ValueError, match="is no checkpoint: it has no folder 'state'"):
        checkpoints.saved_leaves(str(tmp_path))


def mesh_main(directory, num_partitions):
    """Save on this process's mesh; restore onto it and train a step if there is a checkpoint."""
    partitioner = partitioning.PjitPartitioner(num_partitions=int(num_partitions))
    initializer, state, model, _ = micro.initial_state(partitioner)
    if checkpoints.latest_step(directory) is None:
        manager = checkpoints.make_manager(directory)
        checkpoints.save(manager, state)
        manager.close()
    else:
        scratch, path = state, checkpoints.checkpoint_path(directory, 0)
        plan = checkpoints.plan_restore(path, state.state_dict())
        shapes = initializer.global_train_state_shape
        state = checkpoints.restore(path, plan, shapes, partitioner)
        for name, expected in micro.leaves(scratch).items():
            np.testing.assert_array_equal(expected, micro.leaves(state)[name], err_msg=name)
        assert state.params["kernel"].sharding.spec == PartitionSpec(None, "model")
        shards = {shard.data.shape for shard in state.params["kernel"].addressable_shards}
        assert shards == {(8, 32 // int(num_partitions))}
        loop = micro.trainer_cls(
            model=model,
            train_state=state,
            partitioner=partitioner,
            eval_names=(),
            summary_dir=None,
            train_state_axes=initializer.train_state_axes,
            rng=jax.random.PRNGKey(0),
        )
        loop.compile_train(micro.batch())
        loop.train(iter([micro.batch()]), 1).result()
        loop.close()
    print("done on", dict(partitioner.mesh.shape))


@pytest.mark.slow
def test_restore_on_another_mesh(tmp_path):
    # (data, model): saved on (4, 1), restored on (2, 2), each process with four devices.
    for num_partitions, shape in ((1, "'data': 4"), (2, "'data': 2, 'model': 2")):
        code = f"import test_checkpoints as t; t.mesh_main({str(tmp_path)!r}, {num_partitions})"
        flags = os.environ.get("XLA_FLAGS", "")
        flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", flags)
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=os.path.dirname(__file__),
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(sys.path),
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=4",
            },
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert shape in done.stdout
