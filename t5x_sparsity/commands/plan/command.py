"""`t5x-sparsity plan`: what a run would be, from its gin files alone."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

import jax
from absl import logging
from jax.sharding import NamedSharding

from t5x_sparsity import host
from t5x_sparsity.ahead_of_time import slices as aot
from t5x_sparsity.commands import CommandError, as_command_errors, run_file
from t5x_sparsity.commands.output import spinner
from t5x_sparsity.commands.plan.options import PlanOptions
from t5x_sparsity.commands.plan.report import DOES_NOT_FIT, Report, SliceReport, WeightRow
from t5x_sparsity.core.trees import flatten
from t5x_sparsity.monitoring.flops import ramp_warnings, run_flops
from t5x_sparsity.monitoring.matrix_products import loss_products
from t5x_sparsity.monitoring.summary import TOTAL, summarize
from t5x_sparsity.t5x import SparseTrainStateInitializer
from t5x_sparsity.t5x.trainer import SparseTrainer


def run(options: PlanOptions) -> int:
    """Prints the plan; returns the exit code."""
    level = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        # what libraries print must not end up in the JSON
        with contextlib.redirect_stdout(sys.stderr):
            report = _report(options)
    finally:
        logging.set_verbosity(level)
    if options.json:
        print(json.dumps(report.as_dict(), indent=1))
    else:
        print(report.as_text(all_weights=options.all))
    return DOES_NOT_FIT if report.slice and not report.slice.fits else 0


def _report(options: PlanOptions) -> Report:
    devices = None
    if options.topology:
        with as_command_errors():
            devices = aot.get_slice(options.topology, one_process=host.NAME == "embedded")
    with run_file.load(options.gin_file, options.gin_bindings, options.gin_search_paths) as config:
        if devices:
            with as_command_errors():
                aot.use_slice(config.partitioner, devices)
            _check_batch(config, devices)
        with spinner("planning"), as_command_errors("the run can't be planned: "):
            initializer = config.initializer()
            report = _plan(config, initializer)
        if devices:
            report.slice = _compile(config, initializer, devices)
    return report


def _check_batch(config: run_file.Run, devices: aot.Slice) -> None:
    parts = config.partitioner.data_mesh_size
    if config.batch_size % parts:
        raise CommandError(
            f"the batch of {config.batch_size} doesn't divide among the {parts} data-parallel parts"
            f" of {devices.name}; set BATCH_SIZE to a multiple of {parts}, or more model-parallel "
            "partitions"
        )


def _plan(config: run_file.Run, initializer) -> Report:
    state, axes = initializer.global_train_state_shape, initializer.train_state_axes
    sparse = isinstance(initializer, SparseTrainStateInitializer)
    plan, masks, slots, bytes_per_device = {}, {}, {}, 0
    mesh = config.partitioner.mesh
    if sparse:
        optimizer = state._optimizer
        plan = optimizer.optimizer_def.plan(state.params)
        masks, slots = optimizer.state.sparsity.masks, optimizer.state.sparsity.slots
        mask_axes = axes._optimizer.state.sparsity.masks
        bytes_per_device = sum(
            _bytes(NamedSharding(mesh, mask_axes[p]).shard_shape(m.shape), m.dtype)
            for p, m in masks.items()
        )
    shapes, specs = flatten(state.params), _leaves(axes.params)
    names = _leaves(config.partitioner.get_logical_axes(state).params)
    expected = {p: round(layer.size * (1 - layer.level)) for p, layer in plan.items()}
    summaries = {
        r.path: r for r in summarize({p: x.shape for p, x in plan.items()}, expected, plan)
    }
    rows = []
    for path, weight in shapes.items():
        layer, spec, own = plan.get(path), specs.get(path), summaries.get(path)
        # layers under one threshold have no number of their own
        kept = weight.size if own is None else None if own.target is None else own.kept
        rows.append(
            WeightRow(
                path=path,
                shape=tuple(weight.shape),
                axes=None if names.get(path) is None else tuple(names[path]),
                spec=None if spec is None else tuple(spec),
                pattern="" if layer is None else _named(layer.pattern),
                algorithm="" if layer is None else type(layer.algorithm).__name__,
                sparsity=None if own is None else own.target,
                kept=kept,
                mask_bytes=None if layer is None else _size(masks.get(path)),
            )
        )
    return Report(
        host=host.NAME,
        is_sparse=sparse,
        weights=rows,
        target=summaries[TOTAL].target if plan else None,
        kept=sum(expected.get(p, x.size) for p, x in shapes.items()),
        total_steps=config.total_steps,
        flops=run_flops(plan, loss_products(config.model, state, config.batch), config.total_steps),
        other_state_bytes=sum(
            _bytes(x.shape, x.dtype) for arrays in slots.values() for x in arrays.values()
        ),
        mask_bytes_per_device=bytes_per_device,
        mesh=dict(mesh.shape),
        missing_imports=config.missing_imports,
        warnings=ramp_warnings(plan),
    )


def _compile(config: run_file.Run, initializer, devices: aot.Slice) -> SliceReport:
    mesh = config.partitioner.mesh
    sharding = NamedSharding(mesh, config.partitioner.data_partition_spec)
    batch = {
        k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        for k, x in config.batch.items()
    }

    def made(initializer, cls=None):
        """A trainer, and the state that it is for."""
        axes = initializer.train_state_axes
        state = aot.placed(initializer.global_train_state_shape, axes, mesh)
        return config.trainer(initializer, state, cls), state

    with as_command_errors("the run makes no trainer: "), aot.on_slice(devices):
        dense, dense_state = own, own_state = made(initializer)
        variants = {}
        if isinstance(own, SparseTrainer):
            base = type(own).__bases__[1]
            dense, dense_state = made(config.initializer(host.utils.TrainStateInitializer), base)
            variants = own.train_step_variants()
        steps = {"dense": (dense._partitioned_train_step, dense_state)}
        steps |= {kind: (step, own_state) for kind, step in variants.items()}
    found = {}
    for kind, (step, state) in steps.items():
        with spinner(f"compiling the {kind} step for {devices.name}"):
            found[kind] = aot.compile_step(step, devices, state, batch)
    for trainer in {dense, own}:
        trainer.close()
    return SliceReport(devices=devices, steps=found)


def _size(x: Any) -> int:
    return 0 if x is None else x.size


def _bytes(shape, dtype) -> int:
    return jax.ShapeDtypeStruct(shape, dtype).size * dtype.itemsize


def _leaves(axes) -> dict[str, tuple | None]:
    """The axes of weights by path; no axes are a leaf too."""
    return flatten(axes, is_leaf=lambda x: isinstance(x, tuple))


def _named(pattern) -> str:
    """A pattern with the values that are its own."""
    values = ", ".join(f"{k}={v}" for k, v in vars(pattern).items())
    return f"{type(pattern).__name__}({values})" if values else type(pattern).__name__
