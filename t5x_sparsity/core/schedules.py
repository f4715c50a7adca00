"""When masks change, to which level, and how much of a mask is swapped.

Steps are 0-based: the update at step t is made by the train step that takes `state.step` from t to
t + 1. Steps may be Python integers or traced, so that the host picks the compiled step by the same
rule that the step itself follows.
"""

import dataclasses
import functools
from collections.abc import Hashable, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from t5x_sparsity.core.checks import check_integer, check_positive, check_share

# A train step: an integer on the host, or an int32 array, which may be traced.
StepValue = int | jax.Array


class UpdateSchedule(Hashable, Protocol):
    """The steps at which masks are updated. Schedules are hashable, and compare by their fields."""

    def is_update(self, step: StepValue) -> bool | jax.Array:
        """Whether masks change at `step`: bool, or a bool array for an array."""

    def progress(self, step: StepValue) -> jax.Array:
        """The share of the way from the first update to the last, in [0, 1]; 1 at the last."""

    def until_next(self, step: jax.Array) -> jax.Array:
        """Steps from `step` to the next update, int32: 0 at an update, 2**30 after the last."""

    @property
    def last(self) -> int | None:
        """The step of the last update, None if there is none."""


# Steps to the next update where there is none.
_NEVER = np.int32(2**30)


def last_update(updates: UpdateSchedule, step: int, since: int = 0) -> int | None:
    """The last update in [since, step), None if there is none; on the host."""
    if updates.last is None:
        return None
    first = max(since, getattr(updates, "begin", 0))
    steps = range(min(step - 1, updates.last), first - 1, -1)
    return next((t for t in steps if updates.is_update(t)), None)


def resolve_step(
    value: int | float, total_steps: int | None, name: str, start_step: int = 0
) -> int:
    """The step that a configured value stands for.

    >>> resolve_step(300, None, "begin"), resolve_step(0.75, 1000, "end")
    (300, 750)

    Args:
      value: an int is a step; a float in [0, 1] is a share of the run, 1.0 its last step.
      total_steps: the step at which the run ends; needed for a share.
      name: of the value, for errors.
      start_step: the step at which the run begins.

    Raises:
      ValueError: a value that is neither, or a share without the run's steps.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(
            f"{name} must be a step (int) or a share of the run (float), got {value!r}"
        )
    if isinstance(value, int):
        if value < 0:
            raise ValueError(f"{name} must not be negative, got {value}")
        return value
    if not 0 <= value <= 1:
        raise ValueError(
            f"{name} as a float is a share of the run and must be in [0, 1], got {value}; "
            "give a step as an integer"
        )
    if total_steps is None:
        raise ValueError(
            f"{name} is a share of the run ({value}), which needs total_steps (gin: TRAIN_STEPS); "
            "bind it, or give a step as an integer"
        )
    if start_step and total_steps <= start_step:
        raise ValueError(
            f"the run starts at step {start_step} and total_steps (gin: TRAIN_STEPS) is "
            f"{total_steps}, which counts the steps before the start too; set it above {start_step}"
        )
    return min(start_step + round(value * (total_steps - start_step)), max(total_steps - 1, 0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Periodic:
    """Updates at begin, begin + period, ..., and at end even where it is not one of these.

    >>> updates = Periodic(begin=2, end=9, period=3)
    >>> [step for step in range(12) if updates.is_update(step)]
    [2, 5, 8, 9]
    >>> Periodic(begin=0, end=0.75, period=100, total_steps=10_000).last
    7500

    Attributes:
      begin: first update step, an int >= 0, or a float in [0, 1]: a share of the run.
      end: last update step, likewise.
      period: steps from one update to the next, an int >= 1.
      total_steps: the step at which the run ends; needed where begin or end is a share.
      start_step: the step at which the run starts, above 0 where it continues another run. Shares
        are of the steps from here on, and no update comes before.

    Raises:
      ValueError: an argument out of range, a share without total_steps, end before begin.
    """

    begin: int | float
    end: int | float
    period: int
    total_steps: int | None = None
    start_step: int = 0

    def __post_init__(self) -> None:
        start = self.start_step
        check_integer("start_step", start, least=0)
        check_integer("period (MASK_UPDATE_PERIOD)", self.period, least=1)
        begin = resolve_step(self.begin, self.total_steps, "begin (MASK_UPDATE_BEGIN)", start)
        end = resolve_step(self.end, self.total_steps, "end (MASK_UPDATE_END)", start)
        if end < start:
            raise ValueError(
                f"mask updates would end at step {end} before the run starts at step {start}; set "
                "MASK_UPDATE_END to a later step, or to a share of the run"
            )
        begin = max(begin, start)
        if end < begin:
            raise ValueError(
                f"mask updates would end at step {end} before they begin at step {begin}; set "
                "MASK_UPDATE_BEGIN <= MASK_UPDATE_END"
            )
        object.__setattr__(self, "begin", begin)
        object.__setattr__(self, "end", end)

    @property
    def last(self) -> int:
        return int(self.end)  # an int since __post_init__

    def is_update(self, step: StepValue) -> bool | jax.Array:
        grid = (self.begin <= step) & (step <= self.end) & ((step - self.begin) % self.period == 0)
        return grid | (step == self.end)

    def progress(self, step: StepValue) -> jax.Array:
        return _progress(step, int(self.begin), self.last)

    def until_next(self, step: jax.Array) -> jax.Array:
        on_grid = jnp.maximum(-(-(step - self.begin) // self.period), 0) * self.period + self.begin
        return jnp.where(step <= self.end, jnp.minimum(on_grid, self.end) - step, _NEVER)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneShot:
    """A single update.

    >>> updates = OneShot(step=0.5, total_steps=1000)
    >>> updates.last, updates.is_update(499), updates.is_update(500)
    (500, False, True)

    Attributes:
      step: of the update, an int >= 0, or a float in [0, 1]: a share of the run.
      total_steps, start_step: as for `Periodic`.
    """

    step: int | float
    total_steps: int | None = None
    start_step: int = 0

    def __post_init__(self) -> None:
        check_integer("start_step", self.start_step, least=0)
        step = resolve_step(self.step, self.total_steps, "step", self.start_step)
        object.__setattr__(self, "step", step)

    @property
    def last(self) -> int:
        return int(self.step)  # an int since __post_init__

    def is_update(self, step: StepValue) -> bool | jax.Array:
        return step == self.step

    def progress(self, step: StepValue) -> jax.Array:
        return _progress(step, self.last, self.last)

    def until_next(self, step: jax.Array) -> jax.Array:
        return jnp.where(step <= self.step, self.step - step, _NEVER)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Listed:
    """Updates at listed steps.

    >>> Listed(steps=[0, 10, 100]).is_update(10)
    True

    Attributes:
      steps: ints >= 0, strictly increasing, at least one.
    """

    steps: Sequence[int]

    def __post_init__(self) -> None:
        steps = tuple(resolve_step(s, None, "steps") for s in self.steps)
        if not steps or any(a >= b for a, b in zip(steps, steps[1:], strict=False)):
            raise ValueError(f"steps must be a non-empty, increasing list, got {self.steps!r}")
        object.__setattr__(self, "steps", steps)

    @property
    def last(self) -> int:
        return self.steps[-1]

    def is_update(self, step: StepValue) -> bool | jax.Array:
        if isinstance(step, int):
            return step in self.steps
        return jnp.any(jnp.asarray(self.steps, jnp.int32) == step)

    def progress(self, step: StepValue) -> jax.Array:
        return _progress(step, self.steps[0], self.steps[-1])

    def until_next(self, step: jax.Array) -> jax.Array:
        ahead = jnp.asarray(self.steps, jnp.int32) - step
        return jnp.min(jnp.where(ahead >= 0, ahead, _NEVER))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Never:
    """No updates: masks stay as they start.

    >>> Never().last is None
    True

    Attributes:
      start_step: the step at which the run starts, as for `Periodic`.
    """

    start_step: int = 0

    def __post_init__(self) -> None:
        check_integer("start_step", self.start_step, least=0)

    @property
    def last(self) -> None:
        return None

    def is_update(self, step: StepValue) -> bool | jax.Array:
        return False if isinstance(step, int) else jnp.zeros(jnp.shape(step), bool)

    def progress(self, step: StepValue) -> jax.Array:
        done: jax.Array = jnp.float32(1)
        return done

    def until_next(self, step: jax.Array) -> jax.Array:
        return jnp.full(jnp.shape(step), _NEVER)


def _progress(step: StepValue, begin: int, end: int) -> jax.Array:
    passed = (jnp.asarray(step, jnp.int32) - begin).astype(jnp.float32)
    share = passed / np.float32(max(end - begin, 1))
    return jnp.where(jnp.asarray(step) >= end, np.float32(1), jnp.clip(share, 0, 1))


class ValueSchedule(Hashable, Protocol):
    """A number over the progress of mask updates, hashable as an `UpdateSchedule` is."""

    def __call__(self, progress: jax.Array) -> jax.Array:
        """The float32 value at `progress` in [0, 1]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant:
    """The same value throughout.

    >>> float(Constant(value=0.5)(jnp.float32(0.3)))
    0.5

    Attributes:
      value: in [0, 1].
    """

    value: float

    def __post_init__(self) -> None:
        check_share("Constant.value", self.value)

    def __call__(self, progress: jax.Array) -> jax.Array:
        return jnp.full(jnp.shape(progress), self.value, jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Polynomial:
    """final + (initial - final) (1 - progress)^power; power 1 is linear.

    With power 3, from 0 to 1, it is the level of gradual magnitude pruning (Zhu & Gupta 2017,
    arXiv:1710.01878, section 3).

    >>> level = Polynomial(initial=0.0, final=1.0, power=3.0)
    >>> [float(level(jnp.float32(progress))) for progress in (0, 0.5, 1)]
    [0.0, 0.875, 1.0]

    Attributes:
      initial, final: values at progress 0 and 1, in [0, 1].
      power: above 0.
    """

    initial: float = 0.0
    final: float = 1.0
    power: float = 3.0

    def __post_init__(self) -> None:
        check_share("Polynomial.initial", self.initial)
        check_share("Polynomial.final", self.final)
        check_positive("Polynomial.power", self.power)

    def __call__(self, progress: jax.Array) -> jax.Array:
        left: jax.Array = (1 - progress) ** self.power
        return self.final + (self.initial - self.final) * left


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine:
    """final + (initial - final) (1 + cos(pi progress)) / 2.

    With final 0 it is the drop fraction of RigL (Evci et al. 2020, arXiv:1911.11134, section 3).

    >>> fraction = Cosine(initial=0.3)
    >>> [round(float(fraction(jnp.float32(progress))), 4) for progress in (0, 0.5, 1)]
    [0.3, 0.15, 0.0]

    Attributes:
      initial, final: values at progress 0 and 1, in [0, 1].
    """

    initial: float
    final: float = 0.0

    def __post_init__(self) -> None:
        check_share("Cosine.initial", self.initial)
        check_share("Cosine.final", self.final)

    def __call__(self, progress: jax.Array) -> jax.Array:
        half = (1 + jnp.cos(np.float32(np.pi) * progress)) / 2
        value = self.final + (self.initial - self.final) * half
        return jnp.where(progress >= 1, np.float32(self.final), value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exponential:
    """final + (initial - final) exp(-rate progress), and final at progress 1.

    >>> fraction = Exponential(initial=1.0, final=0.0)
    >>> [round(float(fraction(jnp.float32(progress))), 4) for progress in (0, 0.5, 1)]
    [1.0, 0.0821, 0.0]

    Attributes:
      initial, final: values at progress 0 and 1, in [0, 1].
      rate: above 0; at a rate of 5 only 1% of the way is left when progress reaches 1.
    """

    initial: float = 1.0
    final: float = 0.0
    rate: float = 5.0

    def __post_init__(self) -> None:
        check_share("Exponential.initial", self.initial)
        check_share("Exponential.final", self.final)
        check_positive("Exponential.rate", self.rate)

    def __call__(self, progress: jax.Array) -> jax.Array:
        left = jnp.exp(-np.float32(self.rate) * progress)
        value = self.final + (self.initial - self.final) * left
        return jnp.where(progress >= 1, np.float32(self.final), value)


@functools.lru_cache(maxsize=4096)
def value_after(value: ValueSchedule, updates: UpdateSchedule, updated: int | None) -> float:
    """The value after the update at step `updated`, or before the first where it is None.

    On the host. A device computes it, exactly as a train step does, and so it is cached.
    """
    return float(value(jnp.float32(0) if updated is None else updates.progress(updated)))
