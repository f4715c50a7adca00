"""Models: a flax module with vocabularies, an optimizer definition, a loss and its metrics.

They train and evaluate with teacher forcing. To predict, load the checkpoint in T5X.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NoReturn

import clu.metrics
import jax
import jax.numpy as jnp
import seqio
from flax import linen as nn
from flax.core import FrozenDict, freeze

from t5x_sparsity.embedded import optimizers
from t5x_sparsity.embedded.metrics import Metrics, Total
from t5x_sparsity.embedded.refusals import missing_from, refuse

__getattr__ = missing_from(__name__)

PyTree = Any
Batch = Mapping[str, jax.Array]


@dataclasses.dataclass(eq=False)
class BaseTransformerModel:
    """What both families share.

    label_smoothing: probability, in [0, 1), spread over the wrong tokens, in evaluation too.
    z_loss: coefficient of the square of the softmax's log normaliser, added to the loss.
    loss_normalizing_factor: what the loss of a batch is divided by; None: a plain sum over tokens.
    feature_converter_cls: how seqio makes features of examples; None takes the class's own.
    decode_fn: not used; in T5X it is for inference.
    """

    FEATURE_CONVERTER_CLS: ClassVar[Callable[..., seqio.FeatureConverter]]
    SIDES: ClassVar[tuple[str, ...]]  # of the module, of which batches have features

    module: nn.Module
    input_vocabulary: seqio.Vocabulary
    output_vocabulary: seqio.Vocabulary
    optimizer_def: optimizers.OptimizerDef
    decode_fn: Callable | None = None
    feature_converter_cls: Callable[..., seqio.FeatureConverter] | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    loss_normalizing_factor: float | None = None

    def __post_init__(self):
        if self.feature_converter_cls is not None:
            self.FEATURE_CONVERTER_CLS = self.feature_converter_cls
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(
                f"{type(self).__name__}.label_smoothing must be at least 0 and below 1, got "
                f"{self.label_smoothing!r}."
            )
        if isinstance(self.loss_normalizing_factor, str):
            name = f"models.{type(self).__name__}.loss_normalizing_factor"
            refuse(name, self.loss_normalizing_factor, why="divides by a number alone")

    def get_initial_variables(
        self,
        rng: jax.Array,
        input_shapes: Mapping[str, tuple[int, ...]],
        input_types: Mapping[str, Any] | None = None,
    ) -> FrozenDict:
        """Returns the collections `params` and `params_axes` for inputs of these shapes."""
        types = input_types or {}
        batch = {k: jnp.ones(shape, types.get(k, jnp.int32)) for k, shape in input_shapes.items()}
        # Targets have the shape of inputs, and are not always among the features that are declared.
        batch.setdefault("decoder_target_tokens", batch["decoder_input_tokens"])
        return freeze(self._apply(self.module.init, rng, batch, enable_dropout=False))

    def loss_fn(
        self, params: PyTree, batch: Batch, dropout_rng: jax.Array | None
    ) -> tuple[jax.Array, Metrics]:
        """Returns the scalar loss and the metrics of a batch; no dropout where the key is None."""
        logits = self._compute_logits(params, batch, dropout_rng)
        targets, weights = batch["decoder_target_tokens"], batch.get("decoder_loss_weights")
        loss, z_loss = compute_weighted_cross_entropy(
            logits,
            targets,
            weights,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            loss_normalizing_factor=self.loss_normalizing_factor,
        )
        segment_ids = _segment_ids_of(batch)
        return loss, compute_base_metrics(logits, targets, weights, loss, z_loss, segment_ids)

    def eval_fn(self, params: PyTree, batch: Batch) -> tuple[jax.Array, Metrics]:
        """Returns the scalar loss and the metrics of a batch, without dropout."""
        return self.loss_fn(params, batch, None)

    def predict_batch(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises a NotImplementedError, and so does `score_batch`: that is T5X's."""
        raise NotImplementedError(
            f"{type(self).__name__} of the embedded host can not predict or score: it trains and "
            "evaluates with teacher forcing only. Use T5X for it, on this checkpoint."
        )

    score_batch = predict_batch

    def _compute_logits(
        self, params: PyTree, batch: Batch, dropout_rng: jax.Array | None = None
    ) -> jax.Array:
        rngs = None if dropout_rng is None else {"dropout": dropout_rng}
        state, method = {"params": params}, self.module.apply
        return self._apply(method, state, batch, enable_dropout=rngs is not None, rngs=rngs)

    def _apply(self, method: Callable, state: Any, batch: Batch, **kwargs: Any) -> Any:
        """Calls the module's `init` or `apply` on a key or variables, and the batch's features."""
        inputs = [batch[f"{side}_input_tokens"] for side in self.SIDES]
        packing = [f"{side}_{x}" for side in self.SIDES for x in ("segment_ids", "positions")]
        kwargs |= {name: batch.get(name) for name in packing}
        return method(state, *inputs, batch["decoder_target_tokens"], **kwargs)


class EncoderDecoderModel(BaseTransformerModel):
    """A model of targets given inputs."""

    FEATURE_CONVERTER_CLS = seqio.EncDecFeatureConverter
    SIDES = ("encoder", "decoder")


class DecoderOnlyModel(BaseTransformerModel):
    """A model of sequences; where examples have inputs, only targets carry loss weights."""

    FEATURE_CONVERTER_CLS = seqio.DecoderFeatureConverter
    SIDES = ("decoder",)

    def __init__(
        self,
        module: nn.Module,
        vocabulary: seqio.Vocabulary,
        optimizer_def: optimizers.OptimizerDef,
        decode_fn: Callable | None = None,
        inputs_bidirectional_attention: bool = False,
        **kwargs: Any,
    ):
        name = "models.DecoderOnlyModel.inputs_bidirectional_attention"
        refuse(name, inputs_bidirectional_attention, False, "has causal attention only")
        super().__init__(module, vocabulary, vocabulary, optimizer_def, decode_fn, **kwargs)


def compute_weighted_cross_entropy(
    logits: jax.Array,
    targets: jax.Array,
    weights: jax.Array | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    loss_normalizing_factor: float | None = None,
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


def compute_base_metrics(
    logits: jax.Array,
    targets: jax.Array,
    mask: jax.Array | None,
    loss: jax.Array,
    z_loss: jax.Array,
    segment_ids: Mapping[str, jax.Array],
) -> dict[str, clu.metrics.Metric]:
    """Returns the metrics of a batch under T5X's names.

    `logits` is [batch, length, classes]; `targets`, `mask` (loss weights) and each of `segment_ids`
    are [batch, length]; `loss` and `z_loss` are the batch's scalars.
    """

    def average(total, count):
        return clu.metrics.Average(jnp.asarray(total), jnp.asarray(count))

    examples, tokens, devices = targets.shape[0], targets.size, jax.device_count()
    real_tokens = tokens if mask is None else jnp.sum(mask)
    metrics = {
        "accuracy": clu.metrics.Accuracy.from_model_output(
            logits=logits, labels=targets.astype(jnp.int32), mask=mask
        ),
        "loss_per_nonpadding_target_token": average(loss, real_tokens),
        "timing/seqs": Total(examples),
        "timing/seqs_per_second": Total(examples, "second"),
        "timing/seqs_per_second_per_core": Total(examples / devices, "second"),
        "timing/target_tokens_per_second": Total(tokens, "second"),
        "timing/target_tokens_per_second_per_core": Total(tokens / devices, "second"),
        "non_padding_fraction/loss_weights": average(real_tokens, tokens),
    }
    for name, part in {"loss": loss, "z_loss": z_loss, "cross_ent_loss": loss - z_loss}.items():
        metrics[name] = Total(part, "step")
        metrics[f"{name}_per_all_target_tokens"] = average(part, tokens)
    filled = {feature: jnp.sum(ids != 0) for feature, ids in segment_ids.items()}
    for feature, ids in segment_ids.items():
        # An example begins where the segment changes; 0 is padding.
        begins = (jnp.diff(ids, axis=1, prepend=0) != 0) & (ids != 0)
        metrics[f"effective_batch_size/{feature}"] = Total(jnp.sum(begins), "step")
        metrics[f"non_padding_fraction/{feature}"] = average(filled[feature], ids.size)
    size = sum(ids.size for ids in segment_ids.values())
    metrics["non_padding_fraction/overall"] = average(sum(filled.values()), size)
    return metrics


def _segment_ids_of(batch: Batch) -> dict[str, jax.Array]:
    suffix = "_segment_ids"
    packed = {k.removesuffix(suffix): v for k, v in batch.items() if k.endswith(suffix)}
    names = ("encoder_input_tokens", "decoder_target_tokens")
    return packed or {name: (batch[name] != 0).astype(jnp.int32) for name in names if name in batch}
