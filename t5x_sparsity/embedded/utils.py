"""Configurations, learning rates and the train-state initializer, under T5X's names."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.core
import jax
import jax.numpy as jnp
from absl import logging
from clu import parameter_overview
from flax.traverse_util import flatten_dict, unflatten_dict

from t5x_sparsity.embedded import checkpoints, data, train_state
from t5x_sparsity.embedded.refusals import missing_from, refuse, refuse_options

__getattr__ = missing_from(__name__)

DatasetConfig = data.DatasetConfig
get_dataset = data.get_dataset
get_training_eval_datasets = data.get_training_eval_datasets
verify_matching_vocabs = data.verify_matching_vocabs
get_local_data = checkpoints.get_local_data


def _one_of(binding: str, got: Any, allowed: Sequence[Any]) -> None:
    if got not in allowed:
        names = ", ".join(repr(value) for value in allowed)
        raise ValueError(f"{binding} is {got!r}; it must be one of {names}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SaveCheckpointConfig:
    """When checkpoints are written and what they hold.

    Attributes:
      dtype: of weights on disk ('float32', 'bfloat16', or None: as they are). The optimizer's state
        always keeps its own.
      period: steps between checkpoints, or None.
      keep: how many checkpoints stay; None keeps all.
      save_dataset: a resumed run goes on with the batches that come next. Needs a fixed seed in the
        training DatasetConfig.
    """

    dtype: str | None = "float32"
    period: int | None = None
    checkpoint_steps: Sequence[int] | None = None
    keep: int | None = None
    save_dataset: bool = False
    state_transformation_fns: Sequence[Callable] = ()

    def __post_init__(self):
        for name in ("checkpoint_steps", "state_transformation_fns"):
            given = tuple(getattr(self, name) or ())
            refuse(f"utils.SaveCheckpointConfig.{name}", given, (), "saves by `period` alone")
        _one_of("utils.SaveCheckpointConfig.dtype", self.dtype, (None, "float32", "bfloat16"))
        for name in ("period", "keep"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(
                    f"utils.SaveCheckpointConfig.{name} is {value}; it must be at least 1, or None."
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RestoreCheckpointConfig:
    """Which checkpoint a new run starts from.

    Attributes:
      path: a checkpoint (mode 'specific') or a folder of checkpoints (mode 'latest'); an empty
        sequence starts from scratch.
      mode: 'specific' or 'latest'. T5X also has 'all', for evaluation.
      assignment_map: (regex, replacement) pairs. A leaf of the model whose whole name matches is
        read from the checkpoint's leaf of the replaced name; None as replacement leaves it out.
      strict: not used; in T5X it is about TensorFlow checkpoints.
      fallback_to_scratch: initialize what the checkpoint lacks; needs assignment_map or
        state_transformation_fns, which say what may be missing.
      dtype: cast the weights to this type; None takes the model's.
      restore_dataset: go on in the training data where the checkpoint's run was.
      state_transformation_fns: each takes (checkpoint_state, model_state, is_resuming=) as nested
        dicts and returns the checkpoint's; the leaves stand for arrays that are read afterwards.
    """

    path: str | Sequence[str] = ()
    mode: str = "latest"
    assignment_map: Sequence[tuple[str, str | None]] | None = None
    strict: bool = True
    fallback_to_scratch: bool = False
    dtype: str | None = None
    restore_dataset: bool = False
    state_transformation_fns: Sequence[Callable] = ()

    def __post_init__(self):
        _one_of("utils.RestoreCheckpointConfig.mode", self.mode, ("specific", "latest"))
        dtypes = (None, "float32", "bfloat16", "float16")
        _one_of("utils.RestoreCheckpointConfig.dtype", self.dtype, dtypes)
        if self.fallback_to_scratch and not self.transformations:
            raise ValueError(
                "utils.RestoreCheckpointConfig.fallback_to_scratch = True needs an assignment_map "
                "(or state_transformation_fns) that says which leaves the checkpoint may lack, "
                "such as assignment_map = ((r'state/.*', None),)."
            )

    @property
    def transformations(self) -> tuple[Callable, ...]:
        """The assignment map, as a transformation, and the transformations after it."""
        rules = self.assignment_map
        first = () if rules is None else (functools.partial(_assign, rules=tuple(rules)),)
        return (*first, *self.state_transformation_fns)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """How a run saves its checkpoints and which one it starts from; None switches either off."""

    save: SaveCheckpointConfig | None = None
    restore: RestoreCheckpointConfig | None = None


def _assign(
    saved: Mapping, expected: Mapping, *, rules: Sequence, is_resuming: bool = False
) -> Mapping:
    """The state transformation of an assignment map."""
    if is_resuming:
        return saved
    source = flatten_dict(saved, sep="/")
    kept, assigned, used = dict(source), {}, set()
    for name in flatten_dict(expected, sep="/"):
        pattern, replacement = next((r for r in rules if re.fullmatch(r[0], name)), (None, None))
        used.add(pattern)
        if pattern is not None and replacement is None:
            kept.pop(name, None)
        elif pattern is not None:
            old = re.fullmatch(pattern, name).expand(replacement)
            if old not in source:
                raise ValueError(
                    f"assignment_map {pattern!r} -> {replacement!r} reads {name!r} from "
                    f"{old!r}, which the checkpoint doesn't hold."
                )
            kept.pop(old, None)
            assigned[name] = source[old]
    unused = [pattern for pattern, _ in rules if pattern not in used]
    if unused:
        raise ValueError(
            f"utils.RestoreCheckpointConfig.assignment_map: {unused} match no leaf of the "
            "model's state. Patterns match whole names, such as r'state/param_states/.*'."
        )
    return unflatten_dict(kept | assigned, sep="/")


def create_learning_rate_scheduler(
    factors: str = "constant * linear_warmup * rsqrt_decay",
    base_learning_rate: float = 0.5,
    warmup_steps: int = 1000,
    steps_per_cycle: int = 100000,
    **only_in_t5x: Any,
) -> Callable[[jax.Array], jax.Array]:
    """The product of the named factors as a function of the step s; at least 1e-8.

    Factors, with w = warmup_steps:

    - constant: base_learning_rate
    - linear_warmup: min(1, s / w)
    - rsqrt_decay: 1 / sqrt(max(s, w))
    - rsqrt_normalized_decay: sqrt(w / max(s, w))
    - cosine_decay: (1 + cos(pi * p)) / 2, p = max(0, s - w) / steps_per_cycle modulo 1
    """
    refuse_options("utils.create_learning_rate_scheduler", only_in_t5x)
    warmup = warmup_steps
    table: dict[str, Callable[[jax.Array], jax.Array]] = {
        "constant": lambda s: base_learning_rate,
        "linear_warmup": lambda s: jnp.minimum(1.0, s / warmup),
        "rsqrt_decay": lambda s: jax.lax.rsqrt(jnp.maximum(s, warmup).astype(jnp.float32)),
        "rsqrt_normalized_decay": lambda s: jnp.sqrt(warmup / jnp.maximum(s, warmup)),
        "cosine_decay": lambda s: (
            0.5 + 0.5 * jnp.cos(jnp.pi * (jnp.maximum(0.0, s - warmup) / steps_per_cycle % 1.0))
        ),
    }
    names = [name.strip() for name in factors.split("*")]
    for name in names:
        if name not in table:
            raise ValueError(
                f"utils.create_learning_rate_scheduler.factors = {factors!r} names the factor "
                f"{name!r}; the factors are {', '.join(table)}. T5X has others."
            )
        if warmup < 1 and name not in ("constant", "cosine_decay"):
            raise ValueError(
                f"utils.create_learning_rate_scheduler.warmup_steps is {warmup}; with {name!r} "
                "it must be at least 1."
            )

    def learning_rate(step):
        rate = jnp.float32(1.0)
        for name in names:
            rate = rate * table[name](jnp.asarray(step))
        return jnp.maximum(rate, 1e-8).astype(jnp.float32)

    return learning_rate


class TrainStateInitializer:
    """Makes the train state, sharded from the start, and knows its shapes and axes.

    `global_train_state_shape` has a jax.ShapeDtypeStruct for each array, `train_state_axes` a
    PartitionSpec (or None).
    """

    def __init__(
        self,
        optimizer_def: Any,
        init_fn: Callable[..., Mapping],
        input_shapes: Mapping[str, Sequence[int]],
        partitioner: Any,
        input_types: Mapping[str, Any] | None = None,
    ):
        """Trace the initialization; nothing is computed yet. Shapes are those of a whole batch."""
        if optimizer_def is None:
            raise ValueError(
                "The model has no optimizer_def: the embedded host only trains. Set the model's "
                "optimizer_def = %OPTIMIZER, or use T5X for inference."
            )

        def initialize(rng):
            variables = flax.core.freeze(
                init_fn(rng=rng, input_shapes=input_shapes, input_types=input_types)
            )
            return train_state.FlaxOptimTrainState.create(optimizer_def, variables)

        self._partitioner, self._initialize = partitioner, initialize
        self.global_train_state_shape = jax.eval_shape(initialize, jax.random.PRNGKey(0))
        self.train_state_axes = partitioner.get_mesh_axes(self.global_train_state_shape)

    def from_scratch(self, init_rng: jax.Array) -> Any:
        """The train state at step 0, each array made where it is to lie."""
        logging.info("Initializing the train state from scratch.")
        return self._partitioner.partition(self._initialize, None, self.train_state_axes)(init_rng)


def log_model_info(log_file: str, full_train_state: Any) -> None:
    """Write a table of the weights to a file: name, shape, dtype and size."""
    weights = flax.core.unfreeze(full_train_state.params)
    count = parameter_overview.count_parameters(weights)
    logging.info("The model has %s weights.", f"{count:,}")
    with open(log_file, "w", encoding="utf-8") as out:
        table = parameter_overview.get_parameter_overview(weights, include_stats=False)
        out.write(f"Weights in all: {count}\n\n{table}\n")
