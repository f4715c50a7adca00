"""Whole runs by the command a user gives, on the host in use."""

import re

import numpy as np
import pytest
from command_runs import ROOT, assert_equal, environment, flags, run, saved, write_run
from forked_commands import run_module

from t5x_sparsity import host

MASKS = "MASK_UPDATE_PERIOD=3"


@pytest.mark.slow
def test_a_run_trains_reports_and_resumes_exactly(tmp_path):
    file = write_run(tmp_path)
    whole = run(file, tmp_path / "whole", MASKS, steps=8)
    assert whole.returncode == 0, whole.stdout[-3000:]
    assert "see it by: t5x-sparsity report" in whole.stdout
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
def test_bad_model_dirs_are_one_error_each(tmp_path):
    dense, sparse = write_run(tmp_path, "dense"), write_run(tmp_path, "rigl")
    assert run(dense, tmp_path / "dense", steps=4).returncode == 0
    before = sorted(p.name for p in (tmp_path / "dense").iterdir())
    failed = run(sparse, tmp_path / "dense", MASKS, steps=8)
    assert failed.returncode != 0
    assert "has no masks: a dense run made it" in failed.stdout
    other = write_run(tmp_path, "dense", model="t5_1_1_tiny")
    failed = run(other, tmp_path / "dense", steps=8)
    assert failed.returncode != 0
    if host.NAME == "embedded":  # T5X's own error is another
        assert "was written by another model" in failed.stdout
        assert sorted(p.name for p in (tmp_path / "dense").iterdir()) == before


def test_a_missing_data_folder_is_one_error_and_writes_nothing(tmp_path):
    file = write_run(tmp_path)
    failed = run(file, tmp_path / "run", "tasks.text_folder.path='/no/such/folder'")
    assert failed.returncode != 0
    assert "/no/such/folder" in failed.stdout and "text_folder.path" in failed.stdout
    assert not list(tmp_path.glob("run/checkpoint_*"))


def test_a_host_that_is_not_there_is_one_error(tmp_path):
    file = write_run(tmp_path)
    arguments = [*flags(file, tmp_path / "run"), "--host=elsewhere"]
    bad = run_module("t5x_sparsity.train", arguments, environment())
    assert bad.returncode != 0
    assert "must be 'auto', 't5x' or 'embedded', got 'elsewhere'" in bad.stderr
