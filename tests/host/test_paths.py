"""Every optimizer and every model, along every way that a checkpoint takes.

docs/t5x_tests.md has the table.
"""

import functools

import model_table
import numpy as np
import pytest
import tiny_t5
from inprocess_runs import assert_same, restore_dense, run

from t5x_sparsity import host
from t5x_sparsity.core import packing

OPTIMIZERS = [
    "adafactor",
    "adafactor-factored",
    "adafactor-momentum",
    "adafactor-whole",
    "adamw",
    "chain",
    "lion",
    "masked",
    pytest.param("multi", marks=tiny_t5.t5x_only),
    pytest.param("multi-frozen", marks=tiny_t5.t5x_only),
    "multi-steps",
    "sgd",
]
MODELS = [
    pytest.param(name, marks=[tiny_t5.t5x_only] if name in model_table.T5X_ONLY else [])
    for name in model_table.CASES
]
CONFIG = tiny_t5.rigl(0.5, begin=3, end=9, period=2)


def checked(leaves):
    """Half of every sparse weight is kept, the rest is 0; the masks' names."""
    names = [k for k in leaves if k.startswith("state/sparsity/masks/")]
    assert names
    for name in names:
        weight = leaves["target/" + name.removeprefix("state/sparsity/masks/")]
        kept = np.asarray(packing.unpack(leaves[name], weight.shape))
        assert (weight[~kept] == 0).all(), name
    kept = [np.unpackbits(leaves[n]).sum() for n in names if leaves[n].size < _weight(leaves, n)]
    sizes = [_weight(leaves, n) for n in names if leaves[n].size < _weight(leaves, n)]
    assert sum(kept) / sum(sizes) == pytest.approx(0.5, abs=0.02)
    return names


def _weight(leaves, name):
    return leaves["target/" + name.removeprefix("state/sparsity/masks/")].size


def travel(tmp_path, run, other_mesh, can_restore_dense=True):
    """Dense, from dense to sparse, resumed, on another mesh, and dense again."""
    trained = run(tmp_path / "dense", None, 2)
    restore = restore_dense(tmp_path / "dense/checkpoint_2")
    whole = run(tmp_path / "whole", CONFIG, 6, restore=restore)
    checked(whole)
    slots = {k for k in trained if k.startswith("state/param_states")}
    assert slots == {k for k in whole if k.startswith("state/param_states")}

    run(tmp_path / "parts", CONFIG, 4, restore=restore)
    assert_same(run(tmp_path / "parts", CONFIG, 6), whole)

    moved = run(tmp_path / "parts", CONFIG, 8, **other_mesh)
    assert checked(moved) == checked(whole) and int(moved["state/step"]) == 8

    if not can_restore_dense:
        # as plain T5X where a part of a MultiOptimizer leaves weights alone
        with pytest.raises(ValueError, match="param_states"):
            run(tmp_path / "dense", None, 4)
        return
    back = host.utils.RestoreCheckpointConfig(
        path=str(tmp_path / "whole/checkpoint_6"), mode="specific"
    )
    dense = run(tmp_path / "back", None, 6, restore=back)
    assert_same(dense, {k: v for k, v in whole.items() if "state/sparsity" not in k})


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizer(tmp_path, optimizer):
    can_restore_dense = optimizer not in ("multi", "multi-frozen")
    there = functools.partial(run, optimizer=optimizer)
    travel(tmp_path, there, {"mesh": (2, 2)}, can_restore_dense)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_model(tmp_path, name):
    case = model_table.CASES[name]
    pairs = name in ("t5", "gpu_t5", "scalable_t5")
    there = functools.partial(
        run,
        build=case.build,
        optimizer="adafactor-momentum" if case.optimizer == "adamw" else case.optimizer,
        base=case.base(),
        features=("inputs", "targets") if pairs else ("targets",),
        trainer_arguments=case.arguments(),
        partitioner=case.partitioner(),
    )
    # MoE's partitioner has three axes
    other = {} if name == "moe" else {"partitioner": tiny_t5.MeshPartitioner(1, 4)}
    travel(tmp_path, there, other)
