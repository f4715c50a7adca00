"""The trainer: steps, metrics and their writing."""

import contextlib
import glob
import inspect
import threading
import time

import clu.metrics
import clu.values
import jax
import jax.numpy as jnp
import micro_model as micro
import numpy as np
import optax
import pytest
import tensorflow as tf
from clu import asynclib
from jax.sharding import NamedSharding, PartitionSpec

from t5x_sparsity.embedded import metrics, trainer, utils

SHARDING = NamedSharding(micro.OneDevice().mesh, PartitionSpec("data"))


def make(num_microbatches=None, eval_names=("a", "b"), summary_dir=None, **kwargs):
    initializer, state, model, partitioner = micro.initial_state()
    made = trainer.Trainer(
        model=model,
        train_state=state,
        partitioner=partitioner,
        eval_names=eval_names,
        summary_dir=summary_dir,
        train_state_axes=initializer.train_state_axes,
        rng=jax.random.PRNGKey(1),
        learning_rate_fn=lambda step: 0.5 / (1.0 + step),
        num_microbatches=num_microbatches,
        **kwargs,
    )
    return contextlib.closing(made)


def values_of(summary):
    return {name: float(value.value) for name, value in summary.items()}


def test_train_is_optax_by_hand_and_metrics_are_averages():
    with make() as loop:
        params = jax.tree.map(jnp.array, loop.train_state.params)
        state = optax.adam(1e-2).init(params)
        losses = []
        for seed in range(3):
            fn = lambda p, seed=seed: loop._model.loss_fn(p, micro.batch(seed))[0]  # noqa: E731
            loss, grads = jax.value_and_grad(fn)(params)
            updates, state = optax.adam(1e-2).update(grads, state, params)
            params = optax.apply_updates(params, updates)
            losses.append(float(loss))
        summary = loop.train(iter(micro.batch(seed) for seed in range(3)), 3).result()
        got = values_of(summary)
        for name in params:
            np.testing.assert_allclose(loop.train_state.params[name], params[name], rtol=1e-5)
        assert int(loop.train_state.step) == 3
    assert got["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    tokens = 3 * 8 * micro.LENGTH
    assert got["loss_per_nonpadding_target_token"] == pytest.approx(sum(losses) / tokens, rel=1e-5)
    assert got["learning_rate"] == pytest.approx(0.5 * (1 + 1 / 2 + 1 / 3) / 3)
    assert got["learning_rate/current"] == pytest.approx(0.5 / 3)
    assert got["timing/steps_per_second"] == pytest.approx(3 / got["timing/seconds"])
    assert got["timing/uptime"] > 0


def test_train_gives_its_state_away_and_compiling_changes_nothing():
    with make() as jitted, make() as compiled:
        old = compiled.train_state
        compiled.compile_train(micro.batch())
        assert compiled._compiled_train_step is not None
        for loop in (jitted, compiled):
            loop.train(iter([micro.batch(0), micro.batch(1)]), 2, start_step=0).result()
        assert old.params["table"].is_deleted()
        expected, got = micro.leaves(jitted.train_state), micro.leaves(compiled.train_state)
    assert all(np.array_equal(expected[name], got[name]) for name in expected)


def test_training_thread_reads_no_device_values(monkeypatch):
    readers = []
    real = jax.device_get
    monkeypatch.setattr(
        jax, "device_get", lambda x: (readers.append(threading.get_ident()), real(x))[1]
    )
    blocked = []
    real_block = jax.block_until_ready

    def block(x):
        if jax.tree.leaves(x):
            blocked.append(threading.get_ident())
        return real_block(x)

    monkeypatch.setattr(jax, "block_until_ready", block)
    with make() as loop:
        loop.train(iter(micro.batch(seed) for seed in range(4)), 4, start_step=0).result()
    assert readers and threading.get_ident() not in readers
    assert threading.get_ident() not in blocked


@pytest.mark.parametrize("num_microbatches", [2, 4])
def test_microbatches_sum_to_the_batch(num_microbatches):
    with make() as whole, make(num_microbatches) as parts:
        summaries = [
            values_of(loop.train(iter([micro.batch()]), 1).result()) for loop in (whole, parts)
        ]
        grads = []
        for count in (None, num_microbatches):
            state = micro.initial_state()[1]
            grads.append(
                trainer.accumulate_grads_microbatched(
                    whole._model, state, micro.batch(), jax.random.PRNGKey(0), count, SHARDING
                )[0]
            )
    for name in grads[0]:
        assert grads[1][name].dtype == jnp.float32
        np.testing.assert_allclose(grads[0][name], grads[1][name], rtol=1e-5, atol=1e-5)
    for name in ("loss", "loss_per_nonpadding_target_token"):
        assert summaries[0][name] == pytest.approx(summaries[1][name], rel=1e-5)


def test_each_microbatch_has_its_own_rows_and_key():
    seen = []

    class Spy(micro.Model):
        def loss_fn(self, params, batch, dropout_rng):
            jax.debug.callback(
                lambda x, r: seen.append((x.tolist(), r.tolist())),
                batch["decoder_target_tokens"][:, 0],
                jax.random.key_data(dropout_rng),
            )
            return super().loss_fn(params, batch)

    _, state, _, _ = micro.initial_state()
    batch = micro.batch()
    key = jax.random.PRNGKey(0)
    accumulate = trainer.accumulate_grads_microbatched
    jax.jit(lambda s: accumulate(Spy(), s, batch, key, 4, SHARDING))(state)
    jax.effects_barrier()
    rows = sorted(row for part, _ in seen for row in part)
    assert rows == sorted(batch["decoder_target_tokens"][:, 0].tolist())
    assert sorted(part for part, _ in seen) == sorted(
        batch["decoder_target_tokens"][i : i + 2, 0].tolist() for i in range(0, 8, 2)
    )
    assert len({tuple(key) for _, key in seen}) == 4


def test_bad_microbatches_are_named():
    for count in (3, 0):
        with make(count) as loop:
            message = f"num_microbatches is {count}; a batch of 8 over 1 data shards can't be cut"
            with pytest.raises(ValueError, match=message):
                loop.compile_train(micro.batch())


def test_eval_is_over_all_batches_and_leaves_the_state():
    with make() as loop:
        before = micro.leaves(loop.train_state)
        batches = [micro.batch(0), micro.batch(1)]
        summaries = loop.eval({"a": iter(batches), "b": iter(batches[:1])})
        params = loop.train_state.params
        losses = [float(loop._model.loss_fn(params, batch)[0]) for batch in batches]
        after = micro.leaves(loop.train_state)
    assert values_of(summaries["a"])["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert values_of(summaries["b"])["loss"] == pytest.approx(losses[0], rel=1e-5)
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_eval_without_batches_is_left_out():
    with make() as loop:
        assert set(loop.eval({"a": iter([]), "b": iter([micro.batch()])})) == {"b"}


def test_eval_sets_of_one_shape_share_a_program():
    with make(eval_names=("a", "b", "c")) as loop:
        assert loop.eval({"a": iter([micro.batch()]), "b": iter([micro.batch(1)])})
        assert loop._partitioned_eval_step._cache_size() == 1
        assert loop.eval({"c": iter([micro.batch(size=4)])})
        assert loop._partitioned_eval_step._cache_size() == 2


def test_a_subclass_can_rebuild_and_replace_the_steps():
    class Doubled(trainer.Trainer):
        calls = 0

        @property
        def _partitioned_train_step(self):
            for cls in type(self).__mro__[1:]:
                attribute = inspect.getattr_static(cls, "_partitioned_train_step", None)
                if attribute is not None:
                    inner = attribute.func(self)
                    break

            def step(state, batch):
                self.calls += 1
                return inner(state, batch)

            return step

    initializer, state, model, partitioner = micro.initial_state()
    kwargs = dict(learning_rate_fn=lambda step: 0.1, num_microbatches=None)
    axes, key = initializer.train_state_axes, jax.random.PRNGKey(0)
    doubled = Doubled(model, state, partitioner, (), None, axes, key, **kwargs)
    with contextlib.closing(doubled) as loop:
        loop.train(iter([micro.batch()] * 2), 2).result()
        assert loop.calls == 2


def test_step_keys_depend_on_the_step_alone():
    with make() as loop:
        assert not jnp.array_equal(loop._get_step_rng(1), loop._get_step_rng(2))
        assert jnp.array_equal(
            loop._get_step_rng(5), jax.random.fold_in(jax.random.PRNGKey(1), jnp.int32(5))
        )


def test_the_state_survives_data_that_ends():
    with make() as loop:
        with pytest.raises(StopIteration):
            loop.train(iter([micro.batch()]), 3, start_step=6)
        assert int(loop.train_state.step) == 1


def test_weight_metrics_are_left_to_t5x():
    message = "trainer.Trainer.weight_metrics_computer is 'a computer', but .* use T5X for it"
    with pytest.raises(ValueError, match=message):
        make(weight_metrics_computer="a computer")


def test_manager_writes_in_order_and_remembers(tmp_path):
    manager = metrics.MetricsManager("train", str(tmp_path))
    manager.write_scalars(jnp.int32(3), {"x": jnp.float32(1.5), "y": 2})
    manager.write_scalar("x", 4.0, 5)
    manager.close()
    manager.close()
    assert manager.summary_dir == str(tmp_path / "train")

    from tensorboard.backend.event_processing import event_file_loader

    (path,) = glob.glob(f"{tmp_path}/train/events*")
    events = event_file_loader.EventFileLoader(path).Load()
    written = [
        (event.step, value.tag, float(tf.make_ndarray(value.tensor)))
        for event in events
        for value in event.summary.value
    ]
    assert written == [(3, "x", 1.5), (3, "y", 2.0), (5, "x", 4.0)]


def test_background_error_is_raised_at_close():
    class Broken(clu.metrics.Average):
        def compute(self):
            raise ArithmeticError("no such number")

    manager = metrics.MetricsManager("train")
    future = manager.write_metrics_summary({"m": Broken(jnp.float32(1), jnp.float32(1))}, 1, 1)
    with pytest.raises(ArithmeticError, match="no such number"):
        future.result()
    manager.write_scalar("x", 1, 1)
    with pytest.raises(asynclib.AsyncError, match="no such number"):
        manager.close()


def test_duration_runs_from_the_timer():
    manager = metrics.MetricsManager("train")
    time.sleep(0.2)
    before = time.monotonic()
    manager.start_duration_timer()
    summary = manager.write_metrics_summary({"a": metrics.Total(3.0, "second")}, 1, 2).result()
    seconds = summary["timing/seconds"].value
    assert 0 <= seconds <= time.monotonic() - before
    assert summary["a"].value == pytest.approx(3.0 / seconds)
    assert summary["timing/steps_per_second"].value == pytest.approx(2 / seconds)
    manager.close()


def test_what_t5x_alone_has_is_named():
    message = "embedded.trainer has no 'WeightMetricsComputer': .* Use T5X for it"
    with pytest.raises(AttributeError, match=message):
        trainer.WeightMetricsComputer  # noqa: B018
    assert not hasattr(utils, "ImportanceSampler")
