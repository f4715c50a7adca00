"""The input pipeline of the embedded host: seqio datasets, and the feeding of the devices."""

import dataclasses
import importlib
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import seqio
import tensorflow as tf
from absl import logging
from jax.sharding import NamedSharding


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """What to read: a registered seqio task or mixture, how it is cut, batched and shuffled.

    `batch_size` counts the examples of all devices together. `seed=None` draws a new seed at each
    start, so that two runs, or a run and its resumption, see different data. `module` is one that
    registers the task when it is imported.
    """

    mixture_or_task_name: str | seqio.Task | seqio.Mixture
    task_feature_lengths: Mapping[str, int]
    split: str
    batch_size: int
    shuffle: bool
    seed: int | None
    use_cached: bool = False
    pack: bool = False
    use_custom_packing_ops: bool = False
    module: str | None = None
    use_memory_cache: bool = True
    trim_output_features: bool = True

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(
                f"utils.DatasetConfig.batch_size is {self.batch_size}; it must be at least 1."
            )
        if not self.task_feature_lengths:
            raise ValueError(
                "utils.DatasetConfig.task_feature_lengths is empty; give each feature's length "
                "(gin macro TASK_FEATURE_LENGTHS), such as {'inputs': 512, 'targets': 114}."
            )


def _provider(cfg: DatasetConfig) -> seqio.Task | seqio.Mixture:
    if cfg.module:
        importlib.import_module(cfg.module)
    if isinstance(cfg.mixture_or_task_name, seqio.DatasetProviderBase):
        return cfg.mixture_or_task_name
    return seqio.get_mixture_or_task(cfg.mixture_or_task_name)


def get_dataset(
    cfg: DatasetConfig,
    shard_id: int,
    num_shards: int,
    feature_converter_cls: Callable[..., seqio.FeatureConverter],
    num_epochs: int | None = None,
) -> tf.data.Dataset:
    """The batches of one shard, repeated `num_epochs` times (None: forever).

    With a seed the order is the same in every process that reads it: reads that race each other
    are put back in order.
    """
    provider = _provider(cfg)
    if cfg.split not in provider.splits:
        raise ValueError(
            f"Task {provider.name!r} has no split {cfg.split!r}; it has {sorted(provider.splits)}. "
            "Set utils.DatasetConfig.split to one of these."
        )
    data = seqio.get_dataset(
        mixture_or_task_name=provider,
        task_feature_lengths=cfg.task_feature_lengths,
        dataset_split=cfg.split,
        shuffle=cfg.shuffle,
        num_epochs=num_epochs,
        feature_converter=feature_converter_cls(
            pack=cfg.pack, use_custom_packing_ops=cfg.use_custom_packing_ops
        ),
        shard_info=seqio.ShardInfo(index=shard_id, num_shards=num_shards),
        use_cached=cfg.use_cached,
        seed=int(time.time()) if cfg.seed is None else cfg.seed,
        trim_output_features=cfg.trim_output_features,
        batch_size=cfg.batch_size // num_shards,
    )
    options = tf.data.Options()
    options.deterministic = True
    return data.with_options(options)


def get_training_eval_datasets(
    cfg: DatasetConfig,
    shard_id: int,
    num_shards: int,
    eval_steps: int,
    feature_converter_cls: Callable[..., seqio.FeatureConverter],
) -> dict[str, tf.data.Dataset]:
    """At most `eval_steps` batches of every task in `cfg`, and of the mixture itself if it is one.

    A task without the split is left out. Small sets are repeated to fill `eval_steps` batches.
    """
    provider = _provider(cfg)
    mixtures = [provider] if isinstance(provider, seqio.Mixture) else []
    datasets = {}
    for task in [*seqio.get_subtasks(provider), *mixtures]:
        if cfg.split not in task.splits:
            logging.info("Task %s has no split %r: not evaluated.", task.name, cfg.split)
            continue
        # A bound on the epochs keeps a split whose examples are all filtered out from looping.
        data = get_dataset(
            dataclasses.replace(cfg, mixture_or_task_name=task),
            shard_id,
            num_shards,
            feature_converter_cls,
            num_epochs=eval_steps * cfg.batch_size,
        ).take(eval_steps)
        datasets[task.name] = data.cache() if cfg.use_memory_cache else data
    return datasets


def verify_matching_vocabs(cfg: DatasetConfig, model: Any) -> None:
    """Raise a ValueError unless the task and the model use the same vocabularies."""
    features = _provider(cfg).output_features
    for name, attribute in (("inputs", "input_vocabulary"), ("targets", "output_vocabulary")):
        ours, theirs = getattr(model, attribute, None), features.get(name)
        if ours is not None and theirs is not None and ours != theirs.vocabulary:
            raise ValueError(
                f"The model's {attribute} is {ours}, but feature {name!r} of task "
                f"{cfg.mixture_or_task_name!r} uses {theirs.vocabulary}. Give the model the task's "
                "vocabulary, or choose another task (gin macro MIXTURE_OR_TASK_NAME)."
            )


def train_batches(
    data: tf.data.Dataset, partitioner: Any, skipped: int = 0
) -> Iterator[Mapping[str, jax.Array]]:
    """The batches after the first `skipped`, put on the devices; a ValueError where they end.

    One is read at once, so that errors of the input show.
    """
    sharding = NamedSharding(partitioner.mesh, partitioner.data_partition_spec)

    def placed():
        count = skipped
        for batch in data.skip(skipped).prefetch(2).as_numpy_iterator():
            count += 1
            yield jax.device_put(batch, sharding)
        raise ValueError(
            f"The training data has no batch after the first {count}. Train for fewer steps (gin "
            "macro TRAIN_STEPS), or let get_dataset_fn repeat its data."
        )

    batches = placed()
    return itertools.chain([next(batches)], batches)


def batch_shapes(data: Any, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shape and type of each feature of a batch; a ValueError unless `data` has batches."""
    if not isinstance(data, tf.data.Dataset) or not isinstance(data.element_spec, Mapping):
        raise ValueError(
            f"a dataset function returned {type(data).__name__}; on the embedded host it must "
            "return a tf.data.Dataset of batches that are dicts of arrays. Use T5X for others."
        )
    return {
        name: jax.ShapeDtypeStruct((batch_size, *spec.shape[1:]), spec.dtype.as_numpy_dtype)
        for name, spec in data.element_spec.items()
    }
