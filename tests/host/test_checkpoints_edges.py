"""Checkpoints, paths and records that don't fit in ways that nothing would show."""

import json
import shutil

import inprocess_runs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_t5
from inprocess_runs import restore_dense, run

import t5x_sparsity as ts
from t5x_sparsity import host
from t5x_sparsity.core import packing
from t5x_sparsity.t5x import from_dense

STATIC = ts.SparsityConfig(algorithm=ts.Static(), sparsity=0.5)


def periodic(algorithm=ts.RigL, **kwargs):
    updates = ts.Periodic(**{"begin": 4, "end": 8, "period": 2, **kwargs})
    return ts.SparsityConfig(algorithm=algorithm(updates=updates), sparsity=0.5)


def shares(start, **kwargs):
    updates = {"begin": 0.25, "end": 0.75, "period": 1, "total_steps": 12, "start_step": start}
    return periodic(ts.Magnitude, **updates, **kwargs)


@pytest.fixture(scope="module")
def dense(dense_run):
    """A checkpoint of a dense run, at step 4."""
    return dense_run[0] / "checkpoint_4"


@pytest.fixture(scope="module")
def static(tmp_path_factory, dense):
    """The folder of a sparse run, at step 4."""
    folder = tmp_path_factory.mktemp("static") / "run"
    run(folder, STATIC, 4, restore=restore_dense(dense))
    return folder


def copy(folder, to):
    shutil.copytree(folder, to)
    return to


def refused(model_dir, config, **kwargs):
    with pytest.raises(ValueError) as caught:
        run(model_dir, config, kwargs.pop("steps", 12), **kwargs)
    assert not list(model_dir.glob("checkpoint_*tmp*"))
    return str(caught.value)


def test_a_run_from_dense_is_resumed_with_the_include_alone(tmp_path, dense):
    """Shares would be of other steps without it: this ramp would never begin."""
    run(tmp_path, shares(4), 4, restore=restore_dense(dense))
    message = refused(tmp_path, shares(0))
    assert f"{tmp_path} holds a run whose mask updates count from another step" in message
    assert "start_step of mlp_wi was 4 and is 0" in message
    assert "resumed with it, and with the INITIAL_CHECKPOINT_PATH that it began with" in message
    assert int(run(tmp_path, shares(4), 4)["state/step"]) == 4


COUNTS = r"the run starts at step 0, but its mask updates count from step 4 "


def test_a_step_that_is_not_the_checkpoints_is_refused(tmp_path, dense):
    restore = restore_dense(dense, assignment_map=[("state/step", None)])
    message = refused(tmp_path / "a", shares(4), restore=restore)
    assert COUNTS in message and "leave utils.RestoreCheckpointConfig.mode at" in message
    assert (
        "bind t5x_sparsity.Periodic.start_step and t5x_sparsity.OneShot.start_step to 0" in message
    )
    start = run(tmp_path / "b", shares(0), 0, restore=restore)
    assert int(start["state/step"]) == 0
    # T5X starts at random where the 'latest' of a folder is asked for that has none
    if host.NAME == "t5x":
        latest = host.utils.RestoreCheckpointConfig(
            path=str(dense), fallback_to_scratch=True, state_transformation_fns=[from_dense]
        )
        assert COUNTS in refused(tmp_path / "c", shares(4), restore=latest)


@pytest.mark.parametrize(
    ("text", "says"),
    [('{"mlp_wi": ', "JSONDecodeError"), ("[1]", r"ValueError: it is [1], not an object")],
)
def test_a_record_that_is_none_is_named(tmp_path, static, text, says):
    folder = copy(static, tmp_path / "run")
    (folder / "sparsity.json").write_text(text)
    message = refused(folder, STATIC)
    assert f"{folder}/sparsity.json is no record of a run's rules of sparsity ({says}" in message
    assert "move it away to go on without it" in message
    (folder / "sparsity.json").unlink()
    assert int(run(folder, STATIC, 4)["state/step"]) == 4
    assert json.loads((folder / "sparsity.json").read_text())["mlp_wi"]["kept"] == 1024


def test_a_record_may_lack_what_it_did_not_have_when_it_was_written(tmp_path, static):
    folder = copy(static, tmp_path / "run")
    (folder / "sparsity.json").write_text('{"mlp_wi": {"sparsity": 0.5}}')
    assert int(run(folder, STATIC, 4)["state/step"]) == 4


def test_masks_that_no_update_will_change_must_fit(tmp_path, static):
    restore = host.utils.RestoreCheckpointConfig(path=str(static / "checkpoint_4"), mode="specific")
    sparser = ts.SparsityConfig(algorithm=ts.Static(), sparsity=0.75)
    message = refused(tmp_path / "a", sparser, restore=restore)
    assert "were made by other rules of sparsity, and this run has no mask update after" in message
    assert "sparsity of mlp_wi was 0.5 and is 0.75" in message
    assert "a method and a schedule that update masks after that step" in message
    rigl = ts.SparsityConfig(algorithm=periodic().algorithm, sparsity=0.75)
    assert int(run(tmp_path / "b", rigl, 4, restore=restore)["state/step"]) == 4


@pytest.mark.parametrize("here", ["run", "~/run"])
def test_paths_of_this_machine_are_checked_too(tmp_path, static, dense, monkeypatch, here):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    copy(static, tmp_path / "run")
    copy(dense, tmp_path / "dense" / "checkpoint_4")
    sparser = ts.SparsityConfig(algorithm=ts.Static(), sparsity=0.75)
    with pytest.raises(ValueError, match="sparsity of mlp_wi was 0.5 and is 0.75"):
        run(here, sparser, 4)
    if host.NAME == "t5x":  # it reads and writes by absolute paths alone
        return
    restore = restore_dense(here.replace("run", "dense/checkpoint_4"))
    start = run(here.replace("run", "other"), STATIC, 4, restore=restore)
    assert int(start["state/step"]) == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("was", "now"),
    [("adafactor-factored", "adafactor-whole"), ("adafactor-whole", "adafactor-factored")],
)
def test_slots_of_another_shape_are_refused(tmp_path, was, now):
    run(tmp_path / "dense", None, 2, optimizer=was)
    restore = restore_dense(tmp_path / "dense/checkpoint_2")
    message = refused(tmp_path / "run", STATIC, restore=restore, optimizer=now)
    assert "param_states/embedding/v" in message
    if host.NAME == "t5x":
        assert "set OPTIMIZER to the checkpoint's, or start the optimizer afresh by" in message
    afresh = restore_dense(
        tmp_path / "dense/checkpoint_2", assignment_map=[("state/param_states/.*", None)]
    )
    assert int(run(tmp_path / "run", STATIC, 2, restore=afresh, optimizer=now)["state/step"]) == 2


@pytest.mark.slow
def test_dense_weights_have_their_weights_dtype(tmp_path, dense):
    """Read as bfloat16 from the dense run, as float32 from the run's own checkpoints, and again."""
    config, restore = periodic(ts.MagnitudeSTE), restore_dense(dense, dtype="bfloat16")
    start = run(tmp_path / "run", config, 4, restore=restore)
    assert start["state/sparsity/dense/mlp_wi"].dtype == start["target/mlp_wi"].dtype == "bfloat16"
    end = run(tmp_path / "run", config, 6)
    again = host.utils.RestoreCheckpointConfig(
        path=str(tmp_path / "run/checkpoint_6"), mode="specific", dtype="bfloat16"
    )
    other = run(tmp_path / "other", config, 8, restore=again)
    for leaves, dtype in ((end, "float32"), (other, "bfloat16")):
        for path in ("mlp_wi", "mlp_wo"):
            weight, whole = leaves[f"target/{path}"], leaves[f"state/sparsity/dense/{path}"]
            assert weight.dtype == whole.dtype == dtype
            kept = np.asarray(packing.unpack(leaves[f"state/sparsity/masks/{path}"], weight.shape))
            np.testing.assert_array_equal(weight, np.where(kept, whole, 0))


def test_another_step_leaves_a_state_from_scratch_its_masks():
    config = periodic(ts.RandomSTE, end=20)
    initializer, _, _ = tiny_t5.initializer(config, build=inprocess_runs.stacked)
    state = initializer.from_scratch(jax.random.PRNGKey(0))
    moved = state.replace_step(jnp.asarray(7, jnp.int32))
    assert int(moved.step) == 7
    jax.tree.map(
        np.testing.assert_array_equal,
        (moved.params, moved._optimizer.state.sparsity),
        (state.params, state._optimizer.state.sparsity),
    )


def test_mutable_variables_must_be_in_the_checkpoint():
    state = {"target": {"w": 1}, "flax_mutables": {"batch_stats": {"mean": 1}}}
    state["state"] = {"sparsity": {"rng": 1, "masks": {"w": 1}}}
    with pytest.raises(ValueError, match="1 of 1 mutable variables of this model: flax_mutables/b"):
        from_dense({"target": {"w": 1}}, state)
    whole = {"target": {"w": 1}, "flax_mutables": {"batch_stats": {"mean": 1}}}
    assert from_dense(whole, state) is whole
