"""Sparse training for runs that fiddle configures; gin's runs have sparsity/*.gin."""

import inspect
from typing import Any

from t5x_sparsity import host
from t5x_sparsity.t5x.checkpoints import from_dense
from t5x_sparsity.t5x.initializer import SparseTrainStateInitializer
from t5x_sparsity.t5x.trainer import sparse_trainer


def make_sparse(train: Any, config: Any, *, from_dense_checkpoint: bool = False) -> None:
    """Makes a fiddle configuration of T5X's `train` train sparse; it is changed in place.

        run = pretrain.train(model=..., model_dir="/runs/rigl", train_steps=100_000, ...)
        updates = fdl.Config(ts.Periodic, begin=0, end=0.75, period=100, total_steps=100_000)
        rigl = fdl.Config(ts.RigL, updates=updates)
        make_sparse(run, fdl.Config(ts.SparsityConfig, algorithm=rigl, sparsity=0.8))

    The model, the optimizer and the trainer stay those of the run. Set `model_dir` and
    `total_steps` before this call and not by --fdl_set, which would set them in one place of the
    two that need them.

    Args:
      train: `fdl.Config(t5x.train.train, ...)`, as T5X's fiddle_configs make it.
      config: `fdl.Config(SparsityConfig, ...)`, or a `SparsityConfig`.
      from_dense_checkpoint: whether what the run restores is a dense checkpoint, whose weights the
        masks are made from, as 'sparsity/from_dense.gin' does it.

    Raises:
      ValueError: `train` is no such configuration, has no `model_dir`, is sparse already, or is to
        start from a dense checkpoint and names none.
    """
    # T5X requires fiddle; the embedded host does without
    import fiddle as fdl

    parts = ("trainer_cls", "train_state_initializer_cls", "checkpoint_cfg", "model_dir")
    if not isinstance(train, fdl.Buildable) or any(
        p not in inspect.signature(fdl.get_callable(train)).parameters for p in parts
    ):
        raise ValueError(
            "make_sparse changes a fdl.Config of T5X's train(), such as t5x.fiddle_configs.configs."
            f"pretrain.train() makes, and got {_describe(train)}. Evaluation and inference read "
            "a sparse checkpoint as it is, and need nothing of this"
        )
    if not train.model_dir:
        raise ValueError(
            "model_dir isn't set. Set it before make_sparse: a function of yours that makes the "
            "configuration can take it, as in --fdl_config='my_runs.sparse(model_dir=\"/a/run\")'"
        )
    trainer, initializer = train.trainer_cls, train.train_state_initializer_cls
    arguments = {}
    if isinstance(trainer, fdl.Buildable):
        arguments, trainer = fdl.ordered_arguments(trainer), fdl.get_callable(trainer)
    if trainer is sparse_trainer:
        raise ValueError("the configuration is sparse already; call make_sparse once")
    if initializer is not host.utils.TrainStateInitializer:
        raise ValueError(
            f"train_state_initializer_cls is {_describe(initializer)}, whose place "
            "SparseTrainStateInitializer would take; leave it unset"
        )
    train.trainer_cls = fdl.Partial(sparse_trainer, base=trainer, **arguments)
    train.train_state_initializer_cls = fdl.Partial(
        SparseTrainStateInitializer,
        config=config,
        model_dir=train.model_dir,
        # one and the same object: what is set in it later is seen here, too
        checkpoint_cfg=train.checkpoint_cfg,
    )
    if from_dense_checkpoint:
        restore = train.checkpoint_cfg.restore
        if not restore or not isinstance(restore.path, str):
            raise ValueError(
                "from_dense_checkpoint needs checkpoint_cfg.restore.path, the dense checkpoint; "
                "t5x.fiddle_configs.configs.finetune.train() sets it"
            )
        restore.fallback_to_scratch = True
        restore.state_transformation_fns = [from_dense]


def _describe(x: Any) -> str:
    called = getattr(x, "__fn_or_cls__", None)
    name = f"one of {called.__module__}.{called.__qualname__}" if called else repr(x)
    return name if len(name) < 200 else f"{name[:200]}..."
