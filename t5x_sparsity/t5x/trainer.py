"""The trainer that T5X is given: the run's own, with two compiled train steps."""

from __future__ import annotations

import concurrent.futures
import copy
import functools
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from absl import logging
from jax.sharding import PartitionSpec

from t5x_sparsity import host
from t5x_sparsity.core.contract import Plan
from t5x_sparsity.core.plan import update_schedules
from t5x_sparsity.core.trees import flatten
from t5x_sparsity.monitoring import summary
from t5x_sparsity.monitoring.flops import ramp_warnings
from t5x_sparsity.t5x.checkpoints import RECORD, check_start_step, write_record
from t5x_sparsity.t5x.optimizer import SparseOptimizer, StepKind, optimizer_of, with_optimizer
from t5x_sparsity.t5x.run_metrics import RunMetrics

NOT_SPARSE = (
    "the sparse trainer got a train state without masks, and would train dense: bind "
    "train.train_state_initializer_cls = @t5x_sparsity.SparseTrainStateInitializer, as "
    "sparsity/*.gin do, and don't bind it again after them"
)

_LOSS = "loss_per_nonpadding_target_token"


def sparse_trainer(
    base: type, *, reference_losses: Mapping[str, float] | None = None, **kwargs: Any
):
    """Makes a trainer of class `base` that trains sparse.

    Args:
      base: any T5X trainer class, such as gin's configured `trainer.Trainer`; what gin binds to it
        stays in force.
      reference_losses: name -> loss, in the unit of the evaluation loss, which the closing report
        shows next to it.
      **kwargs: what T5X's `train` passes to a trainer.

    Raises:
      TypeError: `base` has no train step to build the sparse ones from.
      ValueError: the train state has no masks, or is at a step before the one that mask updates
        count from.
    """
    if not hasattr(base, "_partitioned_train_step"):
        raise TypeError(
            f"{base.__name__} has no _partitioned_train_step property to build the sparse steps "
            "from; bind sparse_trainer.base to a trainer that has"
        )
    cls = type(f"Sparse{base.__name__}", (SparseTrainer, base), {})
    trainer = cls(**kwargs)
    trainer.reference_losses = dict(reference_losses or {})
    return trainer


class TrainStep:
    """One of the two train steps, over the trainer's own train state.

    The step inside was built for a copy of the optimizer that knows its `StepKind`. The train state
    goes in with that copy in place of the run's optimizer, and comes back with the run's.
    """

    def __init__(self, step, optimizer: SparseOptimizer):
        self._step = step
        self._optimizer = optimizer

    def __call__(self, train_state, batch):
        plain = train_state._optimizer.optimizer_def
        new_state, step_metrics = self._step(with_optimizer(train_state, self._optimizer), batch)
        return with_optimizer(new_state, plain), step_metrics

    def lower(self, train_state, batch):
        """Lowers for ahead-of-time compilation; abstract arguments will do."""
        return self._step.lower(with_optimizer(train_state, self._optimizer), batch)

    def compiler(self, train_state, batch) -> Callable[[], TrainStep]:
        """Traces the step; what is returned compiles it, in whatever thread."""
        lowered = self.lower(train_state, batch)
        return lambda: TrainStep(lowered.compile(), self._optimizer)


class SparseTrainer:
    """Mixin over any T5X trainer. The host knows the step, and so which of two programs to run."""

    reference_losses: Mapping[str, float] = {}

    def __init__(self, **kwargs):
        train_state = kwargs["train_state"]
        # evaluation jobs pass no train state
        if train_state is not None:
            if not isinstance(optimizer_of(train_state), SparseOptimizer):
                raise ValueError(NOT_SPARSE)
            # a state made from scratch is the run's own from here on
            optimizer = kwargs["train_state_axes"]._optimizer.optimizer_def
            kwargs = kwargs | {"train_state": with_optimizer(train_state, optimizer)}
            self._plan = optimizer.plan(train_state.params)
            self._schedules = update_schedules(self._plan)
            # an abstract state, to compile ahead of time, has no step yet
            if not isinstance(train_state.step, jax.ShapeDtypeStruct):
                check_start_step(self._plan, _read_step(train_state))
        super().__init__(**kwargs)
        self._compiled_steps: dict[StepKind, concurrent.futures.Future[TrainStep]] = {}
        self._host_step: int | None = None
        self._last_eval: dict[str, float] = {}
        self._trained = False
        self._model_dir = kwargs.get("summary_dir")
        if train_state is not None and self._model_dir and jax.process_index() == 0:
            write_record(self._model_dir, self._plan)
            _log_plan(self._plan, flatten(train_state.params), self._model_dir)

    @functools.cached_property
    def _steps(self) -> dict[StepKind, TrainStep]:
        """The base trainer's own step, built once for each kind."""
        steps = {}
        for kind in StepKind if self._schedules else [StepKind.PLAIN]:
            optimizer = self._train_state_axes._optimizer.optimizer_def.for_step(kind)
            view = copy.copy(self)
            view.train_state = None
            view._train_state_axes = with_optimizer(self._train_state_axes, optimizer)
            step = super(SparseTrainer, view)._partitioned_train_step
            steps[kind] = TrainStep(step, optimizer)
        return steps

    def train_step_variants(self) -> dict[StepKind, TrainStep]:
        """{'plain': step} and, where masks are updated, {'update': step}; each has `.lower`."""
        return dict(self._steps)

    @property
    def _partitioned_train_step(self):
        return self._dispatch

    def _dispatch(self, train_state, batch):
        """Runs the step that is due; the host counts, nothing is read from the device."""
        if self._host_step is None:
            self._host_step = _read_step(train_state)
        step = self._step_of(self._kind(self._host_step))
        self._run_metrics.before_step(self._host_step, train_state._optimizer.state.sparsity)
        self._host_step += 1
        return step(train_state, batch)

    def _kind(self, step: int) -> StepKind:
        due = any(updates.is_update(step) for updates in self._schedules)
        return StepKind.UPDATE if due else StepKind.PLAIN

    def _step_of(self, kind: StepKind) -> TrainStep:
        if not self._compiled_steps:
            return self._steps[kind]
        for compiling in self._compiled_steps.values():
            # raises a failure now rather than when that step is due
            if compiling.done():
                compiling.result()
        return self._compiled_steps[kind].result()

    def train(self, batch_iter, num_steps, start_step=None):
        """As the base's; the summary also has what RunMetrics reports."""
        if start_step is None:
            start_step = _read_step(self.train_state)
        self._host_step = int(start_step)
        self._trained = True
        self._run_metrics.start_period(self._host_step, num_steps)
        summary = super().train(batch_iter, num_steps, start_step=start_step)
        state = self.train_state._optimizer.state.sparsity
        return self._run_metrics.end_period(self._host_step, state, summary)

    def compile_train(self, batch) -> None:
        """Compiles the step that comes first; a thread compiles the other as that one runs."""
        tick = time.time()
        state = self.train_state
        first = self._kind(_read_step(state))
        order = sorted(self._steps, key=lambda kind: kind != first)
        # traced here, where a mistake stops the run before it starts
        compilers = {kind: self._steps[kind].compiler(state, batch) for kind in order}
        pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="compile")
        self._compiled_steps = {kind: pool.submit(c) for kind, c in compilers.items()}
        pool.shutdown(wait=False)
        # meanwhile
        self._run_metrics.count_flops(self._model, state, batch)
        self._compiled_steps[first].result()
        self._compiled_train_step = self._dispatch
        self.train_metrics_manager.write_scalar(
            "timing/compilation_seconds", time.time() - tick, state.step
        )

    def eval(self, batch_iters):
        """As the base's; the losses are kept for the closing report."""
        summaries = super().eval(batch_iters)
        for name, values in summaries.items():
            if values and _LOSS in values:
                self._last_eval[name] = float(values[_LOSS].value)
        return summaries

    def layer_summaries(self) -> list[summary.LayerSummary]:
        """Target and actual sparsity per weight, the total last. Reads counts from the device."""
        masks = self.train_state._optimizer.state.sparsity.masks
        counts = jax.tree.map(host.utils.get_local_data, self._count(masks)) if masks else {}
        kept = {p: summary.total_kept(c) for p, c in counts.items()}
        return summary.summarize({p: x.shape for p, x in self._plan.items()}, kept, self._plan)

    @functools.cached_property
    def _count(self):
        """Counts the weights kept, for all processes to run."""
        axes = self._train_state_axes._optimizer.state.sparsity.masks
        return self._partitioner.partition(
            summary.kept_counts, in_axis_resources=(axes,), out_axis_resources=PartitionSpec()
        )

    @functools.cached_property
    def _run_metrics(self) -> RunMetrics:
        axes = self._train_state_axes._optimizer.state.sparsity
        return RunMetrics(self._plan, axes, self._partitioner, self.train_metrics_manager)

    def close(self) -> None:
        """Closes the base trainer and, after a run, logs what it has reached."""
        for compiling in self._compiled_steps.values():
            compiling.cancel()
        try:
            if "_run_metrics" in vars(self):
                self._run_metrics.close()
            if self._trained:
                self._trained = False
                # all processes count: a mask may lie on the devices of several
                rows = self.layer_summaries()
                if jax.process_index() == 0:
                    _log_report(rows, self._last_eval, self.reference_losses, self._model_dir)
        finally:
            super().close()


def _read_step(train_state) -> int:
    return int(host.utils.get_local_data(train_state.step))


def _log_plan(plan: Plan, weights: Mapping[str, Any], model_dir: str) -> None:
    size = sum(layer.size for layer in plan.values())
    pruned = sum(layer.level * layer.size for layer in plan.values())
    whole = sum(math.prod(x.shape) for x in weights.values())
    logging.info(
        "%s",
        f"{len(plan)} of {len(weights)} arrays are sparse, with {size} of {whole} weights, "
        f"{100 * pruned / size if size else 0:.2f}% of them zero in the end; "
        f"{model_dir}/{RECORD} lists them. The others stay dense.",
    )
    for warning in ramp_warnings(plan):
        logging.warning("%s", warning)


def _log_report(
    rows, losses: Mapping[str, float], references: Mapping[str, float], model_dir: str | None
) -> None:
    lines = ["Sparsity at the end of the run:", *summary.summary_table(rows).splitlines()]
    for name, loss in losses.items():
        lines.append(f"Validation loss of {name}: {loss:.4f} nats a token")
    for name, loss in references.items():
        lines.append(f"Reference, {name}: {loss:.4f} nats a token")
    if model_dir:
        lines.append(f"The run is in {model_dir}; see it by: t5x-sparsity report {model_dir}")
    logging.info("%s", "\n".join(lines))
