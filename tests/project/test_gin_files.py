"""Every gin file of the package: it parses alone, builds what it says, and its head says how."""

import importlib.util
import inspect
import math
import pathlib
import re
import sys
import types

import gin
import jax
import pytest

import t5x_sparsity as ts
from t5x_sparsity import host, tasks

ROOT = pathlib.Path(__file__).resolve().parents[2]
MODELS = sorted((ROOT / "gin/sparsity/embedded").glob("*_*.gin"))
METHODS = sorted(
    p for p in (ROOT / "gin/sparsity").glob("*.gin") if p.stem not in ("base", "from_dense")
)
RUN = ROOT / "gin/sparsity/embedded/pretrain.gin"
STDLIB = ROOT / "examples/rigl_stdlib.gin"
COMBINED = ROOT / "examples/combined_stdlib.gin"
C4 = ROOT / "examples/t5x_rigl_c4_base.gin"

REQUIRED = {
    "MODEL_DIR": "/tmp/none",
    "TRAIN_STEPS": 12,
    "MIXTURE_OR_TASK_NAME": "stdlib_lm",
    "TASK_FEATURE_LENGTHS": {"targets": 16},
}

# Millions of weights with the byte vocabulary, counted by hand from the dimensions: a layer has
# 4 attention projections and 3 MLP kernels, a decoder layer of an encoder-decoder 4 more.
WEIGHTS = {
    "t5_1_1_tiny": 0.0983 + 2 * 0.1639 + 2 * 0.2294,
    "t5_1_1_mini": 2 * 0.0983 + 4 * 0.6554 + 4 * 0.9175,
    "t5_1_1_small": 2 * 0.1966 + 8 * 2.3593 + 8 * 3.1457,
    "t5_1_1_base": 2 * 0.2949 + 12 * 7.0779 + 12 * 9.4372,
    "decoder_tiny": 0.0492 + 2 * 0.1639,
    "decoder_mini": 0.0983 + 4 * 0.6554,
    "decoder_small": 0.1966 + 8 * 2.3593,
    "decoder_base": 0.2949 + 12 * 7.0779,
}


@pytest.fixture
def configure(monkeypatch):
    """Parses gin files as a run does and returns what train() would be called with."""
    script = types.ModuleType("__main__")
    called = {}

    def train(**kwargs):
        called.update(kwargs)

    train.__module__ = "__main__"
    script.train = train
    monkeypatch.setitem(sys.modules, "__main__", script)

    def parse(*files, **macros):
        gin.clear_config()
        called.clear()
        with gin.config.interactive_mode():
            train_using_gin = gin.configurable(train)
            bindings = [f"{name} = {value!r}" for name, value in macros.items()]
            gin.parse_config_files_and_bindings([str(file) for file in files], bindings)
        train_using_gin()
        inspect.signature(host.train_lib.train).bind(**called)
        return called

    gin.add_config_file_search_path(str(ROOT / "gin"))
    with gin.unlock_config():
        yield parse
        gin.clear_config()


def test_every_model_size_is_there():
    assert {path.stem for path in MODELS} == set(WEIGHTS)


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_model_has_the_size_that_it_says(configure, path):
    model = configure(path, RUN, **REQUIRED)["model"]
    names = ["decoder_input_tokens", "decoder_target_tokens"]
    if path.stem.startswith("t5"):
        names.append("encoder_input_tokens")
        assert isinstance(model, host.models.EncoderDecoderModel)
    else:
        assert isinstance(model, host.models.DecoderOnlyModel)
    shapes = {name: (2, 8) for name in names}
    types_ = {name: "int32" for name in names}
    params = jax.eval_shape(
        lambda rng: model.get_initial_variables(rng, shapes, types_), jax.random.key(0)
    )["params"]
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    assert count / 1e6 == pytest.approx(WEIGHTS[path.stem], rel=0.01)
    assert model.input_vocabulary == tasks.VOCABULARY
    expected = "float32" if path.stem.endswith(("tiny", "mini")) else "bfloat16"
    assert model.module.config.dtype == expected
    assert model.module.config.dropout_rate == 0.0


def test_run_file_passes_its_macros_on(configure):
    values = {
        "BATCH_SIZE": 6,
        "PACK": True,
        "SHUFFLE_TRAIN_EXAMPLES": False,
        "DATA_SEED": 7,
        "RANDOM_SEED": 8,
        "EVAL_PERIOD": 4,
        "EVAL_STEPS": 3,
        "CHECKPOINT_PERIOD": 2,
        "KEEP_CHECKPOINTS": 5,
        "SAVE_DATASET": False,
        "DROPOUT_RATE": 0.25,
        "NUM_MICROBATCHES": 2,
        "LEARNING_RATE": 0.5,
        "LEARNING_RATE_FACTORS": "constant",
    }
    model = next(path for path in MODELS if path.stem == "decoder_tiny")
    called = configure(model, RUN, **{**REQUIRED, **values})
    train, evaluation = called["train_dataset_cfg"], called["train_eval_dataset_cfg"]
    assert (train.split, train.batch_size, train.pack, train.seed) == ("train", 6, True, 7)
    assert (train.shuffle, train.mixture_or_task_name) == (False, "stdlib_lm")
    assert (evaluation.split, evaluation.batch_size, evaluation.shuffle) == ("validation", 6, False)
    assert (called["total_steps"], called["eval_period"], called["eval_steps"]) == (12, 4, 3)
    assert (called["random_seed"], called["model_dir"]) == (8, "/tmp/none")
    save = called["checkpoint_cfg"].save
    assert (save.period, save.keep, save.save_dataset, save.dtype) == (2, 5, False, "float32")
    assert called["model"].module.config.dropout_rate == 0.25
    assert gin.query_parameter("Trainer.num_microbatches") is not None
    assert float(host.utils.create_learning_rate_scheduler("constant", 0.5)(3)) == 0.5
    assert issubclass(called["trainer_cls"], host.trainer.Trainer)


@pytest.mark.parametrize("missing", sorted(REQUIRED))
def test_what_must_be_set_is_named_when_it_is_not(configure, missing):
    model = next(path for path in MODELS if path.stem == "decoder_tiny")
    rest = {name: value for name, value in REQUIRED.items() if name != missing}
    with pytest.raises((RuntimeError, ValueError), match=missing):
        configure(model, RUN, **rest)


@pytest.mark.parametrize("method", METHODS, ids=lambda path: path.stem)
def test_methods_go_on_top_of_the_run_file(configure, method):
    model = next(path for path in MODELS if path.stem == "decoder_tiny")
    called = configure(model, RUN, method, **REQUIRED)
    assert called["trainer_cls"] is not host.trainer.Trainer
    assert called["train_state_initializer_cls"] is not host.utils.TrainStateInitializer


def test_stdlib_example_is_complete(configure):
    called = configure(STDLIB)
    train = called["train_dataset_cfg"]
    assert train.mixture_or_task_name == "stdlib_lm"
    assert train.seed is not None and called["random_seed"] is not None
    save = called["checkpoint_cfg"].save
    assert save.save_dataset and save.period and called["total_steps"] % save.period == 0
    assert gin.query_parameter("SPARSITY/macro.value") == 0.8
    assert called["trainer_cls"] is not host.trainer.Trainer
    called = configure(STDLIB, SPARSITY=0.9, MODEL_DIR="/tmp/other")
    assert called["model_dir"] == "/tmp/other"
    assert gin.query_parameter("SPARSITY/macro.value") == 0.9


def test_combination_example_gives_each_weight_its_method(configure):
    configure(COMBINED)
    names = ("wi_0", "wi_1", "wo")
    shapes = {f"decoder/layers_0/mlp/{name}/kernel": (128, 256) for name in names}
    shapes |= {f"decoder/layers_0/self_attention/{x}/kernel": (128, 128) for x in ("key", "out")}
    shapes |= {"decoder/token_embedder/embedding": (384, 128)}
    shapes |= {"decoder/relpos_bias/rel_embedding": (4, 32), "decoder/decoder_norm/scale": (128,)}
    plan = gin.get_configurable(ts.SparsityConfig)().plan(
        {path: jax.ShapeDtypeStruct(shape, "float32") for path, shape in shapes.items()}
    )
    assert set(plan) == set(list(shapes)[:6])
    seen = {}
    for path, layer in plan.items():
        kind = next(kind for kind in ("mlp", "attention", "embedder") if kind in path)
        seen.setdefault(kind, set()).add((layer.algorithm, layer.pattern, round(layer.level, 4)))
    grid = {"mlp": (80, 400, 20), "attention": (0, 600, 50), "embedder": (200, 600, 40)}
    schedules = {
        kind: ts.Periodic(begin=begin, end=end, period=period, total_steps=800)
        for kind, (begin, end, period) in grid.items()
    }
    assert seen == {
        "mlp": {(ts.IterativeNM(updates=schedules["mlp"]), ts.NByM(n=2, m=4), 0.5)},
        "attention": {(ts.RigL(updates=schedules["attention"]), ts.Unstructured(), 0.9)},
        "embedder": {(ts.Magnitude(updates=schedules["embedder"]), ts.Unstructured(), 0.6838)},
    }


def test_a_folder_of_text_in_a_run_file(configure, tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "b.txt").write_text("more text")
    run = tmp_path / "run.gin"
    run.write_text(
        f"""
from __gin__ import dynamic_registration
from t5x_sparsity import tasks
include '{STDLIB}'
MIXTURE_OR_TASK_NAME = @tasks.text_folder()
"""
    )
    called = configure(run, **{"tasks.text_folder.path": str(tmp_path)})
    name = tasks.text_folder(tmp_path)
    assert called["train_dataset_cfg"].mixture_or_task_name == name
    assert called["train_eval_dataset_cfg"].mixture_or_task_name == name
    with pytest.raises(ValueError, match="text_folder.path is None, which is not a folder"):
        configure(run)
    with pytest.raises(ValueError, match="text_folder.path is '/gone', which is not a folder"):
        configure(run, **{"tasks.text_folder.path": "/gone"})


def test_c4_example_on_t5x(configure, monkeypatch):
    if host.NAME != "t5x":
        pytest.skip("it includes gin files of T5X, which is not in use")
    gin.add_config_file_search_path(str(pathlib.Path(host.utils.__file__).parents[1]))
    if importlib.util.find_spec("t5") is None:  # its tasks are registered by name alone
        for name in ("t5", "t5.data", "t5.data.mixtures"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules["t5"].data = sys.modules["t5.data"]
        sys.modules["t5.data"].mixtures = sys.modules["t5.data.mixtures"]
    called = configure(C4, MODEL_DIR="/tmp/none")
    train = called["train_dataset_cfg"]
    assert (train.mixture_or_task_name, train.batch_size) == ("c4_v220_span_corruption", 256)
    assert called["model"].module.config.emb_dim == 768
    assert called["trainer_cls"] is not host.trainer.Trainer
    assert called["train_state_initializer_cls"] is not host.utils.TrainStateInitializer


@pytest.mark.parametrize(
    "path",
    [*MODELS, RUN, *METHODS, STDLIB, COMBINED, C4],
    ids=lambda path: f"{path.parent.stem}/{path.stem}",
)
def test_head_says_what_it_is_and_how_it_is_used(path):
    text = path.read_text()
    head = re.match(r"(#.*\n)+", text).group()
    assert re.search(r"\b[Uu]sed?\b|python -m", head), "how it is used"
    assert "from __gin__ import dynamic_registration" in text
    for name in re.findall(r"^include '(.*)'", text, flags=re.MULTILINE):
        assert name.startswith("t5x/") or (ROOT / "gin" / name).is_file(), name


SHARED = sorted((ROOT / "gin/sparsity/shared").glob("*.gin"))


def bound_in(path):
    return re.findall(r"^([A-Z_]+) = ", path.read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("path", [*SHARED, *METHODS], ids=lambda path: path.stem)
def test_every_macro_has_its_comment_where_it_is_bound(path):
    for name in bound_in(path):
        assert re.search(rf"\n\n(# .+\n)+{name} = ", path.read_text()), name


@pytest.mark.parametrize("method", METHODS, ids=lambda path: path.stem)
def test_a_method_names_the_macros_that_its_includes_have(method):
    lines = method.read_text().splitlines()
    for i, line in enumerate(lines):
        if "sparsity/shared/" not in line:
            continue
        include, _, comment = line.partition("  # ")
        path = ROOT / "gin" / include.split("'")[1]
        nested = re.findall(r"^include '(.*)'", path.read_text(), flags=re.MULTILINE)
        names = [n for p in (path, *(ROOT / "gin" / p for p in nested)) for n in bound_in(p)]
        named = (comment or lines[i - 1].removeprefix("# ")).split(", ")
        assert sorted(named) == sorted(names), line
