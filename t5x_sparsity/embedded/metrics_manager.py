"""Background writing of metrics to TensorBoard."""

from __future__ import annotations

import concurrent.futures
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import clu.metrics
import clu.values
import jax
import numpy as np
from clu import metric_writers

from t5x_sparsity.embedded import checkpoints
from t5x_sparsity.embedded import metrics as metrics_lib

Metrics = dict[str, clu.metrics.Metric]


class MetricsManager:
    """Writes metrics to TensorBoard from one background thread, in the order they were given.

    They go to `summary_dir`, or nowhere if it is None. `latest` has the last value of each name.
    """

    def __init__(self, name: str, summary_dir: str | None = None):
        self.summary_dir = os.path.join(summary_dir, name) if summary_dir else None
        self.latest: dict[str, Any] = {}
        self._writer: metric_writers.MetricWriter = metric_writers.MultiWriter([])
        if self.summary_dir:
            self._writer = metric_writers.AsyncWriter(
                metric_writers.SummaryWriter(self.summary_dir)
            )
        self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="metrics")
        self._pending: list[concurrent.futures.Future] = []
        self._started = time.monotonic()
        self._closed = False

    @property
    def summary_writer(self) -> metric_writers.MetricWriter:
        return self._writer

    def write_scalar(self, key: str, val: Any, step: Any) -> None:
        self.write_scalars(step, {key: val})

    def write_scalars(self, step: Any, scalars: Mapping[str, Any]) -> None:
        """Write values, which may be device arrays: only the background thread waits for them."""
        # The step may belong to a state that the next train step is given, so it is read here.
        step, scalars = int(read_scalar(step)), dict(scalars)

        def write():
            values = {name: read_scalar(value) for name, value in scalars.items()}
            self.latest.update({name: clu.values.Scalar(value) for name, value in values.items()})
            self._writer.write_scalars(step, values)

        self._submit(write)

    def start_duration_timer(self, block_on: Any = ()) -> None:
        """Start the clock of the next summary, once `block_on` and earlier summaries are ready."""

        def start():
            jax.block_until_ready(block_on)
            self._started = time.monotonic()

        self._submit(start)

    def write_metrics_summary(
        self, metrics: Metrics, step: Any, num_steps: int
    ) -> concurrent.futures.Future:
        """Write what `num_steps` steps gave; the future's result maps names to clu.values.Value.

        Reading the devices, and waiting for them, happens in the background. The duration is from
        `start_duration_timer` until the metrics are ready.
        """

        step = int(read_scalar(step))

        def summarize():
            fetched = jax.device_get(metrics)
            duration = time.monotonic() - self._started
            fetched = metrics_lib.complete(fetched, duration, num_steps)
            values = {name: metric.compute_value() for name, metric in fetched.items()}
            self.latest.update(values)
            metric_writers.write_values(self._writer, step, values)
            return values

        return self._submit(summarize)

    def snapshot(self) -> concurrent.futures.Future:
        """A future of `latest` as it is once all that was given so far is written."""
        return self._submit(lambda: dict(self.latest))

    def flush(self) -> None:
        """Wait until everything is written; an error of the background thread is raised here."""
        pending, self._pending = self._pending, []
        for future in pending:
            future.result()
        self._writer.flush()

    def close(self) -> None:
        """Flush, and free the thread and the writer; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        try:
            self.flush()
        finally:
            self._pool.shutdown()
            self._writer.close()

    def _submit(self, fn: Callable) -> concurrent.futures.Future:
        self._pending = [f for f in self._pending if not f.done() or f.exception() is not None]
        future = self._pool.submit(fn)
        self._pending.append(future)
        return future


def read_scalar(x: Any) -> Any:
    """The value of a number, or an array of one, as Python's; waits for a device array."""
    return np.asarray(checkpoints.get_local_data(x)).item()
