"""The models that T5X brings, tiny, and what of each is sparse."""

import importlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import seqio
import tiny_t5
from flax import linen as nn
from flax.linen import partitioning as flax_partitioning
from jax.sharding import Mesh

from t5x_sparsity import host

EXPERTS, LAYERS = 4, 2


class Case(NamedTuple):
    """A model; `build` takes an optimizer definition.

    sparse: regular expression of the paths of the weights that are sparse by default.
    slices: how many layers or experts a sparse weight is a stack of, and along which axis.
    """

    build: Callable
    sparse: str
    slices: tuple[int, int | None] = (1, None)
    optimizer: Callable | str = "adamw"
    partitioner: Callable = lambda: tiny_t5.MeshPartitioner(2, 2)
    base: Callable = lambda: host.Trainer
    arguments: Callable = dict


def _sizes(**kwargs):
    return dict(
        vocab_size=tiny_t5.VOCAB,
        dtype="float32",
        emb_dim=64,
        num_heads=4,
        head_dim=16,
        mlp_dim=128,
        mlp_activations=("gelu", "linear"),
        dropout_rate=0.0,
        **kwargs,
    )


def encoder_decoder(network, layers=1, **kwargs):
    """From a network module of T5X's layout."""

    def build(optimizer_def):
        config = network().T5Config(
            **_sizes(num_encoder_layers=layers, num_decoder_layers=layers), **kwargs
        )
        vocabulary = seqio.ByteVocabulary()
        return host.models.EncoderDecoderModel(
            network().Transformer(config), vocabulary, vocabulary, optimizer_def
        )

    return build


def _decoder_only(optimizer_def):
    config = host.decoder_only.TransformerConfig(**_sizes(num_layers=1))
    module = host.decoder_only.DecoderWrapper(config)
    return host.models.DecoderOnlyModel(module, seqio.ByteVocabulary(), optimizer_def)


def _t5x(name):
    return lambda: importlib.import_module(f"t5x.{name}")


scalable = _t5x("examples.scalable_t5.network")
moe_models = _t5x("contrib.moe.models")
moe_training_utils = _t5x("contrib.moe.training_utils")


class Dense(nn.Module):
    """A kernel with logical axes."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]

    @nn.compact
    def __call__(self):
        init = nn.initializers.normal(0.2)
        return flax_partitioning.param_with_axes(
            "kernel", init, self.shape, jnp.float32, axes=self.axes
        )


class RouterWeights(nn.Module):
    """The linear map to expert logits, named as in flaxformer."""

    width: int

    @nn.compact
    def __call__(self, x):
        return x @ Dense((self.width, EXPERTS), ("embed", "unmodeled"), name="w")()


class Router(nn.Module):
    """Probabilities of experts, a token."""

    width: int

    @nn.compact
    def __call__(self, x):
        return jax.nn.softmax(RouterWeights(self.width, name="router_weights")(x))


class Expert(nn.Module):
    """The experts' MLPs, stacked along axis 0."""

    width: int
    mlp_dim: int

    @nn.compact
    def __call__(self, x):
        sizes = EXPERTS, self.width, self.mlp_dim
        wi = Dense(sizes, ("expert", "embed", "expert_mlp"), name="wi")()
        wo = Dense((EXPERTS, *sizes[:0:-1]), ("expert", "expert_mlp", "embed"), name="wo")()
        return jnp.einsum("eblf,efd->ebld", jax.nn.gelu(jnp.einsum("bld,edf->eblf", x, wi)), wo)


class Mixture(nn.Module):
    """One layer of softly mixed experts, with the parameter names and axes of flaxformer's MoE."""

    width: int = 64
    mlp_dim: int = 128

    @nn.compact
    def __call__(self, decoder_input_tokens, decoder_target_tokens, **_):
        table = flax_partitioning.param_with_axes(
            "embedding",
            nn.initializers.normal(1.0),
            (tiny_t5.VOCAB, self.width),
            jnp.float32,
            axes=("vocab", "embed"),
        )
        x = table[decoder_input_tokens.astype(jnp.int32)]
        chosen = Router(self.width, name="router")(x)
        made = Expert(self.width, self.mlp_dim, name="expert")(x)
        x = x + jnp.einsum("ble,ebld->bld", chosen, made)
        for metric in moe_models().MOE_METRICS:
            self.sow("intermediates", metric, chosen.mean())
        return x @ table.T


def _mixture(optimizer_def):
    return moe_models().MoeDecoderOnlyModel(Mixture(), seqio.ByteVocabulary(), optimizer_def)


def moe_adafactor(**kwargs):
    rules = _t5x("contrib.moe.adafactor_utils")().logical_factor_rules()
    return host.adafactor.Adafactor(
        decay_rate=0.8, step_offset=0, logical_factor_rules=rules, **kwargs
    )


def moe_partitioner(**kwargs):
    """MoE's, over 1 x 2 x 2 devices; on CPU, T5X takes all devices for model-parallel."""
    base = _t5x("contrib.moe.partitioning")().MoePjitPartitioner

    class Partitioner(base):
        @property
        def mesh(self):
            devices = np.array(jax.devices()[:4]).reshape(1, 2, 2)
            return Mesh(devices, ("data", "expert", "model"))

    return Partitioner(num_expert_partitions=2, num_partitions=2, **kwargs)


_KERNELS = r"(attention/(query|key|value|out)|mlp/(wi_0|wi_1|wo))/kernel$"

CASES = {
    "t5": Case(encoder_decoder(lambda: host.network), _KERNELS),
    "decoder_only": Case(_decoder_only, _KERNELS),
}
T5X_ONLY = {
    "scalable_t5": Case(
        encoder_decoder(scalable, LAYERS, remat_policy="full"), _KERNELS, slices=(LAYERS, 1)
    ),
    "gpu_t5": Case(encoder_decoder(_t5x("contrib.gpu.t5.network")), _KERNELS),
    "moe": Case(
        _mixture,
        r"^expert/w[io]/kernel$",
        slices=(EXPERTS, 0),
        optimizer=lambda: moe_adafactor(min_dim_size_to_factor=8, beta1=0.9),
        partitioner=moe_partitioner,
        base=lambda: _t5x("contrib.moe.trainer")().MoeTrainer,
        arguments=lambda: {"num_expert_partitions": 2},
    ),
}
CASES |= T5X_ONLY
