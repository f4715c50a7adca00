"""Runs that tests of several files read, trained once per worker; copy one to go on with it."""

import inprocess_runs
import pytest
import tiny_t5


@pytest.fixture(scope="session")
def dense_run(tmp_path_factory):
    """The folder of a dense run, saved at 0, 2 and 4, and its final leaves."""
    folder = tmp_path_factory.mktemp("dense") / "run"
    return folder, inprocess_runs.run(folder, None, 4)


@pytest.fixture(scope="session")
def rigl_run(tmp_path_factory):
    """The folder of a run of RigL, saved at 0, 2 and 4, and its final leaves."""
    folder = tmp_path_factory.mktemp("rigl") / "run"
    config = tiny_t5.rigl(0.5, begin=1, end=7, period=2)
    return folder, inprocess_runs.run(folder, config, 4)
