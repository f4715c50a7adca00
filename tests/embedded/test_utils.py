"""Configurations, learning rates, datasets and the train-state initializer."""

import dataclasses
import hashlib
import os
import re
import subprocess
import sys
import warnings

import jax
import micro_model as micro
import numpy as np
import pytest
import seqio
import tensorflow as tf

from t5x_sparsity.embedded import data, utils

SINGLE = micro.OneDevice()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: utils.SaveCheckpointConfig(dtype="float16"),
            "SaveCheckpointConfig.dtype is 'float16'; it must be one of None, 'float32', 'bf",
        ),
        (
            lambda: utils.SaveCheckpointConfig(period=0),
            "SaveCheckpointConfig.period is 0; it must be at least 1, or None",
        ),
        (
            lambda: utils.SaveCheckpointConfig(keep=0),
            "SaveCheckpointConfig.keep is 0; it must be at least 1, or None",
        ),
        (
            lambda: utils.RestoreCheckpointConfig(mode="newest"),
            "RestoreCheckpointConfig.mode is 'newest'; it must be one of 'specific', 'latest'",
        ),
        (
            lambda: utils.RestoreCheckpointConfig(dtype="int8"),
            "RestoreCheckpointConfig.dtype is 'int8'; it must be one of None, 'float32'",
        ),
        (
            lambda: utils.RestoreCheckpointConfig(fallback_to_scratch=True),
            "fallback_to_scratch = True needs an assignment_map",
        ),
        (
            lambda: micro.dataset_config(batch_size=0),
            "DatasetConfig.batch_size is 0; it must be at least 1",
        ),
        (
            lambda: micro.dataset_config(task_feature_lengths={}),
            "task_feature_lengths is empty; give each feature's length (gin macro TASK_FEATURE",
        ),
    ],
)
def test_bad_configuration_is_named(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_unknown_configuration_value_is_refused():
    with pytest.raises(TypeError, match="keep_best"):
        utils.SaveCheckpointConfig(keep_best=3)


def test_learning_rates_by_hand():
    def rate(step, **kwargs):
        return float(utils.create_learning_rate_scheduler(**kwargs)(np.int32(step)))

    base = dict(base_learning_rate=2.0, warmup_steps=4)
    assert rate(2, factors="constant * linear_warmup", **base) == pytest.approx(1.0)
    assert rate(9, factors="constant*linear_warmup", **base) == pytest.approx(2.0)
    assert rate(1, factors="rsqrt_decay", **base) == pytest.approx(0.5)
    assert rate(16, factors="constant * rsqrt_decay", **base) == pytest.approx(0.5)
    assert rate(16, factors="rsqrt_normalized_decay", **base) == pytest.approx(0.5)
    # a quarter of the cycle after warmup: (1 + cos(pi / 4)) / 2
    assert rate(6, factors="cosine_decay", steps_per_cycle=8, **base) == pytest.approx(0.8535534)
    assert rate(0, factors="linear_warmup", **base) == pytest.approx(1e-8)


def test_learning_rates_are_those_of_t5x():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # T5X itself is not free of deprecations
        theirs = pytest.importorskip("t5x.utils").create_learning_rate_scheduler
    steps = np.arange(0, 60, 7, dtype=np.int32)
    for factors in (
        "constant * linear_warmup * rsqrt_decay",
        "constant * rsqrt_normalized_decay",
        "constant * cosine_decay",
    ):
        kwargs = dict(
            factors=factors,
            base_learning_rate=0.3,
            warmup_steps=9,
            steps_per_cycle=25,
        )
        ours = [utils.create_learning_rate_scheduler(**kwargs)(s) for s in steps]
        np.testing.assert_allclose(ours, [theirs(**kwargs)(s) for s in steps], rtol=1e-6)


def test_bad_learning_rates_are_named():
    with pytest.raises(ValueError, match="names the factor 'quadratic'; the factors are constant"):
        utils.create_learning_rate_scheduler(factors="constant * quadratic")
    with pytest.raises(ValueError, match="warmup_steps is 0; with 'rsqrt_decay' it must be"):
        utils.create_learning_rate_scheduler(factors="rsqrt_decay", warmup_steps=0)
    with pytest.raises(ValueError, match="names the factor 'decay_every'; .* T5X has others"):
        utils.create_learning_rate_scheduler(factors="decay_every")
    with pytest.raises(TypeError, match="has no decay_factor, step_offset: leave it out, or use"):
        utils.create_learning_rate_scheduler(decay_factor=0.5, step_offset=2)


def test_assignment_map():
    saved = {"target": {"old": 1, "same": 2}, "state": {"step": 3}}
    expected = {"target": {"new": 0, "same": 0, "fresh": 0}, "state": {"step": 0}}

    def apply(*rules, **kwargs):
        (transform,) = utils.RestoreCheckpointConfig(assignment_map=rules).transformations
        return transform(saved, expected, **kwargs)

    rules = (("target/n(.)w", r"target/old"), ("target/fresh", None))
    assert apply(*rules) == {"target": {"new": 1, "same": 2}, "state": {"step": 3}}
    assert apply(("state/step", None)) == {"target": {"old": 1, "same": 2}}
    assert apply(*rules, is_resuming=True) is saved
    with pytest.raises(ValueError, match="'target/gone', which the checkpoint doesn't hold"):
        apply(("target/new", "target/gone"))
    with pytest.raises(ValueError, match=r"\['traget/.*'\] match no leaf of the model's state"):
        apply(("traget/.*", None))


def test_initializer_knows_shapes_and_axes():
    initializer, state, model, _ = micro.initial_state()
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    expected = jax.tree.map(lambda x: (x.shape, x.dtype), initializer.global_train_state_shape)
    assert shapes == expected
    assert tuple(initializer.train_state_axes.params["kernel"]) == (None, "model")
    rng = jax.random.PRNGKey(0)
    eager = model.get_initial_variables(rng, {"decoder_input_tokens": (8, micro.LENGTH)})
    np.testing.assert_allclose(state.params["table"], eager["params"]["table"], rtol=1e-6)


def test_initializer_without_optimizer():
    with pytest.raises(ValueError, match="no optimizer_def: the embedded host only trains"):
        utils.TrainStateInitializer(None, lambda **_: {}, {}, SINGLE)


def test_model_info(tmp_path):
    path = tmp_path / "model-info.txt"
    utils.log_model_info(str(path), micro.initial_state()[0].global_train_state_shape)
    text = path.read_text()
    assert text.startswith("Weights in all: 512\n")
    line = next(x for x in text.splitlines() if "kernel" in x)
    assert [x.strip() for x in line.strip("|").split("|")] == [
        "kernel",
        "(8, 32)",
        "float32",
        "256",
    ]


def digest(batches):
    hashed = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            hashed.update(np.asarray(batch[name]).tobytes())
    return hashed.hexdigest()


def first_batches(count, **overrides):
    cfg = micro.dataset_config(**overrides)
    found = data.get_dataset(cfg, 0, 1, seqio.DecoderFeatureConverter)
    return list(found.take(count).as_numpy_iterator())


@pytest.mark.slow
def test_data_is_the_same_in_another_process():
    # 30 batches of 8 are two and a half epochs, through shuffling and a random preprocessor.
    here = digest(first_batches(30))
    code = "import test_utils as t; print(t.digest(t.first_batches(30)))"
    there = subprocess.run(
        [sys.executable, "-c", code],
        cwd=os.path.dirname(__file__),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert there.stdout.strip() == here
    assert digest(first_batches(30, seed=4)) != here


def test_batches_are_skipped_and_placed():
    batches = first_batches(7)
    cfg = micro.dataset_config()
    found = data.get_dataset(cfg, 0, 1, seqio.DecoderFeatureConverter)
    skipped = data.train_batches(found, SINGLE, 5)
    got = [next(skipped), next(skipped)]
    assert digest(got) == digest(batches[5:])
    assert got[0]["decoder_target_tokens"].sharding.spec == SINGLE.data_partition_spec


def test_data_that_ends_and_nonsense_are_refused():
    numbers = tf.data.Dataset.from_tensor_slices({"x": np.arange(6, dtype=np.int32).reshape(3, 2)})
    rest = data.train_batches(numbers, SINGLE, 2)
    assert int(next(rest)["x"][0]) == 4
    with pytest.raises(ValueError, match="no batch after the first 3. Train for fewer steps"):
        next(rest)
    with pytest.raises(ValueError, match="no batch after the first 3. Train for fewer steps"):
        data.train_batches(numbers, SINGLE, 3)
    message = "a dataset function returned list; on the embedded host it must return .* Use T5X for"
    with pytest.raises(ValueError, match=message):
        data.batch_shapes([{"x": 1}], 2)


def test_dataset_errors_are_named():
    with pytest.raises(ValueError, match="has no split 'test'; it has .*'train', 'validation'"):
        data.get_dataset(micro.dataset_config("test"), 0, 1, seqio.DecoderFeatureConverter)


def test_eval_datasets_fill_up_and_repeat_themselves():
    cfg = micro.dataset_config("validation")
    sets = data.get_training_eval_datasets(cfg, 0, 1, 3, seqio.DecoderFeatureConverter)
    assert list(sets) == [micro.task()]
    found = sets[micro.task()]
    once, twice = list(found.as_numpy_iterator()), list(found.as_numpy_iterator())
    # 12 examples fill three batches of 8 twice over.
    assert len(once) == 3 and digest(once) == digest(twice)
    missing = dataclasses.replace(cfg, split="test")
    assert data.get_training_eval_datasets(missing, 0, 1, 3, seqio.DecoderFeatureConverter) == {}


def test_vocabularies_must_match():
    utils.verify_matching_vocabs(micro.dataset_config(), micro.Model())
    other = micro.Model()
    other.output_vocabulary = seqio.ByteVocabulary()
    with pytest.raises(ValueError, match="output_vocabulary is .* but feature 'targets' of task"):
        utils.verify_matching_vocabs(micro.dataset_config(), other)


def test_shapes_of_a_batch():
    found = data.get_dataset(micro.dataset_config(), 0, 1, seqio.DecoderFeatureConverter)
    shapes = data.batch_shapes(found, 8)
    assert shapes["decoder_input_tokens"].shape == (8, micro.LENGTH)
    assert shapes["decoder_input_tokens"].dtype == np.int32
    shorter = data.batch_shapes(found, 2)
    assert shorter["decoder_input_tokens"].shape == (2, micro.LENGTH)
