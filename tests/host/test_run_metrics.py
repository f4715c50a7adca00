"""What the sparse trainer writes of its masks, on the host in use."""

import functools
import shutil

import inprocess_runs
import numpy as np
import pytest
import tiny_t5
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

import t5x_sparsity as ts
from t5x_sparsity.core import packing
from t5x_sparsity.core.train_step import EXPLORED
from t5x_sparsity.core.trees import flatten
from t5x_sparsity.monitoring.matrix_products import loss_products


def unpacked(trainer, name="masks"):
    state = trainer.train_state._optimizer.state.sparsity
    stored = state.masks if name == "masks" else state.slots[name]
    shapes = {p: x.shape for p, x in flatten(trainer.train_state.params).items()}
    return {p: np.asarray(packing.unpack(m, shapes[p])) for p, m in stored.items()}


def test_the_numbers_of_a_period_are_those_of_its_masks(tmp_path):
    config = tiny_t5.rigl(track_explored=True)
    trainer = tiny_t5.trainer(config, summary_dir=str(tmp_path))
    ever, start = unpacked(trainer), 0
    for steps in (2, 1, 4, 2, 3):  # updates are at 2, 5, 8, 11
        ends = start + steps
        last = max((t for t in (2, 5, 8, 11) if start <= t < ends), default=None)
        # up to the last update by itself, for the masks before it
        taken = 0 if last is None else last - start
        if taken:
            tiny_t5.run(trainer, taken, start)
        before = unpacked(trainer)
        summary = tiny_t5.run(trainer, ends - start - taken, start + taken)
        after, start = unpacked(trainer), ends
        values = {name: v.value for name, v in summary.items() if hasattr(v, "value")}
        ever = {p: ever[p] | after[p] for p in after}
        for path, mask in after.items():
            assert values[f"sparsity/{path}"] == pytest.approx(1 - mask.mean())
            assert values[f"mask_explored/{path}"] == pytest.approx(ever[path].mean())
            if last is not None:
                grown = (mask & ~before[path]).sum()
                assert values[f"mask_grown/{path}"] == grown
                assert values[f"mask_dropped/{path}"] == grown
                assert values[f"mask_churn/{path}"] == pytest.approx(grown / mask.sum())
        assert ("mask_churn/total" in values) == (last is not None)
        if last is not None:
            assert values["mask_grown/total"] > 0
        assert values["sparsity_target/total"] == pytest.approx(0.8, abs=1e-3)
        np.testing.assert_equal(unpacked(trainer, EXPLORED), ever)
    trainer.close()


@pytest.mark.slow
def test_weights_with_schedules_of_their_own_are_counted_at_their_own_updates():
    algorithm = ts.RigL(updates=ts.Periodic(begin=1, end=9, period=2))
    own = ts.SET(updates=ts.Periodic(begin=0, end=12, period=4))
    config = ts.SparsityConfig(
        algorithm=algorithm, sparsity=0.5, rules=[ts.Rule(path="mlp/", algorithm=own)]
    )
    trainer = tiny_t5.trainer(config, build=tiny_t5.model)
    slow = tiny_t5.trainer(config, build=tiny_t5.model)  # the same steps, one at a time
    masks_at = [unpacked(slow)]
    for step in range(10):
        tiny_t5.run(slow, 1, step)
        masks_at.append(unpacked(slow))
    slow.close()
    # RigL updates at odd steps, SET at 0 and 4; of both in a period, each has its own last update
    for start, steps, rigl_at, set_at in ((0, 4, 3, 0), (4, 3, 5, 4), (7, 1, 7, None)):
        found = {n: v.value for n, v in tiny_t5.run(trainer, steps, start).items() if "mask_" in n}
        total = []
        for path in masks_at[0]:
            at = set_at if "mlp/" in path else rigl_at
            assert (f"mask_churn/{path}" in found) == (at is not None), path
            if at is not None:
                before, after = masks_at[at][path], masks_at[at + 1][path]
                assert found[f"mask_grown/{path}"] == (after & ~before).sum() > 0
                assert found[f"mask_dropped/{path}"] == (before & ~after).sum()
                total.append((after & ~before).sum())
        assert found.get("mask_grown/total") == (sum(total) if total else None)
    trainer.close()


@pytest.mark.slow
def test_a_run_from_a_dense_checkpoint_counts_from_its_own_first_step(tmp_path):
    inprocess_runs.train(tmp_path / "dense", None, 4)
    updates = ts.Periodic(begin=4, end=8, period=2, start_step=4)
    for algorithm in (ts.Static(updates=ts.Never(start_step=4)), ts.RigL(updates=updates)):
        config = ts.SparsityConfig(algorithm=algorithm, sparsity=0.75)
        folder = tmp_path / type(algorithm).__name__
        restore = inprocess_runs.restore_dense(tmp_path / "dense/checkpoint_4")
        inprocess_runs.train(folder, config, 6, restore=restore)
        dense = events(folder).Tensors("flops/training_dense")[-1]
        forward = events(folder).Tensors("flops/inference_dense")[-1]
        ratio = make_ndarray(dense.tensor_proto) / make_ndarray(forward.tensor_proto)
        assert ratio == pytest.approx(3 * 2)  # two steps, not six


def test_flops_are_reported_of_a_compiled_run(tmp_path):
    trainer = tiny_t5.trainer(tiny_t5.rigl(), summary_dir=str(tmp_path))
    trainer.compile_train(tiny_t5.batch())
    values = {n: v.value for n, v in tiny_t5.run(trainer, 5).items() if n.startswith("flops/")}
    products = loss_products(trainer._model, trainer.train_state, tiny_t5.batch())
    assert values["flops/training_dense"] == 5 * 3 * products.total
    sparse = sum(products.of_weights[p] for p in trainer._plan)
    layers = {p: products.of_weights[p] * (1 - x.level) for p, x in trainer._plan.items()}
    forward = products.total - sparse + sum(layers.values())
    assert values["flops/inference"] == pytest.approx(forward)
    # four plain steps and, of the update at step 2, the gradients of all weights
    update = 3 * (products.total - sparse) + 2 * sum(layers.values()) + sparse
    assert values["flops/training"] == pytest.approx(4 * 3 * forward + update)
    assert values["flops/training_share"] == pytest.approx(
        (12 * forward + update) / products.total / 15
    )
    trainer.close()


def test_a_model_that_cannot_be_traced_trains_on(caplog):
    trainer = tiny_t5.trainer(tiny_t5.rigl())
    trainer._run_metrics.count_flops(object(), trainer.train_state, tiny_t5.batch())
    assert "FLOPs are not reported" in caplog.text and "loss_fn" in caplog.text
    assert not [n for n in tiny_t5.run(trainer, 1) if n.startswith("flops/")]
    trainer.close()


def events(folder):
    found = EventAccumulator(str(folder / "train"), size_guidance={"tensors": 0})
    found.Reload()
    return found


def test_tensorboard_shows_groups_and_a_few_images(tmp_path):
    config = tiny_t5.rigl(begin=2, end=18, period=4)
    trainer = tiny_t5.trainer(config, summary_dir=str(tmp_path))
    for start in range(0, 24, 2):
        tiny_t5.run(trainer, 2, start)
    paths = list(unpacked(trainer))
    final = unpacked(trainer)
    trainer.close()
    found = events(tmp_path)
    names = found.Tags()["tensors"]
    ours = {"sparsity", "sparsity_target", "mask_churn", "mask_grown", "mask_dropped"}
    for group in ours:
        assert {n.split("/", 1)[1] for n in names if n.split("/")[0] == group} == {*paths, "total"}
    assert [e.step for e in found.Tensors("sparsity/total")] == list(range(2, 25, 2))
    assert [e.step for e in found.Tensors("mask_churn/total")] == [4, 8, 12, 16, 20]
    # the first summary, then the first after each quarter of the steps from 2 to 18
    assert [e.step for e in found.Tensors(f"masks/{paths[0]}")] == [2, 8, 12, 16, 20]
    assert [e.step for e in found.Tensors(f"mask_fan_in/{paths[0]}")] == [2, 8, 12, 16, 20]
    buckets = make_ndarray(found.Tensors(f"mask_fan_in/{paths[0]}")[-1].tensor_proto)
    assert buckets[:, 2].sum() == final[paths[0]].reshape(-1, final[paths[0]].shape[-1]).shape[1]


def test_a_method_without_updates_has_one_image_and_no_churn(tmp_path):
    config = ts.SparsityConfig(algorithm=ts.Static(), sparsity=0.5)
    trainer = tiny_t5.trainer(config, summary_dir=str(tmp_path))
    for start in (0, 1, 2):
        tiny_t5.run(trainer, 1, start)
    path = next(iter(unpacked(trainer)))
    trainer.close()
    found = events(tmp_path)
    assert [e.step for e in found.Tensors(f"masks/{path}")] == [1]
    assert not [n for n in found.Tags()["tensors"] if n.startswith("mask_churn")]


def test_a_dense_run_reports_flops_and_no_masks(tmp_path):
    config = ts.SparsityConfig(algorithm=ts.Dense())
    trainer = tiny_t5.trainer(config, summary_dir=str(tmp_path))
    trainer.compile_train(tiny_t5.batch())
    summary = tiny_t5.run(trainer, 2)
    trainer.close()
    names = {n.split("/")[0] for n in summary}
    assert "flops" in names and not names & {"sparsity", "sparsity_target", "mask_churn"}
    assert summary["flops/training_share"].value == 1


def test_an_error_of_the_writing_thread_is_raised_at_the_end(monkeypatch):
    trainer = tiny_t5.trainer(tiny_t5.rigl())

    def full(*arguments):
        raise OSError("no space left")

    tiny_t5.run(trainer, 1)
    monkeypatch.setattr(trainer.train_metrics_manager, "write_scalars", full)
    with pytest.raises(OSError, match="no space left"):
        tiny_t5.run(trainer, 1, 1)
    with pytest.raises(OSError, match="no space left"):
        trainer.close()


@pytest.mark.slow
def test_what_was_explored_is_resumed(tmp_path):
    config = tiny_t5.rigl(0.5, begin=1, end=7, period=2, track_explored=True)
    inprocess_runs.run(tmp_path / "halves", config, 4)
    resumed = inprocess_runs.run(tmp_path / "halves", config, 8)
    whole = inprocess_runs.run(tmp_path / "whole", config, 8)
    inprocess_runs.assert_same(resumed, whole)
    masks_now = {k: x for k, x in whole.items() if k.startswith("state/sparsity/masks/")}
    for name, mask in masks_now.items():
        ever = whole[name.replace("/masks/", "/explored/")]
        assert (ever | mask == ever).all()
        assert np.unpackbits(ever).sum() > np.unpackbits(mask).sum()
    # the dense step's numbers are those of all steps, not of those since the run was resumed
    shares = {}
    for name in ("halves", "whole"):
        found = events(tmp_path / name)
        last = found.Tensors("flops/training")[-1]
        shares[name] = last.step, make_ndarray(last.tensor_proto).item()
    assert shares["halves"] == shares["whole"] and shares["whole"][0] == 8


def test_tracking_cannot_begin_in_the_middle(tmp_path, rigl_run):
    folder = shutil.copytree(rigl_run[0], tmp_path / "run")
    config = tiny_t5.rigl(0.5, begin=1, end=7, period=2, track_explored=True)
    with pytest.raises(ValueError, match="SparsityConfig.track_explored = False, as it"):
        inprocess_runs.run(folder, config, 6)


def test_tracking_cannot_end_in_the_middle(tmp_path):
    config = functools.partial(tiny_t5.rigl, 0.5, begin=1, end=7, period=2)
    inprocess_runs.run(tmp_path, config(track_explored=True), 2)
    with pytest.raises(ValueError, match="SparsityConfig.track_explored = True, as it"):
        inprocess_runs.run(tmp_path, config(track_explored=False), 4)
