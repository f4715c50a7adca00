"""The embedded host against T5X itself, where T5X is importable: same numbers, names and axes."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import seqio
from flax import traverse_util
from flax.core import freeze, unfreeze
from flax.linen import partitioning as flax_partitioning

from t5x_sparsity.embedded import (
    adafactor,
    models,
    network,
    optimizers,
    partitioning,
    train_state,
)
from t5x_sparsity.embedded import metrics as metrics_lib

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("t5x")
    from t5x import adafactor as t5x_adafactor
    from t5x import models as t5x_models
    from t5x import optimizers as t5x_optimizers
    from t5x import partitioning as t5x_partitioning
    from t5x import train_state as t5x_train_state
    from t5x.examples.decoder_only import network as t5x_decoder_only
    from t5x.examples.t5 import network as t5x_network

# T5X itself is not free of deprecations.
pytestmark = pytest.mark.filterwarnings("ignore")

BATCH, INPUTS, TARGETS, VOCAB = 4, 12, 10, 64
VOCABULARY = seqio.ByteVocabulary(0)
SIZES = dict(
    vocab_size=VOCAB,
    emb_dim=16,
    num_heads=2,
    head_dim=4,
    mlp_dim=32,
    mlp_activations=("gelu", "linear"),
    dropout_rate=0.1,
)


def flat(tree):
    return traverse_util.flatten_dict(unfreeze(tree), sep="/")


def batch_of(seed, packed, decoder=False):
    rng = np.random.default_rng(seed)

    def row(length):
        filled = length - rng.integers(1, 4)
        tokens, segments = np.zeros(length, np.int32), np.zeros(length, np.int32)
        tokens[:filled] = rng.integers(1, VOCAB, filled)
        cut = filled // 2
        segments[:filled] = np.where(np.arange(filled) < cut, 1, 2)
        positions = np.where(segments == 2, np.arange(length) - cut, np.arange(length))
        return tokens, segments, np.where(segments > 0, positions, 0).astype(np.int32)

    def feature(length):
        return [np.stack(x) for x in zip(*(row(length) for _ in range(BATCH)), strict=True)]

    inputs, input_segments, input_positions = feature(INPUTS)
    targets, target_segments, target_positions = feature(TARGETS)
    batch = {
        "decoder_target_tokens": targets,
        "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
        "decoder_loss_weights": (targets > 0).astype(np.float32),
    }
    if not decoder:
        batch["encoder_input_tokens"] = inputs
    if packed:
        batch |= {
            "decoder_segment_ids": target_segments,
            "decoder_positions": target_positions,
        }
        if not decoder:
            batch |= {
                "encoder_segment_ids": input_segments,
                "encoder_positions": input_positions,
            }
    return {k: jnp.asarray(v) for k, v in batch.items()}


def pair(family, optimizer_pair=(None, None), tied=False, dtype="float32", **kwargs):
    """Returns the same model of the embedded host and of T5X."""
    sizes = {**SIZES, "logits_via_embedding": tied, "dtype": dtype}
    if family == "encdec":
        layer_counts = dict(num_encoder_layers=1, num_decoder_layers=1)
        ours = network.Transformer(network.T5Config(**sizes, **layer_counts))
        theirs = t5x_network.Transformer(t5x_network.T5Config(**sizes, **layer_counts))
        return (
            models.EncoderDecoderModel(
                ours, VOCABULARY, VOCABULARY, optimizer_def=optimizer_pair[0], **kwargs
            ),
            t5x_models.EncoderDecoderModel(
                theirs, VOCABULARY, VOCABULARY, optimizer_def=optimizer_pair[1], **kwargs
            ),
        )
    ours = network.DecoderWrapper(network.TransformerConfig(**sizes, num_layers=2))
    theirs = t5x_decoder_only.DecoderWrapper(
        t5x_decoder_only.TransformerConfig(**sizes, num_layers=2)
    )
    return (
        models.DecoderOnlyModel(ours, VOCABULARY, optimizer_def=optimizer_pair[0], **kwargs),
        t5x_models.DecoderOnlyModel(theirs, VOCABULARY, optimizer_def=optimizer_pair[1], **kwargs),
    )


def variables_of(model, batch, seed=0):
    shapes = {k: v.shape for k, v in batch.items()}
    types = {k: jnp.int32 for k in batch}
    return jax.jit(lambda rng: model.get_initial_variables(rng, shapes, types))(
        jax.random.PRNGKey(seed)
    )


def value_and_grad(model, params, batch):
    def loss(params):
        return model.loss_fn(params, batch, None)

    (value, metrics), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return value, metrics, flat(grads)


# what the manager of metrics adds
OF_THE_MANAGER = {"timing/seconds", "timing/steps_per_second"}


def computed(metric, steps):
    """The value of a metric of either host over `steps` steps of two seconds in all."""
    if isinstance(metric, metrics_lib.Total):
        return metric.replace(step=steps, second=2.0).compute()
    if hasattr(metric, "replace_duration"):
        metric = metric.replace_duration(2.0)
    if hasattr(metric, "replace_steps"):
        metric = metric.replace_steps(steps)
    return metric.compute()


def assert_trees_close(ours, theirs, **tolerance):
    ours, theirs = flat(ours), flat(theirs)
    assert ours.keys() == theirs.keys()
    for path in ours:
        np.testing.assert_allclose(ours[path], theirs[path], err_msg=path, **tolerance)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["encdec", "decoder"])
def test_initial_variables_are_those_of_t5x(family, tied):
    ours, theirs = pair(family, tied=tied)
    batch = batch_of(0, packed=False, decoder=family == "decoder")
    got, expected = variables_of(ours, batch), variables_of(theirs, batch)
    # Same names give the same keys, so that even the values must agree.
    assert_trees_close(got["params"], expected["params"], rtol=1e-6, atol=1e-7)
    names = flax_partitioning.get_axis_names
    assert flat(names(got["params_axes"])) == flat(names(expected["params_axes"]))
    for path, value in flat(expected["params"]).items():
        assert flat(got["params"])[path].dtype == value.dtype


@pytest.mark.parametrize(
    "family, packed, kwargs",
    [
        ("encdec", False, {}),
        ("encdec", True, {"z_loss": 1e-2, "label_smoothing": 0.1}),
        ("encdec", False, {"loss_normalizing_factor": 123.0}),
        ("encdec", True, {"loss_normalizing_factor": 7.0}),
        ("decoder", True, {"z_loss": 1e-4}),
        ("decoder", False, {"loss_normalizing_factor": 3.0}),
    ],
)
def test_loss_metrics_and_gradients_are_those_of_t5x(family, packed, kwargs):
    ours, theirs = pair(family, **kwargs)
    batch = batch_of(1, packed=packed, decoder=family == "decoder")
    params = variables_of(ours, batch)["params"]
    loss, metrics, grads = value_and_grad(ours, params, batch)
    t5x_loss, t5x_metrics, t5x_grads = value_and_grad(theirs, params, batch)

    np.testing.assert_allclose(loss, t5x_loss, rtol=1e-6)
    assert metrics.keys() | OF_THE_MANAGER == t5x_metrics.keys()
    for name, metric in metrics.items():
        got, expected = computed(metric, 1), computed(t5x_metrics[name], 1)
        np.testing.assert_allclose(got, expected, rtol=1e-5, err_msg=name)
    assert grads.keys() == t5x_grads.keys()
    for path, grad in grads.items():
        scale = float(jnp.max(jnp.abs(t5x_grads[path])))
        np.testing.assert_allclose(
            grad, t5x_grads[path], rtol=2e-4, atol=2e-6 * scale, err_msg=path
        )


def test_unweighted_loss_is_that_of_t5x():
    ours, theirs = pair("encdec")
    batch = batch_of(2, packed=False)
    del batch["decoder_loss_weights"]
    params = variables_of(ours, batch)["params"]
    loss, _, grads = value_and_grad(ours, params, batch)
    t5x_loss, _, t5x_grads = value_and_grad(theirs, params, batch)
    np.testing.assert_allclose(loss, t5x_loss, rtol=1e-6)
    assert_trees_close(grads, t5x_grads, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["encdec", "decoder"])
def test_bfloat16_and_tied_logits_are_those_of_t5x(family):
    ours, theirs = pair(family, tied=True, dtype="bfloat16")
    batch = batch_of(3, packed=True, decoder=family == "decoder")
    params = variables_of(ours, batch)["params"]
    loss, t5x_loss = (
        jax.jit(lambda params, model=model: model.eval_fn(params, batch)[0])(params)
        for model in (ours, theirs)
    )
    np.testing.assert_allclose(loss, t5x_loss, rtol=2e-3)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_relative_position_buckets_are_those_of_t5x(bidirectional):
    from t5x.examples.t5 import layers as t5x_layers

    from t5x_sparsity.embedded import layers

    length = 300
    positions = np.arange(length, dtype=np.int32)
    expected = t5x_layers.RelativePositionBiases._relative_position_bucket(
        positions[None] - positions[:, None], bidirectional, 32, 128
    )
    np.testing.assert_array_equal(layers.relative_position_buckets(length, bidirectional), expected)


def random_batch(seed, packed, weights):
    """Rows of random lengths, cut into random examples where `packed`, with loss weights."""
    rng = np.random.default_rng(seed)
    lengths = {"encoder": INPUTS, "decoder": TARGETS}
    batch = {}
    for side, length in lengths.items():
        segments, positions = np.zeros((2, BATCH, length), np.int32)
        for row in range(BATCH):
            at, segment, end = 0, 1, rng.integers(1, length + 1)
            while at < end:
                size = min(rng.integers(1, 5), end - at) if packed else end
                segments[row, at : at + size] = segment
                positions[row, at : at + size] = np.arange(size)
                at, segment = at + size, segment + 1
        tokens = rng.integers(1, VOCAB, (BATCH, length)) * (segments > 0)
        name = "encoder_input_tokens" if side == "encoder" else "decoder_target_tokens"
        batch[name] = tokens.astype(np.int32)
        if packed:
            batch |= {f"{side}_segment_ids": segments, f"{side}_positions": positions}
    targets = batch["decoder_target_tokens"]
    batch["decoder_input_tokens"] = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
    real, shape = (targets > 0).astype(np.float32), targets.shape
    batch["decoder_loss_weights"] = {
        "tokens": real,
        "some": real * rng.integers(0, 2, shape),
        "fractions": real * rng.uniform(0.1, 1.0, shape),
        "padding too": np.ones(shape),
    }[weights].astype(np.float32)
    return {k: jnp.asarray(v) for k, v in batch.items()}


WEIGHTS = ["tokens", "some", "fractions", "padding too"]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("factor", [None, 7.0])
def test_metrics_of_random_batches_are_those_of_t5x(factor, packed, weights):
    ours, theirs = pair("encdec", loss_normalizing_factor=factor, z_loss=1e-2, label_smoothing=0.1)
    batches = [random_batch(seed, packed, weights) for seed in (11, 12)]
    logits = [jax.random.normal(jax.random.PRNGKey(s), (BATCH, TARGETS, VOCAB)) for s in (0, 1)]
    merged = []
    for model in (ours, theirs):
        model._compute_logits = lambda params, batch, *_: params
        first, second = (model.eval_fn(*x)[1] for x in zip(logits, batches, strict=True))
        merged.append({name: metric.merge(second[name]) for name, metric in first.items()})
    assert merged[0].keys() | OF_THE_MANAGER == merged[1].keys()
    for name, metric in merged[0].items():
        for steps in (1, 2):
            got, expected = computed(metric, steps), computed(merged[1][name], steps)
            np.testing.assert_allclose(got, expected, rtol=1e-5, err_msg=name)


ADAFACTORS = [
    {},
    {"min_dim_size_to_factor": 128},
    {"beta1": 0.9, "decay_rate": 0.7},
    {"factored": False, "clipping_threshold": None, "beta1": 0.5},
    {"multiply_by_parameter_scale": False, "step_offset": -3},
]


def stacked_params(seed):
    """Parameters and axes with plain, stacked, rank-3, unfactored and tiny weights."""
    rng = np.random.default_rng(seed)
    leaves = {
        "dense/kernel": ((8, 12), ("embed", "mlp")),
        "dense/tall": ((12, 8), ("mlp", "embed")),
        "scanned/kernel": ((8, 3, 12), ("embed", "layers", "mlp")),
        "scanned/scale": ((8, 3), ("embed", "layers")),
        "heads/kernel": ((8, 2, 6), ("embed", "heads", "kv")),
        "relpos/rel_embedding": ((2, 32), ("heads", "relpos_buckets")),
        "norm/scale": ((8,), ("embed",)),
        "one/scale": ((1,), ("embed",)),
    }
    params = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, (s, _) in leaves.items()}
    axes = {k: jax.sharding.PartitionSpec(*a) for k, (_, a) in leaves.items()}

    def nest(tree):
        return freeze(traverse_util.unflatten_dict(tree, sep="/"))

    return nest(params), nest(axes)


def grads_like(params, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)


@pytest.mark.parametrize("kwargs", ADAFACTORS)
def test_adafactor_steps_are_those_of_t5x(kwargs):
    params, axes = stacked_params(0)
    kwargs = {"min_dim_size_to_factor": 4, **kwargs}
    ours = adafactor.Adafactor(
        **kwargs, logical_factor_rules=adafactor.standard_logical_factor_rules()
    )
    theirs = t5x_adafactor.Adafactor(
        **kwargs, logical_factor_rules=t5x_adafactor.standard_logical_factor_rules()
    )
    created = []
    for definition in (ours, theirs):
        definition.set_param_axes(axes)
        created.append(definition.create(params))
    ours, theirs = created
    assert_trees_close(ours.state_dict(), theirs.state_dict(), atol=0)
    for step in range(3):
        grads = grads_like(params, step)
        ours = ours.apply_gradient(grads, learning_rate=0.1 / (step + 1))
        theirs = theirs.apply_gradient(grads, learning_rate=0.1 / (step + 1))
    assert type(ours.state.param_states) is type(theirs.state.param_states)
    assert_trees_close(ours.state_dict(), theirs.state_dict(), rtol=3e-6, atol=1e-7)


def test_adafactor_axes_are_those_of_t5x():
    params, axes = stacked_params(1)
    for kwargs in ({}, {"beta1": 0.9}, {"factored": False}):
        derived = []
        for module in (adafactor, t5x_adafactor):
            definition = module.Adafactor(
                **kwargs,
                min_dim_size_to_factor=4,
                logical_factor_rules=module.standard_logical_factor_rules(),
            )
            definition.set_param_axes(axes)
            derived.append(definition.derive_logical_axes(definition.create(params), axes))
        assert flat(derived[0].state_dict()) == flat(derived[1].state_dict())


def test_standard_rules_are_those_of_t5x():
    ours = {k: v.name for k, v in adafactor.standard_logical_factor_rules().items()}
    theirs = {k: v.name for k, v in t5x_adafactor.standard_logical_factor_rules().items()}
    assert ours == theirs
    for activations in (1, 2):
        for parameters in (1, 2):
            extra = [("expert", "data")]
            ours = partitioning.standard_logical_axis_rules(activations, parameters, extra)
            theirs = t5x_partitioning.standard_logical_axis_rules(activations, parameters, extra)
            for name in {name for name, _ in theirs}:
                targets = [[v for k, v in rules if k == name] for rules in (ours, theirs)]
                assert targets[0] == targets[1], (activations, parameters, name)


OPTAX = [
    ("adamw", dict(learning_rate=1e-2, weight_decay=0.1)),
    ("adam", dict(learning_rate=1e-2)),
    ("sgd", dict(learning_rate=1e-2)),
    ("sgd", dict(learning_rate=1e-2, momentum=0.9)),
    ("lion", dict(learning_rate=1e-3)),
]


@pytest.mark.parametrize("name, kwargs", OPTAX)
def test_optax_steps_and_axes_are_those_of_t5x(name, kwargs):
    params, axes = stacked_params(2)
    ours = getattr(optimizers, name)(**kwargs).create(params)
    theirs = getattr(t5x_optimizers, name)(**kwargs).create(params)
    for step in range(3):
        grads = grads_like(params, step)
        ours = ours.apply_gradient(grads, learning_rate=1.0)
        theirs = theirs.apply_gradient(grads, learning_rate=1.0)
    assert_trees_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    derived = ours.optimizer_def.derive_logical_axes(ours, axes)
    t5x_derived = theirs.optimizer_def.derive_logical_axes(theirs, axes)
    assert flat(derived.state_dict()) == flat(t5x_derived.state_dict())


def definitions_of(optimizer):
    if optimizer == "adamw":
        return [module.adamw(1e-3) for module in (optimizers, t5x_optimizers)]
    return [
        module.Adafactor(
            decay_rate=0.8,
            min_dim_size_to_factor=16,
            logical_factor_rules=module.standard_logical_factor_rules(),
        )
        for module in (adafactor, t5x_adafactor)
    ]


@pytest.mark.parametrize("dims", [(1, 1), (2, 2)])
@pytest.mark.parametrize(
    "family, optimizer", [("encdec", "adafactor"), ("encdec", "adamw"), ("decoder", "adafactor")]
)
def test_state_dict_and_mesh_axes_are_those_of_t5x(family, optimizer, dims):
    batch = batch_of(7, packed=False, decoder=family == "decoder")
    shapes = {k: v.shape for k, v in batch.items()}
    leaves, mesh_axes = [], []
    for model, states_module, partitioning_module in zip(
        pair(family, definitions_of(optimizer)),
        (train_state, t5x_train_state),
        (partitioning, t5x_partitioning),
        strict=True,
    ):

        def create(rng, model=model, states_module=states_module):
            variables = model.get_initial_variables(rng, shapes)
            return states_module.FlaxOptimTrainState.create(model.optimizer_def, variables)

        state = jax.eval_shape(create, jax.random.PRNGKey(0))
        leaves.append({k: (v.shape, v.dtype) for k, v in flat(state.state_dict()).items()})
        partitioner = partitioning_module.PjitPartitioner(
            num_partitions=1,
            logical_axis_rules=partitioning_module.standard_logical_axis_rules(*dims),
        )
        mesh_axes.append(flat(partitioner.get_mesh_axes(state).state_dict()))
    assert leaves[0] == leaves[1]
    assert mesh_axes[0] == mesh_axes[1]
    assert leaves[0].keys() == mesh_axes[0].keys()


def test_training_step_is_that_of_t5x():
    batch = batch_of(8, packed=True)
    states = []
    for model, states_module in zip(
        pair("encdec", definitions_of("adafactor")), (train_state, t5x_train_state), strict=True
    ):
        state = states_module.FlaxOptimTrainState.create(
            model.optimizer_def, variables_of(model, batch)
        )

        def step(state, model=model):
            grads = jax.grad(lambda p: model.loss_fn(p, batch, None)[0])(state.params)
            return state.apply_gradient(grads, learning_rate=0.01)

        states.append(jax.jit(step)(state).state_dict())
    assert_trees_close(*states, rtol=1e-3, atol=1e-5)
