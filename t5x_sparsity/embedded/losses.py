"""Cross entropy with label smoothing and z-loss, summed and normalised as T5X does."""

import enum
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp


class SpecialLossNormalizingFactor(enum.Enum):
    """What the summed loss is divided by, where that depends on the batch.

    NUM_REAL_TARGET_TOKENS: the sum of the loss weights.
    NUM_TOTAL_TARGET_TOKENS: the number of target positions, padding included.
    AVERAGE_PER_SEQUENCE: first each example's loss by its weights, then the sum by the number of
        examples, packed or not: every example counts alike, whatever its length. Padding is where
        `decoder_segment_ids` are 0; it doesn't count, whatever its weights.
    """

    NUM_REAL_TARGET_TOKENS = 1
    NUM_TOTAL_TARGET_TOKENS = 2
    AVERAGE_PER_SEQUENCE = 3


LossNormalizingFactor = float | int | str | SpecialLossNormalizingFactor | None


def cross_entropy_with_logits(
    logits: jax.Array, targets: jax.Array, z_loss: float
) -> tuple[jax.Array, jax.Array]:
    """Returns (loss, its z-loss part), both of shape [...], of logits and target probabilities.

    `logits` and `targets` are [..., classes]; the z-loss is `z_loss` times the square of the
    logarithm of the softmax's normaliser.
    """
    log_normalizer = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    cross_entropy = -jnp.sum(targets * (logits - log_normalizer), axis=-1)
    penalty = z_loss * jnp.square(log_normalizer[..., 0])
    return cross_entropy + penalty, penalty


def compute_weighted_cross_entropy(
    logits: jax.Array,
    targets: jax.Array,
    weights: jax.Array | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    loss_normalizing_factor: float | jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, float | jax.Array]:
    """Returns scalars (loss, its z-loss part, sum of weights) of target ids.

    `logits` is [batch, length, classes], `targets` and `weights` are [batch, length]. The loss is
    the weighted sum over positions, less the entropy that smoothed labels have of their own, over
    `loss_normalizing_factor`; None leaves it a sum.
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
    loss, penalty = cross_entropy_with_logits(logits, soft_targets, z_loss)
    loss = loss - entropy
    weight_sum = targets.size
    if weights is not None:
        loss, penalty, weight_sum = loss * weights, penalty * weights, jnp.sum(weights)
    loss, penalty = jnp.sum(loss), jnp.sum(penalty)
    if loss_normalizing_factor is not None:
        loss, penalty = loss / loss_normalizing_factor, penalty / loss_normalizing_factor
    return loss, penalty, weight_sum


def get_loss_normalizing_factor_and_weights(
    loss_normalizing_factor: LossNormalizingFactor, batch: Mapping[str, jax.Array]
) -> tuple[float | jax.Array | None, jax.Array | None]:
    """Returns the number to divide by, and weights [batch, length], for a batch.

    A number or None comes back as it is, with `decoder_loss_weights` if the batch has them. The
    special factors, by member or name, weigh targets that are not padding where the batch has no
    weights.
    """
    weights = batch.get("decoder_loss_weights")
    if not isinstance(loss_normalizing_factor, str | SpecialLossNormalizingFactor):
        return loss_normalizing_factor, weights
    factor = _special_factor(loss_normalizing_factor)
    targets = batch["decoder_target_tokens"]
    if weights is None:
        weights = (targets > 0).astype(jnp.float32)
    if factor is SpecialLossNormalizingFactor.NUM_REAL_TARGET_TOKENS:
        return jnp.sum(weights), weights
    if factor is SpecialLossNormalizingFactor.NUM_TOTAL_TARGET_TOKENS:
        return targets.size, weights
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if "decoder_segment_ids" in batch:
        segments = batch["decoder_segment_ids"]
        # Padding, segment 0, is no example: its weights become 0, whatever they were.
        same = (segments[:, :, None] == segments[:, None, :]) & (segments[:, :, None] != 0)
        total = jnp.einsum("bts,bs->bt", same.astype(weights.dtype), weights)
    weights = jnp.where(total > 0, weights / jnp.where(total > 0, total, 1.0), 0.0)
    return jnp.sum(weights), weights


def _special_factor(factor: str | SpecialLossNormalizingFactor) -> SpecialLossNormalizingFactor:
    if isinstance(factor, SpecialLossNormalizingFactor):
        return factor
    names = [member.name for member in SpecialLossNormalizingFactor]
    if factor.upper() not in names:
        raise ValueError(
            f"The model got loss_normalizing_factor = {factor!r}; it must be a number, None, or "
            f"one of {names}."
        )
    return SpecialLossNormalizingFactor[factor.upper()]
