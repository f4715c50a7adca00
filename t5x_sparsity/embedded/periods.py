"""When a run saves, evaluates and reports."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segment:
    """Steps [start, stop) that are dispatched in one go, and what follows them."""

    start: int
    stop: int
    save: bool
    evaluate: bool
    collect: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Periods:
    """Steps between events, None or 0: never. A ValueError unless the shortest divides all."""

    stats: int | None = None
    eval: int | None = None
    checkpoint: int | None = None
    checkpoint_steps: Sequence[int] = ()
    gc: int | None = None

    def __post_init__(self):
        periods = {
            "train.stats_period": self.stats,
            "train.eval_period": self.eval,
            "utils.SaveCheckpointConfig.period": self.checkpoint,
            "train.gc_period": self.gc,
        }
        for name, period in periods.items():
            if period is not None and period < 0:
                raise ValueError(f"{name} is {period}; it must be a number of steps, or None.")
        del periods["train.stats_period"]
        periods = {name: period for name, period in periods.items() if period}
        shortest = min(periods.values(), default=1)
        if any(period % shortest for period in periods.values()):
            given = ", ".join(f"{name} = {period}" for name, period in periods.items())
            raise ValueError(
                f"The periods must all be multiples of the shortest of them, {shortest}, but they "
                f"are {given}. Change one of them."
            )

    def segments(self, first: int, total: int) -> Iterator[Segment]:
        """The segments from step `first` to `total`; periods count from `first`.

        A segment ends at the next multiple of the shortest period, of `stats` within it, or at the
        next of `checkpoint_steps`. The end of training counts as a multiple of every period.
        """
        periods = [period for period in (self.eval, self.checkpoint, self.gc) if period]
        shortest = min(periods, default=max(total - first, 1))
        extra = sorted(self.checkpoint_steps)

        def due(period, stop):
            return bool(period) and (stop == total or (stop - first) % period == 0)

        start = first
        while start < total:
            ends = [total, start + (self.stats or shortest)]
            ends.append(start + shortest - (start - first) % shortest)
            ends += [step for step in extra if step > start][:1]
            stop = min(ends)
            yield Segment(
                start=start,
                stop=stop,
                save=due(self.checkpoint, stop) or stop in extra or bool(extra) and stop == total,
                evaluate=due(self.eval, stop),
                collect=due(self.gc, stop),
            )
            start = stop
