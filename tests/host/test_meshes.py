"""Masks on every mesh: the same bit for bit, and each where its weight is."""

import json
import re

import command_runs
import fixed_update
import numpy as np
import pytest
import tiny_t5

from t5x_sparsity import host
from t5x_sparsity.core.trees import flatten

COLLECTIVE = re.compile(r" (all-gather|all-to-all|collective-permute)(?:-start)?\(")

# the embedded host takes a mesh of each kind, the fast tests one that splits both axes
MESHES = [
    pytest.param("1x4", marks=pytest.mark.slow),
    pytest.param("4x1", marks=tiny_t5.t5x_only),
    pytest.param("4x1-2d", marks=pytest.mark.slow),
    pytest.param("2x2", marks=tiny_t5.t5x_only),
    "2x2-2d",
]


def test_every_mesh_is_tried():
    assert {"1x1", *(getattr(m, "values", [m])[0] for m in MESHES)} == set(fixed_update.MESHES)


@pytest.mark.parametrize("mesh", MESHES)
def test_masks_are_the_same_on_every_mesh_and_host(mesh):
    """From the same weights and gradients, bit for bit; each mask is sharded as its weight."""
    result = fixed_update.updated(mesh)
    assert result.digest == fixed_update.DIGEST
    check_placed(mesh, fixed_update.placed(result.state))


def check_placed(mesh, placed):
    data, model, dims = fixed_update.MESHES[mesh]
    assert len(placed) == 11
    for path, found in placed.items():
        assert found["mask"] == found["weight"], path
        assert found["split"] == (model > 1 or dims > 1 and data > 1), path
        axes = {name for name in found["mask"] if name}
        assert axes == {"model", "data"} if dims > 1 else {"model"}, path


def test_the_masks_of_the_fixed_update_are_what_they_should_be():
    """What the digest stands for, on one device."""
    state, masks, digest = fixed_update.updated("1x1")
    assert digest == fixed_update.DIGEST
    levels = {"nm": 0.5, "saliency": 0.5, "set": 0.4, "embedding": 0.7}
    for path, mask in masks.items():
        level = levels.get(path.split("_")[0])
        if level is not None:
            assert abs(mask.mean() - level) < 1e-3, path
    # wi is (embed, layers, mlp): 2 of 4 along the axis that a product sums over
    groups = masks["nm_wi"].reshape(16, 4, 2, 64)
    assert (groups.sum(1) == 2).all()
    # one threshold for what is pruned jointly
    pooled = [p for p in masks if p.startswith("magnitude")]
    weights = {p: np.abs(np.asarray(x)) for p, x in flatten(state.params).items()}
    lowest = min(weights[p][masks[p]].min() for p in pooled)
    fixed = {p: fixed_update.fixed("weight", p, weights[p].shape) for p in pooled}
    assert max(np.abs(fixed[p])[~masks[p]].max() for p in pooled) <= lowest


@pytest.mark.slow
def test_masks_are_the_same_in_two_processes(tmp_path):
    """2 processes x 2 devices: weights split among processes, and among devices of each."""
    meshes = ["2x2-2d"] if host.NAME == "embedded" else ["1x4", "4x1-2d", "2x2", "2x2-2d"]
    script = [command_runs.ROOT / "tests/host/fixed_update.py"]
    outputs = command_runs.finish(
        command_runs.start_processes(
            lambda i, port: [*script, f"localhost:{port}", "2", str(i), *meshes], tmp_path
        )
    )
    for output in outputs:
        found = json.loads(output.strip().splitlines()[-1])
        for mesh in meshes:
            assert found[mesh]["digest"] == fixed_update.DIGEST
            check_placed(mesh, found[mesh]["placed"])


@pytest.mark.slow
def test_runs_agree_on_every_mesh():
    losses = {}
    for data, model in ((1, 1), (2, 2)):
        trainer = tiny_t5.trainer(tiny_t5.rigl(), partitioner=tiny_t5.MeshPartitioner(data, model))
        losses[data, model] = [
            float(tiny_t5.run(trainer, 1, start=i)["loss"].value) for i in range(6)
        ]
        trainer.close()
    for mesh, values in losses.items():
        np.testing.assert_allclose(values, losses[1, 1], rtol=2e-3, err_msg=str(mesh))


@pytest.mark.parametrize(
    "optimizer, build",
    [
        ("adamw", tiny_t5.stacked_model),
        pytest.param("adamw", tiny_t5.model, marks=pytest.mark.slow),
        pytest.param("adafactor", tiny_t5.model, marks=pytest.mark.slow),
    ],
)
def test_no_weight_moves_between_devices(optimizer, build):
    """The compiled steps gather what the dense step gathers, and sort nothing."""
    partitioner = tiny_t5.MeshPartitioner(1, 4)

    def compiled(step, state):
        return step.lower(state, tiny_t5.batch()).compile().as_text()

    dense = tiny_t5.trainer(None, optimizer, partitioner, build=build)
    base = compiled(dense._partitioned_train_step, dense.train_state)
    sparse = tiny_t5.trainer(tiny_t5.rigl(), optimizer, partitioner, build=build)
    for name, step in sparse.train_step_variants().items():
        text = compiled(step, sparse.train_state)
        assert len(COLLECTIVE.findall(text)) <= len(COLLECTIVE.findall(base)), name
        assert not re.search(r" sort\(", text), name
    dense.close()
    sparse.close()
