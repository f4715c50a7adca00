"""The transformers: names, masks, positions, dtypes, dropout, and configurations refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from flax.core import unfreeze

from t5x_sparsity.embedded import layers, network

SIZES = dict(
    vocab_size=16,
    emb_dim=8,
    num_heads=2,
    head_dim=4,
    mlp_dim=12,
    mlp_activations=("gelu", "linear"),
    dropout_rate=0.5,
)


def encoder_decoder(**kwargs):
    sizes = {**SIZES, "num_encoder_layers": 1, "num_decoder_layers": 1, **kwargs}
    return network.Transformer(network.T5Config(**sizes))


def decoder(**kwargs):
    return network.DecoderWrapper(network.TransformerConfig(**{**SIZES, "num_layers": 1, **kwargs}))


def init(module, *tokens):
    # Not compiled as a whole: the same few operations serve all of these tests.
    variables = module.init(jax.random.PRNGKey(0), *tokens, enable_dropout=False)
    return {"params": variables["params"]}, variables["params_axes"]


def logits_of(module, variables, *args, **kwargs):
    return module.apply(variables, *args, enable_dropout=False, **kwargs)


TOKENS = jnp.asarray([[3, 4, 5, 6, 0, 0]])


def test_decoder_parameters_and_axes():
    variables = jax.eval_shape(
        lambda rng: decoder(num_layers=2).init(rng, TOKENS, TOKENS, enable_dropout=False),
        jax.random.PRNGKey(0),
    )
    axes = variables["params_axes"]
    flat = traverse_util.flatten_dict(unfreeze(variables["params"]), sep="/")
    layer = {
        "pre_self_attention_layer_norm/scale": (8,),
        "self_attention/query/kernel": (8, 8),
        "self_attention/key/kernel": (8, 8),
        "self_attention/value/kernel": (8, 8),
        "self_attention/out/kernel": (8, 8),
        "pre_mlp_layer_norm/scale": (8,),
        "mlp/wi_0/kernel": (8, 12),
        "mlp/wi_1/kernel": (8, 12),
        "mlp/wo/kernel": (12, 8),
    }
    expected = {f"decoder/layers_{i}/{k}": v for i in range(2) for k, v in layer.items()}
    expected |= {
        "decoder/token_embedder/embedding": (16, 8),
        "decoder/relpos_bias/rel_embedding": (2, 32),
        "decoder/decoder_norm/scale": (8,),
        "decoder/logits_dense/kernel": (8, 16),
    }
    assert {k: v.shape for k, v in flat.items()} == expected
    assert all(v.dtype == jnp.float32 for v in flat.values())
    names = {
        k.removesuffix("_axes"): v.names
        for k, v in traverse_util.flatten_dict(unfreeze(axes), sep="/").items()
    }
    assert names.keys() == expected.keys()
    assert names["decoder/layers_0/self_attention/query/kernel"] == ("embed", "joined_kv")
    assert names["decoder/layers_0/mlp/wo/kernel"] == ("mlp", "embed")
    assert names["decoder/logits_dense/kernel"] == ("embed", "vocab")
    assert names["decoder/relpos_bias/rel_embedding"] == ("heads", "relpos_buckets")


def test_tied_and_ungated_models_have_fewer_parameters():
    module = decoder(logits_via_embedding=True, mlp_activations=["relu"])
    variables, _ = init(module, TOKENS, TOKENS)
    params = variables["params"]["decoder"]
    assert "logits_dense" not in params
    assert set(params["layers_0"]["mlp"]) == {"wi", "wo"}
    assert logits_of(module, variables, TOKENS, TOKENS).shape == (1, 6, 16)


def test_decoder_sees_no_later_token_and_no_padding():
    module = decoder()
    variables, _ = init(module, TOKENS, TOKENS)
    logits = logits_of(module, variables, TOKENS, TOKENS)
    other = logits_of(module, variables, TOKENS.at[0, 2].set(9), TOKENS)
    np.testing.assert_allclose(logits[0, :2], other[0, :2], rtol=1e-6)
    assert np.abs(logits[0, 2:4] - other[0, 2:4]).max() > 1e-3
    assert np.isfinite(logits).all()


def test_packed_decoder_examples_are_independent():
    module = decoder()
    tokens = jnp.asarray([[3, 4, 5, 6, 7, 8]])
    segments = jnp.asarray([[1, 1, 1, 2, 2, 2]])
    variables, _ = init(module, tokens, tokens)
    packed = logits_of(module, variables, tokens, tokens, decoder_segment_ids=segments)
    alone = jnp.pad(tokens[:, 3:], ((0, 0), (0, 3)))
    alone = logits_of(module, variables, alone, alone)
    np.testing.assert_allclose(packed[:, 3:], alone[:, :3], rtol=1e-4, atol=1e-5)


def test_packed_encoder_decoder_examples_are_independent():
    module = encoder_decoder()
    inputs, targets = jnp.asarray([[3, 4, 5, 6, 7, 8]]), jnp.asarray([[8, 9, 3, 2, 4, 5]])
    segments = {
        "encoder_segment_ids": jnp.asarray([[1, 1, 2, 2, 2, 2]]),
        "decoder_segment_ids": jnp.asarray([[1, 1, 1, 2, 2, 2]]),
    }
    variables, _ = init(module, inputs, targets, targets)
    packed = logits_of(module, variables, inputs, targets, targets, **segments)
    inputs = jnp.pad(inputs[:, 2:], ((0, 0), (0, 2)))
    targets = jnp.pad(targets[:, 3:], ((0, 0), (0, 3)))
    second = logits_of(module, variables, inputs, targets, targets)
    np.testing.assert_allclose(packed[:, 3:], second[:, :3], rtol=1e-4, atol=1e-5)


def test_encoder_ignores_padding_and_reaches_every_target():
    module = encoder_decoder()
    inputs, targets = jnp.asarray([[3, 4, 5, 0, 0, 0]]), jnp.asarray([[8, 9, 3, 2, 4, 5]])
    variables, _ = init(module, inputs, targets, targets)
    logits = logits_of(module, variables, inputs, targets, targets)
    shorter = logits_of(module, variables, inputs[:, :4], targets, targets)
    np.testing.assert_allclose(logits, shorter, rtol=1e-4, atol=1e-5)
    changed = logits_of(module, variables, inputs.at[0, 2].set(6), targets, targets)
    assert np.abs(logits - changed).max(axis=(0, 2)).min() > 1e-4


def test_buckets_worked_out_by_hand():
    one_way = layers.relative_position_buckets(300, bidirectional=False)
    assert one_way[0].max() == 0
    assert one_way[15, 0] == 15 and one_way[16, 0] == 16 and one_way[299, 0] == 31
    # 16 + 16 * log(64 / 16) / log(128 / 16) = 26.67
    assert one_way[64, 0] == 26
    both = layers.relative_position_buckets(300, bidirectional=True)
    assert both[5, 0] == 5 and both[0, 5] == 16 + 5
    assert both[299, 0] == 15 and both[0, 299] == 31
    # Distance 0 is not ahead, so that the first bucket of that direction, 16, stays unused.
    assert np.unique(both).size == 31 and both.dtype == np.int32


def test_norm_worked_out_by_hand():
    norm = layers.RMSNorm(jnp.float32, epsilon=0.0)
    x = jnp.asarray([[3.0, -4.0]])
    out = norm.apply({"params": {"scale": jnp.asarray([1.0, 2.0])}}, x)
    np.testing.assert_allclose(out, np.array([[3.0, -8.0]]) / np.sqrt(12.5), rtol=1e-6)


def test_dropout_needs_a_key_and_changes_with_it():
    module = decoder()
    variables, _ = init(module, TOKENS, TOKENS)

    def run(seed):
        rngs = {"dropout": jax.random.key(seed)}
        return module.apply(variables, TOKENS, TOKENS, enable_dropout=True, rngs=rngs)

    assert np.abs(run(0) - run(1)).max() > 1e-3
    np.testing.assert_array_equal(run(0), run(0))


@pytest.mark.parametrize("dtype", ["bfloat16", jnp.bfloat16])
def test_bfloat16_activations_give_float32_logits_and_gradients(dtype):
    module = decoder(dtype=dtype)
    variables, _ = init(module, TOKENS, TOKENS)
    full = logits_of(decoder(), variables, TOKENS, TOKENS)
    logits = logits_of(module, variables, TOKENS, TOKENS)
    assert logits.dtype == jnp.float32
    difference = np.abs(logits - full)[:, :4].max()
    assert 0 < difference < 0.2
    grads = jax.eval_shape(
        jax.grad(lambda v: logits_of(module, v, TOKENS, TOKENS).sum()), variables
    )
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(grads))


def test_float32_attention_logits_change_only_rounding():
    variables, _ = init(decoder(), TOKENS, TOKENS)
    half = decoder(dtype="bfloat16")
    mixed = decoder(dtype="bfloat16", float32_attention_logits=True)
    a, b = (logits_of(m, variables, TOKENS, TOKENS)[:, :4] for m in (half, mixed))
    assert 0 < np.abs(a - b).max() < 0.2


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("num_heads", 0, "T5Config.num_heads must be an integer of at least 1, got 0"),
        ("emb_dim", 8.0, "T5Config.emb_dim must be an integer of at least 1, got 8.0"),
        ("num_decoder_layers", -1, "T5Config.num_decoder_layers must be an integer"),
        ("dropout_rate", 1.0, "T5Config.dropout_rate must be at least 0 and below 1, got 1.0"),
        ("dtype", "float8", "T5Config.dtype must be one of .*'bfloat16'.*got 'float8'"),
        ("mlp_activations", "gelu", "T5Config.mlp_activations must be a sequence of 'linear' and"),
        ("mlp_activations", None, r"a sequence of 'linear' and .* got None"),
        ("mlp_activations", (len,), r"a sequence of 'linear' and .* got \(<built-in"),
        ("mlp_activations", ("gleu",), r"as \(\'gelu\', \'linear\'\), got \(\'gleu\',\)"),
    ],
)
def test_configurations_out_of_range_name_the_field(field, value, message):
    with pytest.raises(ValueError, match=message):
        network.T5Config(**{**SIZES, field: value})
