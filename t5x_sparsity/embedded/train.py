"""The training loop of the embedded host, called as T5X's is."""

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

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
    save_cfg = checkpoint_cfg.save or utils.SaveCheckpointConfig()
    if not train_eval_dataset_cfg:
        eval_period = 0
    startup.check_periods(stats_period, eval_period, save_cfg.period)

    if use_hardware_rng:
        jax.config.update("jax_default_prng_impl", "unsafe_rbg")
    if random_seed is None:
        random_seed = int(time.time())
    logging.info("Random seed %d.", random_seed)
    init_rng, trainer_rng = jax.random.split(jax.random.PRNGKey(random_seed))

    # Data.
    for cfg in filter(None, (train_dataset_cfg, train_eval_dataset_cfg)):
        partitioner.check_batch_size(cfg.batch_size)
        if verify_matching_vocabs_fn is not None:
            verify_matching_vocabs_fn(cfg, model)
    converter = model.FEATURE_CONVERTER_CLS
    train_data = get_dataset_fn(train_dataset_cfg, 0, 1, converter)
    batch = data.batch_shapes(train_data, train_dataset_cfg.batch_size)
    eval_sets: Mapping[str, Any] = {}
    if train_eval_dataset_cfg is not None:
        eval_sets = train_eval_get_dataset_fn(train_eval_dataset_cfg, 0, 1, eval_steps, converter)
        for found in eval_sets.values():
            data.batch_shapes(found, train_eval_dataset_cfg.batch_size)
        if not eval_sets:
            logging.warning("train_eval_dataset_cfg names no evaluation set: nothing is evaluated.")

    # State.
    initializer = train_state_initializer_cls(
        optimizer_def=model.optimizer_def,
        init_fn=model.get_initial_variables,
        input_shapes={name: x.shape for name, x in batch.items()},
        input_types={name: x.dtype for name, x in batch.items()},
        partitioner=partitioner,
    )
    shapes = initializer.global_train_state_shape
    source = startup.find_source(model_dir, checkpoint_cfg, shapes)
    # Input that can't be read ends the run here, with nothing written or compiled.
    skipped = source.batches if source else 0
    batches = data.train_batches(train_data, partitioner, skipped)
    if source is None or source.fallback_to_scratch:
        state = initializer.from_scratch(init_rng)
    if source is not None:
        with progress.without_orbax_notes():
            state = checkpoints.restore(
                source.path,
                source.plan,
                shapes,
                partitioner,
                dtype=source.dtype,
                fallback_state=state.state_dict() if source.fallback_to_scratch else None,
            )
    first_step = int(state.step)
    if relative_steps:
        total_steps = first_step + relative_steps
    if total_steps < first_step:
        raise ValueError(
            f"train.total_steps is {total_steps}, but {source.path} is at step {first_step}. Set "
            "the gin macro TRAIN_STEPS to more, or another MODEL_DIR."
        )

    os.makedirs(model_dir, exist_ok=True)
    utils.log_model_info(os.path.join(model_dir, "model-info.txt"), shapes)
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
    metrics = loop.train_metrics_manager
    with contextlib.ExitStack() as stack:
        stack.enter_context(progress.without_orbax_notes())
        stack.callback(loop.close)
        if checkpoint_cfg.save:
            manager = checkpoints.make_manager(model_dir, save_cfg.keep)
            stack.callback(manager.close)

        def save() -> None:
            begun, state = time.monotonic(), loop.train_state
            count = skipped + int(state.step) - first_step if save_cfg.save_dataset else None
            if checkpoints.save(manager, state, dtype=save_cfg.dtype, batches=count):
                seconds = time.monotonic() - begun
                metrics.write_scalar("timing/checkpoint_seconds", seconds, state.step)

        def evaluate(step: int) -> None:
            sets = {name: found.as_numpy_iterator() for name, found in eval_sets.items()}
            for name, values in loop.eval(sets).items():
                loss = values.get(progress.LOSS)
                shown = "" if loss is None else f": {progress.LOSS} {float(loss.value):.4f}"
                logging.info("Step %d, evaluated %s%s", step, name, shown)

        summarize_config_fn(model_dir, metrics.summary_writer, first_step)
        metrics.write_scalar("timing/init_or_restore_seconds", time.monotonic() - begun, first_step)
        if first_step < total_steps:
            compiling = time.monotonic()
            loop.compile_train(batch)
            logging.info("Compiled the train step in %.1f s.", time.monotonic() - compiling)
        else:
            logging.warning("The run is at step %d already: there is nothing to train.", first_step)
        if run_eval_before_training:
            evaluate(first_step)
        if save_cfg.period:
            save()

        report = stack.enter_context(progress.Progress(first_step, total_steps))
        batches = report.count(batches)
        periods = (stats_period, eval_period, save_cfg.period)
        stops = segment_ends(first_step, total_steps, *periods)
        for start, stop in itertools.pairwise([first_step, *stops]):
            try:
                summary = loop.train(batches, stop - start, start_step=start)
            except trainer.PreemptionError:
                if checkpoint_cfg.save:
                    save()
                raise
            report.watch(stop, summary)
            if is_due(save_cfg.period, stop, first_step, total_steps):
                save()
            if is_due(eval_period, stop, first_step, total_steps):
                evaluate(stop)
        return total_steps, loop.train_state


def segment_ends(
    first: int, total: int, stats: int | None, evaluate: int | None, save: int | None
) -> Iterator[int]:
    """The steps, from `first` to `total`, up to which steps are dispatched in one go.

    It is the next multiple of the shorter of the periods `evaluate` and `save`, or of `stats`
    within it. Periods, None or 0 for never, count from `first`.
    """
    shortest = min((x for x in (evaluate, save) if x), default=max(total - first, 1))
    stop = first
    while stop < total:
        whole = stop + shortest - (stop - first) % shortest
        stop = min(total, whole, stop + (stats or shortest))
        yield stop


def is_due(period: int | None, stop: int, first: int, total: int) -> bool:
    """Whether a period ends at step `stop`; the end of training counts as a multiple of each."""
    return bool(period) and (stop == total or (stop - first) % period == 0)
