"""T5X's other jobs read a sparse run's checkpoints without the plugin, and see masked weights."""

import functools
import json
import sys
import types

import inprocess_runs
import jax
import numpy as np
import pytest
import seqio
import tensorflow as tf
import tiny_t5
from flax import traverse_util

from t5x_sparsity import host
from t5x_sparsity.core import packing
from t5x_sparsity.core.trees import flatten

pytestmark = [tiny_t5.t5x_only, pytest.mark.slow]

NAME, LENGTH, BATCH = "jobs", 6, 4


def quiet(*args, **kwargs):
    """Writes no configuration: there is no gin file here."""


def examples(split, shuffle_files, seed=None):
    del shuffle_files, seed
    rng = np.random.default_rng(0 if split == "train" else 1)
    count = 64 if split == "train" else 2 * BATCH
    tokens = rng.integers(3, tiny_t5.VOCAB, (2, count, LENGTH)).astype(np.int32)
    return tf.data.Dataset.from_tensor_slices({"inputs": tokens[0], "targets": tokens[1]})


def mean_score(targets, scores):
    return {"mean_score": float(np.mean(scores))}


def exact(targets, predictions):
    return {"exact": float(np.mean([t == p for t, p in zip(targets, predictions, strict=True)]))}


@functools.cache
def task():
    feature = seqio.Feature(seqio.ByteVocabulary(), add_eos=False)
    seqio.TaskRegistry.add(
        NAME,
        source=seqio.FunctionDataSource(examples, splits=("train", "validation")),
        preprocessors=[],
        output_features={"inputs": feature, "targets": feature},
        metric_fns=[mean_score, exact],
    )
    return NAME


def data(split="validation"):
    return host.utils.DatasetConfig(
        mixture_or_task_name=task(),
        task_feature_lengths={"inputs": LENGTH, "targets": LENGTH},
        split=split,
        batch_size=BATCH,
        shuffle=False,
        seed=3,
        pack=False,
    )


def net():
    return tiny_t5.model(tiny_t5.OPTIMIZERS["adamw"]())


def train(model_dir, **kwargs):
    config = tiny_t5.rigl(0.75, begin=1, end=3, period=2)
    features = ("inputs", "targets")
    return inprocess_runs.run(
        model_dir, config, 4, build=tiny_t5.model, features=features, **kwargs
    )


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    """The last checkpoint of a sparse run, and its leaves."""
    folder = tmp_path_factory.mktemp("jobs") / "run"
    leaves = train(folder)
    return folder / "checkpoint_4", leaves


@pytest.fixture
def restored(monkeypatch):
    """The train states that a job restores."""
    states, restore = [], host.utils.create_checkpoint_manager_and_restore

    def spy(*args, **kwargs):
        result = restore(*args, **kwargs)
        states.append(result[0])
        return result

    monkeypatch.setattr(host.utils, "create_checkpoint_manager_and_restore", spy)
    return states


@pytest.fixture
def t5_package(monkeypatch):
    """precompile.py imports t5's mixtures, only to register them; the package is a large one."""
    for name in ("t5", "t5.data", "t5.data.mixtures"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))


def evaluator():
    loggers = [seqio.TensorBoardLogger, seqio.JSONLogger]
    return functools.partial(seqio.Evaluator, logger_cls=loggers)


def checkpoint(path, **kwargs):
    return host.utils.RestoreCheckpointConfig(path=str(path), mode="specific", **kwargs)


def assert_masked(params, leaves):
    """The weights are those of the run, and 0 where its masks prune."""
    found = {p: np.asarray(host.utils.get_local_data(x)) for p, x in flatten(params).items()}
    assert found.keys() == {k[len("target/") :] for k in leaves if k.startswith("target/")}
    pruned = 0
    for path, weight in found.items():
        np.testing.assert_array_equal(weight, leaves[f"target/{path}"], err_msg=path)
        stored = leaves.get(f"state/sparsity/masks/{path}")
        if stored is not None:
            kept = np.asarray(packing.unpack(stored, weight.shape))
            assert (weight[~kept] == 0).all(), path
            pruned += (~kept).sum()
    # all kernels but the embedding's
    assert pruned > 0.7 * sum(w.size for p, w in found.items() if p.endswith("kernel"))


def params(leaves):
    flat = {k[len("target/") :]: v for k, v in leaves.items() if k.startswith("target/")}
    return traverse_util.unflatten_dict(flat, sep="/")


@functools.cache
def batch():
    found = list(examples("validation", False).batch(2 * BATCH).as_numpy_iterator())[0]
    targets = found["targets"]
    shifted = np.pad(targets[:, :-1], ((0, 0), (1, 0)))
    return {
        "encoder_input_tokens": found["inputs"],
        "decoder_input_tokens": shifted,
        "decoder_target_tokens": targets,
        "decoder_loss_weights": np.ones_like(targets),
    }


@pytest.fixture(scope="module")
def expected(sparse):
    """Scores and predictions of the run's own weights, which T5X's model makes itself."""
    own = params(sparse[1])
    scores = np.asarray(jax.jit(net().score_batch)(own, batch()))
    tokens = np.asarray(jax.jit(net().predict_batch)(own, batch()))
    return scores, tokens


def test_evaluate_sees_the_masked_weights(tmp_path, sparse, expected, restored):
    from t5x import eval as t5x_eval

    path, leaves = sparse
    t5x_eval.evaluate(
        model=net(),
        dataset_cfg=data(),
        restore_checkpoint_cfg=checkpoint(path),
        partitioner=tiny_t5.MeshPartitioner(),
        output_dir=str(tmp_path),
        inference_evaluator_cls=evaluator(),
        training_evaluator_cls=host.Trainer,
        # T5X's default lacks this one argument
        train_eval_get_dataset_fn=functools.partial(
            host.utils.get_training_eval_datasets, eval_steps=1
        ),
        summarize_config_fn=quiet,
    )
    (state,) = restored
    assert int(state.step) == 4
    assert_masked(state.params, leaves)
    (line,) = (tmp_path / f"inference_eval/{NAME}-metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["mean_score"] == pytest.approx(expected[0].mean(), rel=1e-5)
    assert f"{path}" in (tmp_path / f"eval.{NAME}.ckpt").read_text()


def test_evaluate_follows_all_checkpoints_of_a_run(tmp_path, sparse, restored):
    """As a job beside the training does: those that it has seen, it passes over."""
    from t5x import eval as t5x_eval

    for _ in range(2):
        t5x_eval.evaluate(
            model=net(),
            dataset_cfg=data(),
            restore_checkpoint_cfg=host.utils.RestoreCheckpointConfig(
                path=str(sparse[0].parent), mode="all"
            ),
            partitioner=tiny_t5.MeshPartitioner(),
            output_dir=str(tmp_path),
            inference_evaluator_cls=evaluator(),
            summarize_config_fn=quiet,
        )
    assert [int(state.step) for state in restored] == [0, 2, 4]
    assert_masked(restored[-1].params, sparse[1])


@pytest.mark.parametrize("mode", ["predict", "score", "predict_with_aux"])
def test_infer_gives_what_the_runs_weights_give(tmp_path, sparse, expected, restored, mode):
    from t5x import infer

    infer.infer(
        mode=mode,
        model=net(),
        dataset_cfg=data(),
        restore_checkpoint_cfg=checkpoint(sparse[0]),
        partitioner=tiny_t5.MeshPartitioner(),
        output_dir=str(tmp_path),
        checkpoint_period=1,
        checkpoint_ds_iter=False,
        summarize_config_fn=quiet,
    )
    assert_masked(restored[0].params, sparse[1])
    (file,) = tmp_path.glob(f"{NAME}-{mode}.jsonl-*-of-*1")
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(found) == 2 * BATCH
    scores, tokens = expected
    if mode == "score":
        np.testing.assert_allclose([x["score"] for x in found], scores, rtol=1e-5)
    else:
        vocabulary = seqio.ByteVocabulary()
        said = [vocabulary.decode([int(t) for t in row]) for row in tokens]
        assert [x["prediction"] for x in found] == said


def test_an_export_holds_the_masked_weights(tmp_path, sparse, expected):
    from t5x import export_lib

    feature = seqio.Feature(seqio.ByteVocabulary(), add_eos=False)
    export_lib.save(
        model=net(),
        # TensorFlow can't read what JAX makes of the top_k in predict
        inference_mode="score",
        restore_checkpoint_cfg=checkpoint(sparse[0]),
        exportable_module_cls=export_lib.ExportableModule,
        create_preprocessor_fn=functools.partial(
            export_lib.create_preprocessor, split_separator="|"
        ),
        partitioner=tiny_t5.MeshPartitioner(),
        output_features={"inputs": feature, "targets": feature},
        task_feature_lengths={"inputs": LENGTH, "targets": LENGTH},
        batch_size=2 * BATCH,
        output_dir={"cpu": str(tmp_path)},
        model_name="/sparse/model",
    )
    loaded = tf.saved_model.load(str(tmp_path))
    # a byte's token is 3 more than the byte
    inputs, targets = (
        [bytes(row - 3) for row in batch()[k].astype(np.uint8)]
        for k in ("encoder_input_tokens", "decoder_target_tokens")
    )
    texts = [b"|".join(pair) for pair in zip(inputs, targets, strict=True)]
    scores = np.squeeze(loaded(tf.constant(texts)))
    np.testing.assert_allclose(scores, expected[0], rtol=1e-5)
    weights = {v.name.removesuffix(":0").replace("__", "/"): v.numpy() for v in loaded._variables}
    assert_masked(params({f"target/{k}": v for k, v in weights.items()}), sparse[1])


def test_precompile_dumps_the_dense_step(tmp_path, t5_package):
    """It takes T5X's own initializer, whatever is bound, and reads no checkpoint."""
    from t5x import precompile

    precompile.precompile(
        model=net(),
        train_dataset_cfg=data("train"),
        partitioner=tiny_t5.MeshPartitioner(),
        model_dir=str(tmp_path),
        random_seed=0,
    )
    assert (tmp_path / "lowered_hlo_post_optimization").stat().st_size
    assert (tmp_path / "assignment").stat().st_size


def test_the_interactive_model_sees_the_masked_weights(tmp_path):
    from t5x import interactive_model

    # it reads T5X's own format alone
    leaves = train(tmp_path / "run", use_orbax=False, save={"save_dataset": False})
    model = interactive_model.InteractiveModel(
        batch_size=BATCH,
        task_feature_lengths={"inputs": LENGTH, "targets": LENGTH},
        output_dir=str(tmp_path / "interactive"),
        # on devices, T5X can't read its own format on this JAX
        partitioner=tiny_t5.MeshPartitioner(params_on_devices=False),
        model=net(),
        dtype="float32",
        restore_mode="specific",
        checkpoint_path=str(tmp_path / "run/checkpoint_4"),
        input_shapes={k: (BATCH, LENGTH) for k in tiny_t5.FEATURES},
    )
    assert model.step == 4
    assert_masked(model.train_state.params, leaves)
