"""What runs write, what they start from, and every way in which that does not fit."""

import functools
import json
import re
import shutil

import inprocess_runs
import numpy as np
import pytest
import tiny_t5
from inprocess_runs import assert_same, restore_dense, run

import t5x_sparsity as ts
from t5x_sparsity import host
from t5x_sparsity.core import packing
from t5x_sparsity.t5x import checkpoint_step, from_dense

PATHS = ["mlp_wi", "mlp_wo"]


def rigl(sparsity=0.5, begin=1, end=7, period=2, **kwargs):
    return tiny_t5.rigl(sparsity, begin=begin, end=end, period=period, **kwargs)


def mask(leaves, path):
    stored, shape = leaves[f"state/sparsity/masks/{path}"], leaves[f"target/{path}"].shape
    assert stored.size * 8 == np.prod(shape)
    return np.asarray(packing.unpack(stored, shape))


def largest(weight, share, stack_axis):
    """Where the largest |w| of each layer are; ties to the lower index."""
    found = np.zeros(weight.shape, bool)
    for layer in range(weight.shape[stack_axis]):
        at = [slice(None)] * weight.ndim
        at[stack_axis] = layer
        one = np.abs(weight[tuple(at)])
        order = np.argsort(-one.reshape(-1), kind="stable")[: round(share * one.size)]
        chosen = np.zeros(one.size, bool)
        chosen[order] = True
        found[tuple(at)] = chosen.reshape(one.shape)
    return found


@pytest.fixture
def dense(dense_run):
    return dense_run


@pytest.fixture(scope="module")
def sparse(rigl_run, tmp_path_factory):
    """The folder of a run saved up to step 4, its leaves, and those of one that went on to 6."""
    return *rigl_run, run(tmp_path_factory.mktemp("sparse") / "whole", rigl(), 6)


def copy(folder, to):
    shutil.copytree(folder, to)
    return to


STATIC = ts.SparsityConfig(algorithm=ts.Static(), sparsity=0.5)


def from_step(algorithm, start, total, **kwargs):
    updates = ts.Periodic(begin=0.5, end=0.75, period=1, total_steps=total, start_step=start)
    return ts.SparsityConfig(algorithm=algorithm(updates=updates), sparsity=0.5, **kwargs)


def test_a_run_resumes_exactly(tmp_path, sparse):
    folder, _, whole = sparse
    assert_same(run(copy(folder, tmp_path / "run"), rigl(), 6), whole)


def test_from_a_dense_checkpoint_masks_keep_the_largest_weights(tmp_path, dense):
    folder, trained = dense
    start = run(tmp_path, STATIC, 4, restore=restore_dense(folder / "checkpoint_4"))
    assert int(start["state/step"]) == 4
    for path, axis in zip(PATHS, (1, 1), strict=True):
        weight = trained[f"target/{path}"]
        kept = largest(weight, 0.5, axis)
        np.testing.assert_array_equal(mask(start, path), kept, err_msg=path)
        np.testing.assert_array_equal(start[f"target/{path}"], np.where(kept, weight, 0))
    np.testing.assert_array_equal(start["target/embedding"], trained["target/embedding"])
    for path, slot in trained.items():
        if path.startswith("state/param_states"):
            np.testing.assert_array_equal(start[path], slot, err_msg=path)
    # the first save has them, too
    assert (tmp_path / "checkpoint_4").is_dir()
    assert_same(run(tmp_path, STATIC, 4), start)


def test_shares_are_of_the_steps_after_the_dense_checkpoint(tmp_path, dense):
    config = from_step(ts.Magnitude, 4, 12)
    end = run(tmp_path, config, 12, restore=restore_dense(dense[0] / "checkpoint_4"))
    assert config.algorithm.updates.begin == 8 and config.algorithm.updates.end == 10
    for path in PATHS:
        kept = mask(end, path)
        assert kept.sum() == kept.size // 2
        assert (end[f"target/{path}"][~kept] == 0).all()


@pytest.mark.slow
def test_a_run_from_dense_resumes_exactly(tmp_path, dense):
    restore = restore_dense(dense[0] / "checkpoint_4")
    whole = run(tmp_path / "whole", rigl(0.5, begin=5, end=11), 8, restore=restore)
    run(tmp_path / "parts", rigl(0.5, begin=5, end=11), 6, restore=restore)
    again = run(tmp_path / "parts", rigl(0.5, begin=5, end=11), 8, restore=restore)
    assert_same(again, whole)


@pytest.mark.parametrize("algorithm", [ts.MagnitudeSTE, ts.TopKAST], ids=lambda a: a.__name__)
def test_dense_weights_under_a_mask_are_the_checkpoints(tmp_path, dense, algorithm):
    folder, trained = dense
    config = from_step(algorithm, 4, 8)
    start = run(tmp_path, config, 4, restore=restore_dense(folder / "checkpoint_4"))
    for path in PATHS:
        weight = trained[f"target/{path}"]
        np.testing.assert_array_equal(start[f"state/sparsity/dense/{path}"], weight)
        kept = largest(weight, 0.5, 1)
        np.testing.assert_array_equal(start[f"target/{path}"], np.where(kept, weight, 0))


def test_another_optimizer_starts_afresh(tmp_path, dense):
    folder, trained = dense
    restore = restore_dense(folder / "checkpoint_4")
    start = run(tmp_path, STATIC, 4, restore=restore, optimizer="sgd")
    assert int(start["state/step"]) == 4
    slots = {k: v for k, v in start.items() if k.startswith("state/param_states")}
    assert slots and all((v == 0).all() for v in slots.values())
    kept = largest(trained["target/mlp_wi"], 0.5, 1)
    np.testing.assert_array_equal(mask(start, "mlp_wi"), kept)


def test_a_sparse_checkpoint_elsewhere_goes_on_with_its_masks(tmp_path, sparse):
    folder, _, whole = sparse
    restore = host.utils.RestoreCheckpointConfig(
        path=str(folder / "checkpoint_4"), mode="specific", restore_dataset=True
    )
    assert_same(run(tmp_path, rigl(), 6, restore=restore), whole)


def test_a_dense_run_goes_on_from_a_sparse_checkpoint(tmp_path, sparse):
    folder, stored, _ = sparse
    restore = host.utils.RestoreCheckpointConfig(path=str(folder / "checkpoint_4"), mode="specific")
    start = run(tmp_path / "start", None, 4, restore=restore)
    assert start.keys() == {k for k in stored if "state/sparsity" not in k}
    assert all((start[k] == stored[k]).all() for k in start)
    moved = run(tmp_path / "moved", None, 6, restore=restore)
    # nothing holds the pruned weights at 0 any more
    assert (moved["target/mlp_wi"] != 0).all() > (start["target/mlp_wi"] != 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(1, 4), (2, 2)])
def test_a_checkpoint_resumes_on_another_mesh(tmp_path, sparse, mesh):
    folder, stored, _ = sparse
    there = run(copy(folder, tmp_path / "there"), rigl(), 4, mesh=mesh)
    assert_same(there, stored)
    moved = run(tmp_path / "there", rigl(), 6, mesh=mesh)
    back = run(tmp_path / "there", rigl(), 8)
    for path in PATHS:
        assert mask(moved, path).sum() == mask(back, path).sum() == mask(there, path).sum()


@pytest.mark.slow
def test_bfloat16_weights_resume_exactly(tmp_path, sparse):
    """The type to read weights as leaves masks, counters and the step as they are."""
    folder, before, _ = sparse
    restore = host.utils.RestoreCheckpointConfig(
        path=str(folder / "checkpoint_4"), mode="specific", dtype="bfloat16"
    )
    start = run(tmp_path / "other", rigl(), 4, restore=restore, save={"dtype": "bfloat16"})
    for path, leaf in start.items():
        if path.startswith("target/"):
            assert leaf.dtype == "bfloat16"
            np.testing.assert_array_equal(leaf, before[path].astype(leaf.dtype), err_msg=path)
        else:
            assert leaf.dtype == before[path].dtype, path
            np.testing.assert_array_equal(leaf, before[path], err_msg=path)
    whole = run(tmp_path / "whole", rigl(), 8, restore=restore, save={"dtype": "bfloat16"})
    # T5X loses a batch where it resumes from a checkpoint of before its first step
    run(tmp_path / "parts", rigl(), 6, restore=restore, save={"dtype": "bfloat16"})
    assert_same(run(tmp_path / "parts", rigl(), 8, save={"dtype": "bfloat16"}), whole)


# ---------------------------------------------------------------------------------------------
# What does not fit is one error that says what to do.


def refused(model_dir, config, steps=8, **kwargs):
    before = sorted(p.name for p in model_dir.glob("*")) if model_dir.exists() else []
    with pytest.raises(ValueError) as caught:
        run(model_dir, config, steps, **kwargs)
    after = sorted(p.name for p in model_dir.glob("*")) if model_dir.exists() else []
    assert before == after
    return str(caught.value)


def test_a_dense_model_dir_is_refused(dense):
    message = refused(dense[0], rigl())
    assert f"the checkpoint {dense[0]}/checkpoint_4 has no masks: a dense run made it" in message
    assert "include 'sparsity/from_dense.gin'" in message and "another MODEL_DIR" in message


def test_a_dense_initial_checkpoint_needs_the_include(tmp_path, dense):
    restore = host.utils.RestoreCheckpointConfig(
        path=str(dense[0] / "checkpoint_4"), mode="specific"
    )
    message = refused(tmp_path / "run", rigl(), restore=restore)
    assert "checkpoint_4 has no masks" in message
    assert "include 'sparsity/from_dense.gin' with its path in INITIAL_CHECKPOINT_PATH" in message


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (rigl(0.75), r"sparsity of mlp_w[io] was 0.5 and is 0.7"),
        (rigl(rules=[ts.Rule(path="wo", sparsity=None)]), "unexpected state/sparsity/masks/mlp_wo"),
        (rigl(pack_masks=False), "masks/mlp_wi has shape .* where this run has"),
        (STATIC, "algorithm of mlp_wi was RigL and is Static"),
        (
            rigl(rules=[ts.Rule(path="wi", pattern=ts.NByM(n=2, m=4))]),
            r"pattern of mlp_wi was Unstructured\(\) and is NByM\(n=2, m=4",
        ),
        (from_step(ts.MagnitudeSTE, 0, 8), "missing state/sparsity/dense/mlp_wi"),
    ],
    ids=["level", "rules", "packing", "algorithm", "pattern", "slots"],
)
def test_other_rules_are_refused_in_the_same_model_dir(sparse, config, says):
    message = refused(sparse[0], config)
    assert "other rules of sparsity" in message and re.search(says, message), message
    assert "the configuration that made it" in message and "another MODEL_DIR" in message


@pytest.mark.parametrize(
    ("saved_by", "says"), [(2, "of 2 processes, and this run has 1"), (0, "of 0 processes")]
)
def test_a_position_in_the_data_of_other_processes_is_named(tmp_path, sparse, saved_by, says):
    folder = copy(sparse[0], tmp_path / "run")
    shutil.rmtree(folder / "checkpoint_4/dataset")
    for i in range(saved_by):
        (folder / f"checkpoint_4/dataset/process_{i}-of-{saved_by}").mkdir(parents=True)
    message = refused(folder, rigl())
    assert "checkpoint_4 has the position in the training data" in message and says in message
    assert "save_dataset = False" in message
    assert int(run(folder, rigl(), 6, save={"save_dataset": False})["state/step"]) == 6


def test_more_steps_and_another_schedule_are_no_other_rules(tmp_path, sparse):
    longer = rigl(end=9, period=1)
    assert int(run(copy(sparse[0], tmp_path / "run"), longer, 6)["state/step"]) == 6


def test_the_record_of_a_run_is_written_whole(sparse):
    record = json.loads((sparse[0] / "sparsity.json").read_text())
    assert set(record) == set(PATHS)
    assert record["mlp_wi"] == {
        "shape": [32, 2, 64],
        "sparsity": 0.5,
        "kept": 1024,
        "pattern": "Unstructured()",
        "algorithm": "RigL",
        "start_step": 0,
        "axes": ["embed", "layers", "mlp"],
        "stack_axes": [1],
    }
    assert not list(sparse[0].glob("*.tmp"))


def test_a_sparse_checkpoint_is_not_for_from_dense(tmp_path, sparse):
    message = refused(tmp_path / "run", STATIC, restore=restore_dense(sparse[0] / "checkpoint_4"))
    assert "is a sparse run's checkpoint, whose masks 'from_dense.gin' would throw away" in message


def test_a_checkpoint_after_the_last_update_is_refused(tmp_path, dense):
    restore = restore_dense(dense[0] / "checkpoint_4")
    message = refused(tmp_path / "run", rigl(end=3), restore=restore)
    assert "the checkpoint is at step 4, after the last mask update at step 3" in message
    assert "Periodic.start_step" in message and "TRAIN_STEPS" in message


def test_another_model_is_refused_by_its_weights(tmp_path, dense):
    build = functools.partial(inprocess_runs.stacked, names=("mlp", "more"))
    message = refused(
        tmp_path / "run", STATIC, restore=restore_dense(dense[0] / "checkpoint_4"), build=build
    )
    assert "the checkpoint lacks 2 of 5 weights of this model: target/more_wi; " in message
    assert "set MODEL to the checkpoint's" in message


def test_a_path_that_is_no_checkpoint_is_named(tmp_path):
    restore = restore_dense(tmp_path / "nothing" / "checkpoint_7")
    message = refused(tmp_path / "run", STATIC, restore=restore)
    assert f"{tmp_path / 'nothing/checkpoint_7'} is no whole checkpoint" in message


def test_a_tensorflow_checkpoint_is_named(tmp_path):
    (tmp_path / "model.ckpt-100.index").write_text("")
    restore = restore_dense(tmp_path / "model.ckpt-100")
    message = refused(tmp_path / "run", STATIC, restore=restore)
    assert "is a TensorFlow checkpoint" in message and "convert_tf_checkpoint" in message


@pytest.mark.parametrize(
    ("path", "step"),
    [("/a/checkpoint_4", 4), ("gs://b/run/checkpoint_1000000/", 1000000), ("checkpoint_0", 0)],
)
def test_the_step_of_a_checkpoint_is_in_its_name(path, step):
    assert checkpoint_step(path) == step


@pytest.mark.parametrize("path", ["/a/run", "/a/model.ckpt-100", "/a/checkpoint_4/state", []])
def test_a_name_without_a_step_says_what_to_bind(path):
    with pytest.raises(ValueError, match=r"can't be told .* bind t5x_sparsity.Periodic.start_step"):
        checkpoint_step(path)


def test_part_of_the_optimizers_state_is_refused():
    state = {"target": {"w": 1}, "state": {"param_states": {"mu": 1, "nu": 2}}}
    with pytest.raises(ValueError, match="this run is dense; include a method's file, such as"):
        from_dense(state, state)
    state["state"]["sparsity"] = {"rng": 1, "masks": {"w": 1}}
    half = {"target": {"w": 1}, "state": {"param_states": {"mu": 1}}}
    with pytest.raises(
        ValueError, match="lacks 1 of 2 leaves of the optimizer's state: .*nu; set "
    ):
        from_dense(half, state)
    assert from_dense(half, state, is_resuming=True) is half
    none = {"target": {"w": 1}, "state": {"step": 3}}
    assert from_dense(none, state) is none


# ---------------------------------------------------------------------------------------------
# Formats that only T5X writes.


@tiny_t5.t5x_only
def test_legacy_checkpoints_resume_exactly(tmp_path, sparse):
    kwargs = {"use_orbax": False, "save": {"save_dataset": False}}
    whole = run(tmp_path / "whole", rigl(), 4, **kwargs)
    run(tmp_path / "parts", rigl(), 2, **kwargs)
    again = run(tmp_path / "parts", rigl(), 2, **kwargs)
    assert (tmp_path / "parts/checkpoint_2/checkpoint").is_file()
    assert again.keys() == whole.keys()
    message = refused(tmp_path / "parts", rigl(0.75), **kwargs)
    assert "other rules of sparsity" in message
    # and by the Orbax manager, which reads both
    assert_same(run(tmp_path / "parts", rigl(), 2, save={"save_dataset": False}), again)


@tiny_t5.t5x_only
def test_a_legacy_dense_checkpoint_starts_a_sparse_run(tmp_path):
    kwargs = {"use_orbax": False, "save": {"save_dataset": False}}
    trained = run(tmp_path / "dense", None, 4, **kwargs)
    assert (tmp_path / "dense/checkpoint_4/checkpoint").is_file()
    restore = restore_dense(tmp_path / "dense/checkpoint_4")
    assert "has no masks" in refused(tmp_path / "dense", rigl(), **kwargs)
    for name, more in (("legacy", kwargs), ("orbax", {"save": {"save_dataset": False}})):
        start = run(tmp_path / name, STATIC, 4, restore=restore, **more)
        for path in PATHS:
            weight = trained[f"target/{path}"]
            kept = largest(weight, 0.5, 1)
            np.testing.assert_array_equal(mask(start, path), kept, err_msg=path)
            np.testing.assert_array_equal(start[f"target/{path}"], np.where(kept, weight, 0))
