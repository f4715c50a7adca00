"""The bar and the log lines."""

import concurrent.futures
import io
import re

import clu.values
import rich.console
from absl import logging

from t5x_sparsity.embedded import progress


def done(**values):
    future = concurrent.futures.Future()
    future.set_result({name: clu.values.Scalar(value) for name, value in values.items()})
    return future


def console(terminal):
    return rich.console.Console(file=io.StringIO(), force_terminal=terminal, width=120)


VALUES = {"loss_per_nonpadding_target_token": 2.5, "sparsity/total": 0.8, "accuracy": 0.1}


def test_log_lines_off_a_terminal(caplog):
    logging.set_verbosity(logging.INFO)
    with caplog.at_level("INFO", logger="absl"):
        with progress.Progress(10, 30, console(False)) as report:
            batches = report.count(iter("abc"))
            assert list(batches) == ["a", "b", "c"]
            report.watch(20, done(**VALUES))
            report.watch(30, done(loss=1.0))
    first, second = (r.getMessage() for r in caplog.records if "Step" in r.getMessage())
    assert first.startswith("Step 20/30: loss 2.5000, sparsity 80.00%, ")
    assert "steps/s" in first and "left" in first
    # A run without these values says nothing of them.
    assert second.startswith("Step 30/30: ") and "loss" not in second and "sparsity" not in second


def test_failed_summary_is_left_to_the_trainer(caplog):
    failed = concurrent.futures.Future()
    failed.set_exception(RuntimeError("no"))
    with progress.Progress(0, 2, console(False)) as report:
        report.watch(2, failed)
    assert not any("Step" in r.getMessage() for r in caplog.records)


def test_bar_on_a_terminal_prints_logs_above_itself():
    logging.set_verbosity(logging.INFO)
    screen = console(True)
    handler = logging.get_absl_handler()
    before = handler.python_handler.stream
    with progress.Progress(0, 4, screen) as report:
        for _ in report.count(iter(range(3))):
            pass
        report.watch(2, done(**VALUES))
        handler.python_handler.stream.write("I0101 [a line of the log]\n")
    assert handler.python_handler.stream is before
    shown = re.sub(r"\x1b\[[0-9;]*m", "", screen.file.getvalue())  # without colours
    assert "I0101 [a line of the log]" in shown
    assert "step 3/4" in shown
    assert "loss 2.5000, sparsity 80.00%" in shown


def test_count_is_of_dispatched_steps_only():
    # A summary that never comes must not hold up the counting.
    waiting = concurrent.futures.Future()
    screen = console(True)
    with progress.Progress(0, 9, screen) as report:
        report.watch(5, waiting)
        for _ in report.count(iter(range(7))):
            pass
        assert report._bar.tasks[0].completed == 7
        waiting.set_result({})


def test_orbax_notes_are_dropped_and_warnings_stay():
    handler = logging.get_absl_handler()
    before = list(handler.filters)
    with progress.without_orbax_notes():
        (added,) = set(handler.filters) - set(before)
        kept = added
    assert handler.filters == before
    record = logging.logging.LogRecord
    note = record("absl", 20, "/site/orbax/checkpoint/x.py", 1, "", (), None)
    warning = record("absl", 30, "/site/orbax/checkpoint/x.py", 1, "", (), None)
    ours = record("absl", 20, "/site/t5x_sparsity/x.py", 1, "", (), None)
    assert [kept(r) for r in (note, warning, ours)] == [False, True, True]
