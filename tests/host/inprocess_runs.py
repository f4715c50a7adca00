"""Whole runs of the host's own train(), in this process: a tiny stacked model, a few hundred ms."""

import functools
import time
from pathlib import Path

import numpy as np
import seqio
import tensorflow as tf
import tiny_t5

from t5x_sparsity import host
from t5x_sparsity.t5x import SparseTrainStateInitializer, from_dense, sparse_trainer

LENGTH, BATCH = tiny_t5.LENGTH, tiny_t5.BATCH


def _examples(split, shuffle_files, seed=None):
    del shuffle_files, seed
    rng = np.random.default_rng(0 if split == "train" else 1)
    data = rng.integers(3, tiny_t5.VOCAB, (96 if split == "train" else 16, LENGTH)).astype(np.int32)
    return tf.data.Dataset.from_tensor_slices({"targets": data})


@functools.cache
def task(features=("targets",)):
    """The name of a task of random tokens; it is registered at the first call."""
    name = "_".join(("random_tokens", *features))
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(_examples, splits=("train", "validation")),
        preprocessors=[seqio.map_over_dataset(lambda x: dict.fromkeys(features, x["targets"]))],
        output_features={f: seqio.Feature(seqio.ByteVocabulary(), add_eos=False) for f in features},
    )
    return name


def stacked(optimizer_def, names=("mlp",)):
    """A tiny model of stacked layers, wide enough for packed masks."""
    module = tiny_t5.Stacked(names, width=32, mlp_dim=64)
    return host.models.DecoderOnlyModel(module, seqio.ByteVocabulary(), optimizer_def)


def data(features=("targets",), split="train"):
    return host.utils.DatasetConfig(
        mixture_or_task_name=task(features),
        task_feature_lengths=dict.fromkeys(features, LENGTH),
        split=split,
        batch_size=BATCH,
        shuffle=False,
        seed=3,
        pack=False,
    )


def restore_dense(path, **kwargs):
    """What 'sparsity/from_dense.gin' binds."""
    return host.utils.RestoreCheckpointConfig(
        path=str(path),
        mode="specific",
        fallback_to_scratch=True,
        state_transformation_fns=[from_dense],
        **kwargs,
    )


def run(*args, **kwargs):
    """The leaves of the final state of `train`, by path."""
    return tiny_t5.leaves(train(*args, **kwargs)[1])


def train(
    model_dir,
    config,
    steps,
    *,
    optimizer="adamw",
    restore=None,
    save=None,
    mesh=(1, 1),
    build=stacked,
    partitioner=None,
    base=None,
    features=("targets",),
    trainer_arguments=None,
    **kwargs,
):
    """Trains up to `steps`, saving every 2; a config of None trains dense.

    Returns:
      The last step and the final state.
    """
    model_dir = str(model_dir)
    checkpoint_cfg = host.utils.CheckpointConfig(
        save=host.utils.SaveCheckpointConfig(
            **{"period": 2, "save_dataset": True, "keep": None, **(save or {})}
        ),
        restore=restore or host.utils.RestoreCheckpointConfig(path=[]),
    )
    settings = {
        "learning_rate_fn": lambda step: 1e-2,
        "num_microbatches": None,
        **(trainer_arguments or {}),
    }
    base = base or host.Trainer
    arguments = {"trainer_cls": functools.partial(base, **settings)}
    if config is not None:
        arguments = {
            "trainer_cls": functools.partial(sparse_trainer, base, **settings),
            "train_state_initializer_cls": functools.partial(
                SparseTrainStateInitializer,
                config=config,
                model_dir=model_dir,
                checkpoint_cfg=checkpoint_cfg,
            ),
        }
    defaults = {
        "eval_steps": 1,
        "eval_period": 2,
        "random_seed": 0,
        "summarize_config_fn": lambda model_dir, writer, step: None,
    }
    end = host.train_lib.train(
        model=build(tiny_t5.OPTIMIZERS[optimizer]() if isinstance(optimizer, str) else optimizer()),
        train_dataset_cfg=data(features),
        train_eval_dataset_cfg=None,
        infer_eval_dataset_cfg=None,
        checkpoint_cfg=checkpoint_cfg,
        partitioner=partitioner or tiny_t5.MeshPartitioner(*mesh),
        model_dir=model_dir,
        total_steps=steps,
        **{**defaults, **arguments, **kwargs},
    )
    # T5X doesn't wait for the save before the first step where there is no step to take
    deadline = time.monotonic() + 60
    while list(Path(model_dir).glob("*-tmp*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    return end


def assert_same(a, b):
    """Asserts that leaves by path are the same, dtypes included."""
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype, path
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)
