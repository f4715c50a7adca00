"""A model of a few hundred weights, and its data: the smallest run of the embedded host.

As a script: `micro_model.py MODEL_DIR TOTAL_STEPS [OUT.npz]` trains and writes the final state.
"""

import sys
from functools import cache

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import seqio
import tensorflow as tf
from clu import metrics as clu_metrics
from flax.linen import partitioning as nn_partitioning
from jax.sharding import Mesh

from t5x_sparsity.core.trees import flatten
from t5x_sparsity.embedded import metrics, optimizers, partitioning, trainer, utils
from t5x_sparsity.embedded.train import train

VOCABULARY = seqio.PassThroughVocabulary(32, eos_id=1)
LENGTH = 8
EXAMPLES = 96


class Module(nn.Module):
    """Next-token logits from the current token alone."""

    width: int = 8

    @nn.compact
    def __call__(self, tokens):
        init = nn.initializers.normal(0.5)
        table = nn_partitioning.param_with_axes(
            "table", init, (32, self.width), axes=("vocab", "embed")
        )
        kernel = nn_partitioning.param_with_axes(
            "kernel", init, (self.width, 32), axes=("embed", "vocab")
        )
        return jnp.tanh(table[tokens]) @ kernel


class OneDevice(partitioning.PjitPartitioner):
    """Uses the first device alone, however many there are."""

    def __init__(self):
        super().__init__(num_partitions=1)

    @property
    def mesh(self):
        return Mesh(np.asarray(jax.local_devices()[:1]).reshape(1, 1), ("data", "model"))


class Model:
    """T5X's model interface, no more."""

    FEATURE_CONVERTER_CLS = seqio.DecoderFeatureConverter
    input_vocabulary = output_vocabulary = VOCABULARY

    def __init__(self, optimizer_def=None, width=8):
        self.module = Module(width)
        self.optimizer_def = optimizer_def or optimizers.adam(1e-2)

    def get_initial_variables(self, rng, input_shapes, input_types=None):
        shape = input_shapes["decoder_input_tokens"]
        return self.module.init(rng, jnp.zeros(shape, jnp.int32))

    def loss_fn(self, params, batch, dropout_rng=None):
        logits = self.module.apply({"params": params}, batch["decoder_input_tokens"])
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits, batch["decoder_target_tokens"]
        )
        weights = batch["decoder_loss_weights"]
        loss = jnp.sum(losses * weights)
        values = {
            "loss": metrics.Total(loss, "step"),
            "loss_per_nonpadding_target_token": clu_metrics.Average(loss, jnp.sum(weights)),
        }
        return loss, values

    def eval_fn(self, params, batch):
        return self.loss_fn(params, batch)


def _examples(split, shuffle_files, seed=None):
    del shuffle_files, seed
    rng = np.random.default_rng(0 if split == "train" else 1)
    count = EXAMPLES if split == "train" else 12
    data = rng.integers(2, 32, (count, LENGTH)).astype(np.int32)
    return tf.data.Dataset.from_tensor_slices({"targets": data})


@seqio.map_over_dataset(num_seeds=1)
def _replace_one(example, seed):
    """A random preprocessor: one token becomes another."""
    at = tf.random.stateless_uniform((), seed, 0, LENGTH, tf.int32)
    new = tf.random.stateless_uniform((), seed, 2, 32, tf.int32)
    targets = tf.where(tf.range(LENGTH) == at, new, example["targets"])
    return {"targets": targets}


@cache
def task():
    """The name of the task; it is registered at the first call."""
    seqio.TaskRegistry.add(
        "embedded_micro",
        source=seqio.FunctionDataSource(_examples, splits=("train", "validation")),
        preprocessors=[_replace_one],
        output_features={"targets": seqio.Feature(VOCABULARY, add_eos=False, dtype=tf.int32)},
        shuffle_buffer_size=32,
    )
    return "embedded_micro"


def dataset_config(split="train", **overrides):
    """Eight examples a batch, shuffled with a fixed seed."""
    values = dict(
        mixture_or_task_name=task(),
        task_feature_lengths={"targets": LENGTH},
        split=split,
        batch_size=8,
        shuffle=split == "train",
        seed=3,
    )
    return utils.DatasetConfig(**{**values, **overrides})


def trainer_cls(**kwargs):
    """What gin makes of trainer.Trainer."""
    values = dict(learning_rate_fn=lambda step: jnp.float32(1e-2), num_microbatches=None)
    return trainer.Trainer(**{**values, **kwargs})


def run(model_dir, total_steps=6, *, save=None, restore=None, **overrides):
    """`train`, saving every 2 steps with the position in the data, evaluating every 4."""
    save = {"period": 2, "save_dataset": True, "keep": 2, **(save or {})}
    values = dict(
        model=Model(),
        train_dataset_cfg=dataset_config(),
        train_eval_dataset_cfg=dataset_config("validation"),
        infer_eval_dataset_cfg=None,
        checkpoint_cfg=utils.CheckpointConfig(
            save=utils.SaveCheckpointConfig(**save),
            restore=utils.RestoreCheckpointConfig(**(restore or {})),
        ),
        partitioner=OneDevice(),
        trainer_cls=trainer_cls,
        model_dir=str(model_dir),
        total_steps=total_steps,
        eval_steps=2,
        eval_period=4,
        random_seed=7,
        summarize_config_fn=lambda model_dir, writer, step: None,
    )
    return train(**{**values, **overrides})


def leaves(state):
    """The state dict as {name: numpy array}."""
    return {k: np.asarray(v) for k, v in flatten(state.state_dict()).items()}


def initial_state(partitioner=None):
    """(initializer, state, model, partitioner) of the micro model; the arrays are the caller's."""
    if partitioner is None:
        initializer, state, model, partitioner = _made_once()
        # New arrays each time: a train step takes what it is given.
        return initializer, jax.tree.map(jnp.copy, state), model, partitioner
    return _make(partitioner)


@cache
def _made_once():
    return _make(OneDevice())


def _make(partitioner):
    model = Model()
    initializer = utils.TrainStateInitializer(
        optimizer_def=model.optimizer_def,
        init_fn=model.get_initial_variables,
        input_shapes={"decoder_input_tokens": (8, LENGTH)},
        partitioner=partitioner,
    )
    return initializer, initializer.from_scratch(jax.random.PRNGKey(0)), model, partitioner


def batch(seed=0, size=8):
    """A batch of random tokens, as the feature converter gives them."""
    rng = np.random.default_rng(seed)
    return {
        "decoder_input_tokens": rng.integers(2, 32, (size, LENGTH)).astype(np.int32),
        "decoder_target_tokens": rng.integers(2, 32, (size, LENGTH)).astype(np.int32),
        "decoder_loss_weights": np.ones((size, LENGTH), np.int32),
    }


if __name__ == "__main__":
    _, final = run(sys.argv[1], int(sys.argv[2]))
    if len(sys.argv) > 3:
        np.savez(sys.argv[3], **leaves(final))
