"""Metrics that T5X adds to CLU's: totals, averages per step, and rates over a period's duration.

Time is not known inside a compiled step: the trainer sets durations, and numbers of steps, on the
host before it computes a metric.
"""

import dataclasses
from collections.abc import MutableMapping
from typing import Any

import jax
import jax.numpy as jnp
from clu import metrics as clu_metrics
from flax import struct

MetricsMap = MutableMapping[str, clu_metrics.Metric]
Scalar = Any


class _Additive(clu_metrics.Metric):
    """A metric whose fields add up, but for a duration."""

    def merge(self, other: "_Additive") -> "_Additive":
        """Returns the metric over both; its duration is unset."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "duration"]
        return type(self)(**{name: getattr(self, name) + getattr(other, name) for name in names})


@struct.dataclass
class Sum(_Additive):
    """The sum of all values."""

    total: Scalar = 0

    def compute(self) -> jax.Array:
        return jnp.asarray(self.total)


@struct.dataclass
class Step(_Additive):
    """A metric that counts steps; with microbatches the trainer must set the number."""

    steps: Scalar = 1

    def replace_steps(self, steps: Scalar) -> "Step":
        return self.replace(steps=steps)


@struct.dataclass
class AveragePerStep(Step, Sum):
    """The sum of all values, over the number of steps."""

    def compute(self) -> jax.Array:
        return self.total / jnp.asarray(self.steps)


@struct.dataclass
class Time(_Additive):
    """The seconds that a period took, which must be set before `compute`."""

    duration: Scalar = None

    def replace_duration(self, duration: Scalar) -> "Time":
        return self.replace(duration=duration)

    def compute(self) -> jax.Array:
        if self.duration is None:
            raise ValueError(f"{type(self).__name__} has no duration yet: call replace_duration")
        return jnp.asarray(self.duration)


@struct.dataclass
class TimeRate(Time):
    """The sum of all values, per second."""

    numerator: Scalar = 0

    def compute(self) -> jax.Array:
        return self.numerator / super().compute()


@struct.dataclass
class StepsPerTime(Step, Time):
    """The number of steps, per second."""

    def compute(self) -> jax.Array:
        return self.steps / super().compute()


def complete(metrics: Any, duration: Scalar, num_steps: Scalar) -> Any:
    """Returns `metrics`, a pytree, with the duration in seconds and the number of steps set."""

    def completed(metric):
        if isinstance(metric, Time):
            metric = metric.replace_duration(duration)
        return metric.replace_steps(num_steps) if isinstance(metric, Step) else metric

    return jax.tree.map(completed, metrics, is_leaf=lambda x: isinstance(x, clu_metrics.Metric))
