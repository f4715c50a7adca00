"""`t5x-sparsity plan`: what a run would be, from its gin files alone."""

import contextlib
import dataclasses
import json
import math
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
from t5x_sparsity.commands.plan.report import as_text, own_steps
from t5x_sparsity.core.trees import flatten
from t5x_sparsity.monitoring.flops import FlopsSoFar, ramp_warnings
from t5x_sparsity.monitoring.matrix_products import loss_products
from t5x_sparsity.monitoring.summary import TOTAL, summarize
from t5x_sparsity.t5x import SparseTrainStateInitializer
from t5x_sparsity.t5x.trainer import SparseTrainer

# The exit code of a plan whose steps don't fit the slice.
_DOES_NOT_FIT = 3


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
    print(json.dumps(report, indent=1) if options.json else as_text(report, options.all))
    topology = report["topology"]
    return _DOES_NOT_FIT if topology and not topology["fits"] else 0


def _report(options: PlanOptions) -> dict[str, Any]:
    """The plan as JSON has it."""
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
        topology = _compile(config, initializer, devices) if devices else None
    return {**report, "topology": topology}


def _check_batch(config: run_file.Run, devices: aot.Slice) -> None:
    parts = config.partitioner.data_mesh_size
    if config.batch_size % parts:
        raise CommandError(
            f"the batch of {config.batch_size} doesn't divide among the {parts} data-parallel parts"
            f" of {devices.name}; set BATCH_SIZE to a multiple of {parts}, or more model-parallel "
            "partitions"
        )


def _plan(config: run_file.Run, initializer) -> dict[str, Any]:
    state, axes = initializer.global_train_state_shape, initializer.train_state_axes
    is_sparse = isinstance(initializer, SparseTrainStateInitializer)
    mesh = config.partitioner.mesh
    plan, masks, slots, mask_axes = {}, {}, {}, {}
    if is_sparse:
        optimizer = state._optimizer
        plan = optimizer.optimizer_def.plan(state.params)
        masks, slots = optimizer.state.sparsity.masks, optimizer.state.sparsity.slots
        mask_axes = axes._optimizer.state.sparsity.masks
    shapes, specs = flatten(state.params), _by_path(axes.params)
    names = _by_path(config.partitioner.get_logical_axes(state).params)
    expected = {p: round(layer.size * (1 - layer.level)) for p, layer in plan.items()}
    summaries = {
        r.path: r for r in summarize({p: x.shape for p, x in plan.items()}, expected, plan)
    }
    weights = []
    for path, weight in shapes.items():
        found = {
            "path": path,
            "shape": tuple(weight.shape),
            "axes": names.get(path),
            "spec": specs.get(path),
            "pattern": "",
            "algorithm": "",
            "sparsity": None,
            "kept": weight.size,
        }
        if layer := plan.get(path):
            target = summaries[path].target
            found |= {
                "pattern": _named(layer.pattern),
                "algorithm": type(layer.algorithm).__name__,
                "sparsity": target,
                # layers under one threshold have no number of their own
                "kept": None if target is None else expected[path],
                "mask_bytes": masks[path].size,
            }
        weights.append(found | {"is_sparse": path in plan, "size": weight.size})
    products = loss_products(config.model, state, config.batch)
    flops = FlopsSoFar(plan, products).advance(config.total_steps)
    return {
        "host": host.NAME,
        "is_sparse": is_sparse,
        "missing_imports": config.missing_imports,
        "warnings": ramp_warnings(plan),
        "weights": weights,
        "totals": {
            "weights": sum(x.size for x in shapes.values()),
            "sparse_weights": sum(shapes[p].size for p in plan),
            "sparsity": summaries[TOTAL].target,
            "kept": sum(expected.get(p, x.size) for p, x in shapes.items()),
            "mask_bytes": sum(m.size for m in masks.values()),
            "mask_bytes_per_device": sum(
                math.prod(NamedSharding(mesh, mask_axes[p]).shard_shape(m.shape))
                for p, m in masks.items()
            ),
            "other_state_bytes": sum(
                x.size * x.dtype.itemsize for arrays in slots.values() for x in arrays.values()
            ),
        },
        "flops": {
            "total_steps": config.total_steps,
            "training_share": flops.training / flops.dense_training,
            "inference_share": flops.forward / flops.dense_forward,
            **flops._asdict(),
        },
        "mesh": dict(mesh.shape),
    }


def _compile(config: run_file.Run, initializer, devices: aot.Slice) -> dict[str, Any]:
    """What each step takes on a chip, the dense one as well, to compare."""
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
    return {
        "name": devices.name,
        "chip": devices.kind,
        "chips": len(devices.devices),
        "mesh": dict(mesh.shape),
        "usable_bytes_per_chip": devices.hbm_bytes,
        "fits": all(c.fits for c in own_steps(found).values()),
        "steps": {kind: {"fits": c.fits, **dataclasses.asdict(c)} for kind, c in found.items()},
    }


def _by_path(axes) -> dict[str, tuple]:
    """The axes of the weights that have any."""
    found = flatten(axes, is_leaf=lambda x: isinstance(x, tuple))
    return {path: tuple(names) for path, names in found.items()}


def _named(pattern) -> str:
    """A pattern with the values that are its own."""
    values = ", ".join(f"{k}={v}" for k, v in vars(pattern).items())
    return f"{type(pattern).__name__}({values})" if values else type(pattern).__name__
