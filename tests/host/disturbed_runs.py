"""Runs that something happens to: batches of their own, and metrics at every step."""

import inprocess_runs
import numpy as np
import tensorflow as tf
import tiny_t5

from t5x_sparsity import host

STEPS = 8


def batches(nan_at=()):
    """Batch by batch, those of a run; where it is asked for, one has a NaN loss."""
    count = STEPS + 4
    tokens = [tiny_t5.batch(i) for i in range(count)]
    data = {k: np.stack([b[k] for b in tokens]) for k in tiny_t5.FEATURES[1:3]}
    weights = np.ones((count, tiny_t5.BATCH, tiny_t5.LENGTH), np.float32)
    weights[list(nan_at)] = np.nan
    return {**data, tiny_t5.FEATURES[3]: weights}


def train(model_dir, steps=STEPS, *, base=host.Trainer, nan_at=(), **kwargs):
    """(last step, train state) of a sparse run."""
    data = tf.data.Dataset.from_tensor_slices(batches(nan_at))
    return inprocess_runs.train(
        model_dir,
        tiny_t5.rigl(begin=0, period=3, end=20),
        steps,
        base=base,
        build=tiny_t5.stacked_model,
        get_dataset_fn=lambda *arguments: data,
        verify_matching_vocabs_fn=None,
        eval_period=0,
        stats_period=1,
        concurrent_metrics=host.NAME == "embedded",
        **kwargs,
    )
