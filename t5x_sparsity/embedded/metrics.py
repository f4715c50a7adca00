"""Totals per step and per second, and the background writing of metrics to TensorBoard."""

from __future__ import annotations

import concurrent.futures
import os
import time
from collections.abc import Mapping
from typing import Any

import clu.metrics
import clu.values
import jax
from clu import asynclib, metric_writers
from flax import struct

Metrics = Mapping[str, clu.metrics.Metric]


@struct.dataclass
class Total(clu.metrics.Metric):
    """The sum of all values of a period, or that per 'step' or per 'second' of it.

    `step` and `second` say how many the period has. A compiled step knows neither: they are set
    on the host, before the metric is computed.
    """

    total: Any
    per: str = struct.field(pytree_node=False, default="period")
    step: Any = None
    second: Any = None

    def merge(self, other: Total) -> Total:
        return Total(self.total + other.total, self.per)

    def compute(self) -> Any:
        return self.total if self.per == "period" else self.total / getattr(self, self.per)


class MetricsManager:
    """Writes metrics to TensorBoard in the background.

    They go to the folder `name` of `summary_dir`, or nowhere if that is None. An error of the
    background is raised by the next call that gives it work, or by `close`.
    """

    def __init__(self, name: str, summary_dir: str | None = None):
        self.summary_dir = os.path.join(summary_dir, name) if summary_dir else None
        self.summary_writer: metric_writers.MetricWriter = metric_writers.MultiWriter([])
        if self.summary_dir:
            writer = metric_writers.SummaryWriter(self.summary_dir)
            self.summary_writer = metric_writers.AsyncWriter(writer)
        self._pool = asynclib.Pool("metrics", max_workers=1)
        self._started = time.monotonic()

    def write_scalar(self, key: str, val: Any, step: Any) -> None:
        self.write_scalars(step, {key: val})

    def write_scalars(self, step: Any, scalars: Mapping[str, Any]) -> None:
        """Write values, which may be device arrays: only the background thread waits for them."""
        # The step may belong to a state that the next train step is given, so it is read here.
        self.summary_writer.write_scalars(int(step), scalars)

    def start_duration_timer(self, block_on: Any = ()) -> None:
        """Start the clock of the next summary, once `block_on` and earlier summaries are ready."""

        @self._pool
        def start():
            jax.block_until_ready(block_on)
            self._started = time.monotonic()

        start()

    def write_metrics_summary(
        self, metrics: Metrics, step: Any, num_steps: int
    ) -> concurrent.futures.Future:
        """Write what `num_steps` steps gave; the future's result maps names to clu.values.Value.

        Reading the devices, and waiting for them, happens in the background. The duration is from
        `start_duration_timer` until the metrics are ready.
        """
        step = int(step)

        @self._pool
        def summarize():
            fetched = jax.device_get(metrics)
            seconds = time.monotonic() - self._started
            values = {
                "timing/seconds": clu.values.Scalar(seconds),
                "timing/steps_per_second": clu.values.Scalar(num_steps / seconds),
            }
            for name, metric in fetched.items():
                if isinstance(metric, Total):
                    metric = metric.replace(step=num_steps, second=seconds)
                values[name] = metric.compute_value()
            metric_writers.write_values(self.summary_writer, step, values)
            return values

        return summarize()

    def close(self) -> None:
        """Wait until all is written, and free the thread and the writer."""
        try:
            self._pool.close()
        finally:
            self.summary_writer.close()
