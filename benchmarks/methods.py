"""Trains every method on the standard library's text and prints the README's table.

    python benchmarks/methods.py --sparsity=0.9 --steps=5000 --seeds=3

Each run is a process of its own, `python -m t5x_sparsity.train` with the method's gin file. A seed
sets the weights, the order of the data and the masks. Results are kept in --out, a JSON file, and a
run that is in it already is not run again.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from absl import app, flags
from tabulate import tabulate

METHODS = ("dense", "magnitude", "rigl", "set", "static")
MOVING = ("magnitude", "rigl", "set")

_SPARSITY = flags.DEFINE_float("sparsity", 0.9, "Sparsity of all methods but dense.")
_STEPS = flags.DEFINE_integer("steps", 5000, "Train steps of a run.")
_PERIOD = flags.DEFINE_integer("period", 100, "Steps from one mask update to the next.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Seeds a method.")
_METHODS = flags.DEFINE_list("methods", list(METHODS), "Gin files of gin/sparsity to run.")
_OUT = flags.DEFINE_string("out", "runs/methods.json", "Results, read and written.")


def validation_loss(model_dir: Path) -> float:
    """The last evaluation's cross entropy, nats a byte, from the run's TensorBoard events."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(model_dir / "training_eval" / "stdlib_lm"))
    events.Reload()
    return float(
        make_ndarray(events.Tensors("cross_ent_loss_per_all_target_tokens")[-1].tensor_proto)
    )


def train(method: str, seed: int) -> float:
    """One run; returns its validation loss."""
    with tempfile.TemporaryDirectory() as folder:
        gin = {
            "TRAIN_STEPS": _STEPS.value,
            "MODEL_DIR": f"'{folder}'",
            "RANDOM_SEED": seed,
            "DATA_SEED": seed,
            "t5x_sparsity.SparsityConfig.seed": seed,
        }
        if method != "dense":
            gin["SPARSITY"] = _SPARSITY.value
        if method in MOVING:
            gin["MASK_UPDATE_PERIOD"] = _PERIOD.value
        command = [
            sys.executable,
            "-m",
            "t5x_sparsity.train",
            f"--gin_file={Path(__file__).parent / 'stdlib.gin'}",
            f"--gin_file=sparsity/{method}.gin",
            *(f"--gin.{name}={value}" for name, value in gin.items()),
        ]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-4000:]}")
        return validation_loss(Path(folder))


def table(results: dict[str, float]) -> str:
    """Mean and spread over the seeds, best first."""
    rows = []
    for method in _METHODS.value:
        losses = [results[k] for s in range(_SEEDS.value) if (k := key(method, s)) in results]
        if losses:
            spread = statistics.stdev(losses) if len(losses) > 1 else float("nan")
            rows.append((method, statistics.mean(losses), spread, len(losses)))
    rows.sort(key=lambda r: r[1])
    return tabulate(
        rows,
        headers=("method", "validation loss (nats a byte)", "standard deviation", "seeds"),
        floatfmt=("", ".4f", ".4f", "d"),
        tablefmt="github",
    )


def key(method: str, seed: int) -> str:
    level = 0 if method == "dense" else _SPARSITY.value
    return f"{method} sparsity={level} steps={_STEPS.value} period={_PERIOD.value} seed={seed}"


def main(_) -> None:
    out = Path(_OUT.value)
    results = json.loads(out.read_text()) if out.exists() else {}
    for seed in range(_SEEDS.value):
        for method in _METHODS.value:
            if key(method, seed) not in results:
                results[key(method, seed)] = train(method, seed)
                out.parent.mkdir(parents=True, exist_ok=True)
                partial = out.with_suffix(".tmp")
                partial.write_text(json.dumps(results, indent=1))
                os.replace(partial, out)
                print(f"{key(method, seed)}: {results[key(method, seed)]:.4f}", flush=True)
    print(table(results))


if __name__ == "__main__":
    app.run(main)
