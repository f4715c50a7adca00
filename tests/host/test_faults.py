"""Numbers that are not finite, torn checkpoints and preemption: nothing is lost silently."""

import gc
import shutil

import command_runs
import disturbed_runs
import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_t5
from jax.sharding import PartitionSpec

import t5x_sparsity as ts
from t5x_sparsity import host
from t5x_sparsity.core import packing
from t5x_sparsity.core.trees import flatten
from t5x_sparsity.t5x import SparseOptimizer
from t5x_sparsity.t5x.optimizer import StepKind

EVERY = ts.Periodic(begin=0, end=20, period=2)
ALGORITHMS = {
    "rigl": ts.RigL(updates=EVERY),
    "rigl-with-gradient-step": ts.RigL(updates=EVERY, take_gradient_step=True),
    "mest": ts.MEST(updates=EVERY),
    "snfs": ts.SNFS(updates=EVERY),
    "saliency": ts.Saliency(updates=EVERY, level=ts.Constant(value=1.0), gradient_steps=3),
}
SHAPE, KEPT = (16, 32), 128
AXES = {"kernel": PartitionSpec("embed", "mlp"), "bias": PartitionSpec("mlp")}


def stepper(algorithm):
    """(state to start with, a function that takes a step of a kind with the given gradients)."""
    params = {
        "kernel": jax.random.normal(jax.random.key(0), SHAPE),
        "bias": jnp.zeros(SHAPE[1:]),
    }
    config = ts.SparsityConfig(algorithm=algorithm, sparsity=0.75)
    optimizer = SparseOptimizer(tiny_t5.OPTIMIZERS["sgd"](), config)
    optimizer.set_param_axes(flax.core.freeze(AXES))

    @jax.jit
    def step(state, grads, updates):
        def of(kind):
            driven = optimizer.for_step(kind)
            hyper = driven.update_hyper_params(learning_rate=0.1)
            return lambda: driven.apply_gradient(hyper, state.target, state.state, grads)

        target, new = jax.lax.cond(updates, of(StepKind.UPDATE), of(StepKind.PLAIN))
        return state.replace(target=target, state=new)

    return optimizer.create(flax.core.freeze(params)), step


def gradients(i, bad=None):
    grads = {"kernel": np.random.RandomState(i).normal(size=SHAPE).astype(np.float32)}
    if bad is not None:
        grads["kernel"][:, ::3] = bad
    return flax.core.freeze({**grads, "bias": np.zeros(SHAPE[1:], np.float32)})


def mask_of(state):
    return np.asarray(packing.unpack(state.state.sparsity.masks["kernel"], SHAPE))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_masks_keep_their_count_whatever_the_gradients(name, bad):
    """At an update and after it; kept weights are as the base optimizer leaves them."""
    state, step = stepper(ALGORITHMS[name])
    for i in range(7):
        before, grads = state, gradients(i, bad if i == 2 else None)
        state = step(state, grads, i % 2 == 0)
        mask, weights = mask_of(state), np.asarray(state.target["kernel"])
        assert mask.sum() == KEPT, i
        assert (weights[~mask] == 0).all(), i
        if i == 2:
            kept = mask & mask_of(before)
            old = np.asarray(before.target["kernel"])
            if name == "rigl":  # an update takes the place of the gradient step
                np.testing.assert_array_equal(weights[kept], old[kept])
            else:
                is_bad = ~np.isfinite(np.asarray(grads["kernel"]))
                assert not np.isfinite(weights[kept & is_bad]).any()
                assert np.isfinite(weights[kept & ~is_bad]).all()
    # what an algorithm adds up of gradients is clean again
    for slot in state.state.sparsity.slots.values():
        assert np.isfinite(np.asarray(slot["kernel"])).all()
    if name == "rigl":
        assert np.isfinite(np.asarray(state.target["kernel"])).all()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(model_dir, leaves at the end) of a run that nothing happened to."""
    model_dir = tmp_path_factory.mktemp("whole") / "run"
    step, state = disturbed_runs.train(model_dir)
    assert step == disturbed_runs.STEPS
    return model_dir, tiny_t5.leaves(state)


def checkpoints_in(folder):
    return sorted(int(p.name.split("_")[1]) for p in folder.glob("checkpoint_*"))


@tiny_t5.t5x_only
@pytest.mark.parametrize("nan_at", [3, 4], ids=["at an update", "at a plain step"])
def test_a_nan_loss_stops_a_sparse_run(tmp_path, nan_at):
    """By the host's own action; masks updated by the NaN gradient have kept their count."""
    action = host.trainer.TerminateOnNanAction(task="train", metric="loss")
    optimizer = "adamw" if nan_at == 4 else "sgd"
    step, state = disturbed_runs.train(
        tmp_path,
        nan_at=[nan_at],
        actions={"TRAIN": [action]},
        optimizer=optimizer,
    )
    assert step == nan_at + 1 == max(checkpoints_in(tmp_path))
    weights = flatten(state.params)
    stored = state._optimizer.state.sparsity.masks
    plan = state._optimizer.optimizer_def.plan(state.params)
    assert stored
    for path, mask in stored.items():
        layer = plan[path]
        mask = np.asarray(packing.unpack(mask, layer.shape))
        per_slice = mask.sum(tuple(a for a in range(mask.ndim) if a not in layer.stack_axes))
        assert (per_slice == layer.kept).all(), path
        assert (np.asarray(weights[path])[~mask] == 0).all(), path
        # an update takes the place of the gradient step, and of the NaN
        assert np.isfinite(np.asarray(weights[path])[mask]).all() == (nan_at == 3), path


@pytest.mark.slow
def test_a_preempted_run_saves_and_goes_on_exactly(tmp_path, whole):
    """T5X's way: the trainer raises PreemptionError, train() saves and raises it again."""

    class Preempted(host.Trainer):
        def train(self, batch_iter, num_steps, start_step=None):
            summary = super().train(batch_iter, num_steps, start_step=start_step)
            if start_step == 4:
                raise host.trainer.PreemptionError("the machine is needed elsewhere")
            return summary

    with pytest.raises(host.trainer.PreemptionError, match="needed elsewhere"):
        disturbed_runs.train(tmp_path, base=Preempted)
    assert max(checkpoints_in(tmp_path)) == 5
    step, state = disturbed_runs.train(tmp_path)
    assert step == disturbed_runs.STEPS
    command_runs.assert_equal(tiny_t5.leaves(state), whole[1])


def cut(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def largest(checkpoint):
    files = [p for p in (checkpoint / "state").rglob("*") if p.is_file() and p.parent.name == "d"]
    return max(files, key=lambda p: p.stat().st_size)


# what happens to the last checkpoint
TEARS = {
    "data cut": lambda c: cut(largest(c)),
    "data lost": lambda c: largest(c).unlink(),
    "metadata cut": lambda c: cut(c / "state/_METADATA"),
    "metadata lost": lambda c: (c / "state/_METADATA").unlink(),
    "manifest cut": lambda c: cut(c / "state/manifest.ocdbt"),
    "manifest lost": lambda c: (c / "state/manifest.ocdbt").unlink(),
    "state lost": lambda c: shutil.rmtree(c / "state"),
    "all lost": lambda c: (shutil.rmtree(c), c.mkdir()),
    "never completed": lambda c: c.rename(f"{c}.orbax-checkpoint-tmp"),
}
# Orbax finds out as it reads the arrays, and names the path: reading all twice would cost too much
FOUND_BY_ORBAX = ("data cut", "data lost")


class Started(Exception):
    """The run has restored its state."""


class Starts(host.Trainer):
    def __init__(self, **kwargs):
        raise Started(int(host.utils.get_local_data(kwargs["train_state"].step)))


@pytest.fixture
def reads_left_behind():
    """Takes away the reads that Orbax started and left, before they are another test's warnings."""
    yield
    gc.collect()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("tear", TEARS)
def test_a_torn_checkpoint_is_passed_over_or_named(tmp_path, whole, tear, reads_left_behind):
    run = tmp_path / "run"
    shutil.copytree(whole[0], run)
    last = run / f"checkpoint_{disturbed_runs.STEPS}"
    TEARS[tear](last)
    with pytest.raises(Exception) as caught:
        disturbed_runs.train(run, disturbed_runs.STEPS + 2, base=Starts)
    if isinstance(caught.value, Started):
        assert caught.value.args == (disturbed_runs.STEPS - 2,)
        assert tear in ("state lost", "all lost", "never completed")
        return
    message = str(caught.value)
    assert str(last) in message
    if tear not in FOUND_BY_ORBAX:
        assert (
            f"move that folder away to go on from checkpoint_{disturbed_runs.STEPS - 2}" in message
        )
    # nothing has been taken away, and what is said to help does
    assert last.is_dir()
    shutil.rmtree(last)
    with pytest.raises(Started, match=str(disturbed_runs.STEPS - 2)):
        disturbed_runs.train(run, disturbed_runs.STEPS + 2, base=Starts)
