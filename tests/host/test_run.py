"""Whole runs by the command a user gives, on the host in use."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from t5x_sparsity import host

ROOT = Path(__file__).resolve().parents[2]

# A run that takes seconds: what it has in common with examples/rigl_stdlib.gin is the whole path.
RUN = """
from __gin__ import dynamic_registration
import __main__ as train_script
from t5x_sparsity import host
from t5x_sparsity import tasks
include 'sparsity/embedded/{model}.gin'
include 'sparsity/embedded/pretrain.gin'
include 'sparsity/{method}.gin'
{config}:
  emb_dim = 64
  mlp_dim = 64
  head_dim = 16
{layers}
MIXTURE_OR_TASK_NAME = {task}
TASK_FEATURE_LENGTHS = {lengths}
BATCH_SIZE = 8
EVAL_STEPS = 2
EVAL_PERIOD = 4
CHECKPOINT_PERIOD = 4
KEEP_CHECKPOINTS = 2
WARMUP_STEPS = 10
train_script.train.stats_period = 2
tasks.text_folder.path = {folder}
tasks.text_folder.objective = {objective}
"""


def write_run(tmp_path, method="rigl", model="decoder_tiny", more=""):
    texts = tmp_path / "texts"
    texts.mkdir(exist_ok=True)
    rng = random.Random(0)
    words = "the quick brown fox jumps over a lazy dog while small bytes learn to speak".split()
    for i in range(60):
        (texts / f"{i}.txt").write_text(" ".join(rng.choice(words) for _ in range(400)))
    decoder = model.startswith("decoder")
    text = RUN.format(
        model=model,
        method=method,
        config="host.decoder_only.TransformerConfig" if decoder else "host.network.T5Config",
        layers="  num_layers = 1"
        if decoder
        else "  num_encoder_layers = 1\n  num_decoder_layers = 1",
        task="@tasks.text_folder()",
        lengths={"targets": 32} if decoder else {"inputs": 16, "targets": 16},
        folder=repr(str(texts)),
        objective=repr("lm" if decoder else "prefix_lm"),
    )
    path = tmp_path / f"{method}_{model}.gin"
    path.write_text(text + more)
    return path


def command(run_file, model_dir, *bindings, steps=8):
    return [
        sys.executable,
        "-m",
        "t5x_sparsity.train",
        f"--gin_file={run_file}",
        f"--gin.MODEL_DIR='{model_dir}'",
        f"--gin.TRAIN_STEPS={steps}",
        *(f"--gin.{b}" for b in bindings),
    ]


def environment(devices=1):
    path = [str(ROOT), str(ROOT / "gin"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in path if p),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
    }


def run(*arguments, devices=1, **kwargs):
    return subprocess.run(
        command(*arguments, **kwargs),
        env=environment(devices),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )


def saved(model_dir, step):
    """The arrays of a checkpoint, whichever host wrote it."""
    import orbax.checkpoint as ocp
    from flax import traverse_util

    folder = Path(model_dir) / f"checkpoint_{step}" / "state"
    handler = ocp.PyTreeCheckpointHandler()
    tree = handler.metadata(folder)
    tree = getattr(tree, "tree", tree)
    arguments = {
        k: ocp.RestoreArgs(restore_type=np.ndarray)
        for k in traverse_util.flatten_dict(dict(tree), sep="/")
    }
    restored = handler.restore(
        folder,
        args=ocp.args.PyTreeRestore(
            restore_args=traverse_util.unflatten_dict(arguments, sep="/"),
        ),
    )
    return {k: np.asarray(v) for k, v in traverse_util.flatten_dict(restored, sep="/").items()}


def assert_equal(a, b):
    assert a.keys() == b.keys() and any("sparsity/masks" in k for k in a)
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


MASKS = "MASK_UPDATE_PERIOD=3"


def test_a_run_trains_reports_and_resumes_exactly(tmp_path):
    file = write_run(tmp_path)
    whole = run(file, tmp_path / "whole", MASKS, steps=8)
    assert whole.returncode == 0, whole.stdout[-3000:]
    first = next(line for line in whole.stdout.splitlines() if "Host: " in line)
    assert ("T5X at" if host.NAME == "t5x" else "embedded host") in first
    table = whole.stdout[whole.stdout.index("Sparsity at the end of the run") :]
    rows = re.findall(r"^(\S+/kernel) +\S+ +([\d,]+) +([\d,]+) +([\d.]+)% +", table, re.M)
    assert len(rows) == 7
    for _, size, kept, target in rows:
        size, kept = int(size.replace(",", "")), int(kept.replace(",", ""))
        assert abs(kept - size * (1 - float(target) / 100)) <= 1
    assert re.search(r"Validation loss of \S+: \d", table)

    parts = run(file, tmp_path / "parts", MASKS, "MASK_UPDATE_END=6", steps=4)
    assert parts.returncode == 0, parts.stdout[-3000:]
    parts = run(file, tmp_path / "parts", MASKS, steps=8)
    assert parts.returncode == 0, parts.stdout[-3000:]
    assert_equal(saved(tmp_path / "whole", 8), saved(tmp_path / "parts", 8))
    # a checkpoint of pruned weights, with masks of an eighth of a byte a weight
    leaves = saved(tmp_path / "whole", 8)
    weight = leaves["target/decoder/layers_0/mlp/wi_0/kernel"]
    mask = leaves["state/sparsity/masks/decoder/layers_0/mlp/wi_0/kernel"]
    assert mask.dtype == np.uint8 and mask.nbytes * 8 == weight.size
    kept = int(np.unpackbits(mask).sum())
    assert np.count_nonzero(weight) <= kept


@pytest.mark.slow
def test_dense_weights_under_a_mask_resume_exactly(tmp_path):
    file = write_run(tmp_path, "magnitude_ste")
    whole = run(file, tmp_path / "whole", MASKS, steps=8, devices=2)
    assert whole.returncode == 0, whole.stdout[-3000:]
    for steps in (4, 8):
        parts = run(file, tmp_path / "parts", MASKS, "MASK_UPDATE_END=7", steps=steps, devices=2)
        assert parts.returncode == 0, parts.stdout[-3000:]
    leaves = saved(tmp_path / "whole", 8)
    assert_equal(leaves, saved(tmp_path / "parts", 8))
    path = "decoder/layers_0/mlp/wi_0/kernel"
    dense, weight = leaves[f"state/sparsity/dense/{path}"], leaves[f"target/{path}"]
    assert np.count_nonzero(dense) == dense.size
    np.testing.assert_array_equal(weight, np.where(weight != 0, dense, 0))
    assert abs(np.count_nonzero(weight) - 0.2 * weight.size) <= 1


@pytest.mark.slow
def test_the_combination_example_trains_each_weight_its_way(tmp_path):
    example = (ROOT / "examples/combined_stdlib.gin").read_text()
    rules = example[example.index("t5x_sparsity.SparsityConfig.rules") :]
    more = "import t5x_sparsity\nSPARSITY = 0.9\n" + rules[: rules.index("MODEL_DIR")]
    file = write_run(tmp_path, "rigl", more=more)
    done = run(file, tmp_path / "run", MASKS, "EVAL_PERIOD=8", "CHECKPOINT_PERIOD=8", steps=8)
    assert done.returncode == 0, done.stdout[-3000:]
    leaves = saved(tmp_path / "run", 8)
    levels = {}
    for path, weight in leaves.items():
        if path.startswith("target/") and f"state/sparsity/masks/{path[7:]}" in leaves:
            levels[path[7:]] = np.mean(weight == 0)
    kinds = {"mlp": 0.5, "attention": 0.9, "embedder": 1 - 0.1**0.5}
    assert len(levels) == 8
    for path, level in levels.items():
        expected = next(x for kind, x in kinds.items() if kind in path)
        assert level == pytest.approx(expected, abs=1e-3), path
    wi = leaves["target/decoder/layers_0/mlp/wi_0/kernel"]
    assert (np.count_nonzero(wi.reshape(-1, 4, wi.shape[-1]), axis=1) == 2).all()


@pytest.mark.slow
def test_killed_at_any_moment_it_resumes_exactly(tmp_path):
    file = write_run(tmp_path)
    steps = 40
    bindings = (MASKS, "CHECKPOINT_PERIOD=2", "EVAL_PERIOD=20")
    whole = run(file, tmp_path / "whole", *bindings, steps=steps)
    assert whole.returncode == 0, whole.stdout[-3000:]
    rng = random.Random(1)
    model_dir = tmp_path / "killed"
    for kill in range(2):
        process = subprocess.Popen(
            command(file, model_dir, *bindings, steps=steps),
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        # once it writes checkpoints again, any moment may be in the middle of one
        seen, deadline = newest(model_dir), time.monotonic() + 300
        while newest(model_dir) in (seen, None) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.6))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if (newest(model_dir) or 0) >= steps:
            assert kill, "the run ended before it could be killed"
            break
    done = run(file, model_dir, *bindings, steps=steps)
    assert done.returncode == 0, done.stdout[-3000:]
    assert_equal(saved(tmp_path / "whole", steps), saved(model_dir, steps))


def newest(model_dir):
    """The last step that a checkpoint is complete for, or None."""
    names = [p.name for p in Path(model_dir).glob("checkpoint_*")] if model_dir.exists() else []
    steps = [int(m[1]) for n in names if (m := re.fullmatch(r"checkpoint_(\d+)", n))]
    return max(steps, default=None)


@pytest.mark.slow
def test_bad_model_dirs_are_one_error_each(tmp_path):
    if host.NAME == "t5x":
        pytest.skip("T5X restores before the plugin is asked; see the README")
    dense, sparse = write_run(tmp_path, "dense"), write_run(tmp_path, "rigl")
    assert run(dense, tmp_path / "dense", steps=4).returncode == 0
    before = sorted(p.name for p in (tmp_path / "dense").iterdir())
    failed = run(sparse, tmp_path / "dense", MASKS, steps=8)
    assert failed.returncode != 0
    assert "holds no masks: it was written by a dense run" in failed.stdout
    other = write_run(tmp_path, "dense", model="t5_1_1_tiny")
    failed = run(other, tmp_path / "dense", steps=8)
    assert failed.returncode != 0 and "was written by another model" in failed.stdout
    assert sorted(p.name for p in (tmp_path / "dense").iterdir()) == before


def test_a_missing_data_folder_is_one_error_and_writes_nothing(tmp_path):
    file = write_run(tmp_path)
    failed = run(file, tmp_path / "run", "tasks.text_folder.path='/no/such/folder'")
    assert failed.returncode != 0
    assert "/no/such/folder" in failed.stdout and "text_folder.path" in failed.stdout
    assert not list(tmp_path.glob("run/checkpoint_*"))


def test_a_host_that_is_not_there_is_one_error(tmp_path):
    file = write_run(tmp_path)
    bad = subprocess.run(
        [*command(file, tmp_path / "run"), "--host=elsewhere"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert bad.returncode != 0
    assert "must be 'auto', 't5x' or 'embedded', got 'elsewhere'" in bad.stderr
