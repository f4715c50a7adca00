"""What the include binds, and every way to get it wrong, before anything is built."""

import dataclasses

import gin
import pytest
import tiny_t5

import t5x_sparsity as ts
from t5x_sparsity.artifacts.macros import sparsity_macros
from t5x_sparsity.t5x import SparseTrainStateInitializer, sparse_trainer

METHODS = sorted(
    p.stem
    for p in (tiny_t5.ROOT / "gin/sparsity").glob("*.gin")
    if p.stem not in ("base", "from_dense")
)
WITHOUT_STEPS = ("dense", "static")


@pytest.fixture
def configure():
    """Parses gin text as a run does, and returns what train() is called with."""
    with tiny_t5.gin_script() as parse:
        yield lambda text, *bindings: parse(text, *bindings)()


def include(method):
    steps = "" if method in WITHOUT_STEPS else "TRAIN_STEPS = 1000\n"
    return f"include 'sparsity/{method}.gin'\n{steps}"


RIGL = include("rigl")
TRAINER_AGAIN = """
from __gin__ import dynamic_registration
import __main__ as train_script
from t5x_sparsity import host
train_script.train.trainer_cls = @host.trainer.Trainer
"""


@pytest.mark.parametrize("method", METHODS)
def test_an_include_binds_both_halves(configure, method):
    trainer_cls, initializer_cls = configure(include(method))
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


RAMP = ts.Periodic(begin=250, end=750, period=100, total_steps=1000)
THROUGHOUT = ts.Periodic(begin=0, end=750, period=100, total_steps=1000)
EVERY_STEP = ts.Periodic(begin=0, end=999, period=1, total_steps=1000)
PHASES = ts.Periodic(begin=100, end=850, period=500, total_steps=1000)
THIRD, HALF = ts.Cosine(initial=0.3), ts.Cosine(initial=0.5)
TWO_FOUR = ts.NByM(n=2, m=4)

# What the comments of each file name: algorithm, distribution, pattern.
DEFAULTS = {
    "acdc": (ts.ACDC(updates=PHASES, reset_optimizer=False), "uniform", None),
    "adam_fisher": (ts.AdamFisher(updates=RAMP, reset_optimizer=False), "uniform", None),
    "decaying_mask": (ts.DecayingMask(updates=RAMP), "uniform", None),
    "dense": (ts.Dense(), "uniform", None),
    "global_magnitude": (ts.GlobalMagnitude(updates=RAMP, normalization="norm"), "uniform", None),
    "global_saliency": (
        ts.GlobalSaliency(updates=RAMP, normalization="norm", gradient_steps=1),
        "uniform",
        None,
    ),
    "granet": (
        ts.GraNet(updates=THROUGHOUT, drop_fraction=HALF, initial_sparsity=0.5),
        "erk",
        None,
    ),
    "iterative_nm": (ts.IterativeNM(updates=RAMP), "uniform", TWO_FOUR),
    "lamp": (ts.GlobalMagnitude(updates=RAMP, normalization="lamp"), "uniform", None),
    "magnitude": (ts.Magnitude(updates=RAMP), "uniform", None),
    "magnitude_ste": (ts.MagnitudeSTE(updates=EVERY_STEP), "uniform", None),
    "mest": (
        ts.MEST(updates=THROUGHOUT, drop_fraction=THIRD, gradient_weight=0.01),
        "erk",
        None,
    ),
    "random": (ts.RandomPruning(updates=RAMP), "uniform", None),
    "random_ste": (ts.RandomSTE(updates=EVERY_STEP), "uniform", None),
    "rigl": (ts.RigL(updates=THROUGHOUT, drop_fraction=THIRD), "erk", None),
    "saliency": (ts.Saliency(updates=RAMP, gradient_steps=1), "uniform", None),
    "set": (ts.SET(updates=THROUGHOUT, drop_fraction=THIRD), "erk", None),
    "snfs": (ts.SNFS(updates=THROUGHOUT, drop_fraction=HALF, momentum=0.9), "erk", None),
    "sr_ste": (ts.SRSTE(updates=EVERY_STEP, decay=2e-4), "uniform", TWO_FOUR),
    "srigl": (
        ts.SRigL(updates=THROUGHOUT, drop_fraction=THIRD, ablation_threshold=0.95),
        "erk",
        ts.ConstantFanIn(),
    ),
    "static": (ts.Static(), "erk", None),
    "structure_decay": (ts.StructureDecay(updates=RAMP), "uniform", ts.NByM(n=2, m=8)),
    "top_kast": (
        ts.TopKAST(updates=THROUGHOUT, backward=ts.Constant(value=0.625), regularizer=1e-4),
        "erk",
        None,
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_defaults_are_those_the_comments_name(configure, method):
    configure(include(method))
    algorithm, distribution, pattern = DEFAULTS[method]
    assert gin.get_configurable(ts.SparsityConfig)() == ts.SparsityConfig(
        algorithm=algorithm, sparsity=0.8, distribution=distribution, pattern=pattern
    )


# A value other than the default for every macro, and where it must arrive.
SET = {
    "SPARSITY": ("0.9", lambda c: c.sparsity, 0.9),
    "SPARSITY_DISTRIBUTION": ("'er'", lambda c: c.distribution, "er"),
    "EMBEDDING_SPARSITY": ("'auto'", lambda c: c.embedding_sparsity, "auto"),
    "SPARSITY_PATTERN": ("@t5x_sparsity.Channel()", lambda c: c.pattern, ts.Channel()),
    "NM_N": ("1", lambda c: c.pattern.n, 1),
    "NM_M": ("16", lambda c: c.pattern.m, 16),
    "MASK_UPDATE_BEGIN": ("7", lambda c: c.algorithm.updates.begin, 7),
    "MASK_UPDATE_END": ("0.9", lambda c: c.algorithm.updates.end, 900),
    "MASK_UPDATE_PERIOD": ("11", lambda c: c.algorithm.updates.period, 11),
    "DROP_FRACTION": ("0.4", lambda c: c.algorithm.drop_fraction, ts.Cosine(initial=0.4)),
    "GRADIENT_STEPS": ("4", lambda c: c.algorithm.gradient_steps, 4),
    "GRADIENT_WEIGHT": ("0.5", lambda c: c.algorithm.gradient_weight, 0.5),
    "MOMENTUM": ("0.8", lambda c: c.algorithm.momentum, 0.8),
    "INITIAL_SPARSITY": ("0.25", lambda c: c.algorithm.initial_sparsity, 0.25),
    "ABLATION_THRESHOLD": ("0.3", lambda c: c.algorithm.ablation_threshold, 0.3),
    "PRUNED_WEIGHT_DECAY": ("0.1", lambda c: c.algorithm.decay, 0.1),
    "REGULARIZER": ("0.2", lambda c: c.algorithm.regularizer, 0.2),
    "BACKWARD_SPARSITY_SHARE": ("0.5", lambda c: c.algorithm.backward, ts.Constant(value=0.5)),
    "NORMALIZATION": ("None", lambda c: c.algorithm.normalization, None),
    "RESET_OPTIMIZER": ("True", lambda c: c.algorithm.reset_optimizer, True),
}


def macros_of(method):
    return [name for name, macro in sparsity_macros().items() if method in macro.defaults]


@pytest.mark.parametrize("method", [m for m in METHODS if m != "dense"])
def test_every_macro_of_a_file_reaches_the_config(configure, method):
    names = macros_of(method)
    assert names
    # the pattern by itself: others are of the file's own
    for some in ([n for n in names if n != "SPARSITY_PATTERN"], ["SPARSITY_PATTERN"]):
        configure(include(method), *(f"{name} = {SET[name][0]}" for name in some))
        config = gin.get_configurable(ts.SparsityConfig)()
        for name in some:
            _, read, expected = SET[name]
            assert read(config) == expected, name


@pytest.mark.parametrize("method", METHODS)
def test_a_method_takes_the_place_of_the_one_included_before(configure, method):
    trainer_cls, _ = configure(f"{RIGL}include 'sparsity/{method}.gin'\n")
    assert trainer_cls.__wrapped__ is sparse_trainer
    config = gin.get_configurable(ts.SparsityConfig)()
    algorithm, _, pattern = DEFAULTS[method]
    assert type(config.algorithm) is type(algorithm)
    assert config.pattern == pattern


def test_every_macro_that_the_checks_know_is_in_a_file():
    assert set(sparsity_macros()) == set(SET)
    for name, macro in sparsity_macros().items():
        assert macro.defaults.keys() <= {*METHODS, "from_dense"}, name


@pytest.mark.parametrize("name", SET)
def test_every_macro_has_its_comment(name):
    assert len(sparsity_macros()[name].comment) > 60


@pytest.mark.parametrize(
    "pattern",
    [ts.Block(height=4, width=0), ts.NByM(n=1, m=2), ts.ConstantFanIn(), ts.Unstructured()],
    ids=lambda pattern: type(pattern).__name__,
)
def test_a_pattern_by_flags_alone(configure, pattern):
    name = f"t5x_sparsity.{type(pattern).__name__}"
    values = dataclasses.asdict(pattern)
    configure(
        RIGL, f"SPARSITY_PATTERN = @{name}()", *(f"{name}.{k} = {values[k]!r}" for k in values)
    )
    assert gin.get_configurable(ts.SparsityConfig)().pattern == pattern


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
        (RIGL, "SPARSITY_PATERN = None", "did you mean SPARSITY_PATTERN"),
        (include("sr_ste"), "SPARSITY = 0.9", "SPARSITY is bound, but nothing reads it"),
        (include("srigl"), "NM_N = 2", "NM_N is bound, but nothing"),
        (include("lamp"), "NORMALIZATION = None", "NORMALIZATION is bound, but nothing reads"),
        (include("sr_ste"), "PRUNED_WEIGHTS_DECAY = 1.0", "did you mean PRUNED_WEIGHT_DECAY"),
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


@pytest.mark.parametrize(
    ("method", "binding", "message"),
    [
        ("acdc", "MASK_UPDATE_PERIOD = 0.05", r"MASK_UPDATE_PERIOD\) must be an integer.*got 0.05"),
        ("global_saliency", "NORMALIZATION = 'l1'", r"NORMALIZATION\) must be one of.*got 'l1'"),
        (
            "global_saliency",
            "GRADIENT_STEPS = 0",
            r"GRADIENT_STEPS\) must be an integer of at least",
        ),
        (
            "granet",
            "INITIAL_SPARSITY = 1.5",
            r"INITIAL_SPARSITY\) must be a number in \[0, 1\], got 1.5",
        ),
        ("granet", "DROP_FRACTION = 2", r"in \[0, 1\], got 2(.|\n)*in scope 'drop_fraction'"),
        ("mest", "GRADIENT_WEIGHT = -1", r"GRADIENT_WEIGHT\) must not be negative, got -1"),
        ("saliency", "GRADIENT_STEPS = 1.5", r"GRADIENT_STEPS\) must be an integer of at least 1"),
        ("snfs", "MOMENTUM = 1.0", r"MOMENTUM\) must be a number in \[0, 1\), got 1.0"),
        ("sr_ste", "PRUNED_WEIGHT_DECAY = -1", r"PRUNED_WEIGHT_DECAY\) must not be negative"),
        ("sr_ste", "NM_N = 5", "NByM needs 0 < n <= m, got n=5, m=4"),
        (
            "srigl",
            "ABLATION_THRESHOLD = 2",
            r"ABLATION_THRESHOLD\) must be a number in \[0, 1\], got 2",
        ),
        ("top_kast", "REGULARIZER = -1", r"REGULARIZER\) must not be negative, got -1"),
        ("top_kast", "BACKWARD_SPARSITY_SHARE = 2", r"got 2(.|\n)*in scope 'backward'"),
    ],
)
def test_a_bad_value_of_a_methods_own_is_one_error(configure, method, binding, message):
    with pytest.raises(ValueError, match=message):
        configure(include(method), binding)
        gin.get_configurable(ts.SparsityConfig)()


@pytest.mark.parametrize("method", [m for m in METHODS if m not in WITHOUT_STEPS])
def test_without_train_steps_the_error_names_them(configure, method):
    with pytest.raises(Exception, match="TRAIN_STEPS"):
        configure(f"include 'sparsity/{method}.gin'\n")
        gin.get_configurable(ts.SparsityConfig)()
