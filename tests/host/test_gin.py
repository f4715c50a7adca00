"""What the include binds, and every way to get it wrong, before anything is built."""

import sys
import types
from pathlib import Path

import gin
import pytest

import t5x_sparsity as ts
from t5x_sparsity.plugin import SparseTrainStateInitializer, sparse_trainer

ROOT = Path(__file__).resolve().parents[2]
METHODS = ("dense", "magnitude", "rigl", "set", "static")


@pytest.fixture
def configure(monkeypatch):
    """Parses gin text as a run does, under a train() that takes what T5X's takes."""
    script = types.ModuleType("__main__")

    def train(trainer_cls=None, train_state_initializer_cls=None):
        return trainer_cls, train_state_initializer_cls

    train.__module__ = "__main__"
    script.train = train
    monkeypatch.setitem(sys.modules, "__main__", script)
    gin.add_config_file_search_path(str(ROOT / "gin"))

    def parse(text, *bindings):
        gin.clear_config()
        with gin.config.interactive_mode():
            gin.configurable(train)
            gin.parse_config(text)
            gin.parse_config(list(bindings))
        gin.finalize()
        return gin.get_configurable(train)()

    with gin.unlock_config():
        yield parse
        gin.clear_config()


RIGL = "include 'sparsity/rigl.gin'\nTRAIN_STEPS = 1000\n"
TRAINER_AGAIN = """
from __gin__ import dynamic_registration
import __main__ as train_script
from t5x_sparsity import host
train_script.train.trainer_cls = @host.trainer.Trainer
"""


@pytest.mark.parametrize("method", METHODS)
def test_an_include_binds_both_halves(configure, method):
    steps = "" if method in ("dense", "static") else "TRAIN_STEPS = 1000\n"
    trainer_cls, initializer_cls = configure(f"include 'sparsity/{method}.gin'\n{steps}")
    assert trainer_cls.__wrapped__ is sparse_trainer
    assert issubclass(initializer_cls, SparseTrainStateInitializer)


def test_macros_reach_the_algorithm(configure):
    configure(
        RIGL,
        "SPARSITY = 0.9",
        "SPARSITY_DISTRIBUTION = 'er'",
        "MASK_UPDATE_BEGIN = 10",
        "MASK_UPDATE_END = 0.5",
        "MASK_UPDATE_PERIOD = 7",
        "DROP_FRACTION = 0.4",
        "EMBEDDING_SPARSITY = 'auto'",
    )
    config = gin.get_configurable(ts.SparsityConfig)()
    assert config == ts.SparsityConfig(
        algorithm=ts.RigL(
            updates=ts.Periodic(begin=10, end=500, period=7, total_steps=1000),
            drop_fraction=ts.Cosine(initial=0.4),
        ),
        sparsity=0.9,
        distribution="er",
        embedding_sparsity="auto",
    )


@pytest.mark.parametrize(
    ("method", "algorithm"),
    [
        ("rigl", ts.RigL(updates=ts.Periodic(begin=0, end=750, period=100, total_steps=1000))),
        ("set", ts.SET(updates=ts.Periodic(begin=0, end=750, period=100, total_steps=1000))),
        ("static", ts.Static()),
        ("dense", ts.Dense()),
        (
            "magnitude",
            ts.Magnitude(updates=ts.Periodic(begin=250, end=750, period=100, total_steps=1000)),
        ),
    ],
)
def test_defaults_are_those_the_comments_name(configure, method, algorithm):
    steps = "" if method in ("dense", "static") else "TRAIN_STEPS = 1000\n"
    configure(f"include 'sparsity/{method}.gin'\n{steps}")
    config = gin.get_configurable(ts.SparsityConfig)()
    assert config.algorithm == algorithm
    assert config.sparsity == 0.8


def test_a_run_file_included_later_is_an_error(configure):
    with pytest.raises(ValueError, match=r"not its trainer.*Include sparsity/\*\.gin last"):
        configure(RIGL + TRAINER_AGAIN)


def test_a_run_file_included_before_is_fine(configure):
    trainer_cls, _ = configure(TRAINER_AGAIN + RIGL)
    assert trainer_cls.__wrapped__ is sparse_trainer


def test_the_initializer_taken_back_is_an_error(configure):
    again = """
from __gin__ import dynamic_registration
import __main__ as train_script
from t5x_sparsity import host
train_script.train.train_state_initializer_cls = @host.utils.TrainStateInitializer
"""
    with pytest.raises(ValueError, match="would train dense: bind"):
        configure(RIGL + again)


@pytest.mark.parametrize(
    ("text", "binding", "message"),
    [
        (RIGL, "SPARSTY = 0.9", "SPARSTY is bound.*did you mean SPARSITY"),
        (RIGL, "sparsity = 0.9", "did you mean SPARSITY"),
        (RIGL, "MASK_UPDATES_END = 0.9", "did you mean MASK_UPDATE_END"),
        ("include 'sparsity/static.gin'\n", "DROP_FRACTION = 0.9", "DROP_FRACTION is bound, but"),
        ("include 'sparsity/dense.gin'\n", "SPARSITY = 0.9", "SPARSITY is bound, but nothing"),
        (RIGL, "t5x_sparsity.SparsityConfig.sparsity = 0.9", "SPARSITY is bound, but nothing"),
    ],
)
def test_a_macro_that_nobody_reads_is_an_error(configure, text, binding, message):
    with pytest.raises(ValueError, match=message):
        configure(text, binding)


def test_macros_of_the_users_own_are_let_alone(configure):
    configure(RIGL, "MY_NOTE = 'unused'", "DROPOUT_RATE = 0.1")


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("SPARSITY = 1.2", r"SPARSITY\) must be a number in \[0, 1\), got 1.2"),
        ("SPARSITY = 1", r"SPARSITY\) must be a number in \[0, 1\), got 1"),
        ("SPARSITY = -0.1", r"SPARSITY\) must be"),
        ("SPARSITY = '0.9'", r"SPARSITY\) must be a number.*got '0.9'"),
        ("SPARSITY_DISTRIBUTION = 'ekr'", r"unknown sparsity distribution 'ekr'.*'erk'"),
        ("MASK_UPDATE_PERIOD = 0", r"MASK_UPDATE_PERIOD\) must be an integer of at least 1"),
        ("MASK_UPDATE_BEGIN = 900", "MASK_UPDATE_BEGIN <= MASK_UPDATE_END"),
        ("MASK_UPDATE_END = 1.5", r"MASK_UPDATE_END\).*share of the run.*got 1.5"),
        ("DROP_FRACTION = 2", r"Cosine.initial must be a number in \[0, 1\], got 2"),
        ("TRAIN_STEPS = None", r"TRAIN_STEPS\); bind it"),
        ("EMBEDDING_SPARSITY = 3", r"EMBEDDING_SPARSITY\), unless .* must be"),
    ],
)
def test_a_bad_value_is_one_error_that_names_it(configure, binding, message):
    with pytest.raises(ValueError, match=message):
        configure(RIGL, binding)
        gin.get_configurable(ts.SparsityConfig)()


def test_without_train_steps_the_error_names_them(configure):
    with pytest.raises(Exception, match="TRAIN_STEPS"):
        configure("include 'sparsity/rigl.gin'\n")
        gin.get_configurable(ts.SparsityConfig)()
