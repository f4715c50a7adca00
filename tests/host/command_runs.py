"""Whole runs by the command a user gives, in one process or several."""

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from forked_commands import run_module
from xla_flags import QUICK_COMPILE

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
    """Writes a run file and the texts that it trains on; returns its path."""
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


def flags(run_file, model_dir, *bindings, steps=8):
    """The flags of a command that trains up to `steps`."""
    return [
        f"--gin_file={run_file}",
        f"--gin.MODEL_DIR='{model_dir}'",
        f"--gin.TRAIN_STEPS={steps}",
        *(f"--gin.{b}" for b in bindings),
    ]


def command(*arguments, module="t5x_sparsity.train", **kwargs):
    """The command line of `flags`."""
    return [sys.executable, "-m", module, *flags(*arguments, **kwargs)]


def environment(devices=1, more_flags=""):
    """The environment of a process with so many CPU devices, which imports this package."""
    path = [str(ROOT), str(ROOT / "gin"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in path if p),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {more_flags}".strip(),
        "JAX_PLATFORMS": "cpu",
    }


def run(*arguments, devices=1, module="t5x_sparsity.train", **kwargs):
    """The finished process of `command`; its stdout has both streams."""
    env = environment(devices, QUICK_COMPILE)
    return run_module(module, flags(*arguments, **kwargs), env, merged=True)


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
    """Asserts that leaves by path are the same bit for bit, and those of a sparse run."""
    assert a.keys() == b.keys() and any("sparsity/masks" in k for k in a)
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


def newest(model_dir):
    """The last step that a checkpoint is complete for, or None."""
    names = [p.name for p in Path(model_dir).glob("checkpoint_*")] if model_dir.exists() else []
    steps = [int(m[1]) for n in names if (m := re.fullmatch(r"checkpoint_(\d+)", n))]
    return max(steps, default=None)


class Process(NamedTuple):
    """One process of a run, in a group of its own."""

    popen: subprocess.Popen
    log: Path

    def kill(self):
        if self.popen.poll() is None:
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()

    def output(self):
        return self.log.read_text(errors="replace")


def start(arguments, log, devices=1):
    """Starts a process of Python; what it says goes to the file `log`."""
    with open(log, "w") as out:
        popen = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            env=environment(devices, QUICK_COMPILE),
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Process(popen, log)


def start_processes(arguments, folder, count=2, devices=2):
    """Starts processes that belong together; arguments(index, port) are those of each."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    return [start(arguments(i, port), folder / f"process_{i}.log", devices) for i in range(count)]


def finish(processes, timeout=300):
    """Waits for processes to end well; what they said."""
    deadline = time.monotonic() + timeout
    try:
        for p in processes:
            assert p.popen.wait(max(deadline - time.monotonic(), 0.1)) == 0, p.output()[-4000:]
    finally:
        for p in processes:
            p.kill()
    return [p.output() for p in processes]


def start_run(run_file, model_dir, *bindings, count=2, devices=2, **kwargs):
    """Starts a training of several processes, which join as T5X's own flags say."""
    single = command(run_file, model_dir, *bindings, **kwargs)[1:]

    def arguments(index, port):
        return [
            *single,
            "--multiprocess_gpu",
            f"--coordinator_address=localhost:{port}",
            f"--process_count={count}",
            f"--process_index={index}",
        ]

    return start_processes(arguments, Path(run_file).parent, count, devices)
