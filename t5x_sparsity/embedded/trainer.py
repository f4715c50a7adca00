"""The trainer: compiled steps, and metrics that are merged on the devices."""

import concurrent.futures
import contextlib
import functools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import clu.metrics
import clu.values
import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import NamedSharding

from t5x_sparsity.embedded.metrics import Metrics, MetricsManager
from t5x_sparsity.embedded.refusals import missing_from, refuse

__getattr__ = missing_from(__name__)

Batch = Mapping[str, jax.Array]
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
    data_sharding: NamedSharding,
) -> tuple[Any, Metrics]:
    """Gradients and metrics of a batch, summed in float32 over equal consecutive parts of it.

    One microbatch (or None) takes the batch whole, with `dropout_rng` itself.
    """
    grad_fn = jax.value_and_grad(model.loss_fn, has_aux=True)
    if num_microbatches is None or num_microbatches == 1:
        (_, metrics), grads = grad_fn(train_state.params, batch, dropout_rng)
        return grads, dict(metrics)

    size = len(next(iter(batch.values())))
    shards = math.prod(data_sharding.mesh.shape[a] for a in data_sharding.spec if a)
    if num_microbatches < 1 or size % num_microbatches or size // num_microbatches % shards:
        raise ValueError(
            f"trainer.Trainer.num_microbatches is {num_microbatches}; a batch of {size} over "
            f"{shards} data shards can't be cut into that many equal parts. Choose a divisor of "
            f"{size // shards}."
        )
    parts = jax.tree.map(lambda x: x.reshape(num_microbatches, -1, *x.shape[1:]), dict(batch))

    def one(carry, part):
        rng, total = carry
        rng, part_rng = jax.random.split(rng)
        part = jax.lax.with_sharding_constraint(part, data_sharding)
        (_, metrics), grads = grad_fn(train_state.params, part, part_rng)
        total = jax.tree.map(lambda t, g: t + g.astype(jnp.float32), total, grads)
        return (rng, total), dict(metrics)

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), train_state.params)
    (_, grads), stacked = jax.lax.scan(one, (dropout_rng, zeros), parts)
    by_part = [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(num_microbatches)]
    return grads, functools.reduce(merge_metrics, by_part)


class Trainer:
    """Runs train and eval steps over batches. `train_state` is that after the last dispatched."""

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

        The arrays of `train_state` are given away to the first step. TensorBoard events go to
        `summary_dir` (`train`, `training_eval/<name>`), or nowhere if it is None. A batch is cut
        into `num_microbatches` parts to save memory; None: not at all.
        """
        name = "trainer.Trainer.weight_metrics_computer"
        refuse(name, weight_metrics_computer, None, "has no metrics of single weights")
        self._learning_rate_fn = learning_rate_fn
        self._num_microbatches = num_microbatches
        self._model = model
        self.train_state = train_state
        self._train_state_axes = train_state_axes
        self._partitioner = partitioner
        self._base_rng = rng
        self._compiled_train_step: Step | None = None
        self._begun = time.monotonic()
        self.train_metrics_manager = MetricsManager("train", summary_dir)
        # Long names of mixtures would pass what a file system takes.
        self.eval_metrics_managers = {
            name: MetricsManager(os.path.join("training_eval", name[:113]), summary_dir)
            for name in eval_names
        }

    def close(self) -> None:
        """Wait for all metrics to be written; errors of the background threads are raised here."""
        with contextlib.ExitStack() as stack:
            for manager in (*self.eval_metrics_managers.values(), self.train_metrics_manager):
                stack.callback(manager.close)

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
        first = int(self.train_state.step if start_step is None else start_step)
        metrics: Metrics = {}
        self.train_metrics_manager.start_duration_timer()
        for step in range(first, first + num_steps):
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                self.train_state, update = step_fn(self.train_state, next(batch_iter))
                metrics = merge_metrics(metrics, update) if metrics else update
        uptime = jnp.asarray([time.monotonic() - self._begun])
        uptime = clu.metrics.LastValue.from_model_output(uptime)
        return self.train_metrics_manager.write_metrics_summary(
            {**metrics, "timing/uptime": uptime}, first + num_steps, num_steps
        )

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
        state, summaries = self.train_state, {}
        for name, batches in batch_iters.items():
            manager = self.eval_metrics_managers[name]
            manager.start_duration_timer(block_on=state)
            updates = [self._partitioned_eval_step(state, batch) for batch in batches]
            if updates:
                metrics = functools.reduce(merge_metrics, updates)
                summaries[name] = manager.write_metrics_summary(metrics, state.step, len(updates))
            else:
                logging.warning("Evaluation set %s has no batch; it is left out.", name)
        return {name: summary.result() for name, summary in summaries.items()}

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
