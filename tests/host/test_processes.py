"""Runs of several processes, which T5X has and the embedded host has not."""

import shutil
import types

import command_runs
import jax
import numpy as np
import pytest
import tiny_t5

from t5x_sparsity import host, train

# weights are split among the processes too, so that no process has a whole mask
MORE = """
host.partitioning.standard_logical_axis_rules.parameter_partitioning_dims = 2
train_script.train.train_eval_dataset_cfg = None
"""
BINDINGS = ("MASK_UPDATE_PERIOD=3", "MASK_UPDATE_END=7", "CHECKPOINT_PERIOD=4", "EVAL_PERIOD=4")


def test_the_flags_of_several_processes(monkeypatch, capsys):
    """They are T5X's; the embedded host says that it is one process."""
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: joined.append((a, k)))
    values = types.SimpleNamespace(
        coordinator_address="localhost:1",
        process_count=2,
        process_index=1,
        initialization_timeout=7,
    )
    if host.NAME == "embedded":
        with pytest.raises(SystemExit, match="2"):
            train._join_processes(values)
        assert "one process; run several with T5X, or drop" in capsys.readouterr().err
    else:
        train._join_processes(values)
        assert joined == [(("localhost:1", 2, 1), {"initialization_timeout": 7})]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """(run file, model_dir) of 8 steps in 2 processes x 2 devices, by T5X's own script."""
    folder = tmp_path_factory.mktemp("two")
    file = command_runs.write_run(folder, more=MORE)
    outputs = command_runs.finish(
        command_runs.start_run(file, folder / "run", *BINDINGS, steps=8, module="t5x.train")
    )
    assert "Sparsity at the end of the run" in outputs[0]
    assert "Sparsity at the end of the run" not in outputs[1]
    return file, folder / "run"


def copied(model_dir, to, step):
    """A run as it was after `step`."""
    to.mkdir()
    for path in model_dir.iterdir():
        if path.name == f"checkpoint_{step}" or path.is_file():
            (shutil.copytree if path.is_dir() else shutil.copy)(path, to / path.name)
    return to


@tiny_t5.t5x_only
@pytest.mark.slow
def test_two_processes_resume_exactly(tmp_path, two):
    """By the package's own entry, from what T5X's has saved; data go on where they were."""
    file, whole = two
    parts = copied(whole, tmp_path / "parts", 4)
    outputs = command_runs.finish(command_runs.start_run(file, parts, *BINDINGS, steps=8))
    assert "Host: T5X at" in outputs[1]
    command_runs.assert_equal(command_runs.saved(whole, 8), command_runs.saved(parts, 8))


@tiny_t5.t5x_only
@pytest.mark.slow
def test_a_run_goes_on_in_other_processes_and_back(tmp_path, two):
    """2 x 2 devices, then 1 x 4 in one process, then 2 x 2; the position in the data starts anew.

    The last mask update is at step 7.
    """
    file, whole = two
    moved = copied(whole, tmp_path / "moved", 4)
    bindings = (*BINDINGS, "SAVE_DATASET=False")
    one = command_runs.run(file, moved, *bindings, steps=10, devices=4)
    assert one.returncode == 0, one.stdout[-4000:]
    command_runs.finish(command_runs.start_run(file, moved, *bindings, steps=12))
    before, after = command_runs.saved(moved, 10), command_runs.saved(moved, 12)
    assert before.keys() == after.keys()
    paths = [p for p in before if p.startswith("state/sparsity/masks/")]
    assert len(paths) == 7
    for path in paths:
        np.testing.assert_array_equal(before[path], after[path], err_msg=path)
        weight = after[path.replace("state/sparsity/masks/", "target/")]
        kept = int(np.unpackbits(after[path]).sum())
        assert kept == round(0.2 * weight.size)
        assert 0.99 * kept <= np.count_nonzero(weight) <= kept
    assert any((before[p] != after[p]).any() for p in before if p.startswith("target/"))
