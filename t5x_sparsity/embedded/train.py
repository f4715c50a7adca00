"""The training loop of the embedded host, called as T5X's is."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from absl import logging

from t5x_sparsity.embedded import checkpoints, data, gin_utils, progress, startup, trainer, utils
from t5x_sparsity.embedded.refusals import refuse


def train(
    *,
    model: Any,
    train_dataset_cfg: utils.DatasetConfig,
    train_eval_dataset_cfg: utils.DatasetConfig | None,
    infer_eval_dataset_cfg: None,
    checkpoint_cfg: utils.CheckpointConfig,
    partitioner: Any,
    trainer_cls: Callable[..., trainer.BaseTrainer],
    model_dir: str,
    total_steps: int,
    eval_steps: int,
    eval_period: int,
    relative_steps: int | None = None,
    stats_period: int | None = None,
    random_seed: int | None,
    use_hardware_rng: bool = False,
    summarize_config_fn: Callable[[str, Any, int], None] = gin_utils.summarize_gin_config,
    inference_evaluator_cls: Any = None,
    get_dataset_fn: Callable[..., Any] = data.get_dataset,
    concurrent_metrics: bool = True,
    actions: Mapping[str, Sequence[Any]] | None = None,
    train_eval_get_dataset_fn: Callable[..., Mapping] = data.get_training_eval_datasets,
    run_eval_before_training: bool = False,
    train_state_initializer_cls: Callable[..., Any] = utils.TrainStateInitializer,
    use_orbax: bool = True,
    verify_matching_vocabs_fn: Callable | None = data.verify_matching_vocabs,
    gc_period: int = 0,
) -> tuple[int, Any]:
    """Train, or resume the last run in `model_dir`. Arguments are T5X's.

    Those of which the embedded host takes one value only are refused with an error that says so;
    `inference_evaluator_cls` is not used. `stats_period=None` is the shortest of the other periods,
    `random_seed=None` takes the time, `relative_steps` counts from the checkpoint instead of
    `total_steps`.

    Returns:
      The last step and the train state after it.

    Raises:
      ValueError: the configuration can't work; nothing has been written or compiled by then.
      trainer.PreemptionError: the trainer raised it; the state has been saved.
    """
    begun = time.monotonic()
    del inference_evaluator_cls
    refuse("train.infer_eval_dataset_cfg", infer_eval_dataset_cfg, None, "doesn't decode")
    refuse("train.use_orbax", use_orbax, True, "writes Orbax checkpoints only")
    refuse("train.gc_period", gc_period, 0, "leaves garbage to Python")
    refuse("train.concurrent_metrics", concurrent_metrics, True, "writes metrics concurrently")
    refuse("train.actions", dict(actions or {}), {}, "has no actions")
    refuse("jax.process_count()", jax.process_count(), 1, "runs as one process")
    startup.check_checkpoint_cfg(checkpoint_cfg, train_dataset_cfg)
    model_dir = startup.check_model_dir(model_dir)
    save_cfg = checkpoint_cfg.save
    save_period = save_cfg.period if save_cfg else None
    if not train_eval_dataset_cfg:
        eval_period = 0
    startup.check_periods(stats_period, eval_period, save_period)

    if use_hardware_rng:
        jax.config.update("jax_default_prng_impl", "unsafe_rbg")
    if random_seed is None:
        random_seed = int(time.time())
    logging.info("Random seed %d.", random_seed)
    init_rng, trainer_rng = jax.random.split(jax.random.PRNGKey(random_seed))

    # Data.
    layout = partitioner.get_data_layout(train_dataset_cfg.batch_size)
    for cfg in (train_dataset_cfg, train_eval_dataset_cfg):
        if cfg is not None and verify_matching_vocabs_fn is not None:
            verify_matching_vocabs_fn(cfg, model)
    train_iter = data.TrainIterator(
        get_dataset_fn(
            train_dataset_cfg, layout.shard_id, layout.num_shards, model.FEATURE_CONVERTER_CLS
        ),
        partitioner,
    )
    eval_sets: Mapping[str, Any] = {}
    if train_eval_dataset_cfg is not None:
        eval_layout = partitioner.get_data_layout(train_eval_dataset_cfg.batch_size)
        shard = (eval_layout.shard_id, eval_layout.num_shards)
        eval_sets = train_eval_get_dataset_fn(
            train_eval_dataset_cfg, *shard, eval_steps, model.FEATURE_CONVERTER_CLS
        )
        if not eval_sets:
            logging.warning("train_eval_dataset_cfg names no evaluation set: nothing is evaluated.")

    # State.
    initializer = train_state_initializer_cls(
        optimizer_def=model.optimizer_def,
        init_fn=model.get_initial_variables,
        input_shapes={
            name: (layout.batch_size, *spec.shape[1:])
            for name, spec in train_iter.element_spec.items()
        },
        input_types={name: spec.dtype for name, spec in train_iter.element_spec.items()},
        partitioner=partitioner,
    )
    shapes = initializer.global_train_state_shape
    source = startup.find_source(model_dir, checkpoint_cfg, shapes)
    if source:
        train_iter.skip(source.batches)
    # Input that can't be read ends the run here, with nothing written or compiled.
    train_iter.warm_up()
    manager = checkpoints.OrbaxCheckpointManagerInterface(
        directory=model_dir,
        train_state=shapes,
        partitioner=partitioner,
        dataset_iterator=train_iter if save_cfg and save_cfg.save_dataset else None,
        save_dtype=save_cfg.dtype if save_cfg else None,
        restore_dtype=source.dtype if source else None,
        keep=save_cfg.keep if save_cfg else None,
    )
    if source is None:
        state = initializer.from_scratch(init_rng)
    else:
        fallback = None
        if source.fallback_to_scratch:
            fallback = initializer.from_scratch(init_rng).state_dict()
        with progress.without_orbax_notes():
            state = manager.restore(path=source.path, fallback_state=fallback, plan=source.plan)
    host_step = int(utils.get_local_data(state.step))
    if relative_steps:
        total_steps = host_step + relative_steps
    if total_steps < host_step:
        raise ValueError(
            f"train.total_steps is {total_steps}, but {source.path} is at step {host_step}. Set "
            "the gin macro TRAIN_STEPS to more, or another MODEL_DIR."
        )

    os.makedirs(model_dir, exist_ok=True)
    utils.log_model_info(os.path.join(model_dir, "model-info.txt"), shapes, partitioner)
    loop = trainer_cls(
        model=model,
        train_state=state,
        partitioner=partitioner,
        train_state_axes=initializer.train_state_axes,
        eval_names=list(eval_sets),
        summary_dir=model_dir,
        rng=trainer_rng,
    )
    # The trainer alone may hold the state: its arrays are donated to the first step.
    del state
    with progress.without_orbax_notes(), contextlib.closing(loop), contextlib.closing(manager):
        metrics = loop.train_metrics_manager
        summarize_config_fn(model_dir, metrics.summary_writer, host_step)
        metrics.write_scalar("timing/init_or_restore_seconds", time.monotonic() - begun, host_step)
        if host_step < total_steps:
            compiling = time.monotonic()
            loop.compile_train(train_iter.zeros(layout.batch_size))
            logging.info("Compiled the train step in %.1f s.", time.monotonic() - compiling)
        else:
            logging.warning("The run is at step %d already: there is nothing to train.", host_step)
        if run_eval_before_training and eval_sets:
            _evaluate(loop, eval_sets, host_step)
        if save_period:
            _save(loop, manager)

        with progress.Progress(host_step, total_steps) as report:
            batches = report.count(train_iter)
            for segment in segments(host_step, total_steps, stats_period, eval_period, save_period):
                try:
                    loop.train(batches, segment.stop - segment.start, start_step=segment.start)
                except trainer.PreemptionError:
                    if save_cfg:
                        _save(loop, manager)
                    raise
                host_step = segment.stop
                report.watch(host_step, metrics.snapshot())
                if segment.save:
                    _save(loop, manager)
                if segment.evaluate and eval_sets:
                    _evaluate(loop, eval_sets, host_step)
        return host_step, loop.train_state


class Segment(NamedTuple):
    """Steps [start, stop) that are dispatched in one go, and what follows them."""

    start: int
    stop: int
    save: bool
    evaluate: bool


def segments(
    first: int, total: int, stats: int | None, evaluate: int | None, save: int | None
) -> Iterator[Segment]:
    """The segments from step `first` to `total`; periods, None or 0 for never, count from `first`.

    A segment ends at the next multiple of the shorter of `evaluate` and `save`, or of `stats`
    within it. The end of training counts as a multiple of every period.
    """
    shortest = min((x for x in (evaluate, save) if x), default=max(total - first, 1))

    def due(period, stop):
        return bool(period) and (stop == total or (stop - first) % period == 0)

    start = first
    while start < total:
        whole = start + shortest - (start - first) % shortest
        stop = min(total, whole, start + (stats or shortest))
        yield Segment(start, stop, due(save, stop), due(evaluate, stop))
        start = stop


def _save(loop: trainer.BaseTrainer, manager: Any) -> None:
    """Save a checkpoint of the current step, unless there is one."""
    begun = time.monotonic()
    state = loop.train_state
    if manager.save(state):
        loop.train_metrics_manager.write_scalar(
            "timing/checkpoint_seconds", time.monotonic() - begun, state.step
        )


def _evaluate(loop: trainer.BaseTrainer, sets: Mapping[str, Any], step: int) -> None:
    """Evaluate every set and log its loss."""
    loop.compile_eval({n: data.get_zeros_batch_like_dataset(s) for n, s in sets.items()})
    summaries = loop.eval({name: iter(_as_numpy(found)) for name, found in sets.items()})
    for name, values in summaries.items():
        loss = values.get(progress.LOSS)
        shown = "" if loss is None else f": {progress.LOSS} {float(loss.value):.4f}"
        logging.info("Step %d, evaluated %s%s", step, name, shown)


def _as_numpy(found: Any) -> Iterable:
    return found.as_numpy_iterator() if hasattr(found, "as_numpy_iterator") else found
