"""The parts of a T5 transformer, with T5X's parameter names, shapes and logical axes.

Parameters are float32; activations have the `dtype` of the configuration, logits are float32. There
is no decoding cache: these models train and evaluate with teacher forcing.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen import partitioning as flax_partitioning

constrain = flax_partitioning.with_sharding_constraint

_scaled = functools.partial(nn.initializers.variance_scaling, 1.0)
_BUCKETS = 32
_MAX_DISTANCE = 128
# Added to the logits of masked positions. A row that is masked throughout stays finite.
_MASKED = -1e10
_DTYPES = ("float32", "bfloat16", "float16")
_SIZE = "an integer of at least 1"
_ACTIVATIONS = "a sequence of 'linear' and names in flax.linen, such as ('gelu', 'linear')"


def _param(name: str, init: Callable, **sizes: int) -> jax.Array:
    """A float32 parameter of the module at hand; `sizes` has a size per logical axis."""
    shape, axes = tuple(sizes.values()), tuple(sizes)
    return flax_partitioning.param_with_axes(name, init, shape, jnp.float32, axes=axes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerSizes:
    """What the layers need to know of a model; the configurations of both families extend it.

    dtype: of activations: float32, bfloat16 or float16, as a dtype or its name.
    mlp_activations: names in flax.linen, or 'linear'; their outputs are multiplied, so that
        ('gelu', 'linear') is T5 1.1's gated GELU.
    dropout_rate: in [0, 1).
    logits_via_embedding: share the token embedding with the output layer.
    float32_attention_logits: compute attention logits in float32 whatever `dtype` is.
    """

    vocab_size: int
    dtype: Any = jnp.float32
    emb_dim: int = 512
    num_heads: int = 8
    head_dim: int = 64
    mlp_dim: int = 2048
    mlp_activations: Sequence[str] = ("relu",)
    dropout_rate: float = 0.1
    logits_via_embedding: bool = False
    float32_attention_logits: bool = False

    def __post_init__(self):
        values, names = dict(vars(self)), self.mlp_activations
        sizes = [f.name for f in dataclasses.fields(self) if f.type in (int, "int")]
        is_known = isinstance(names, list | tuple) and all(
            isinstance(x, str) and (x == "linear" or hasattr(nn, x)) for x in names
        )
        for name, holds, allowed in (
            *((x, isinstance(values[x], int) and values[x] >= 1, _SIZE) for x in sizes),
            ("dtype", getattr(self.dtype, "__name__", self.dtype) in _DTYPES, f"one of {_DTYPES}"),
            ("dropout_rate", 0.0 <= self.dropout_rate < 1.0, "at least 0 and below 1"),
            ("mlp_activations", names and is_known, _ACTIVATIONS),
        ):
            if not holds:
                raise ValueError(
                    f"{type(self).__name__}.{name} must be {allowed}, got {values[name]!r}."
                )
        # A list from gin would make the modules that hold a configuration unhashable.
        object.__setattr__(self, "mlp_activations", tuple(names))


class Dense(nn.Module):
    """A linear map of the last axis, without bias: parameter `kernel` (inputs, features)."""

    features: int
    axes: tuple[str, str]
    dtype: Any
    init: Callable = _scaled("fan_in", "truncated_normal")

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        sizes = dict(zip(self.axes, (x.shape[-1], self.features), strict=True))
        kernel = _param("kernel", self.init, **sizes)
        return jnp.dot(x.astype(self.dtype), kernel.astype(self.dtype))


class RMSNorm(nn.Module):
    """T5's layer norm, without mean and bias: parameter `scale` (features,)."""

    dtype: Any
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Divides the last axis by its root mean square, in float32, and scales it."""
        scale = _param("scale", nn.initializers.ones, embed=x.shape[-1])
        x = x.astype(jnp.float32)
        power = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        normed = x * jax.lax.rsqrt(power + self.epsilon)
        return normed.astype(self.dtype) * scale.astype(self.dtype)


class TokenEmbedding(nn.Module):
    """Token vectors: parameter `embedding` (vocabulary, features)."""

    vocab_size: int
    features: int
    dtype: Any

    def setup(self):
        init = nn.initializers.normal(stddev=1.0)
        self.embedding = _param("embedding", init, vocab=self.vocab_size, embed=self.features)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps ids [batch, length] to vectors [batch, length, features]."""
        # A product, not a gather: it stays partitioned where the vocabulary is, and its gradient is
        # the same from run to run on accelerators too, where a scatter's need not be.
        one_hot = jax.nn.one_hot(tokens.astype(jnp.int32), self.vocab_size, dtype=self.dtype)
        return jnp.dot(one_hot, self.embedding.astype(self.dtype))

    def logits(self, x: jax.Array) -> jax.Array:
        """Maps [batch, length, features] to float32 logits [batch, length, vocabulary]."""
        logits = jnp.dot(x.astype(jnp.float32), self.embedding.T)
        return logits / np.float32(self.features**0.5)


class RelativePositionBias(nn.Module):
    """A learned attention bias per head and distance: `rel_embedding` (heads, 32 buckets)."""

    num_heads: int
    dtype: Any

    @nn.compact
    def __call__(self, length: int, bidirectional: bool) -> jax.Array:
        """Returns the bias [1, heads, length, length] of queries (rows) and keys (columns)."""
        init = _scaled("fan_avg", "uniform")
        table = _param("rel_embedding", init, heads=self.num_heads, relpos_buckets=_BUCKETS)
        buckets = relative_position_buckets(length, bidirectional)
        one_hot = jnp.asarray(buckets[..., None] == np.arange(_BUCKETS), self.dtype)
        return jnp.einsum("hb,qkb->hqk", table.astype(self.dtype), one_hot)[None]


def relative_position_buckets(length: int, bidirectional: bool) -> np.ndarray:
    """Returns the int32 bucket, in [0, 32), of each query (row) and key (column) position.

    Half of the buckets (of each direction) hold one distance each; the rest grow logarithmically up
    to distance 128, and the last holds all beyond. One-directional buckets count backwards only.
    """
    positions = np.arange(length, dtype=np.int32)
    ahead = positions[None, :] - positions[:, None]
    count = _BUCKETS // 2 if bidirectional else _BUCKETS
    distance = np.abs(ahead) if bidirectional else np.maximum(-ahead, 0)
    exact = count // 2
    with np.errstate(divide="ignore"):
        # float32, with this epsilon, since checkpoints of T5 count on where its buckets end.
        ratio = distance.astype(np.float32) / exact + np.finfo(np.float32).eps
    log_scale = np.log(ratio) / np.log(_MAX_DISTANCE / exact) * (count - exact)
    far = np.minimum(exact + log_scale.astype(np.int32), count - 1)
    buckets = np.where(distance < exact, distance, far)
    offset = count * (ahead > 0) if bidirectional else 0
    return (buckets + offset).astype(np.int32)


class Attention(nn.Module):
    """Multi-head attention: `query`, `key`, `value` (embed, heads * head_dim) and `out`."""

    config: TransformerSizes

    @nn.compact
    def __call__(
        self, x: jax.Array, memory: jax.Array, bias: jax.Array, deterministic: bool
    ) -> jax.Array:
        """Attends from `x` [batch, queries, embed] to `memory` [batch, keys, embed].

        `bias` [batch, heads, queries, keys] is added to the logits; it carries the mask too.
        """
        cfg = self.config
        init = _scaled("fan_in", "normal")

        def heads(inputs, name, init=init):
            features = cfg.num_heads * cfg.head_dim
            y = Dense(features, ("embed", "joined_kv"), cfg.dtype, init, name=name)(inputs)
            y = y.reshape(*y.shape[:-1], cfg.num_heads, cfg.head_dim)
            return constrain(y, ("batch", "length", "heads", "kv"))

        # T5 has no 1/sqrt(head_dim) in the logits; the query's initial values make up for it.
        query = heads(x, "query", lambda *args: init(*args) / np.float32(cfg.head_dim**0.5))
        key = heads(memory, "key")
        value = heads(memory, "value")
        if cfg.float32_attention_logits:
            query, key = query.astype(jnp.float32), key.astype(jnp.float32)
        logits = jnp.einsum("bqhd,bkhd->bhqk", query, key)
        weights = jax.nn.softmax(logits + bias.astype(logits.dtype)).astype(cfg.dtype)
        weights = _dropout(cfg)(weights, deterministic=deterministic)
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
        y = y.reshape(*y.shape[:-2], -1)
        return Dense(x.shape[-1], ("joined_kv", "embed"), cfg.dtype, init, name="out")(y)


class Mlp(nn.Module):
    """The feed-forward block: `wi` (or `wi_0`, `wi_1`, ... where gated) and `wo`."""

    config: TransformerSizes

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        cfg = self.config
        branches = []
        for i, activation in enumerate(cfg.mlp_activations):
            name = "wi" if len(cfg.mlp_activations) == 1 else f"wi_{i}"
            y = Dense(cfg.mlp_dim, ("embed", "mlp"), cfg.dtype, name=name)(x)
            branches.append(y if activation == "linear" else getattr(nn, activation)(y))
        hidden = functools.reduce(operator.mul, branches)
        hidden = _dropout(cfg)(hidden, deterministic=deterministic)
        hidden = constrain(hidden, ("batch", "length", "mlp"))
        return Dense(x.shape[-1], ("mlp", "embed"), cfg.dtype, name="wo")(hidden)


class Block(nn.Module):
    """One layer of an encoder or decoder: attention, cross attention where `memory` is, MLP.

    Each is normed and residual.
    """

    config: TransformerSizes
    role: str

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        bias: jax.Array,
        memory: tuple[jax.Array, jax.Array] | None,  # vectors and their bias
        deterministic: bool,
    ) -> jax.Array:
        cfg = self.config

        def normed(x, sublayer):
            return RMSNorm(cfg.dtype, name=f"pre_{sublayer}_layer_norm")(x)

        def residual(x, y):
            return x + _dropout(cfg)(y, deterministic=deterministic)

        name = "attention" if self.role == "encoder" else "self_attention"
        y = normed(x, name)
        x = residual(x, Attention(cfg, name=name)(y, y, bias, deterministic))
        if memory is not None:
            y = normed(x, "cross_attention")
            cross = Attention(cfg, name="encoder_decoder_attention")
            x = residual(x, cross(y, *memory, deterministic))
        return residual(x, Mlp(cfg, name="mlp")(normed(x, "mlp"), deterministic))


class Stack(nn.Module):
    """An encoder or a decoder, from tokens to vectors (encoder) or to logits (decoder).

    role: 'encoder' or 'decoder'.
    shared_embedding: the token embedding, or None for one of its own.
    """

    config: TransformerSizes
    num_layers: int
    role: str
    shared_embedding: nn.Module | None = None

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        mask: jax.Array,
        memory: jax.Array | None = None,
        memory_mask: jax.Array | None = None,
        *,
        deterministic: bool,
    ) -> jax.Array:
        """Runs the layers over `tokens` [batch, length]; masks are those of `attention_mask`."""
        cfg = self.config
        is_encoder = self.role == "encoder"
        embedding = self.shared_embedding or TokenEmbedding(
            cfg.vocab_size, cfg.emb_dim, cfg.dtype, name="token_embedder"
        )
        positions = RelativePositionBias(cfg.num_heads, cfg.dtype, name="relpos_bias")
        bias = positions(tokens.shape[-1], is_encoder) + _mask_bias(mask, cfg.dtype)
        if memory is not None:
            memory = memory, _mask_bias(memory_mask, cfg.dtype)

        x = _dropout(cfg)(embedding(tokens), deterministic=deterministic)
        x = constrain(x, ("batch", "length", "embed"))
        for i in range(self.num_layers):
            x = Block(cfg, self.role, name=f"layers_{i}")(x, bias, memory, deterministic)
        x = RMSNorm(cfg.dtype, name=f"{self.role}_norm")(x)
        if is_encoder:
            return nn.Dropout(cfg.dropout_rate)(x, deterministic=deterministic)
        x = _dropout(cfg)(x, deterministic=deterministic)
        if cfg.logits_via_embedding:
            return embedding.logits(x)
        return Dense(cfg.vocab_size, ("embed", "vocab"), jnp.float32, name="logits_dense")(x)


def attention_mask(
    queries: tuple[jax.Array, jax.Array | None],
    keys: tuple[jax.Array, jax.Array | None],
    is_causal: bool = False,
) -> jax.Array:
    """Returns the mask [batch, 1, queries, keys], True where a query may attend to a key.

    Each is (tokens, segment ids or None), [batch, length]. Padding (0) is left out, and so are keys
    of other segments and, where it is causal, those after the query.
    """
    pairs = functools.partial(nn.make_attention_mask, dtype=bool)
    mask = pairs(queries[0] > 0, keys[0] > 0)
    if is_causal:
        mask = mask & nn.make_causal_mask(queries[0], dtype=bool)
    if queries[1] is not None:
        mask = mask & pairs(queries[1], keys[1], jnp.equal)
    return mask


def _mask_bias(mask: jax.Array, dtype: Any) -> jax.Array:
    return jnp.where(mask, 0.0, _MASKED).astype(dtype)


def _dropout(cfg: TransformerSizes) -> nn.Dropout:
    # One draw for all positions (queries, in attention weights), as T5X has it.
    return nn.Dropout(cfg.dropout_rate, broadcast_dims=(-2,))
