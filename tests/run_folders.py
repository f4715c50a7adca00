"""Folders of runs as training leaves them, with all metrics, made without any training."""

import json
import math

import numpy as np
from clu import metric_writers

TASK = "made_task"
PARTS = (
    ("mlp/wi_0/kernel", (64, 128)),
    ("mlp/wi_1/kernel", (64, 128)),
    ("mlp/wo/kernel", (128, 64)),
    ("self_attention/query/kernel", (64, 64)),
    ("self_attention/out/kernel", (64, 64)),
)

CONFIG = """\
import t5x_sparsity

# Macros:
# ==============================================================================
BATCH_SIZE = 8
MODEL_DIR = '{folder}'
SPARSITY = {sparsity}
SPARSITY_DISTRIBUTION = 'erk'
TRAIN_STEPS = {steps}

# Parameters for t5x_sparsity.SparsityConfig:
# ==============================================================================
t5x_sparsity.SparsityConfig.algorithm = @t5x_sparsity.{method}()
t5x_sparsity.SparsityConfig.distribution = %SPARSITY_DISTRIBUTION
t5x_sparsity.SparsityConfig.sparsity = %SPARSITY
"""


def make_run(
    folder,
    *,
    method="RigL",
    sparsity=0.8,
    ramp=False,
    layers=2,
    steps=800,
    period=10,
    image_steps=3,
    seed=0,
    level=1.8,
):
    """A run that has ended; method None is a dense one. `level`: about where the loss ends."""
    rng = np.random.default_rng(seed)
    shapes = {f"decoder/layers_{i}/{p}": s for i in range(layers) for p, s in PARTS}
    at = np.arange(period, steps + 1, period)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.gin").write_text(
        CONFIG.format(folder=folder, sparsity=sparsity, steps=steps, method=method)
    )
    size = sum(math.prod(s) for s in shapes.values())
    (folder / "model-info.txt").write_text(f"Weights in all: {size + 10_000}\n\ntarget/...\n")
    train = metric_writers.SummaryWriter(str(folder / "train"))
    for step in at:
        loss = level + 3 * math.exp(-step / steps * 6) + rng.normal() * 0.08
        scalars = {"loss_per_nonpadding_target_token": loss, "learning_rate": 1 / step}
        train.write_scalars(int(step), scalars)
    final = {p: min(0.99, sparsity + rng.uniform(-0.04, 0.04)) for p in shapes}
    if method:
        _write_record(folder, shapes, final, method)
        for step in at:
            train.write_scalars(int(step), _scalars(step / steps, shapes, final, ramp, rng))
        for step in np.linspace(0, steps, image_steps).astype(int):
            _write_masks(train, int(step), dict(list(shapes.items())[:12]), sparsity, rng)
    train.close()
    evals = metric_writers.SummaryWriter(str(folder / "training_eval" / TASK))
    for step in range(steps // 8, steps + 1, steps // 8):
        loss = level + 0.1 + 3 * math.exp(-step / steps * 6)
        evals.write_scalars(step, {"loss_per_nonpadding_target_token": loss})
    evals.close()
    return folder


def _write_record(folder, shapes, final, method):
    record = {
        p: {
            "shape": list(shape),
            "sparsity": final[p],
            "kept": round(math.prod(shape) * (1 - final[p])),
            "pattern": "Unstructured()",
            "algorithm": method,
            "start_step": 0,
            "axes": ["embed", "mlp"],
            "stack_axes": [],
        }
        for p, shape in shapes.items()
    }
    (folder / "sparsity.json").write_text(json.dumps(record))


def _scalars(share, shapes, final, ramp, rng):
    """What a period of statistics has; share: of the run that is over."""
    level = 1 - (1 - min(1.0, share / 0.75)) ** 3 if ramp else 1.0
    found, sizes = {}, {p: math.prod(s) for p, s in shapes.items()}
    for path, size in sizes.items():
        churn = max(0.0, 0.3 * math.cos(math.pi / 2 * min(share / 0.75, 1)) + rng.normal() * 0.01)
        kept = size * (1 - final[path] * level)
        found[f"sparsity_target/{path}"] = final[path] * level
        found[f"sparsity/{path}"] = 1 - round(kept) / size
        found[f"mask_churn/{path}"] = churn * rng.uniform(0.8, 1.2)
        found[f"mask_grown/{path}"] = found[f"mask_dropped/{path}"] = round(churn * kept)
    total = sum(sizes.values())
    for name in ("sparsity_target", "sparsity", "mask_churn"):
        found[f"{name}/total"] = sum(found[f"{name}/{p}"] * n for p, n in sizes.items()) / total
    for name in ("mask_grown", "mask_dropped"):
        found[f"{name}/total"] = sum(found[f"{name}/{p}"] for p in sizes)
    found["mask_explored/total"] = min(1.0, 1 - found["sparsity/total"] + 0.5 * share)
    left = 1 - 0.7 * found["sparsity/total"]
    found |= {
        "flops/training": 1e15 * share * left,
        "flops/training_dense": 1e15 * share,
        "flops/training_share": left,
        "flops/inference": 1e9 * left,
        "flops/inference_dense": 1e9,
        "flops/inference_share": left,
    }
    return {k: float(v) for k, v in found.items()}


def _write_masks(writer, step, shapes, sparsity, rng):
    masks = {p: rng.random(s) > sparsity for p, s in shapes.items()}
    images = {f"masks/{p}": np.uint8(255 * m)[None, :, :, None] for p, m in masks.items()}
    writer.write_images(step, images)
    fan_in = {f"mask_fan_in/{p}": m.sum(0).astype(np.float32) for p, m in masks.items()}
    writer.write_histograms(step, fan_in)
