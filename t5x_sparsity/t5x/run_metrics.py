"""What a sparse run writes next to the host's own metrics, and when."""

import concurrent.futures
from collections.abc import Callable, Mapping
from typing import Any

import clu.values
import jax
import numpy as np
from absl import logging
from jax.sharding import PartitionSpec

from t5x_sparsity import host
from t5x_sparsity.core.contract import Plan
from t5x_sparsity.core.plan import by_algorithm, update_schedules
from t5x_sparsity.core.schedules import last_update
from t5x_sparsity.core.train_step import EXPLORED, SparsityState
from t5x_sparsity.monitoring import mask_metrics
from t5x_sparsity.monitoring.flops import FlopsSoFar
from t5x_sparsity.monitoring.matrix_products import loss_products

# Images are written at the first summary, then after these shares of the steps that update masks.
_PICTURE_TIMES = (0.25, 0.5, 0.75, 1.0)


class RunMetrics:
    """Watches the masks of a run, and writes their metrics once per stats period.

    The train steps are not touched. The masks before each algorithm's last update of a period are
    copied, one bit per weight where they are packed, and counted with those at its end. A thread of
    its own waits for the devices.
    """

    def __init__(self, plan: Plan, axes: SparsityState, partitioner: Any, manager: Any):
        """Makes nothing yet.

        `axes` are those of the state of sparsity, logical or PartitionSpecs. The run's
        `partitioner` compiles the functions of masks, which all processes run. `manager` is the
        host's MetricsManager of training.
        """
        self._plan, self._manager = plan, manager
        masks, explored = axes.masks, axes.slots.get(EXPLORED, {})
        shown = mask_metrics.pictured(plan)

        def compiled(fn: Callable, *inputs: Any, out: Any) -> Callable:
            return partitioner.partition(fn, in_axis_resources=inputs, out_axis_resources=out)

        def copy(stored):
            return {p: jax.numpy.copy(x) for p, x in stored.items()}

        def draw(stored):
            return mask_metrics.mask_pictures(plan, {p: stored[p] for p in shown})

        everywhere = PartitionSpec()
        self._copy = compiled(copy, masks, out=masks)
        self._count = compiled(mask_metrics.mask_counts, masks, masks, explored, out=everywhere)
        self._draw = compiled(draw, masks, out=everywhere)
        self._flops: FlopsSoFar | None = None
        self._before: dict[str, jax.Array] = {}
        self._watched: dict[int, list[str]] = {}
        self._pictures = -1
        self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="sparsity")
        self._pending: list[concurrent.futures.Future] = []

    def count_flops(self, model: Any, train_state: Any, batch: Mapping[str, Any]) -> None:
        """Reports FLOPs from here on, if the model's loss of such a batch can be traced."""
        shapes = {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in batch.items()}
        try:
            products = loss_products(model, train_state, shapes)
        except Exception as e:  # noqa: BLE001 - a model's own; the run goes on without these numbers
            why = f"{type(e).__name__}: {e}"
            logging.warning("FLOPs are not reported, the model's loss can't be traced: %s", why)
            return
        # the algorithms that have a start_step all have the run's
        starts = [getattr(a.updates, "start_step", 0) for a, _ in by_algorithm(self._plan)]
        self._flops = FlopsSoFar(self._plan, products, max(starts, default=0))

    def start_period(self, first: int, steps: int) -> None:
        """Before the steps of a stats period."""
        self._watched, self._before = {}, {}
        for algorithm, part in by_algorithm(self._plan):
            last = last_update(algorithm.updates, first + steps, since=first)
            if last is not None:
                self._watched.setdefault(last, []).extend(part)

    def before_step(self, step: int, state: SparsityState) -> None:
        """Before each train step, whose state may be given away to it."""
        if step in self._watched:
            copied = self._copy(state.masks)
            self._before |= {p: copied[p] for p in self._watched[step]}

    def end_period(
        self, step: int, state: SparsityState, base: concurrent.futures.Future
    ) -> concurrent.futures.Future:
        """Writes the metrics of a period, and adds them to the result of `base`, the host's own.

        The future's result maps names to clu.values.Value.
        """
        scalars: dict[str, float] = {}
        if self._flops is not None:
            scalars |= mask_metrics.flops_scalars(self._flops.advance(step))
        counts, pictures, updated = None, None, frozenset(self._before)
        tracks = EXPLORED in state.slots
        if state.masks:
            targets = mask_metrics.scheduled_sparsities(self._plan, step)
            before = {**state.masks, **self._before}
            explored = state.slots.get(EXPLORED, {})
            counts = host.utils.get_local_data(self._count(state.masks, before, explored))
            if self._pictures_are_due(step):
                pictures = jax.tree.map(host.utils.get_local_data, self._draw(state.masks))
        self._before = {}

        def write():
            if counts is not None:
                scalars.update(
                    mask_metrics.mask_scalars(
                        self._plan,
                        np.asarray(counts),
                        targets=targets,
                        updated=updated,
                        explored=tracks,
                    )
                )
            if scalars:
                self._manager.write_scalars(step, scalars)
            if pictures and jax.process_index() == 0:
                self._write_pictures(step, pictures)
            return {name: clu.values.Scalar(value) for name, value in scalars.items()}

        own = self._pool.submit(write)
        self._pending = [f for f in self._pending if not f.done() or f.exception()] + [own]
        # an error of the base's summary is its own
        return self._pool.submit(lambda: {**(base.result() or {}), **own.result()})

    def close(self) -> None:
        """Waits until all is written; an error of the thread is raised here."""
        self._pool.shutdown()
        pending, self._pending = self._pending, []
        for future in pending:
            future.result()

    def _pictures_are_due(self, step: int) -> bool:
        schedules = update_schedules(self._plan)
        first = min((getattr(s, "begin", 0) for s in schedules), default=0)
        last = max((s.last for s in schedules), default=0)
        passed = sum(step > first + share * (last - first) for share in _PICTURE_TIMES)
        due = passed > self._pictures
        self._pictures = passed
        return due

    def _write_pictures(self, step: int, pictures: Mapping[str, tuple[Any, Any]]) -> None:
        images, fan_in = {}, {}
        for path, (kept, counts) in pictures.items():
            kept, fan_in[f"mask_fan_in/{path}"] = np.asarray(kept), np.asarray(counts)
            # the densest cell is white, or a sparse mask would be almost black
            images[f"masks/{path}"] = (kept / max(kept.max(), 1e-9))[None, :, :, None]
        self._manager.summary_writer.write_images(step, images)
        self._manager.summary_writer.write_histograms(step, fan_in, dict.fromkeys(fan_in, 30))
