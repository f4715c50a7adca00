"""The trainer: compiled steps, metrics merged on the devices, and their background writing."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import clu.metrics
import clu.values
import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import NamedSharding

from t5x_sparsity.embedded import metrics_manager
from t5x_sparsity.embedded.refusals import missing_from, refuse

__getattr__ = missing_from(__name__)

MetricsManager = metrics_manager.MetricsManager

Batch = Mapping[str, jax.Array]
Metrics = dict[str, clu.metrics.Metric]
Step = Callable[[Any, Batch], tuple[Any, Metrics]]


class PreemptionError(Exception):
    """Raised by a trainer whose machine is about to be taken away; `train` saves, and raises it."""


@jax.jit
def merge_metrics(a: Metrics, b: Metrics) -> Metrics:
    """The metrics of two runs of steps as those of one; stays on the devices."""
    return {name: metric.merge(b[name]) for name, metric in a.items()}


def accumulate_grads_microbatched(
    model: Any,
    train_state: Any,
    batch: Batch,
    dropout_rng: jax.Array,
    num_microbatches: int | None,
    data_sharding: NamedSharding | None = None,
) -> tuple[Any, Metrics]:
    """Gradients and metrics of a batch, summed in float32 over equal consecutive parts of it.

    One microbatch (or None) takes the batch whole, with `dropout_rng` itself.
    """
    grad_fn = jax.value_and_grad(model.loss_fn, has_aux=True)
    if num_microbatches is None or num_microbatches == 1:
        (_, metrics), grads = grad_fn(train_state.params, batch, dropout_rng)
        return grads, dict(metrics)

    size = len(next(iter(batch.values())))
    shards = 1
    if data_sharding is not None:
        shards = math.prod(data_sharding.mesh.shape[a] for a in data_sharding.spec if a)
    if num_microbatches < 1 or size % num_microbatches or size // num_microbatches % shards:
        raise ValueError(
            f"trainer.Trainer.num_microbatches is {num_microbatches}; a batch of {size} over "
            f"{shards} data shards can't be cut into that many equal parts. Choose a divisor of "
            f"{size // shards}."
        )
    parts = {
        name: x.reshape(num_microbatches, size // num_microbatches, *x.shape[1:])
        for name, x in batch.items()
    }

    def one(carry, part):
        rng, total = carry
        rng, part_rng = jax.random.split(rng)
        if data_sharding is not None:
            part = jax.lax.with_sharding_constraint(part, data_sharding)
        (_, metrics), grads = grad_fn(train_state.params, part, part_rng)
        total = jax.tree.map(lambda t, g: t + g.astype(jnp.float32), total, grads)
        return (rng, total), dict(metrics)

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), train_state.params)
    (_, grads), stacked = jax.lax.scan(one, (dropout_rng, zeros), parts)
    metrics = jax.tree.map(lambda x: x[0], stacked)
    for i in range(1, num_microbatches):
        metrics = merge_metrics(metrics, jax.tree.map(lambda x, i=i: x[i], stacked))
    return grads, metrics


class Trainer:
    """Runs train and eval steps over batches."""

    def __init__(
        self,
        model: Any,
        train_state: Any,
        partitioner: Any,
        eval_names: Sequence[str],
        summary_dir: str | None,
        train_state_axes: Any,
        rng: jax.Array,
        *,
        learning_rate_fn: Callable[[jax.Array], jax.Array],
        num_microbatches: int | None,
        weight_metrics_computer: None = None,
    ):
        """Prepare a trainer, by T5X's arguments; nothing is compiled yet.

        The arrays of `train_state` are given away to the first step. `rng` is folded with the step
        number into the key of each step. TensorBoard events go to `summary_dir` (`train`,
        `training_eval/<name>`), or nowhere if it is None. `num_microbatches` is into how many parts
        a batch is cut to save memory; None: not at all.
        """
        name = "trainer.Trainer.weight_metrics_computer"
        refuse(name, weight_metrics_computer, None, "has no metrics of single weights")
        self._learning_rate_fn = learning_rate_fn
        self._num_microbatches = num_microbatches
        self._model = model
        self._train_state = train_state
        self._train_state_axes = train_state_axes
        self._train_state_lock = threading.RLock()
        self._partitioner = partitioner
        self._base_rng = rng
        self._compiled_train_step: Step | None = None
        self._compiled_eval_steps: dict[str, Callable] = {}
        self._begun = time.monotonic()
        self.train_metrics_manager = MetricsManager("train", summary_dir)
        # Long names of mixtures would pass what a file system takes.
        self.eval_metrics_managers = {
            name: MetricsManager(os.path.join("training_eval", name[:113]), summary_dir)
            for name in eval_names
        }

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    def close(self) -> None:
        """Wait for all metrics to be written; errors of the background threads are raised here."""
        with contextlib.ExitStack() as stack:
            for manager in (*self.eval_metrics_managers.values(), self.train_metrics_manager):
                stack.callback(manager.close)

    @property
    def train_state(self) -> Any:
        """The state after the last step dispatched; waits while `train` is dispatching."""
        with self._train_state_lock:
            return self._train_state

    @train_state.setter
    def train_state(self, train_state: Any) -> None:
        with self._train_state_lock:
            self._train_state = train_state

    def _get_step_rng(self, step: Any) -> jax.Array:
        return jax.random.fold_in(self._base_rng, step)

    def train(
        self, batch_iter: Iterator[Batch], num_steps: int, start_step: int | None = None
    ) -> concurrent.futures.Future:
        """Dispatch `num_steps` steps, without waiting for the devices.

        Returns a future of the metrics of these steps together. `start_step` is the number of the
        first step; without it the state's own step is read, which does wait.
        """
        step_fn = self._compiled_train_step or self._partitioned_train_step
        metrics = None
        with self._train_state_lock:
            state = self._train_state
            first = metrics_manager.read_scalar(state.step if start_step is None else start_step)
            self.train_metrics_manager.start_duration_timer()
            try:
                for step in range(first, first + num_steps):
                    with jax.profiler.StepTraceAnnotation("train", step_num=step):
                        state, update = step_fn(state, self._next_batch(batch_iter, step))
                        metrics = update if metrics is None else merge_metrics(metrics, update)
            finally:
                self._train_state = state
        metrics = dict(metrics or {})
        uptime = jnp.asarray([time.monotonic() - self._begun])
        metrics["timing/uptime"] = clu.metrics.LastValue.from_model_output(uptime)
        return self.train_metrics_manager.write_metrics_summary(
            metrics, first + num_steps, num_steps
        )

    def _next_batch(self, batch_iter: Iterator[Batch], step: int) -> Batch:
        try:
            return next(batch_iter)
        except StopIteration:
            raise ValueError(
                f"The training data ended before step {step + 1}. Train for fewer steps (gin macro "
                "TRAIN_STEPS), or let get_dataset_fn repeat its data."
            ) from None

    def compile_train(self, batch: Batch) -> None:
        """Compile the train step for batches like `batch`, whose values don't matter."""
        begun = time.monotonic()
        self._compiled_train_step = self._partitioner.compile(
            self._partitioned_train_step, self.train_state, batch
        )
        self.train_metrics_manager.write_scalar(
            "timing/compilation_seconds", time.monotonic() - begun, self.train_state.step
        )

    def eval(
        self, batch_iters: Mapping[str, Iterator[Batch]]
    ) -> dict[str, Mapping[str, clu.values.Value]]:
        """Evaluate the current state on each set; the metrics of each set over all its batches.

        A set without a single batch is left out, with a warning.
        """
        state = self.train_state
        summaries = {}
        for name, batches in batch_iters.items():
            step_fn = self._compiled_eval_steps.get(name) or self._partitioned_eval_step
            manager = self.eval_metrics_managers[name]
            manager.start_duration_timer(block_on=state)
            metrics, count = None, 0
            for batch in batches:
                update = step_fn(state, batch)
                metrics = update if metrics is None else merge_metrics(metrics, update)
                count += 1
            if metrics is None:
                logging.warning("Evaluation set %s has no batch; it is left out.", name)
                continue
            summaries[name] = manager.write_metrics_summary(metrics, state.step, count)
        return {name: summary.result() for name, summary in summaries.items()}

    def compile_eval(self, batches: Mapping[str, Batch]) -> None:
        """Compile the eval step for each set's batches; sets of the same shapes share one."""
        by_shapes = {}
        for name, batch in batches.items():
            if name in self._compiled_eval_steps:
                continue
            begun = time.monotonic()
            shapes = tuple(sorted((k, x.shape, str(x.dtype)) for k, x in batch.items()))
            if shapes not in by_shapes:
                by_shapes[shapes] = self._partitioner.compile(
                    self._partitioned_eval_step, self.train_state, batch
                )
            self._compiled_eval_steps[name] = by_shapes[shapes]
            self.eval_metrics_managers[name].write_scalar(
                "timing/compilation_seconds", time.monotonic() - begun, self.train_state.step
            )

    @functools.cached_property
    def _partitioned_train_step(self) -> Step:
        spec = self._partitioner.data_partition_spec
        data_sharding = NamedSharding(self._partitioner.mesh, spec)

        def train_step(train_state, batch):
            grads, metrics = accumulate_grads_microbatched(
                self._model,
                train_state,
                batch,
                self._get_step_rng(train_state.step),
                self._num_microbatches,
                data_sharding,
            )
            rate = self._learning_rate_fn(train_state.step)
            new_state = train_state.apply_gradient(grads, learning_rate=rate)
            rate = jnp.asarray([rate])
            metrics["learning_rate"] = clu.metrics.Average.from_model_output(rate)
            metrics["learning_rate/current"] = clu.metrics.LastValue.from_model_output(rate)
            return new_state, metrics

        return self._partitioner.partition(
            train_step,
            in_axis_resources=(self._train_state_axes, spec),
            out_axis_resources=(self._train_state_axes, None),
            donate_argnums=(0,),
        )

    @functools.cached_property
    def _partitioned_eval_step(self) -> Callable[[Any, Batch], Metrics]:
        def eval_step(train_state, batch):
            _, metrics = self._model.eval_fn(train_state.params, batch)
            return metrics

        return self._partitioner.partition(
            eval_step,
            in_axis_resources=(self._train_state_axes, self._partitioner.data_partition_spec),
            out_axis_resources=None,
        )


BaseTrainer = Trainer  # T5X has trainers of other kinds
