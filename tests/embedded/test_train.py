"""Whole runs: their course, their errors, and being killed."""

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import micro_model as micro
import numpy as np
import optax
import orbax.checkpoint
import pytest
import tensorflow as tf
from absl import logging

from t5x_sparsity.embedded import checkpoints, optimizers, startup, train, trainer, utils


def plan(first, total, stats=None, eval=None, checkpoint=None):
    ends = train.segment_ends(first, total, stats, eval, checkpoint)
    return [
        (start, stop, due(checkpoint, stop, first, total, "S") + due(eval, stop, first, total, "E"))
        for start, stop in itertools.pairwise([first, *ends])
    ]


def due(period, stop, first, total, letter):
    return letter * train.is_due(period, stop, first, total)


def test_segments_by_hand():
    assert plan(0, 7, eval=4, checkpoint=2) == [
        (0, 2, "S"),
        (2, 4, "SE"),
        (4, 6, "S"),
        (6, 7, "SE"),
    ]
    # Periods count from the first step.
    assert plan(1, 6, checkpoint=4) == [(1, 5, "S"), (5, 6, "S")]
    assert plan(0, 6, eval=6, stats=4) == [(0, 4, ""), (4, 6, "E")]
    assert plan(0, 5, stats=2) == [(0, 2, ""), (2, 4, ""), (4, 5, "")]
    assert plan(0, 4) == [(0, 4, "")]
    assert plan(3, 3, eval=2) == []


def test_bad_periods_are_named():
    message = (
        "multiples of the shortest of them, 4, but they are train.eval_period = 6, "
        "utils.SaveCheckpointConfig.period = 4"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        startup.check_periods(None, 6, 4)
    with pytest.raises(ValueError, match="train.stats_period is -1; it must be a number of steps"):
        startup.check_periods(-1, 0, None)
    startup.check_periods(3, 0, 4)
    startup.check_periods(None, 4, 8)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(model_dir, final leaves) of an uninterrupted run of 6 steps."""
    model_dir = tmp_path_factory.mktemp("whole") / "run"
    step, state = micro.run(model_dir, 6)
    assert step == 6
    return model_dir, micro.leaves(state)


def same(a, b):
    assert list(a) == list(b)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_a_run_leaves_its_record(whole):
    model_dir, final = whole
    assert final["state/step"] == 6
    assert checkpoints.all_steps(str(model_dir)) == [4, 6]
    assert checkpoints.saved_batches(str(model_dir / "checkpoint_4")) == 4
    assert {"model-info.txt", "train", "training_eval"} <= set(os.listdir(model_dir))
    assert os.listdir(model_dir / "training_eval") == [micro.task()]


class Killed(Exception):
    pass


def killing_trainer(at_step):
    """A trainer that fails before it takes the batch of `at_step`."""

    class Killing(trainer.Trainer):
        def train(self, batch_iter, num_steps, start_step=None):
            def batches():
                for step in itertools.count(start_step):
                    if step == at_step:
                        raise Killed
                    yield next(batch_iter)

            return super().train(batches(), num_steps, start_step)

    return lambda **kwargs: Killing(
        **kwargs, learning_rate_fn=lambda step: jnp.float32(1e-2), num_microbatches=None
    )


@pytest.mark.parametrize("at_step", [1, 5])
def test_resumed_run_is_bit_identical(tmp_path, whole, at_step):
    with pytest.raises(Killed):
        micro.run(tmp_path, 6, trainer_cls=killing_trainer(at_step))
    # What a kill while a checkpoint is written leaves.
    torn = tmp_path / "checkpoint_6.orbax-checkpoint-tmp" / "state.orbax-checkpoint-tmp"
    torn.mkdir(parents=True)
    (torn / "_METADATA").write_text("{")
    step, state = micro.run(tmp_path, 6)
    assert step == 6
    same(micro.leaves(state), whole[1])
    assert checkpoints.all_steps(str(tmp_path)) == [4, 6]
    back = checkpoints.saved_batches(str(tmp_path / "checkpoint_6"))
    assert back == 6


def test_position_in_the_data_matters(tmp_path, whole):
    # The same resumption without the position reads the first batches again, and differs.
    save = {"save_dataset": False}
    micro.run(tmp_path, 4, save=save)
    _, state = micro.run(tmp_path, 6, save=save)
    assert not np.array_equal(micro.leaves(state)["target/table"], whole[1]["target/table"])


def test_finished_run_only_evaluates(tmp_path, whole):
    shutil.copytree(whole[0], tmp_path / "run")
    calls = []

    class Counting(trainer.Trainer):
        def eval(self, batch_iters):
            calls.append(super().eval(batch_iters))
            return calls[-1]

        def compile_train(self, batch):
            raise AssertionError("there is nothing to compile")

    def cls(**kwargs):
        return Counting(**kwargs, learning_rate_fn=lambda step: step * 0.0, num_microbatches=None)

    step, state = micro.run(tmp_path / "run", 6, trainer_cls=cls, run_eval_before_training=True)
    assert step == 6 and len(calls) == 1
    same(micro.leaves(state), whole[1])
    assert calls[0][micro.task()]["loss_per_nonpadding_target_token"].value > 0


def test_relative_steps_and_microbatches(tmp_path):
    def cls(**kwargs):
        return micro.trainer_cls(**kwargs, num_microbatches=2)

    options = dict(
        save={"period": 4, "keep": None},
        train_eval_dataset_cfg=None,
        stats_period=1,
        trainer_cls=cls,
    )
    step, _ = micro.run(tmp_path, 4, **options)
    assert (step, checkpoints.all_steps(str(tmp_path))) == (4, [0, 4])
    step, _ = micro.run(tmp_path, 4, relative_steps=2, **options)
    assert (step, checkpoints.all_steps(str(tmp_path))) == (6, [0, 4, 6])


def test_start_from_another_run(tmp_path, whole):
    source = str(whole[0])
    options = dict(train_eval_dataset_cfg=None, save={"period": 100})
    restore = {"path": source, "mode": "latest"}
    step, state = micro.run(
        tmp_path / "a", 6, restore=restore, run_eval_before_training=True, **options
    )
    same(micro.leaves(state), whole[1])
    # The weights alone, by an assignment map: the optimizer and the step begin anew.
    restore = {
        "path": os.path.join(source, "checkpoint_6"),
        "mode": "specific",
        "assignment_map": [("state/.*", None)],
        "fallback_to_scratch": True,
        "restore_dataset": True,
    }
    step, state = micro.run(tmp_path / "b", 0, restore=restore, **options)
    got = micro.leaves(state)
    assert step == 0 == got["state/step"]
    np.testing.assert_array_equal(got["target/table"], whole[1]["target/table"])
    # Six batches of the other run were skipped.
    assert checkpoints.saved_batches(str(tmp_path / "b" / "checkpoint_0")) == 6


def test_log_shows_progress(tmp_path, caplog):
    logging.set_verbosity(logging.INFO)
    with caplog.at_level("INFO", logger="absl"):
        micro.run(tmp_path, 2, save={"period": 2})
    lines = [record.getMessage() for record in caplog.records]
    assert any(
        re.fullmatch(r"Step 2/2: loss \d\.\d{4}, .* steps/s, 0:00:00 left", x) for x in lines
    )
    assert any(re.match(r"Step 2, evaluated embedded_micro: loss_per_non\S+ \d", x) for x in lines)


ERRORS = {
    "decoding": (
        lambda: {"infer_eval_dataset_cfg": micro.dataset_config("validation")},
        "but the embedded host doesn't decode: set it to None, or use T5X for it.",
    ),
    "orbax": (
        lambda: {"use_orbax": False},
        "train.use_orbax is False, but the embedded host writes Orbax checkpoints only: set it to "
        "True, or use T5X for it.",
    ),
    "garbage": (lambda: {"gc_period": 4}, "train.gc_period is 4, but the embedded host"),
    "extra saves": (
        lambda: {"save": {"checkpoint_steps": [3]}},
        "utils.SaveCheckpointConfig.checkpoint_steps is (3,), but the embedded host saves by",
    ),
    "saved otherwise": (
        lambda: {"save": {"state_transformation_fns": [dict]}},
        "SaveCheckpointConfig.state_transformation_fns is (<class 'dict'>,), but the embedded host",
    ),
    "seed": (
        lambda: {"train_dataset_cfg": micro.dataset_config(seed=None)},
        "save_dataset is True, but the training data has no fixed seed, so that a resumed run "
        "couldn't find its place in it. Set train/utils.DatasetConfig.seed = 0",
    ),
    "periods": (lambda: {"eval_period": 3}, "The periods must all be multiples of the shortest"),
    "actions": (
        lambda: {"actions": {"TRAIN": ["an action"]}},
        "train.actions is {'TRAIN': ['an action']}, but the embedded host has no actions: set it",
    ),
    "metrics": (
        lambda: {"concurrent_metrics": False},
        "train.concurrent_metrics is False, but the embedded host writes metrics concurrently",
    ),
    "restore all": (
        lambda: {"restore": {"path": "x", "mode": "all"}},
        "RestoreCheckpointConfig.mode is 'all'; it must be one of 'specific', 'latest'",
    ),
    "restore many": (
        lambda: {"restore": {"path": ["x", "y"]}},
        "RestoreCheckpointConfig.path is ['x', 'y']; training starts from one checkpoint",
    ),
    "restore nothing": (
        lambda: {"restore": {"path": "/nowhere"}},
        "utils.RestoreCheckpointConfig.path is '/nowhere': /nowhere doesn't exist; give a folder",
    ),
    "restore empty": (
        lambda: {"restore": {"path": os.path.dirname(__file__)}},
        "holds no checkpoint: neither is it one, nor has it a folder checkpoint_<step>",
    ),
    "split": (
        lambda: {"train_dataset_cfg": micro.dataset_config("test")},
        "has no split 'test'",
    ),
    "optimizer": (
        lambda: {"model": _without_optimizer()},
        "The model has no optimizer_def",
    ),
    "data": (
        lambda: {"get_dataset_fn": _broken_data},
        "No such folder: /data/books",
    ),
}


def _without_optimizer():
    model = micro.Model()
    model.optimizer_def = None
    return model


def _broken_data(cfg, *args):
    def batches():
        raise FileNotFoundError("No such folder: /data/books")

    names = ("decoder_input_tokens", "decoder_target_tokens", "decoder_loss_weights")
    spec = tf.TensorSpec((8, micro.LENGTH), tf.int32)
    return tf.data.Dataset.from_generator(batches, output_signature=dict.fromkeys(names, spec))


@pytest.mark.parametrize("name", ERRORS)
def test_bad_input_ends_the_run_before_it_compiles_or_writes(tmp_path, monkeypatch, name):
    overrides, message = ERRORS[name]

    def compiled(*args):
        raise AssertionError("compiled before the error")

    monkeypatch.setattr(utils.TrainStateInitializer, "from_scratch", compiled)
    with pytest.raises((ValueError, tf.errors.OpError), match=re.escape(message)):
        micro.run(tmp_path / "run", 4, **overrides())
    assert not (tmp_path / "run").exists()


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    message = "jax.process_count() is 2, but the embedded host runs as one process: set it to 1, or"
    with pytest.raises(ValueError, match=re.escape(message)):
        micro.run(tmp_path / "run", 4)


@pytest.mark.parametrize(
    ("model_dir", "message"),
    [
        ("", "model_dir is '', but it names no folder. Set the gin macro MODEL_DIR"),
        ("gs://bucket/run", "the embedded host writes to local folders only"),
        (__file__, "test_train.py is not a folder"),
        (os.path.join(__file__, "run"), "test_train.py is not a folder"),
    ],
)
def test_bad_model_dir_is_named(model_dir, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        micro.run(model_dir, 4)


def test_batch_that_does_not_divide_the_mesh(tmp_path):
    class Wide(micro.OneDevice):
        @property
        def data_mesh_size(self):
            return 3

    with pytest.raises(ValueError, match="batch of 8 examples .* 3 devices. Set BATCH_SIZE"):
        micro.run(tmp_path / "run", 4, partitioner=Wide())
    assert not (tmp_path / "run").exists()


def listing(folder):
    return {
        os.path.join(root, name): os.stat(os.path.join(root, name)).st_mtime_ns
        for root, _, names in os.walk(folder)
        for name in names
    }


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (lambda: {"model": micro.Model(width=4)}, "of another shape:"),
        (
            lambda: {"model": micro.Model(optimizers.OptaxWrapper(optax.adagrad(1e-2)))},
            "missing in the checkpoint:",
        ),
    ],
)
def test_model_dir_of_another_model_is_refused_untouched(tmp_path, whole, overrides, message):
    before = listing(whole[0])
    with pytest.raises(ValueError, match="another model or optimizer") as caught:
        micro.run(whole[0], 8, **overrides())
    assert message in str(caught.value) and str(whole[0]) in str(caught.value)
    assert listing(whole[0]) == before


def test_fewer_steps_than_done_is_refused(whole):
    with pytest.raises(ValueError, match="train.total_steps is 3, but .*checkpoint_6 is at step 6"):
        micro.run(whole[0], 3)


def test_missing_position_in_the_data_is_named(tmp_path):
    micro.run(tmp_path, 2, save={"save_dataset": False})
    with pytest.raises(ValueError, match="holds no position in the training data"):
        micro.run(tmp_path, 4)


def test_checkpoints_can_be_off(tmp_path):
    step, _ = micro.run(
        tmp_path, 2, checkpoint_cfg=utils.CheckpointConfig(), train_eval_dataset_cfg=None
    )
    assert step == 2 and checkpoints.all_steps(str(tmp_path)) == []


def test_errors_of_the_run_and_of_closing_both_show(tmp_path, monkeypatch):
    def close(self):
        raise RuntimeError("from close")

    monkeypatch.setattr(orbax.checkpoint.CheckpointManager, "close", close)
    with pytest.raises(RuntimeError, match="from close") as caught:
        micro.run(tmp_path, 4, trainer_cls=killing_trainer(1))
    assert isinstance(caught.value.__context__, Killed)


def start(model_dir, steps, out):
    return subprocess.Popen(
        [sys.executable, micro.__file__, str(model_dir), str(steps), str(out)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def wait_for(process, condition, seconds=180):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.0005)


@pytest.mark.slow
def test_sigkill_at_any_moment_then_bit_identical(tmp_path):
    steps = 60
    assert start(tmp_path / "whole", steps, tmp_path / "whole.npz").wait() == 0
    model_dir = tmp_path / "killed"

    def torn():
        return model_dir.is_dir() and any(
            "orbax-checkpoint-tmp" in x for x in os.listdir(model_dir)
        )

    def past(step):
        return lambda: (checkpoints.latest_step(str(model_dir)) or 0) >= step

    for condition in (torn, past(10), lambda: past(24)() and torn()):
        process = start(model_dir, steps, tmp_path / "out.npz")
        wait_for(process, condition)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "out.npz").exists()
    assert start(model_dir, steps, tmp_path / "out.npz").wait() == 0
    same(dict(np.load(tmp_path / "whole.npz")), dict(np.load(tmp_path / "out.npz")))
    assert not torn()
