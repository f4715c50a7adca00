"""T5X's own run files, unmodified, with the include after them: their first 20 steps."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_t5
from command_runs import environment, saved
from xla_flags import QUICK_COMPILE

from t5x_sparsity.core import packing

pytestmark = [tiny_t5.t5x_only, pytest.mark.slow]

# What a user without C4, WMT and their vocabulary at hand must set, and what makes a run short.
BYTES = """
from __gin__ import dynamic_registration
import seqio
import t5x_sparsity.tasks
VOCABULARY = @seqio.ByteVocabulary()
MIXTURE_OR_TASK_NAME = {task!r}
USE_CACHED_TASKS = False
TASK_FEATURE_LENGTHS = {{'inputs': 16, 'targets': 16}}
BATCH_SIZE = {batch}
DROPOUT_RATE = 0.0
MASK_UPDATE_PERIOD = 5
"""

# some examples name their batches' size twice
SMALL_BATCHES = """
from t5x import utils
train/utils.DatasetConfig.batch_size = %BATCH_SIZE
train_eval/utils.DatasetConfig.batch_size = %BATCH_SIZE
infer_eval/utils.DatasetConfig.batch_size = %BATCH_SIZE
"""

# of T5 1.1 tiny, for examples that are of base
TINY = """
from t5x.examples.t5 import network
network.T5Config:
  emb_dim = 8
  num_heads = 4
  num_encoder_layers = 2
  num_decoder_layers = 2
  head_dim = 3
  mlp_dim = 16
"""

# name -> T5X's files, what else must be set for it
RUNS = {
    "t5_1_1 tiny": (["examples/t5/t5_1_1/tiny", "configs/runs/pretrain"], ""),
    "t5_1_1 small": (["examples/t5/t5_1_1/small", "configs/runs/pretrain"], ""),
    "t5_1_1 base": (["examples/t5/t5_1_1/base", "configs/runs/pretrain"], ""),
    "scalable_t5 small": (["examples/scalable_t5/t5_1_1/small", "configs/runs/pretrain"], ""),
    "decoder_only base": (["examples/decoder_only/examples/base_wmt_from_scratch"], SMALL_BATCHES),
}


def train(
    tmp_path,
    files,
    model_dir,
    steps,
    more="",
    sparse=("rigl",),
    batch=2,
    large=False,
    module="t5x.train",
):
    """Trains by the command that T5X's docs give; what it said."""
    # T5X's examples import it to register WMT's tasks; the package is a large one
    mixtures = tmp_path / "packages/t5/data/mixtures.py"
    mixtures.parent.mkdir(parents=True, exist_ok=True)
    for path in (mixtures, mixtures.parent / "__init__.py", mixtures.parent.parent / "__init__.py"):
        path.write_text("")
    overrides = tmp_path / "overrides.gin"
    overrides.write_text(BYTES.format(task="stdlib_prefix_lm", batch=batch) + more)
    names = [f"t5x/{f}.gin" for f in files] + [str(overrides)]
    names += [f"sparsity/{name}.gin" for name in sparse]
    # of millions of weights, running is more than compiling
    variables = environment(1, "" if large else QUICK_COMPILE)
    variables["PYTHONPATH"] = f"{tmp_path / 'packages'}:{variables['PYTHONPATH']}"
    done = subprocess.run(
        [
            sys.executable,
            *("-m", *module.split()),
            *(f"--gin_file={name}" for name in names),
            f"--gin.MODEL_DIR='{model_dir}'",
            f"--gin.TRAIN_STEPS={steps}",
        ],
        # gin finds no file in T5X's folders that are not packages, unless it is there
        cwd=Path(importlib.util.find_spec("t5x").origin).parents[1],
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def assert_sparse(output, level=0.8):
    """The closing report has reached the level in each weight, and a finite loss."""
    table = output[output.index("Sparsity at the end of the run") :]
    rows = re.findall(r"^(\S+) +\S* +([\d,]+) +([\d,]+) +([\d.]+)% +([\d.]+)%", table, re.M)
    for _, size, kept, target, reached in rows[:-1]:
        size, kept = int(size.replace(",", "")), int(kept.replace(",", ""))
        # one weight in each of the stacked layers
        assert abs(kept - size * (1 - float(target) / 100)) <= 12 + 1e-6 * size
        assert abs(float(target) - float(reached)) < 2
    total = re.search(r"^total .* ([\d.]+)% +([\d.]+)%$", table, re.M)
    assert abs(float(total[2]) - 100 * level) < 0.1
    loss = re.search(r"Validation loss of \S+: ([\d.]+) nats", table)
    # where LOSS_NORMALIZING_FACTOR is set, T5X divides the loss by it
    assert 0 <= float(loss[1]) < 20
    return len(rows)


# Base models take most of ten minutes each to compile on two cores: they run when asked for.
CHOSEN = [name for name in RUNS if "base" not in name or os.environ.get("T5X_SPARSITY_TEST_BASE")]


@pytest.mark.parametrize("name", CHOSEN)
def test_a_run_file_trains_sparse(tmp_path, name):
    files, more = RUNS[name]
    output = train(tmp_path, files, tmp_path / "run", 20, more, large="tiny" not in name)
    assert assert_sparse(output) > 10
    assert (tmp_path / "run/checkpoint_20").is_dir()


@pytest.mark.parametrize("module", ["t5x.train", "t5x.main --run_mode=train", "t5x_sparsity.train"])
def test_every_way_to_start_t5x_trains_sparse(tmp_path, module):
    files, more = RUNS["t5_1_1 tiny"]
    output = train(tmp_path, files, tmp_path / "run", 4, more, module=module)
    assert assert_sparse(output) > 10


def test_the_wmt_finetune_example_starts_from_a_dense_checkpoint(tmp_path):
    files, _ = RUNS["t5_1_1 tiny"]
    train(tmp_path, files, tmp_path / "dense", 4, sparse=())
    more = f"{TINY}{SMALL_BATCHES}\nINITIAL_CHECKPOINT_PATH = '{tmp_path}/dense/checkpoint_4'\n"
    files = ["examples/t5/t5_1_1/examples/base_wmt14enfr_finetune"]
    output = train(
        tmp_path, files, tmp_path / "run", 24, more, sparse=("rigl", "from_dense"), batch=2
    )
    assert assert_sparse(output) > 10
    before, after = saved(tmp_path / "dense", 4), saved(tmp_path / "run", 24)
    start = saved(tmp_path / "run", 4)
    assert int(after["state/step"]) == 24
    prefix, moved = "state/sparsity/masks/", 0
    for name in [k for k in after if k.startswith(prefix)]:
        weight = before[f"target/{name[len(prefix) :]}"]
        first = np.asarray(packing.unpack(start[name], weight.shape))
        last = np.asarray(packing.unpack(after[name], weight.shape))
        # it starts with the largest of the dense run's weights, and moves on
        np.testing.assert_array_equal(
            start[f"target/{name[len(prefix) :]}"], np.where(first, weight, 0)
        )
        assert np.abs(weight[first]).min() >= np.abs(weight[~first]).max()
        assert (after[f"target/{name[len(prefix) :]}"][~last] == 0).all()
        moved += (first != last).sum()
    assert moved
