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
from t5x_sparsity.embedded.refusals import missing_from

__getattr__ = missing_from(__name__)

PyTree = Any
Batch = Mapping[str, jax.Array]


class BaseTransformerModel:
    """What both families share; a subclass says how logits are computed from a batch.

    label_smoothing: probability, in [0, 1), spread over the wrong tokens, in evaluation too.
    z_loss: coefficient of the square of the softmax's log normaliser, added to the loss.
    loss_normalizing_factor: a number, None for a plain sum over tokens, or a
        `losses.SpecialLossNormalizingFactor` or its name.
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
        loss_normalizing_factor: losses.LossNormalizingFactor = None,
    ):
        """Keeps the arguments, see the class."""
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
        loss, z_loss, _ = losses.compute_weighted_cross_entropy(
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

    def score_batch(self, params: PyTree, batch: Batch) -> jax.Array:
        """Returns the log likelihood of each target sequence, [batch]; z-loss has no part in it."""
        targets = batch["decoder_target_tokens"]
        logits = self._compute_logits(params, batch)
        one_hot = jax.nn.one_hot(targets, logits.shape[-1])
        scores = -losses.cross_entropy_with_logits(logits, one_hot, 0.0)[0]
        return jnp.sum(scores * batch["decoder_loss_weights"], axis=-1)

    def predict_batch(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises a NotImplementedError: the embedded host does not decode."""
        raise NotImplementedError(
            f"{type(self).__name__} of the embedded host can not predict: it trains and evaluates "
            "with teacher forcing only. Use T5X for it, on this checkpoint."
        )

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
        raise NotImplementedError(f"{type(self).__name__} must define _apply")


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
    """A model of sequences; where examples have inputs, only targets carry loss weights.

    inputs_bidirectional_attention: let inputs attend to each other both ways (prefix LM).
    """

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
        """Keeps the arguments; `kwargs` are those of the base class."""
        self._inputs_bidirectional_attention = inputs_bidirectional_attention
        super().__init__(module, vocabulary, vocabulary, optimizer_def, decode_fn, **kwargs)

    def _apply(self, method: Callable, state: Any, batch: Batch, **kwargs: Any) -> Any:
        bidirectional = None
        if self._inputs_bidirectional_attention:
            bidirectional = batch.get("decoder_causal_attention")
            if bidirectional is None:
                raise ValueError(
                    "DecoderOnlyModel.inputs_bidirectional_attention = True needs the feature "
                    f"'decoder_causal_attention', and the batch has {sorted(batch)}. Use a task "
                    "with inputs and seqio.PrefixLMFeatureConverter, or set it to False."
                )
        return method(
            state,
            batch["decoder_input_tokens"],
            batch["decoder_target_tokens"],
            decoder_segment_ids=batch.get("decoder_segment_ids"),
            decoder_positions=batch.get("decoder_positions"),
            decoder_causal_attention=bidirectional,
            **kwargs,
        )


def count_packed_examples(segment_ids: jax.Array) -> jax.Array:
    """Returns how many examples are packed in rows of segment ids [batch, length]; 0 is padding."""
    starts = jnp.diff(segment_ids, axis=1, prepend=0) != 0
    return jnp.sum(starts & (segment_ids != 0))


def compute_base_metrics(
    logits: jax.Array,
    targets: jax.Array,
    mask: jax.Array | None,
    loss: jax.Array,
    z_loss: jax.Array | None = None,
    segment_ids: Mapping[str, jax.Array] | None = None,
) -> metrics_lib.MetricsMap:
    """Returns the metrics of a batch under T5X's names.

    `logits` is [batch, length, classes]; `targets`, `mask` (loss weights) and each of `segment_ids`
    are [batch, length]; `loss` and `z_loss` are the batch's scalars.
    """
    average, per_step = clu_metrics.Average, metrics_lib.AveragePerStep
    rate = metrics_lib.TimeRate.from_model_output
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
        "timing/seqs_per_second": rate(numerator=examples),
        "timing/steps_per_second": metrics_lib.StepsPerTime.from_model_output(),
        "timing/seconds": metrics_lib.Time(),
        "timing/seqs": metrics_lib.Sum(examples),
        "timing/seqs_per_second_per_core": rate(numerator=examples / devices),
        "timing/target_tokens_per_second": rate(numerator=tokens),
        "timing/target_tokens_per_second_per_core": rate(numerator=tokens / devices),
        "non_padding_fraction/loss_weights": average(total=real_tokens, count=tokens),
    }
    if z_loss is not None:
        metrics |= {
            "z_loss": per_step(total=z_loss),
            "z_loss_per_all_target_tokens": average(total=z_loss, count=tokens),
            "cross_ent_loss": per_step(total=loss - z_loss),
            "cross_ent_loss_per_all_target_tokens": average(total=loss - z_loss, count=tokens),
        }
    if segment_ids:
        filled, size = 0, 0
        for feature, ids in segment_ids.items():
            metrics[f"effective_batch_size/{feature}"] = per_step(total=count_packed_examples(ids))
            feature_filled = jnp.sum(ids != 0)
            metrics[f"non_padding_fraction/{feature}"] = average(
                total=feature_filled, count=jnp.asarray(ids.size)
            )
            filled, size = filled + feature_filled, size + ids.size
        metrics["non_padding_fraction/overall"] = average(total=filled, count=jnp.asarray(size))
    return metrics


def _segment_ids_of(batch: Batch) -> dict[str, jax.Array]:
    suffix = "_segment_ids"
    packed = {k.removesuffix(suffix): v for k, v in batch.items() if k.endswith(suffix)}
    names = ("encoder_input_tokens", "decoder_target_tokens")
    return packed or {name: (batch[name] != 0).astype(jnp.int32) for name in names if name in batch}
