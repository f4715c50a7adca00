"""A run that is killed again and again ends as one that was not."""

import os
import random
import re
import time

import command_runs
import pytest

from t5x_sparsity import host

# how often the run is killed; T5X_SPARSITY_KILLS=20 for a thorough run
KILLS = int(os.environ.get("T5X_SPARSITY_KILLS", "2"))

# T5X trains in two processes; the embedded host is one
COUNT, DEVICES = (2, 2) if host.NAME == "t5x" else (1, 1)

# no evaluation, all weights split among processes, and a line in the log for every step
RUN = """
train_script.train.train_eval_dataset_cfg = None
train_script.train.stats_period = 1
host.partitioning.standard_logical_axis_rules.parameter_partitioning_dims = 2
"""

# a checkpoint every second step, a mask update every third
BINDINGS = (
    "CHECKPOINT_PERIOD=2",
    "EVAL_PERIOD=2",
    "MASK_UPDATE_PERIOD=3",
    "MASK_UPDATE_END=1.0",
)

AIMS = ("any moment", "a write", "a mask update", "the start")
VICTIMS = ("both", "both", "the second", "the first")


@pytest.mark.slow
def test_killed_at_any_moment_it_resumes_exactly(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    file = command_runs.write_run(tmp_path, more=RUN)
    # a kill comes after at most three checkpoints
    steps = 6 * KILLS + 4

    def start(model_dir):
        if COUNT > 1:
            return command_runs.start_run(file, model_dir, *BINDINGS, steps=steps)
        arguments = command_runs.command(file, model_dir, *BINDINGS, steps=steps)[1:]
        return [command_runs.start(arguments, tmp_path / "process_0.log")]

    command_runs.finish(start(tmp_path / "whole"), timeout=1200)
    rng = random.Random(1)
    killed = tmp_path / "killed"
    for i in range(KILLS):
        processes = start(killed)
        # the first is aimed at nothing, so that there is something to resume from
        aim, victims = AIMS[i % len(AIMS)], VICTIMS[i // len(AIMS) % len(VICTIMS)]
        begun = command_runs.newest(killed)
        wait_for(aim, processes, killed, rng)
        assert all(p.popen.poll() is None for p in processes), processes[0].output()[-4000:]
        chosen = {"the second": processes[1:], "the first": processes[:1]}.get(victims, processes)
        for p in chosen or processes:
            p.kill()
        at, torn = command_runs.newest(killed), bool(torn_folders(killed))
        fell = others_fall(processes)
        print(f"kill {i + 1}: {aim}, {victims}, from {begun} to {at}, torn: {torn}, others: {fell}")
        assert at is None or at < steps, "the run ended before it could be killed"
    command_runs.finish(start(killed), timeout=1200)
    command_runs.assert_equal(
        command_runs.saved(tmp_path / "whole", steps), command_runs.saved(killed, steps)
    )
    assert not torn_folders(killed)


def wait_for(aim, processes, model_dir, rng):
    """Waits for the moment of a kill, not before the run has gone on."""
    log, deadline = processes[0].log, time.monotonic() + 300

    def until(condition):
        while not condition() and all(p.popen.poll() is None for p in processes):
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.005)

    if aim == "the start":
        before, end = command_runs.newest(model_dir), time.monotonic() + rng.uniform(1, 20)
        until(lambda: time.monotonic() > end or command_runs.newest(model_dir) != before)
        return
    for _ in range(rng.randint(1, 2)):
        before, tick = command_runs.newest(model_dir), time.monotonic()
        # T5X saves step 0 with the first batch read already, and resumes from there without it
        until(lambda before=before: command_runs.newest(model_dir) not in (None, 0, before))
        period = time.monotonic() - tick
    if aim == "any moment":
        time.sleep(rng.uniform(0, min(period, 2)))
    elif aim == "a write":
        until(lambda: torn_folders(model_dir))
        time.sleep(rng.uniform(0, 0.2))
    else:
        # a line says how many steps have been taken: after 6, step 6 is under way
        seen = len(log.read_text())
        until(lambda: any(int(n) % 3 == 0 for n in steps_in(log.read_text()[seen:])))


def steps_in(text):
    return re.findall(r"\[(\d+)\] collection=train ", text)


def torn_folders(model_dir):
    """Checkpoints that are being written, or were when the run was killed."""
    return list(model_dir.glob("*orbax-checkpoint-tmp*")) if model_dir.exists() else []


def others_fall(processes, patience=30):
    """How those that were not killed end: by themselves, or killed when patience is over."""
    alive = [p for p in processes if p.popen.poll() is None]
    if not alive:
        return "none"
    begun = time.monotonic()
    while any(p.popen.poll() is None for p in alive) and time.monotonic() < begun + patience:
        time.sleep(0.05)
    hung = any(p.popen.poll() is None for p in alive)
    for p in alive:
        p.kill()
    return "hung" if hung else f"failed in {time.monotonic() - begun:.0f} s"
