"""The models: losses and metrics worked out by hand, and what they refuse."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import seqio
from flax.core import FrozenDict

from t5x_sparsity.embedded import (
    metrics,
    models,
    network,
    optimizers,
    train_state,
)

VOCABULARY = seqio.ByteVocabulary(0)
SIZES = dict(
    vocab_size=16,
    emb_dim=8,
    num_heads=2,
    head_dim=4,
    mlp_dim=12,
    mlp_activations=("gelu", "linear"),
)


def decoder_model(dropout_rate=0.0, optimizer_def=None, **kwargs):
    config = network.TransformerConfig(**SIZES, num_layers=1, dropout_rate=dropout_rate)
    return models.DecoderOnlyModel(
        network.DecoderWrapper(config), VOCABULARY, optimizer_def, **kwargs
    )


def encoder_decoder_model(**kwargs):
    config = network.T5Config(**SIZES, num_encoder_layers=1, num_decoder_layers=1)
    return models.EncoderDecoderModel(
        network.Transformer(config), VOCABULARY, VOCABULARY, optimizer_def=None, **kwargs
    )


TARGETS = jnp.asarray([[3, 4, 5, 6], [7, 8, 0, 0]])
BATCH = {
    "decoder_input_tokens": jnp.pad(TARGETS, ((0, 0), (1, 0)))[:, :-1],
    "decoder_target_tokens": TARGETS,
    "decoder_loss_weights": (TARGETS > 0).astype(jnp.float32),
}
SHAPES = {name: value.shape for name, value in BATCH.items()}


def compute(metric, step=1, second=1.0):
    is_total = isinstance(metric, metrics.Total)
    return (metric.replace(step=step, second=second) if is_total else metric).compute()


def params_of(model, shapes=SHAPES):
    # Not compiled as a whole: the same few operations serve all of these tests.
    return model.get_initial_variables(jax.random.PRNGKey(0), shapes)["params"]


def test_cross_entropy_worked_out_by_hand():
    logits = jnp.log(jnp.asarray([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]])) + 2.0
    targets = jnp.asarray([[0, 1]])
    loss, z_loss = models.compute_weighted_cross_entropy(logits, targets)
    np.testing.assert_allclose(loss, -math.log(0.5) - math.log(0.8), rtol=1e-6)
    assert z_loss == 0.0
    # The normaliser of the softmax is e**2: the penalty of a position is 0.1 * 2**2.
    weighted, z_loss = models.compute_weighted_cross_entropy(
        logits, targets, jnp.asarray([[1.0, 0.0]]), z_loss=0.1, loss_normalizing_factor=2.0
    )
    np.testing.assert_allclose(z_loss, 0.4 / 2, rtol=1e-6)
    np.testing.assert_allclose(weighted, (-math.log(0.5) + 0.4) / 2, rtol=1e-6)


def test_label_smoothing_is_zero_at_its_own_optimum():
    smooth = jnp.asarray([[[0.05, 0.9, 0.05]]])
    loss, _ = models.compute_weighted_cross_entropy(
        jnp.log(smooth), jnp.asarray([[1]]), label_smoothing=0.1
    )
    np.testing.assert_allclose(loss, 0.0, atol=1e-6)
    sharper, _ = models.compute_weighted_cross_entropy(
        jnp.log(jnp.asarray([[[0.01, 0.98, 0.01]]])), jnp.asarray([[1]]), label_smoothing=0.1
    )
    assert sharper > 0.01


def test_shapes_that_do_not_fit_are_an_error():
    with pytest.raises(ValueError, match=r"one axis more than targets, got \(2, 3\) and \(2, 3\)"):
        models.compute_weighted_cross_entropy(jnp.ones((2, 3)), jnp.ones((2, 3)))


def test_named_normalizing_factors_are_left_to_t5x():
    message = "loss_normalizing_factor is 'NUM_REAL_TARGET_TOKENS', but the .* use T5X for it"
    with pytest.raises(ValueError, match=f"models.DecoderOnlyModel.{message}"):
        decoder_model(loss_normalizing_factor="NUM_REAL_TARGET_TOKENS")


def test_loss_and_metrics_of_a_decoder():
    model = decoder_model(z_loss=0.01)
    params = params_of(model)
    loss, got = model.eval_fn(params, BATCH)
    logits = model.module.apply(
        {"params": params},
        BATCH["decoder_input_tokens"],
        BATCH["decoder_target_tokens"],
        enable_dropout=False,
    )
    log_z = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, TARGETS[..., None], -1)[..., 0]
    weights = BATCH["decoder_loss_weights"]
    cross_entropy = jnp.sum((log_z - picked) * weights)
    z_loss = jnp.sum(0.01 * log_z**2 * weights)
    hits = jnp.sum((logits.argmax(-1) == TARGETS) * weights)
    expected = {
        "loss": cross_entropy + z_loss,
        "loss_per_nonpadding_target_token": (cross_entropy + z_loss) / 6,
        "loss_per_all_target_tokens": (cross_entropy + z_loss) / 8,
        "z_loss": z_loss,
        "z_loss_per_all_target_tokens": z_loss / 8,
        "cross_ent_loss": cross_entropy,
        "cross_ent_loss_per_all_target_tokens": cross_entropy / 8,
        "accuracy": hits / 6,
        "non_padding_fraction/loss_weights": 6 / 8,
        "non_padding_fraction/decoder_target_tokens": 6 / 8,
        "non_padding_fraction/overall": 6 / 8,
        "effective_batch_size/decoder_target_tokens": 2,
        "timing/seqs": 2,
    }
    np.testing.assert_allclose(loss, expected["loss"], rtol=1e-5)
    for name, value in expected.items():
        np.testing.assert_allclose(compute(got[name]), value, rtol=1e-5, err_msg=name)
    rest = {name for name in got if name not in expected}
    assert rest == {
        "timing/seqs_per_second",
        "timing/seqs_per_second_per_core",
        "timing/target_tokens_per_second",
        "timing/target_tokens_per_second_per_core",
    }


def test_packed_examples_are_counted():
    segments = jnp.asarray([[1, 1, 3, 3, 0, 0], [2, 2, 2, 2, 2, 2], [2, 7, 7, 7, 7, 0]])
    many = {"ids": segments}
    got = models.compute_base_metrics(jnp.ones((3, 6, 2)), segments, None, 1.0, 0.0, many)
    assert compute(got["effective_batch_size/ids"]) == 5
    model = decoder_model()
    packed = {
        **BATCH,
        "decoder_segment_ids": jnp.asarray([[1, 1, 2, 2], [1, 1, 0, 0]]),
        "decoder_positions": jnp.asarray([[0, 1, 0, 1], [0, 1, 0, 0]]),
    }
    _, got = model.eval_fn(params_of(model), packed)
    assert compute(got["effective_batch_size/decoder"]) == 3
    assert got["non_padding_fraction/decoder"].compute() == 0.75


def test_encoder_decoder_loss_and_variables():
    model = encoder_decoder_model()
    batch = {**BATCH, "encoder_input_tokens": jnp.asarray([[3, 4, 5, 0], [6, 0, 0, 0]])}
    shapes = {name: value.shape for name, value in batch.items()}
    types = dict.fromkeys(shapes, jnp.int32)
    variables = jax.eval_shape(
        lambda rng: model.get_initial_variables(rng, shapes, types), jax.random.PRNGKey(0)
    )
    assert isinstance(variables, FrozenDict) and set(variables) == {"params", "params_axes"}
    _, got = model.eval_fn(params_of(model, shapes), batch)
    assert got["non_padding_fraction/encoder_input_tokens"].compute() == 0.5
    assert model.FEATURE_CONVERTER_CLS is seqio.EncDecFeatureConverter


def test_dropout_only_in_training_with_a_key():
    model = decoder_model(dropout_rate=0.5)
    params = params_of(model)

    def loss(key):
        return model.loss_fn(params, BATCH, key)[0]

    plain = model.loss_fn(params, BATCH, None)[0]
    np.testing.assert_allclose(plain, model.eval_fn(params, BATCH)[0], rtol=1e-6)
    first, second = loss(jax.random.PRNGKey(0)), loss(jax.random.PRNGKey(1))
    assert first != second and first != plain


def test_model_learns_a_repeated_batch():
    model = decoder_model(optimizer_def=optimizers.adam(1e-2))
    state = train_state.FlaxOptimTrainState.create(
        model.optimizer_def, model.get_initial_variables(jax.random.PRNGKey(0), SHAPES)
    )

    @jax.jit
    def step(state):
        loss, grads = jax.value_and_grad(lambda p: model.loss_fn(p, BATCH, None)[0])(state.params)
        return state.apply_gradient(grads, learning_rate=None), loss

    history = []
    for _ in range(60):
        state, loss = step(state)
        history.append(float(loss))
    assert history[-1] < 0.1 * history[0]
    assert int(state.step) == 60


def test_what_the_models_refuse():
    with pytest.raises(ValueError, match="DecoderOnlyModel.label_smoothing must be at least 0"):
        decoder_model(label_smoothing=1.0)
    with pytest.raises(
        NotImplementedError, match="EncoderDecoderModel of the embedded host can not"
    ):
        encoder_decoder_model(decode_fn=None).predict_batch({}, {})
    with pytest.raises(NotImplementedError, match="can not predict or score.*Use T5X for it"):
        decoder_model().score_batch({}, {})
    with pytest.raises(ValueError, match="inputs_bidirectional_attention is True, but.*use T5X"):
        decoder_model(inputs_bidirectional_attention=True)


def test_vocabularies_and_converters():
    model = decoder_model(decode_fn=None)
    assert model.FEATURE_CONVERTER_CLS is seqio.DecoderFeatureConverter
    assert model.input_vocabulary is VOCABULARY and model.output_vocabulary is VOCABULARY
    with pytest.raises(AttributeError, match="no 'get_output_vocabulary': .* Use T5X for it"):
        models.get_output_vocabulary(model)
    other = decoder_model(feature_converter_cls=seqio.PrefixLMFeatureConverter)
    assert other.FEATURE_CONVERTER_CLS is seqio.PrefixLMFeatureConverter
    assert decoder_model().FEATURE_CONVERTER_CLS is seqio.DecoderFeatureConverter


def test_totals_merge_and_take_what_they_are_per():
    total, per_step, per_second = (
        metrics.Total(4.0, per).merge(metrics.Total(jnp.asarray(2.0), per))
        for per in ("period", "step", "second")
    )
    values = [float(compute(m, step=3, second=4.0)) for m in (total, per_step, per_second)]
    assert values == [6.0, 2.0, 1.5]
    assert float(compute(per_step)) == 6.0
    assert total.compute() == 6.0
