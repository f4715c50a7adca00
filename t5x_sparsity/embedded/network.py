"""The encoder-decoder transformer of T5 1.1."""

import dataclasses

import jax
import jax.numpy as jnp
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
        is_input = encoder_input_tokens > 0
        mask = layers.pair_mask(is_input, is_input)
        cross_mask = layers.pair_mask(decoder_target_tokens > 0, is_input)
        if encoder_segment_ids is not None:
            same = layers.pair_mask(encoder_segment_ids, encoder_segment_ids, jnp.equal)
            mask = mask & same
            same = layers.pair_mask(decoder_segment_ids, encoder_segment_ids, jnp.equal)
            cross_mask = cross_mask & same
        encoded = self.encoder(encoder_input_tokens, mask, deterministic=deterministic)
        return self.decoder(
            decoder_input_tokens,
            layers.decoder_mask(decoder_target_tokens, decoder_segment_ids),
            encoded,
            cross_mask,
            deterministic=deterministic,
        )
