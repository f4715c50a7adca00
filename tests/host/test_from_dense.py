"""The include that starts a sparse run from a dense checkpoint, and a run by it."""

import command_runs
import gin
import numpy as np
import pytest
import tiny_t5
from command_runs import saved, write_run

import t5x_sparsity as ts
from t5x_sparsity import host
from t5x_sparsity.core import packing

FROM_DENSE = "include 'sparsity/from_dense.gin'\n"
RIGL = "include 'sparsity/rigl.gin'\nTRAIN_STEPS = 1400\n"
PATH = "INITIAL_CHECKPOINT_PATH = '/a/checkpoint_1000'\n"


@pytest.fixture
def configure():
    with tiny_t5.gin_script() as parse:
        yield lambda text, *bindings: parse(text, *bindings)()


@pytest.mark.parametrize("text", [RIGL + FROM_DENSE + PATH, PATH + FROM_DENSE + RIGL])
def test_it_restores_and_counts_from_the_checkpoints_step(configure, text):
    configure(text)
    updates = gin.get_configurable(ts.SparsityConfig)().algorithm.updates
    assert updates == ts.Periodic(begin=0, end=0.75, period=100, total_steps=1400, start_step=1000)
    assert (updates.begin, updates.end) == (1000, 1300)
    restore = gin.get_configurable(host.utils.RestoreCheckpointConfig)()
    assert (restore.path, restore.mode) == ("/a/checkpoint_1000", "specific")
    assert restore.fallback_to_scratch
    assert [f.__name__ for f in restore.state_transformation_fns] == ["from_dense"]


def test_a_users_assignment_map_comes_before_it(configure):
    config = "host.utils.RestoreCheckpointConfig"
    map_ = f"t5x_sparsity.{config}.assignment_map = [('state/param_states/.*', None)]"
    configure(RIGL + FROM_DENSE + PATH, map_)
    restore = gin.get_configurable(host.utils.RestoreCheckpointConfig)()
    fns = getattr(restore, "transformations", None) or restore.state_transformation_fns
    assert len(fns) == 2 and fns[1].__name__ == "from_dense"


def test_without_a_path_the_error_names_it(configure):
    with pytest.raises(ValueError, match="INITIAL_CHECKPOINT_PATH"):
        configure(RIGL + FROM_DENSE)


def test_a_path_that_nothing_reads_is_an_error(configure):
    with pytest.raises(ValueError, match="INITIAL_CHECKPOINT_PATH is bound, but nothing reads it"):
        configure(RIGL + PATH)


def test_train_steps_must_count_the_dense_runs(configure):
    configure(RIGL + FROM_DENSE + PATH, "TRAIN_STEPS = 400")
    with pytest.raises(ValueError, match=r"starts at step 1000 and total_steps \(gin: TRAIN_STEPS"):
        gin.get_configurable(ts.SparsityConfig)()


RELATIVE = """
import __main__ as train_script
train_script.train.relative_steps = %TRAIN_STEPS_RELATIVE
TRAIN_STEPS_RELATIVE = None
"""


def test_relative_steps_are_refused_where_shares_are_of_train_steps(configure):
    head = "from __gin__ import dynamic_registration\n" + RELATIVE
    configure(head + RIGL)
    with pytest.raises(ValueError, match=r"\(TRAIN_STEPS_RELATIVE\) is 400, so that the run doesn"):
        configure(head + RIGL, "TRAIN_STEPS_RELATIVE = 400")
    configure(head + "include 'sparsity/static.gin'\n", "TRAIN_STEPS_RELATIVE = 400")


def run(*arguments, **kwargs):
    done = command_runs.run(*arguments, **kwargs)
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


@pytest.mark.slow
def test_a_run_by_the_include(tmp_path):
    """Trained dense for 4 steps, then pruned from step 4 on by the command a user gives."""
    run(write_run(tmp_path, "dense"), tmp_path / "dense", steps=4)
    trained = saved(tmp_path / "dense", 4)
    path = f"INITIAL_CHECKPOINT_PATH = '{tmp_path}/dense/checkpoint_4'\n"
    file = write_run(tmp_path, "magnitude", more=FROM_DENSE + path)
    out = run(file, tmp_path / "sparse", "MASK_UPDATE_PERIOD=1", steps=8)
    assert "masks are made from its weights" in out
    start = saved(tmp_path / "sparse", 4)
    for name, leaf in trained.items():
        if name.startswith("target/"):
            np.testing.assert_array_equal(start[name], leaf, err_msg=name)
    end = saved(tmp_path / "sparse", 8)
    checked = 0
    for name, stored in end.items():
        if name.startswith("state/sparsity/masks/"):
            weight = end["target/" + name.removeprefix("state/sparsity/masks/")]
            kept = np.asarray(packing.unpack(stored, weight.shape))
            assert abs(kept.sum() - 0.2 * kept.size) <= 1 and (weight[~kept] == 0).all()
            checked += 1
    assert checked == 7
