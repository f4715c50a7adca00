"""The transformers: T5 1.1's encoder and decoder, and a decoder alone with its layers."""

import dataclasses

import jax
from flax import linen as nn

from t5x_sparsity.embedded import layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config(layers.TransformerSizes):
    """The sizes of an encoder-decoder, see `layers.TransformerSizes`."""

    num_encoder_layers: int = 6
    num_decoder_layers: int = 6


class Transformer(nn.Module):
    """An encoder and a decoder that share the token embedding."""

    config: T5Config

    def setup(self):
        cfg = self.config
        self.token_embedder = layers.TokenEmbedding(cfg.vocab_size, cfg.emb_dim, cfg.dtype)
        self.encoder = layers.Stack(cfg, cfg.num_encoder_layers, "encoder", self.token_embedder)
        self.decoder = layers.Stack(cfg, cfg.num_decoder_layers, "decoder", self.token_embedder)

    def __call__(
        self,
        encoder_input_tokens: jax.Array,
        decoder_input_tokens: jax.Array,
        decoder_target_tokens: jax.Array,
        encoder_segment_ids: jax.Array | None = None,
        decoder_segment_ids: jax.Array | None = None,
        encoder_positions: jax.Array | None = None,
        decoder_positions: jax.Array | None = None,
        *,
        enable_dropout: bool = True,
    ) -> jax.Array:
        """Returns float32 logits [batch, target length, vocabulary] under teacher forcing.

        Tokens are ids [batch, length], 0 is padding. Segment ids tell packed examples apart.
        Positions are accepted and not used: they are relative.
        """
        del encoder_positions, decoder_positions
        deterministic = not enable_dropout
        inputs = encoder_input_tokens, encoder_segment_ids
        targets = decoder_target_tokens, decoder_segment_ids
        mask = layers.attention_mask(inputs, inputs)
        encoded = self.encoder(encoder_input_tokens, mask, deterministic=deterministic)
        return self.decoder(
            decoder_input_tokens,
            layers.attention_mask(targets, targets, is_causal=True),
            encoded,
            layers.attention_mask(targets, inputs),
            deterministic=deterministic,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig(layers.TransformerSizes):
    """The sizes of a decoder, see `layers.TransformerSizes`."""

    num_layers: int = 6


class DecoderWrapper(nn.Module):
    """A decoder under the name `decoder`, as T5X's checkpoints have it."""

    config: TransformerConfig

    def setup(self):
        self.decoder = layers.Stack(self.config, self.config.num_layers, "decoder")

    def __call__(
        self,
        decoder_input_tokens: jax.Array,
        decoder_target_tokens: jax.Array,
        decoder_segment_ids: jax.Array | None = None,
        decoder_positions: jax.Array | None = None,
        *,
        enable_dropout: bool = True,
    ) -> jax.Array:
        """Returns float32 logits [batch, length, vocabulary] under teacher forcing.

        Tokens are ids [batch, length], 0 is padding. Segment ids tell packed examples apart.
        Positions are accepted and not used: they are relative.
        """
        del decoder_positions
        targets = decoder_target_tokens, decoder_segment_ids
        mask = layers.attention_mask(targets, targets, is_causal=True)
        return self.decoder(decoder_input_tokens, mask, deterministic=not enable_dropout)
