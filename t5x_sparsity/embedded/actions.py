"""What may end a training early, from its metrics."""

from __future__ import annotations

import abc
import enum
import math
from collections.abc import Mapping
from typing import Any

from absl import logging


@enum.unique
class ActionMode(enum.Enum):
    """After what an action runs."""

    TRAIN = 1
    TRAIN_EVAL = 2
    INFER_EVAL = 3


class BaseAction(abc.ABC):
    """Looks at metrics and may end the training."""

    @abc.abstractmethod
    def run(self, train_state: Any, metrics_by_task: Mapping[str, Mapping[str, Any]]) -> bool:
        """Whether to stop training; metrics are by task, 'train' for those of training."""


class TerminateOnNanAction(BaseAction):
    """Stops training when a metric of a task is no longer finite."""

    def __init__(self, task: str, metric: str = "loss"):
        """Watch `metric` of `task`."""
        self._task, self._metric = task, metric

    def run(self, train_state: Any, metrics_by_task: Mapping[str, Mapping[str, Any]]) -> bool:
        """See BaseAction; an unknown task or metric is a ValueError."""
        known = metrics_by_task.get(self._task)
        if known is None or self._metric not in known:
            raise ValueError(
                f"trainer.TerminateOnNanAction watches metric {self._metric!r} of task "
                f"{self._task!r}; there are {sorted(metrics_by_task if known is None else known)}."
            )
        value = float(known[self._metric].value)
        if math.isfinite(value):
            return False
        logging.error("%s of %s is %s: training stops.", self._metric, self._task, value)
        return True
