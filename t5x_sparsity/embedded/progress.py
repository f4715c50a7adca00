"""How a run reports itself: a bar on a terminal, log lines elsewhere."""

from __future__ import annotations

import concurrent.futures
import contextlib
import datetime
import logging as std_logging
import math
import sys
import time
from collections.abc import Iterator
from typing import Any

import rich.console
import rich.progress
from absl import logging

LOSS = "loss_per_nonpadding_target_token"
_SHOWN = {"loss": (LOSS, "{:.4f}"), "sparsity": ("sparsity/total", "{:.2%}")}


@contextlib.contextmanager
def without_orbax_notes() -> Iterator[None]:
    """Keeps what Orbax notes at each checkpoint, a dozen lines, out of the log meanwhile."""

    def is_no_note(record: std_logging.LogRecord) -> bool:
        return record.levelno > std_logging.INFO or "/orbax/" not in record.pathname

    handler = logging.get_absl_handler()
    handler.addFilter(is_no_note)
    try:
        yield
    finally:
        handler.removeFilter(is_no_note)


class Progress:
    """Step, loss, sparsity, steps per second and time left; never reads the devices.

    It counts the batches that the trainer takes, and learns the metrics of a stats period when
    their summary is ready, in its own thread. As a context manager it shows the bar, with absl's
    log lines printed above it, if `console` (standard error) is a terminal, and logs otherwise.
    """

    def __init__(
        self, first_step: int, total_steps: int, console: rich.console.Console | None = None
    ):
        self._first, self._total = first_step, total_steps
        self._begun = time.monotonic()
        self._seen = (first_step, self._begun)
        self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="progress")
        console = console or rich.console.Console(file=sys.stderr)
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("step"),
            rich.progress.MofNCompleteColumn(),
            rich.progress.BarColumn(),
            rich.progress.TextColumn("{task.description}"),
            console=console,
            refresh_per_second=4,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", completed=first_step, total=total_steps)
        self._stream: Any = None

    def __enter__(self) -> Progress:
        if not self._bar.disable:
            self._bar.start()
            # What the bar makes of standard error prints above it.
            self._stream = logging.get_absl_handler().python_handler.setStream(sys.stderr)
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._pool.shutdown()
        if not self._bar.disable:
            self._bar.stop()
            logging.get_absl_handler().python_handler.setStream(self._stream)

    def count(self, batches: Iterator) -> Iterator:
        """The same batches; each one taken counts as a step."""
        for batch in batches:
            self._bar.advance(self._task)
            yield batch

    def watch(self, step: int, summary: Any) -> None:
        """Report the metrics of the stats period that ends at `step` once they are ready.

        `summary.result()` maps names to clu.values.Value. Its errors are left to who made it.
        """
        self._pool.submit(self._report, step, summary)

    def _report(self, step: int, summary: Any) -> None:
        # An error in this thread goes no further; its maker raises it too.
        values = summary.result()
        now = time.monotonic()
        seen, seen_at = self._seen
        self._seen = (step, now)
        rate = (step - seen) / max(now - seen_at, 1e-9)
        # The time left counts evaluations and checkpoints too, so it goes by the whole run so far.
        left = (now - self._begun) / max(step - self._first, 1) * (self._total - step)
        parts = [
            f"{label} {form.format(float(values[name].value))}"
            for label, (name, form) in _SHOWN.items()
            if name in values
        ]
        clock = datetime.timedelta(seconds=math.ceil(max(left, 0.0)))
        status = ", ".join([*parts, f"{rate:.2f} steps/s", f"{clock} left"])
        self._bar.update(self._task, description=status)
        if self._bar.disable:
            logging.info("Step %d/%d: %s", step, self._total, status)
