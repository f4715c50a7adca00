"""The models, batches and trainers that the benchmarks train, on the host in use."""

from __future__ import annotations

import argparse
import functools
import math
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import commandline
import gin
import jax
import numpy as np
import seqio
from absl import logging
from jax.sharding import Mesh

import t5x_sparsity as ts
from t5x_sparsity import host

GIN = Path(__file__).parents[1] / "gin"
# includes are found as they are where the package is installed
sys.path.append(str(GIN))
FEATURES = (
    "encoder_input_tokens",
    "decoder_input_tokens",
    "decoder_target_tokens",
    "decoder_loss_weights",
)
TOTAL_STEPS = 10**6

# what hosts say of every weight
logging.set_verbosity(logging.ERROR)


def methods() -> tuple[str, ...]:
    """The methods there is a gin file for."""
    files = (GIN / "sparsity").glob("*.gin")
    return tuple(sorted(p.stem for p in files if "sparsity/base.gin" in p.read_text()))


def config_of(
    method: str, *, begin: int, period: int, bindings: list[str] | None = None
) -> ts.SparsityConfig:
    """The configuration that a method's gin file makes, with masks updated on these steps."""
    script = types.ModuleType("__main__")  # which gin files bind
    script.train = host.train_lib.train
    before = sys.modules["__main__"]
    sys.modules["__main__"] = script
    try:
        gin.clear_config()
        with gin.config.interactive_mode():  # the host may have registered it already
            gin.configurable(script.train)
        text = (GIN / "sparsity" / f"{method}.gin").read_text()
        macros = {
            "TRAIN_STEPS": TOTAL_STEPS,
            "MASK_UPDATE_BEGIN": begin,
            "MASK_UPDATE_END": TOTAL_STEPS - 1,
            "MASK_UPDATE_PERIOD": period,
        }
        gin.parse_config(text)
        gin.parse_config([f"{k} = {v}" for k, v in macros.items() if k in text])
        gin.parse_config(bindings or [])
        return gin.get_configurable(ts.SparsityConfig)()
    finally:
        sys.modules["__main__"] = before


def optimizer(name: str) -> Any:
    """The host's own optimizer."""
    if name == "adamw":
        return host.optimizers.adamw(1e-3)
    return host.adafactor.Adafactor(
        decay_rate=0.8,
        step_offset=0,
        logical_factor_rules=host.adafactor.standard_logical_factor_rules(),
    )


class Partitioner(host.partitioning.PjitPartitioner):
    """The host's, over these devices, every `model_parallel` of which share a model."""

    def __init__(self, devices: Sequence[Any], model_parallel: int, **kwargs: Any):
        super().__init__(num_partitions=1, **kwargs)
        grid = np.array(devices).reshape(-1, model_parallel)
        self._own_mesh = Mesh(grid, ("data", "model"))

    @property
    def mesh(self) -> Mesh:
        return self._own_mesh


def model(args: argparse.Namespace, optimizer_def: Any) -> Any:
    """A T5 1.1 with a small vocabulary, so that most of its weights can be sparse."""
    # four heads at least, to be split over four devices
    heads = max(args.d_model // 64, 4)
    return t5(optimizer_def, 512, args.d_model, args.layers, heads, 4 * args.d_model, "float32")


def t5(
    optimizer_def: Any, vocab: int, d_model: int, layers: int, heads: int, d_ff: int, dtype: str
) -> Any:
    """A T5 1.1 of `layers` in the encoder and as many in the decoder, without dropout."""
    config = host.network.T5Config(
        vocab_size=vocab,
        dtype=dtype,
        emb_dim=d_model,
        num_heads=heads,
        num_encoder_layers=layers,
        num_decoder_layers=layers,
        head_dim=64,
        mlp_dim=d_ff,
        mlp_activations=("gelu", "linear"),
        dropout_rate=0.0,
    )
    vocabulary = seqio.ByteVocabulary()
    return host.models.EncoderDecoderModel(
        host.network.Transformer(config), vocabulary, vocabulary, optimizer_def
    )


def batch(args: argparse.Namespace) -> dict[str, np.ndarray]:
    """One batch of noise."""
    rng = np.random.RandomState(0)
    shape = (args.batch, args.length)
    tokens = {k: rng.randint(3, 250, shape).astype("int32") for k in FEATURES[:3]}
    return {**tokens, FEATURES[3]: np.ones(shape, "int32")}


def make_trainer(
    args: argparse.Namespace, config: ts.SparsityConfig | None, optimizer_def: Any = None
) -> Any:
    """A trainer with a fresh state; the host's own, dense, where config is None."""
    optimizer_def = optimizer(args.optimizer) if optimizer_def is None else optimizer_def
    return assemble(
        model(args, optimizer_def),
        optimizer_def,
        Partitioner(commandline.devices(args.devices), args.devices),
        config,
        (args.batch, args.length),
        lambda initializer: initializer.from_scratch(jax.random.PRNGKey(0)),
    )


def assemble(
    net: Any,
    optimizer_def: Any,
    partitioner: Any,
    config: ts.SparsityConfig | None,
    shape: tuple[int, int],
    state_of: Callable[[Any], Any],
) -> Any:
    """A trainer of batches of `shape`, with the state that `state_of` makes of the initializer."""
    arguments = (
        optimizer_def,
        net.get_initial_variables,
        dict.fromkeys(FEATURES, shape),
        partitioner,
    )
    if config is None:
        initializer = host.utils.TrainStateInitializer(*arguments)
        make: Callable = host.Trainer
    else:
        initializer = ts.SparseTrainStateInitializer(*arguments, config=config)
        make = functools.partial(ts.sparse_trainer, host.Trainer)
    return make(
        model=net,
        train_state=state_of(initializer),
        partitioner=partitioner,
        eval_names=[],
        summary_dir=None,
        train_state_axes=initializer.train_state_axes,
        rng=jax.random.PRNGKey(1),
        learning_rate_fn=lambda step: 1e-3,
        num_microbatches=None,
    )


def steps_of(trainer: Any) -> dict[str, Any]:
    """The train steps that a trainer compiles, by kind; a dense one has a plain one only."""
    if hasattr(trainer, "train_step_variants"):
        return trainer.train_step_variants()
    return {"plain": trainer._partitioned_train_step}


def weights_of(trainer: Any) -> int:
    """How many weights the model has."""
    return sum(x.size for x in jax.tree.leaves(trainer.train_state.params))


def masks_of(trainer: Any) -> list[Any]:
    """The masks in a trainer's state; JaxPruner's are part of the optimizer's."""
    leaves = jax.tree_util.tree_leaves_with_path(trainer.train_state)
    return [x for path, x in leaves if "masks" in (getattr(key, "name", None) for key in path)]


def mask_bytes(trainer: Any) -> int:
    """Bytes of all masks on one device; their shapes will do."""
    shards = [(x.sharding.shard_shape(x.shape), x.dtype.itemsize) for x in masks_of(trainer)]
    return sum(math.prod(shape) * size for shape, size in shards)


def settings(args: argparse.Namespace, *names: str) -> Mapping[str, Any]:
    """The flags that shape a result, for its JSON."""
    shared = ("devices", "optimizer", "d_model", "layers", "batch", "length", "binding")
    return {name: getattr(args, name) for name in (*shared, *names)}
