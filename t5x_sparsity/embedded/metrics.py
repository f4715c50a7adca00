"""Metrics that T5X adds to CLU's: totals, averages a step, and rates over the time a period took.

Time is not known inside a compiled step, so that the trainer sets durations, and numbers of steps,
on the host before it computes a metric.
"""

from collections.abc import Mapping, MutableMapping
from typing import Any

import jax
import jax.numpy as jnp
from clu import metrics as clu_metrics
from flax import struct

MetricsMap = MutableMapping[str, clu_metrics.Metric]
Scalar = Any


@struct.dataclass
class Sum(clu_metrics.Metric):
    """The sum of all values."""

    total: Scalar

    @classmethod
    def from_model_output(cls, values: Scalar, **_: Any) -> "Sum":
        """Returns the metric of one value or an array of them."""
        return cls(total=jnp.sum(jnp.asarray(values)))

    def merge(self, other: "Sum") -> "Sum":
        """Returns the sum of both."""
        return type(self)(total=self.total + other.total)

    def compute(self) -> jax.Array:
        """Returns the total."""
        return jnp.asarray(self.total)


@struct.dataclass
class Step(clu_metrics.Metric):
    """A metric that counts steps; with microbatches the trainer must set the number."""

    steps: Scalar = 1

    def replace_steps(self, steps: Scalar) -> "Step":
        """Returns the metric with the number of steps set."""
        return self.replace(steps=steps)


@struct.dataclass
class AveragePerStep(Step):
    """The sum of all values, over the number of steps."""

    total: Scalar = 0

    @classmethod
    def from_model_output(cls, values: Scalar, steps: Scalar = 1, **_: Any) -> "AveragePerStep":
        """Returns the metric of one value or an array of them, which took `steps` steps."""
        return cls(total=jnp.sum(jnp.asarray(values)), steps=steps)

    def merge(self, other: "AveragePerStep") -> "AveragePerStep":
        """Returns the metric over both."""
        return type(self)(total=self.total + other.total, steps=self.steps + other.steps)

    def compute(self) -> jax.Array:
        """Returns the average."""
        return self.total / jnp.asarray(self.steps)


@struct.dataclass
class Time(clu_metrics.Metric):
    """The seconds that a period took, which must be set before `compute`."""

    duration: Scalar = None

    def merge(self, other: "Time") -> "Time":
        """Returns self: the period is the same."""
        return self

    def replace_duration(self, duration: Scalar) -> "Time":
        """Returns the metric with its duration in seconds set."""
        return self.replace(duration=duration)

    def compute(self) -> jax.Array:
        """Returns the seconds."""
        return jnp.asarray(self._seconds())

    def _seconds(self) -> Scalar:
        if self.duration is None:
            raise ValueError(
                f"{type(self).__name__} has no duration yet: call replace_duration(seconds) on the "
                "host before compute()."
            )
        return self.duration


@struct.dataclass
class TimeRate(Time):
    """The sum of all values, a second."""

    numerator: Scalar = 0

    @classmethod
    def from_model_output(cls, numerator: Scalar, **_: Any) -> "TimeRate":
        """Returns the metric of one value."""
        return cls(numerator=numerator)

    def merge(self, other: "TimeRate") -> "TimeRate":
        """Returns the metric over both; its duration is unset."""
        return type(self)(numerator=self.numerator + other.numerator)

    def compute(self) -> jax.Array:
        """Returns the rate."""
        return self.numerator / jnp.asarray(self._seconds())


@struct.dataclass
class StepsPerTime(Step, Time):
    """The number of steps, a second."""

    @classmethod
    def from_model_output(cls, steps: Scalar = 1, **_: Any) -> "StepsPerTime":
        """Returns the metric of `steps` steps."""
        return cls(steps=steps)

    def merge(self, other: "StepsPerTime") -> "StepsPerTime":
        """Returns the metric over both; its duration is unset."""
        return type(self)(steps=self.steps + other.steps)

    def compute(self) -> jax.Array:
        """Returns the rate."""
        return self.steps / jnp.asarray(self._seconds())


def is_metric_obj(obj: Any) -> bool:
    """Says whether `obj` is a CLU metric."""
    return isinstance(obj, clu_metrics.Metric)


def is_time_metric(obj: Any) -> bool:
    """Says whether `obj` needs a duration."""
    return isinstance(obj, Time)


def create_metrics_dict(float_metrics_dict: Mapping[str, Scalar]) -> dict[str, Sum]:
    """Returns a `Sum` of each value."""
    return {name: Sum(value) for name, value in float_metrics_dict.items()}


def set_time_metrics_duration(metrics: Any, duration: Scalar) -> Any:
    """Returns `metrics`, a pytree, with the duration in seconds of each time metric set."""
    return jax.tree.map(
        lambda m: m.replace_duration(duration) if is_time_metric(m) else m,
        metrics,
        is_leaf=is_metric_obj,
    )


def set_step_metrics_num_steps(metrics: Any, num_steps: Scalar) -> Any:
    """Returns `metrics`, a pytree, with the number of steps of each step metric set."""
    return jax.tree.map(
        lambda m: m.replace_steps(num_steps) if isinstance(m, Step) else m,
        metrics,
        is_leaf=is_metric_obj,
    )
