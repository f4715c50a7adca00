"""The trainer that the host is given."""

import concurrent.futures
import threading
import types

import jax
import numpy as np
import pytest
import tiny_t5
from jax.sharding import PartitionSpec

import t5x_sparsity as ts
from t5x_sparsity import host
from t5x_sparsity.core import packing
from t5x_sparsity.core.trees import flatten
from t5x_sparsity.t5x import SparseOptimizer, sparse_trainer


def mask_bytes(state):
    return {p: np.asarray(m) for p, m in state._optimizer.state.sparsity.masks.items()}


@pytest.fixture(scope="module")
def trainer():
    trainer = tiny_t5.trainer(tiny_t5.rigl())
    yield trainer
    trainer.close()


def test_masks_change_at_the_scheduled_steps_alone(trainer):
    before = mask_bytes(trainer.train_state)
    for step in range(9):
        summary = tiny_t5.run(trainer, 1, start=step)
        after = mask_bytes(trainer.train_state)
        changed = any((before[p] != after[p]).any() for p in before)
        assert changed == (step in (2, 5, 8)), step
        assert summary["sparsity/total"].value == pytest.approx(0.8, abs=1e-3)
        before = after
    assert int(trainer.train_state.step) == 9


def test_pruned_weights_are_exactly_zero_and_counts_are_exact(trainer):
    state = trainer.train_state
    weights = flatten(state.params)
    rows = {r.path: r for r in trainer.layer_summaries()}
    for path, stored in state._optimizer.state.sparsity.masks.items():
        mask = np.asarray(packing.unpack(stored, weights[path].shape))
        assert (np.asarray(weights[path])[~mask] == 0).all()
        target = round(weights[path].size * (1 - rows[path].target))
        assert abs(int(mask.sum()) - target) <= 1
        assert rows[path].kept == mask.sum()


def test_the_two_steps_compile_once(trainer):
    variants = trainer.train_step_variants()
    assert set(variants) == {"plain", "update"}
    tiny_t5.run(trainer, 4, start=9)

    def sizes():
        steps = [v._step for v in variants.values()]
        jitted = [
            next(x for x in (s, *vars(s).values()) if hasattr(x, "_cache_size")) for s in steps
        ]
        return [j._cache_size() for j in jitted]

    first = sizes()
    tiny_t5.run(trainer, 6, start=13)
    assert sizes() == first == [1, 1]


def test_the_state_keeps_its_structure(trainer):
    fresh = tiny_t5.initializer(tiny_t5.rigl())[0].global_train_state_shape
    state = trainer.train_state
    assert [x.shape for x in jax.tree.leaves(state)] == [x.shape for x in jax.tree.leaves(fresh)]
    assert [x.dtype for x in jax.tree.leaves(state)] == [x.dtype for x in jax.tree.leaves(fresh)]
    assert isinstance(state._optimizer.optimizer_def, SparseOptimizer)
    assert state._optimizer.optimizer_def.step_kind is None


@pytest.mark.slow
def test_compiled_ahead_of_time_it_trains_the_same():
    def final(compile_first):
        trainer = tiny_t5.trainer(tiny_t5.rigl())
        if compile_first:
            trainer.compile_train(tiny_t5.batch())
        tiny_t5.run(trainer, 6)
        trainer.close()
        return tiny_t5.leaves(trainer.train_state)

    a, b = final(False), final(True)
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


class Held:
    """A step whose compiling waits, or fails."""

    def __init__(self, step, until=None, error=None):
        self.step, self.until, self.error = step, until, error

    def compiler(self, *arguments):
        compile_step = self.step.compiler(*arguments)

        def compile_later():
            self.until.wait(60)
            if self.error:
                raise self.error
            return compile_step()

        return compile_later


def test_the_update_step_is_compiled_while_plain_steps_run():
    trainer = tiny_t5.trainer(tiny_t5.rigl())
    released = threading.Event()
    trainer._steps["update"] = Held(trainer._steps["update"], released)
    trainer.compile_train(tiny_t5.batch())
    before = mask_bytes(trainer.train_state)
    tiny_t5.run(trainer, 2)  # the first update is at step 2
    assert not trainer._compiled_steps["update"].done()
    released.set()
    tiny_t5.run(trainer, 1, start=2)
    after = mask_bytes(trainer.train_state)
    assert any((before[p] != after[p]).any() for p in before)
    trainer.close()


@pytest.mark.slow
def test_an_update_step_that_cannot_be_compiled_stops_the_run_before_it_is_due():
    trainer = tiny_t5.trainer(tiny_t5.rigl())
    released = threading.Event()
    trainer._steps["update"] = Held(trainer._steps["update"], released, MemoryError("no room"))
    trainer.compile_train(tiny_t5.batch())
    tiny_t5.run(trainer, 1)
    released.set()
    concurrent.futures.wait([trainer._compiled_steps["update"]])
    with pytest.raises(MemoryError, match="no room"):
        tiny_t5.run(trainer, 1, start=1)
    trainer.close()


@pytest.mark.slow
def test_the_step_that_comes_first_is_compiled_first():
    trainer = tiny_t5.trainer(tiny_t5.rigl(begin=0))
    released = threading.Event()
    trainer._steps["plain"] = Held(trainer._steps["plain"], released)
    trainer.compile_train(tiny_t5.batch())
    assert trainer._compiled_steps["update"].done()
    assert not trainer._compiled_steps["plain"].done()
    released.set()
    trainer.close()


def test_no_step_reads_from_the_device(monkeypatch):
    trainer = tiny_t5.trainer(tiny_t5.rigl())
    tiny_t5.run(trainer, 4)  # compiled by now, both of them
    state, reads = trainer.train_state, []
    value, own = type(state.step)._value.fget, threading.get_ident()

    def watched(x):
        if threading.get_ident() == own:  # another trainer's thread may be writing its metrics
            reads.append(x.shape)
        return value(x)

    monkeypatch.setattr(type(state.step), "_value", property(watched))
    for _ in range(4):
        state, _metrics = trainer._partitioned_train_step(state, tiny_t5.batch())
    assert not reads
    assert int(state.step) == 8
    assert reads == [()], "the watch over reads is blind"
    trainer.train_state = state  # the old one is donated
    trainer.close()


def test_static_masks_need_no_update_step():
    config = ts.SparsityConfig(algorithm=ts.Static(), sparsity=0.9)
    trainer = tiny_t5.trainer(config)
    assert set(trainer.train_step_variants()) == {"plain"}
    before = mask_bytes(trainer.train_state)
    tiny_t5.run(trainer, 3)
    after = mask_bytes(trainer.train_state)
    assert before and all((before[p] == after[p]).all() for p in before)
    trainer.close()


def test_a_dense_run_by_the_same_path_is_the_hosts_own():
    dense = tiny_t5.trainer(ts.SparsityConfig(algorithm=ts.Dense()))
    plain = tiny_t5.trainer(None)
    tiny_t5.run(dense, 3)
    tiny_t5.run(plain, 3)
    ours, theirs = tiny_t5.leaves(dense.train_state), tiny_t5.leaves(plain.train_state)
    assert set(ours) - set(theirs) == {"state/sparsity/rng"}
    for path in theirs:
        np.testing.assert_array_equal(ours[path], theirs[path], err_msg=path)
    dense.close()
    plain.close()


def test_magnitude_reaches_its_target_at_the_last_update():
    updates = ts.Periodic(begin=1, end=6, period=2)
    trainer = tiny_t5.trainer(
        ts.SparsityConfig(algorithm=ts.Magnitude(updates=updates), sparsity=0.75), "adafactor"
    )
    assert trainer.layer_summaries()[-1].sparsity == 0
    levels = []
    for step in range(7):
        tiny_t5.run(trainer, 1, start=step)
        levels.append(trainer.layer_summaries()[-1].sparsity)
    # updates at 1, 3, 5 and, off the grid, 6; the first is at the start of the ramp
    assert levels[0] == levels[1] == levels[2] == 0
    assert 0 < levels[3] == levels[4] < levels[5] < levels[6]
    assert all(abs(r.sparsity - 0.75) * r.size <= 1 for r in trainer.layer_summaries()[:-1])
    trainer.close()


def test_microbatches_are_the_bases():
    whole, parts = (
        tiny_t5.trainer(tiny_t5.rigl()),
        tiny_t5.trainer(tiny_t5.rigl(), num_microbatches=2),
    )
    tiny_t5.run(whole, 2)
    tiny_t5.run(parts, 2)
    a, b = tiny_t5.leaves(whole.train_state), tiny_t5.leaves(parts.train_state)
    for path in a:
        if path.startswith("target/"):
            np.testing.assert_allclose(a[path], b[path], atol=2e-2, err_msg=path)
    whole.close()
    parts.close()


def test_a_users_own_trainer_class_works():
    class Counting(host.Trainer):
        traced = 0

        @property
        def _partitioned_train_step(self):
            inner = host.Trainer.__dict__["_partitioned_train_step"].func(self)
            type(self).traced += 1
            return inner

    trainer = tiny_t5.trainer(tiny_t5.rigl(), base=Counting)
    assert isinstance(trainer, Counting)
    tiny_t5.run(trainer, 3)
    # one build a compiled step, each through the user's class
    assert type(trainer).traced == 2
    trainer.close()


def test_a_dense_train_state_is_refused():
    with pytest.raises(ValueError, match="would train dense.*train_state_initializer_cls"):
        sparse_trainer(host.Trainer, **tiny_t5.trainer_arguments(None))


def test_the_initializer_without_an_optimizer_changes_nothing():
    from t5x_sparsity.t5x import SparseTrainStateInitializer

    if host.NAME == "embedded":
        pytest.skip("the embedded host has no inference jobs, which pass no optimizer")
    _, net, partitioner = tiny_t5.initializer(tiny_t5.rigl())
    shapes = {k: (tiny_t5.BATCH, tiny_t5.LENGTH) for k in tiny_t5.FEATURES}
    init = SparseTrainStateInitializer(None, net.get_initial_variables, shapes, partitioner)
    state = init.from_scratch(jax.random.PRNGKey(0))
    assert not hasattr(state, "_optimizer")


def test_the_initializer_without_a_config_says_so():
    from t5x_sparsity.t5x import SparseTrainStateInitializer

    _, net, partitioner = tiny_t5.initializer(tiny_t5.rigl())
    shapes = {k: (tiny_t5.BATCH, tiny_t5.LENGTH) for k in tiny_t5.FEATURES}
    with pytest.raises(ValueError, match=r"has no config; include one of sparsity/\*\.gin"):
        SparseTrainStateInitializer(
            tiny_t5.OPTIMIZERS["adamw"](), net.get_initial_variables, shapes, partitioner
        )


def test_a_mesh_too_wide_for_a_packed_mask_is_refused_by_name():
    init, _, _ = tiny_t5.initializer(tiny_t5.rigl(), build=tiny_t5.model)
    # an embed axis of 64 packs to 8 bytes, which 16 devices can't share
    rules = {"embed": "data"}
    axes = init.train_state_axes._optimizer.state.sparsity.masks
    for path, spec in axes.items():
        names = init.train_state_axes._optimizer.optimizer_def._axes[path]
        axes[path] = PartitionSpec(*(rules.get(n, s) for n, s in zip(names, spec, strict=True)))
    init._partitioner = types.SimpleNamespace(
        mesh=types.SimpleNamespace(shape={"data": 16, "model": 1})
    )
    with pytest.raises(
        ValueError, match=r"packed mask of 'decoder/.*SparsityConfig.pack_masks=False"
    ):
        init._check_masks_divide()


def test_plain_step_does_nothing_but_mask():
    """No loop of a search, and no more all-reduces than the dense step has."""
    trainer = tiny_t5.trainer(tiny_t5.rigl(), build=tiny_t5.model)
    text = trainer.train_step_variants()["plain"].lower(trainer.train_state, tiny_t5.batch())
    assert "while" not in text.as_text()
    trainer.close()


def test_axes_of_the_state_are_replicated_or_named(trainer):
    axes = trainer._train_state_axes
    assert axes._optimizer.state.step == PartitionSpec()
    assert axes._optimizer.state.sparsity.rng == PartitionSpec()


def test_a_base_without_a_train_step_is_named():
    with pytest.raises(TypeError, match="object has no _partitioned_train_step property .* bind"):
        sparse_trainer(object)
