"""Cross entropy with label smoothing and z-loss, summed and normalised as T5X does."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

# What the summed loss may be divided by where that depends on the batch: the sum of the loss
# weights, or the number of target positions, padding included.
FACTORS = ("NUM_REAL_TARGET_TOKENS", "NUM_TOTAL_TARGET_TOKENS")


def compute_weighted_cross_entropy(
    logits: jax.Array,
    targets: jax.Array,
    weights: jax.Array | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    loss_normalizing_factor: float | jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns scalars (loss, its z-loss part) of target ids.

    `logits` is [batch, length, classes], `targets` and `weights` are [batch, length]. The loss is
    the weighted sum over positions, less the entropy that smoothed labels have of their own, over
    `loss_normalizing_factor`; None leaves it a sum. The z-loss is `z_loss` times the square of the
    logarithm of the softmax's normaliser.
    """
    if logits.ndim != targets.ndim + 1:
        raise ValueError(
            f"Logits must have one axis more than targets, got {logits.shape} and {targets.shape}."
        )
    classes = logits.shape[-1]
    confidence = 1.0 - label_smoothing
    other = label_smoothing / max(classes - 1, 1)
    entropy = -(confidence * math.log(confidence) + label_smoothing * math.log(other + 1e-20))

    # Built by comparison, so that it is fused and stays partitioned where the logits are.
    is_target = targets[..., None] == jnp.arange(classes)
    soft_targets = jnp.where(is_target, confidence, other).astype(jnp.float32)
    log_normalizer = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    loss = -jnp.sum(soft_targets * (logits - log_normalizer), axis=-1)
    penalty = z_loss * jnp.square(log_normalizer[..., 0])
    loss = loss + penalty - entropy
    if weights is not None:
        loss, penalty = loss * weights, penalty * weights
    loss, penalty = jnp.sum(loss), jnp.sum(penalty)
    if loss_normalizing_factor is not None:
        loss, penalty = loss / loss_normalizing_factor, penalty / loss_normalizing_factor
    return loss, penalty


def get_loss_normalizing_factor_and_weights(
    loss_normalizing_factor: float | str | None, batch: Mapping[str, jax.Array]
) -> tuple[float | jax.Array | None, jax.Array | None]:
    """Returns the number to divide by, and weights [batch, length], for a batch.

    A number or None comes back as it is, with `decoder_loss_weights` if the batch has them. The
    names in `FACTORS` weigh targets that are not padding where the batch has no weights.
    """
    factor, weights = loss_normalizing_factor, batch.get("decoder_loss_weights")
    if not isinstance(factor, str):
        return factor, weights
    if factor.upper() not in FACTORS:
        raise ValueError(
            f"The model got loss_normalizing_factor = {factor!r}; it must be a number, None, or "
            f"one of {FACTORS}. Use T5X for others."
        )
    targets = batch["decoder_target_tokens"]
    if weights is None:
        weights = (targets > 0).astype(jnp.float32)
    is_real = factor.upper() == FACTORS[0]
    return (jnp.sum(weights) if is_real else targets.size), weights
