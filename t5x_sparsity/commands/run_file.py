"""A user's run as its gin files configure it, without its data, its weights and its checkpoints."""

import contextlib
import dataclasses
import functools
import inspect
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import gin
import jax
import numpy as np

from t5x_sparsity import host
from t5x_sparsity.ahead_of_time.patches import gin_missing_imports, gin_search_paths, main_train
from t5x_sparsity.artifacts.macros import check_bindings
from t5x_sparsity.commands import CommandError, as_command_errors
from t5x_sparsity.t5x import SparseTrainStateInitializer

# Stand-ins: a plan needs no folder, and making a task may read data.
_NO_MODEL_DIR, _NO_TASK = "no_model_dir", "no_task"
# Of a bound reference, gin computes the value even where the caller gives another. This one may
# read data.
_REFERENCES = "t5x_sparsity.sparse_trainer.reference_losses"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The arguments that the configuration gives to `train`, as far as a plan needs them."""

    model: Any
    partitioner: Any
    trainer_cls: Any  # sparse or not, as the initializer is
    initializer_cls: Any
    batch: Mapping[str, jax.ShapeDtypeStruct]  # of a whole batch, by feature
    total_steps: int
    missing_imports: Sequence[str]  # modules that the files import and that aren't installed

    @property
    def batch_size(self) -> int:
        return next(iter(self.batch.values())).shape[0]

    def initializer(self, cls: Any = None) -> Any:
        """The initializer of the train state: the run's own, or one of the class given."""
        cls = cls or self.initializer_cls
        is_sparse = isinstance(cls, type) and issubclass(cls, SparseTrainStateInitializer)
        return cls(
            optimizer_def=self.model.optimizer_def,
            init_fn=self.model.get_initial_variables,
            input_shapes={k: x.shape for k, x in self.batch.items()},
            input_types={k: x.dtype for k, x in self.batch.items()},
            partitioner=self.partitioner,
            # else it would look for the run's checkpoints
            **({"model_dir": None, "checkpoint_cfg": None} if is_sparse else {}),
        )

    def trainer(self, initializer: Any, train_state: Any, cls: Any = None) -> Any:
        """A trainer over an abstract train state: the run's own, or one of the class given."""
        cls = cls or self.trainer_cls
        return cls(
            model=self.model,
            train_state=train_state,
            partitioner=self.partitioner,
            train_state_axes=initializer.train_state_axes,
            eval_names=[],
            summary_dir=None,
            rng=jax.random.PRNGKey(0),
        )


@contextlib.contextmanager
def load(
    files: Sequence[str], bindings: Sequence[str], search_paths: Sequence[str]
) -> Iterator[Run]:
    """The run of gin files and bindings, read as the host's train script reads them.

    What gin binds is in force within the context.

    Raises:
      CommandError: they can't be read, or don't make a run.
    """
    captured: dict[str, Any] = {}

    def train(**arguments):
        captured.update(arguments)

    train.__signature__ = signature = inspect.signature(host.train_lib.train)
    missing: list[str] = []
    generator = jax.config.jax_default_prng_impl
    made = functools.partial(as_command_errors, "the gin files don't make a run: ", Exception)
    with gin_search_paths(), main_train(train):
        try:
            with gin.unlock_config():
                gin.clear_config()
            with made(), _without_search_notes(), gin.unlock_config(), gin_missing_imports(missing):
                check_bindings(bindings)
                _parse(train, files, bindings, search_paths)
            with made():
                gin.get_configurable(train)()
                arguments = _with_defaults(signature, captured)
                if arguments["use_hardware_rng"] or (
                    host.NAME == "t5x" and arguments["random_seed"] is None
                ):
                    jax.config.update("jax_default_prng_impl", "unsafe_rbg")
                run = Run(
                    model=arguments["model"],
                    partitioner=arguments["partitioner"],
                    trainer_cls=arguments["trainer_cls"],
                    initializer_cls=arguments["train_state_initializer_cls"],
                    batch=_batch(arguments["model"], arguments["train_dataset_cfg"]),
                    total_steps=arguments["total_steps"],
                    missing_imports=missing,
                )
            yield run
        finally:
            jax.config.update("jax_default_prng_impl", generator)
            with gin.unlock_config():
                gin.clear_config()


def _parse(train, files, bindings, search_paths) -> None:
    search = list(search_paths)
    if host.NAME == "t5x":
        # T5X's gin files are found relative to its package's parent
        search.append(os.path.dirname(os.path.dirname(host.train_lib.__file__)))
    with gin.config.interactive_mode():
        gin.configurable(train)
        host.gin_utils.parse_gin_flags(
            search,
            list(files),
            list(bindings),
            # Missing modules, such as those that register tasks, are skipped; a name from one is
            # an error all the same.
            skip_unknown=("no configurable has this name",),
            finalize_config=False,
        )
        if _bound(_REFERENCES) is not None:
            gin.bind_parameter(_REFERENCES, None)
        gin.bind_parameter(("MIXTURE_OR_TASK_NAME", "gin.macro", "value"), _NO_TASK)
        if _is_required("MODEL_DIR"):
            gin.bind_parameter(("MODEL_DIR", "gin.macro", "value"), _NO_MODEL_DIR)
    if _is_required("TRAIN_STEPS"):
        raise CommandError(
            "TRAIN_STEPS isn't set, and mask updates and FLOPs depend on it; add, for example, "
            "--gin.TRAIN_STEPS=100000"
        )
    gin.finalize()


@contextlib.contextmanager
def _without_search_notes() -> Iterator[None]:
    """Silences gin's log line per folder that has no such file; its error then lists them all."""

    def is_no_note(record) -> bool:
        return not str(record.msg).startswith("Path not found")

    root = logging.getLogger()
    root.addFilter(is_no_note)
    try:
        yield
    finally:
        root.removeFilter(is_no_note)


def _is_required(macro: str) -> bool:
    """Whether a macro is bound to `%gin.REQUIRED`, which is to say, to nothing yet."""
    return getattr(_bound(f"{macro}/gin.macro.value"), "scopes", None) == ["gin.REQUIRED"]


def _bound(name: str) -> Any:
    """What is bound to a parameter; None where nothing is."""
    try:
        return gin.query_parameter(name)
    except ValueError:
        return None


def _with_defaults(signature: inspect.Signature, captured: Mapping[str, Any]) -> dict[str, Any]:
    bound = signature.bind_partial(**captured)
    bound.apply_defaults()
    needed = ("model", "partitioner", "trainer_cls", "train_dataset_cfg", "total_steps")
    missing = [name for name in needed if bound.arguments.get(name) is None]
    if missing:
        raise CommandError(
            f"the gin files bind no {', '.join(f'train.{n}' for n in missing)}; give a run file, "
            "such as T5X's 't5x/configs/runs/pretrain.gin' after a model's"
        )
    return {"random_seed": None, **bound.arguments}


def _batch(model: Any, cfg: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a batch, from the lengths that the configuration gives; no data is read."""
    if cfg.batch_size < 1:
        raise CommandError(
            f"utils.DatasetConfig.batch_size is {cfg.batch_size}; set BATCH_SIZE to at least 1"
        )
    converter = model.FEATURE_CONVERTER_CLS(
        pack=cfg.pack, use_custom_packing_ops=cfg.use_custom_packing_ops
    )
    features = dict(converter.MODEL_FEATURES)
    if deep := sorted(name for name, spec in features.items() if spec.rank != 1):
        raise CommandError(
            f"the features {deep} have more than one dimension, and only the data says how large "
            "they are; a plan can be made for models of token sequences only"
        )
    types = {name: spec.dtype for name, spec in features.items()}
    types |= dict(converter.PACKING_FEATURE_DTYPES or {}) if cfg.pack else {}
    lengths = converter.get_model_feature_lengths(cfg.task_feature_lengths)
    return {
        name: jax.ShapeDtypeStruct(
            (cfg.batch_size, length),
            types[name].as_numpy_dtype if name in types else np.int32,
        )
        for name, length in lengths.items()
    }
