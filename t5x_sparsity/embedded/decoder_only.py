"""The decoder-only transformer, with T5 1.1's layers."""

import dataclasses

import jax
from flax import linen as nn

from t5x_sparsity.embedded import layers


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
        return self.decoder(
            decoder_input_tokens,
            layers.decoder_mask(decoder_target_tokens, decoder_segment_ids),
            deterministic=not enable_dropout,
        )
