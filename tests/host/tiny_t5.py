"""A tiny T5 on the host in use, T5X or the embedded one, for the host tests."""

import contextlib
import sys
import types
from pathlib import Path

import gin
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import seqio
from flax import linen as nn
from flax import traverse_util
from flax.linen import partitioning as flax_partitioning
from jax.sharding import Mesh, PartitionSpec
from optimizer_table import CASES

import t5x_sparsity as ts
from t5x_sparsity import host
from t5x_sparsity.t5x import SparseTrainStateInitializer, sparse_trainer

ROOT = Path(__file__).resolve().parents[2]
BATCH, LENGTH, VOCAB = 4, 8, 64
FEATURES = (
    "encoder_input_tokens",
    "decoder_input_tokens",
    "decoder_target_tokens",
    "decoder_loss_weights",
)

# for tests of what only T5X has: its jobs, its models, several processes
t5x_only = pytest.mark.skipif(host.NAME != "t5x", reason="only T5X has it")


OPTIMIZERS = {name: case.make for name, case in CASES.items()}


def model(optimizer_def, layers=1):
    """A T5 1.1 of width 64."""
    config = host.network.T5Config(
        vocab_size=VOCAB,
        dtype="float32",
        emb_dim=64,
        num_heads=4,
        num_encoder_layers=layers,
        num_decoder_layers=layers,
        head_dim=16,
        mlp_dim=128,
        mlp_activations=("gelu", "linear"),
        dropout_rate=0.0,
    )
    vocabulary = seqio.ByteVocabulary()
    return host.models.EncoderDecoderModel(
        host.network.Transformer(config), vocabulary, vocabulary, optimizer_def
    )


class Stacked(nn.Module):
    """Residual MLPs whose layers are stacked along axis 1, as T5X's scanned models have them.

    names: of the stacks; one called x has the weights x_wi and x_wo.
    """

    names: tuple[str, ...] = ("mlp",)
    layers: int = 2
    width: int = 16
    mlp_dim: int = 32

    @nn.compact
    def __call__(self, decoder_input_tokens, decoder_target_tokens, **_):
        def weight(name, scale, axes):
            sizes = {"vocab": VOCAB, "embed": self.width, "mlp": self.mlp_dim}
            shape = tuple(sizes.get(axis, self.layers) for axis in axes)
            init = nn.initializers.normal(scale)
            return flax_partitioning.param_with_axes(name, init, shape, jnp.float32, axes=axes)

        def stacks(name, axes):
            kernels = [weight(f"{n}_{name}", 0.2, axes) for n in self.names]
            return jnp.moveaxis(jnp.concatenate(kernels, axis=1), 1, 0)

        def layer(x, kernels):
            wi, wo = kernels
            return x + jax.nn.gelu(x @ wi) @ wo, None

        table = weight("embedding", 1.0, ("vocab", "embed"))
        kernels = stacks("wi", ("embed", "layers", "mlp")), stacks("wo", ("mlp", "layers", "embed"))
        x, _ = jax.lax.scan(layer, table[decoder_input_tokens.astype(jnp.int32)], kernels)
        return x @ table.T


def stacked_model(optimizer_def, names=("mlp",)):
    """A tiny model of stacked layers, under the host's own decoder-only model."""
    return host.models.DecoderOnlyModel(Stacked(names), seqio.ByteVocabulary(), optimizer_def)


class MeshPartitioner(host.partitioning.PjitPartitioner):
    """Over the first data x model devices; on CPU, T5X takes all devices for model-parallel."""

    def __init__(self, data=1, model=1, **kwargs):
        self._wanted = Mesh(
            np.array(jax.devices()[: data * model]).reshape(data, model), ("data", "model")
        )
        super().__init__(num_partitions=model, **kwargs)

    @property
    def mesh(self):
        return self._wanted


def rigl(sparsity=0.8, *, begin=2, end=20, period=3, **kwargs):
    """A RigL configuration that updates at 2, 5, 8, ..."""
    return ts.SparsityConfig(
        algorithm=ts.RigL(updates=ts.Periodic(begin=begin, end=end, period=period)),
        sparsity=sparsity,
        distribution="erk",
        **kwargs,
    )


def batch(seed=0):
    rng = np.random.RandomState(seed)
    tokens = {k: rng.randint(3, VOCAB, (BATCH, LENGTH)).astype("int32") for k in FEATURES[:3]}
    return {**tokens, FEATURES[3]: np.ones((BATCH, LENGTH), "int32")}


def initializer(config, optimizer="adamw", partitioner=None, build=stacked_model):
    """(initializer, model, partitioner); a config of None is a dense run.

    optimizer: a name in OPTIMIZERS, or what makes one.
    """
    optimizer_def = OPTIMIZERS.get(optimizer, optimizer)()
    net = build(optimizer_def)
    partitioner = partitioner or MeshPartitioner()
    shapes = {k: (BATCH, LENGTH) for k in FEATURES}
    arguments = (optimizer_def, net.get_initial_variables, shapes, partitioner)
    if config is None:
        made = host.utils.TrainStateInitializer(*arguments)
    else:
        made = SparseTrainStateInitializer(*arguments, config=config)
    return made, net, partitioner


def trainer_arguments(
    config, optimizer="adamw", partitioner=None, state=None, seed=0, build=stacked_model, **kwargs
):
    """What train() would pass to a trainer, with a fresh train state or the one given."""
    init, net, partitioner = initializer(config, optimizer, partitioner, build)
    arguments = dict(
        model=net,
        train_state=init.from_scratch(jax.random.PRNGKey(seed)) if state is None else state,
        partitioner=partitioner,
        eval_names=[],
        summary_dir=None,
        train_state_axes=init.train_state_axes,
        rng=jax.random.PRNGKey(1),
        learning_rate_fn=lambda step: 1e-2,
        num_microbatches=None,
    )
    return arguments | kwargs


def trainer(config, *args, base=host.Trainer, **kwargs):
    """A sparse trainer over `base`; the host's own, dense, where config is None."""
    arguments = trainer_arguments(config, *args, **kwargs)
    return base(**arguments) if config is None else sparse_trainer(base, **arguments)


def run(trainer, steps, start=0):
    """Takes steps on batches that depend on the step alone; returns the last summary."""
    batches = iter([batch(i) for i in range(start, start + steps)])
    return trainer.train(batches, steps, start_step=start).result()


def leaves(state):
    """The whole leaves of a train state by path, however many devices share each."""
    flat = traverse_util.flatten_dict(state.state_dict(), sep="/")
    return {k: np.asarray(v) for k, v in flat.items() if v is not None}


def parse_gin(text, *bindings):
    """Parses gin text as a run does, under a train() that takes what T5X's takes; returns train."""
    gin.clear_config()
    with gin.config.interactive_mode():
        train = gin.configurable(sys.modules["__main__"].train)
        gin.parse_config(f"MODEL_DIR = '/a/run'\n{text}")
        gin.parse_config(list(bindings))
    gin.finalize()
    return train


@contextlib.contextmanager
def gin_script():
    """A __main__ with a train() for gin to bind, and gin's configuration cleared at the end."""
    script = types.ModuleType("__main__")

    def train(trainer_cls=None, train_state_initializer_cls=None, relative_steps=None):
        return trainer_cls, train_state_initializer_cls

    train.__module__ = "__main__"
    script.train = train
    gin.add_config_file_search_path(str(ROOT / "gin"))
    before = sys.modules["__main__"]
    sys.modules["__main__"] = script
    try:
        with gin.unlock_config():
            yield parse_gin
            gin.clear_config()
    finally:
        sys.modules["__main__"] = before


def specs(axes):
    """The axes of weights by path."""
    flat = jax.tree_util.tree_flatten_with_path(
        axes, is_leaf=lambda x: isinstance(x, PartitionSpec)
    )[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in flat}
