"""Models: a flax module with vocabularies, an optimizer definition, a loss and its metrics.

They train and evaluate with teacher forcing. To predict, load the checkpoint in T5X.
"""

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import seqio
from clu import metrics as clu_metrics
from flax import linen as nn
from flax.core import FrozenDict, freeze

from t5x_sparsity.embedded import losses, optimizers
from t5x_sparsity.embedded import metrics as metrics_lib
from t5x_sparsity.embedded.refusals import missing_from, refuse

__getattr__ = missing_from(__name__)

PyTree = Any
Batch = Mapping[str, jax.Array]


class BaseTransformerModel:
    """What both families share; a subclass says how logits are computed from a batch.

    label_smoothing: probability, in [0, 1), spread over the wrong tokens, in evaluation too.
    z_loss: coefficient of the square of the softmax's log normaliser, added to the loss.
    loss_normalizing_factor: a number, None for a plain sum over tokens, or a name in
        `losses.FACTORS`.
    feature_converter_cls: how seqio makes features of examples; None takes the class's own.
    decode_fn: accepted for T5X's sake, and not used.
    """

    FEATURE_CONVERTER_CLS: Callable[..., seqio.FeatureConverter]

    def __init__(
        self,
        module: nn.Module,
        input_vocabulary: seqio.Vocabulary,
        output_vocabulary: seqio.Vocabulary,
        optimizer_def: optimizers.OptimizerDef,
        decode_fn: Callable | None = None,
        feature_converter_cls: Callable[..., seqio.FeatureConverter] | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        loss_normalizing_factor: float | str | None = None,
    ):
        if feature_converter_cls is not None:
            self.FEATURE_CONVERTER_CLS = feature_converter_cls
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(
                f"{type(self).__name__}.label_smoothing must be at least 0 and below 1, got "
                f"{label_smoothing!r}."
            )
        self.module = module
        self.optimizer_def = optimizer_def
        self.input_vocabulary = input_vocabulary
        self.output_vocabulary = output_vocabulary
        self.decode_fn = decode_fn
        self._label_smoothing = label_smoothing
        self._z_loss = z_loss
        self._loss_normalizing_factor = loss_normalizing_factor

    def get_initial_variables(
        self,
        rng: jax.Array,
        input_shapes: Mapping[str, tuple[int, ...]],
        input_types: Mapping[str, Any] | None = None,
    ) -> FrozenDict:
        """Returns the collections `params` and `params_axes` for inputs of these shapes."""
        types = input_types or {}
        batch = {
            name: jnp.ones(shape, types.get(name, jnp.int32))
            for name, shape in input_shapes.items()
        }
        # Targets have the shape of inputs, and are not always among the features that are declared.
        batch.setdefault("decoder_target_tokens", batch["decoder_input_tokens"])
        return freeze(self._apply(self.module.init, rng, batch, enable_dropout=False))

    def loss_fn(
        self, params: PyTree, batch: Batch, dropout_rng: jax.Array | None
    ) -> tuple[jax.Array, metrics_lib.MetricsMap]:
        """Returns the scalar loss and the metrics of a batch; no dropout where the key is None."""
        logits = self._compute_logits(params, batch, dropout_rng)
        targets = batch["decoder_target_tokens"]
        factor, weights = losses.get_loss_normalizing_factor_and_weights(
            self._loss_normalizing_factor, batch
        )
        loss, z_loss = losses.compute_weighted_cross_entropy(
            logits,
            targets,
            weights,
            label_smoothing=self._label_smoothing,
            z_loss=self._z_loss,
            loss_normalizing_factor=factor,
        )
        metrics = compute_base_metrics(
            logits, targets, weights, loss, z_loss, _segment_ids_of(batch)
        )
        return loss, metrics

    def eval_fn(self, params: PyTree, batch: Batch) -> tuple[jax.Array, metrics_lib.MetricsMap]:
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
        has_dropout = dropout_rng is not None
        return self._apply(
            self.module.apply,
            {"params": params},
            batch,
            enable_dropout=has_dropout,
            rngs={"dropout": dropout_rng} if has_dropout else None,
        )

    def _apply(self, method: Callable, state: Any, batch: Batch, **kwargs: Any) -> Any:
        """Calls the module's `init` or `apply` on a key or variables, and the batch's features."""
        raise NotImplementedError


class EncoderDecoderModel(BaseTransformerModel):
    """A model of targets given inputs."""

    FEATURE_CONVERTER_CLS = seqio.EncDecFeatureConverter

    def _apply(self, method: Callable, state: Any, batch: Batch, **kwargs: Any) -> Any:
        return method(
            state,
            batch["encoder_input_tokens"],
            batch["decoder_input_tokens"],
            batch["decoder_target_tokens"],
            encoder_segment_ids=batch.get("encoder_segment_ids"),
            decoder_segment_ids=batch.get("decoder_segment_ids"),
            encoder_positions=batch.get("encoder_positions"),
            decoder_positions=batch.get("decoder_positions"),
            **kwargs,
        )


class DecoderOnlyModel(BaseTransformerModel):
    """A model of sequences; where examples have inputs, only targets carry loss weights."""

    FEATURE_CONVERTER_CLS = seqio.DecoderFeatureConverter

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

    def _apply(self, method: Callable, state: Any, batch: Batch, **kwargs: Any) -> Any:
        return method(
            state,
            batch["decoder_input_tokens"],
            batch["decoder_target_tokens"],
            decoder_segment_ids=batch.get("decoder_segment_ids"),
            decoder_positions=batch.get("decoder_positions"),
            **kwargs,
        )


def compute_base_metrics(
    logits: jax.Array,
    targets: jax.Array,
    mask: jax.Array | None,
    loss: jax.Array,
    z_loss: jax.Array,
    segment_ids: Mapping[str, jax.Array],
) -> metrics_lib.MetricsMap:
    """Returns the metrics of a batch under T5X's names.

    `logits` is [batch, length, classes]; `targets`, `mask` (loss weights) and each of `segment_ids`
    are [batch, length]; `loss` and `z_loss` are the batch's scalars.
    """
    average, per_step = clu_metrics.Average, metrics_lib.AveragePerStep
    rate = metrics_lib.TimeRate
    examples = jnp.asarray(targets.shape[0])
    tokens = jnp.asarray(targets.size)
    real_tokens = tokens if mask is None else jnp.sum(mask)
    devices = jax.device_count()
    metrics = {
        "accuracy": clu_metrics.Accuracy.from_model_output(
            logits=logits, labels=targets.astype(jnp.int32), mask=mask
        ),
        "loss": per_step(total=loss),
        "loss_per_nonpadding_target_token": average(total=loss, count=real_tokens),
        "loss_per_all_target_tokens": average(total=loss, count=tokens),
        "z_loss": per_step(total=z_loss),
        "z_loss_per_all_target_tokens": average(total=z_loss, count=tokens),
        "cross_ent_loss": per_step(total=loss - z_loss),
        "cross_ent_loss_per_all_target_tokens": average(total=loss - z_loss, count=tokens),
        "timing/seqs_per_second": rate(numerator=examples),
        "timing/steps_per_second": metrics_lib.StepsPerTime(),
        "timing/seconds": metrics_lib.Time(),
        "timing/seqs": metrics_lib.Sum(examples),
        "timing/seqs_per_second_per_core": rate(numerator=examples / devices),
        "timing/target_tokens_per_second": rate(numerator=tokens),
        "timing/target_tokens_per_second_per_core": rate(numerator=tokens / devices),
        "non_padding_fraction/loss_weights": average(total=real_tokens, count=tokens),
    }
    filled = {feature: jnp.sum(ids != 0) for feature, ids in segment_ids.items()}
    sizes = {feature: ids.size for feature, ids in segment_ids.items()}
    for feature, ids in segment_ids.items():
        # An example begins where the segment changes; 0 is padding.
        begins = (jnp.diff(ids, axis=1, prepend=0) != 0) & (ids != 0)
        metrics[f"effective_batch_size/{feature}"] = per_step(total=jnp.sum(begins))
        metrics[f"non_padding_fraction/{feature}"] = average(
            total=filled[feature], count=jnp.asarray(sizes[feature])
        )
    metrics["non_padding_fraction/overall"] = average(
        total=sum(filled.values()), count=jnp.asarray(sum(sizes.values()))
    )
    return metrics


def _segment_ids_of(batch: Batch) -> dict[str, jax.Array]:
    suffix = "_segment_ids"
    packed = {k.removesuffix(suffix): v for k, v in batch.items() if k.endswith(suffix)}
    names = ("encoder_input_tokens", "decoder_target_tokens")
    return packed or {name: (batch[name] != 0).astype(jnp.int32) for name in names if name in batch}
