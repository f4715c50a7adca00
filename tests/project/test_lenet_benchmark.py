import functools
import importlib.util
import json
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest
from scipy import stats

import t5x_sparsity as ts


@functools.cache
def lenet():
    """The benchmark's script, as a module."""
    path = Path(__file__).parents[2] / "benchmarks" / "lenet.py"
    spec = importlib.util.spec_from_file_location("lenet_benchmark", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def digits(seed=0):
    """50 digits of 16 pixels that are noise."""
    rng = np.random.default_rng(seed)
    images = rng.uniform(size=(50, 16)).astype(np.float32)
    return lenet().Data(images, rng.integers(0, 10, size=50).astype(np.int32))


def command(out, *more):
    return [
        "--levels=0.9",
        "--methods=static,rigl",
        "--seeds=2",
        "--epochs=6",
        "--period=2",
        "--learning_rate=0.1",
        f"--out={out}",
        *more,
    ]


@pytest.mark.slow
def test_two_methods_train_and_resume(tmp_path, capsys, monkeypatch):
    out = tmp_path / "runs" / "lenet.json"
    lenet().main(command(out), digits())
    first = capsys.readouterr().out
    results = json.loads(out.read_text())
    assert [name.split()[0] for name in results] == ["static", "rigl"]
    # 6 steps: one batch of all 40 digits per epoch
    kept = round(0.1 * (16 * 300 + 300 * 100)) + 100 * 10
    for result in results.values():
        assert len(result["accuracy"]) == len(result["weights"]) == 2
        assert all(0 <= x <= 100 for x in result["accuracy"])
        # what RigL has grown at its last update has trained since
        assert all(abs(x - kept) <= 2 for x in result["weights"])
    settings = lenet().Settings(seeds=(0, 1), epochs=6, period=2, learning_rate=0.1, vmap=True)
    together = lenet().train("rigl", "0.9", settings, digits())
    assert together["accuracy"] == list(results.values())[1]["accuracy"]
    table = first.split("## 0.9")[1]
    assert "| static " in table and "| rigl " in table
    assert "- static < rigl: " in table

    def refuse(*args):
        raise AssertionError("trained what is in the file already")

    monkeypatch.setattr(lenet(), "train", refuse)
    lenet().main(command(out), digits())
    assert capsys.readouterr().out.split("## 0.9")[1] == table
    with pytest.raises(AssertionError, match="trained what"):
        lenet().main(command(out, "--first_seed=5"), digits())


def test_masks_follow_a_traced_seed():
    params = {n: {"kernel": jnp.ones((8, 8))} for n in ("hidden1", "output")}

    @meshes.quick_jit
    def masks(seed):
        tx = lenet().optimizer(ts.Static(), 0.1, 10, sparsity=0.5, seed=seed)
        return tx.init(params).sparsity.masks["hidden1/kernel"]

    both = np.asarray(jax.vmap(masks)(jnp.arange(2)))
    np.testing.assert_array_equal(both, [masks(0), masks(1)])
    assert (both[0] != both[1]).any()


def test_orders_split_every_seed_in_its_own_way():
    tests, batches = lenet().orders([7, 8], 5000, epochs=2)
    assert tests.shape == (2, 1000) and batches.shape == (2, 80, 100)
    for test, batch in zip(tests, batches, strict=True):
        for epoch in (batch[:40], batch[40:]):
            assert sorted([*test, *epoch.ravel()]) == list(range(5000))
    assert (tests[0] != tests[1]).any() and (batches[0, :40] != batches[0, 40:]).any()
    again, _ = lenet().orders([8], 5000, epochs=1, steps=3)
    np.testing.assert_array_equal(again[0], tests[1])


def test_small_dense_has_about_as_many_weights():
    for weights in (14260, 6304, 266200):
        a, b = lenet().small_widths(784, weights)
        assert abs(784 * a + a * b + 10 * b - weights) < 500
        assert abs(a - 3 * b) <= 1


def test_interval_is_student_t():
    values = [94.0, 95.5, 95.0, 93.0]
    mean, half = lenet().interval(values)
    expected = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    np.testing.assert_allclose([mean - half, mean + half], expected)
    assert math.isnan(lenet().interval([90.0])[1])


def test_verdicts_follow_the_paired_intervals():
    noise = np.array([0.0, 3.0, -2.0, 1.0])  # of the seeds, shared by all methods
    accuracy = {
        "static": 90 + noise,
        "snip": 91 + noise,  # above static on every seed, by the same
        "small-dense": 91.1 + noise,
        "set": 90 - noise,
        "rigl": 89 - noise,
        "magnitude": 94 + noise + [0.1, -0.1, 0.1, 0],
    }
    results = {m: {"accuracy": list(x), "weights": [1]} for m, x in accuracy.items()}
    lines = lenet().verdicts(results)
    assert "static < snip: reproduced (+1.00 ± 0.00)" in lines
    assert any(x.startswith("static < set: undecided") for x in lines)
    assert any(x.startswith("set < rigl: not reproduced, the reverse holds") for x in lines)
    assert any(x.startswith("snip ~ small-dense, within 0.5: reproduced") for x in lines)
    assert any(x.startswith("set ~ rigl, within 0.5: not reproduced") for x in lines)
    # too near to be told apart from the margin
    results["rigl"] = {"accuracy": list(90.4 - noise + [0.2, -0.2, 0.2, -0.2]), "weights": [1]}
    lines = lenet().verdicts(results)
    assert any(x.startswith("set ~ rigl, within 0.5: undecided") for x in lines)
    results["rigl"] = {"accuracy": accuracy["rigl"], "weights": [1]}
    table = lenet().table(results).splitlines()
    assert table[2].split("|")[1].strip() == "magnitude"  # the best comes first
    (row,) = [x for x in table if "| set " in x]
    assert row.split("|")[4].strip() == "no"
    # a single seed decides nothing
    one = {m: {"accuracy": list(x[:1]), "weights": [1]} for m, x in accuracy.items()}
    assert all("undecided" in x for x in lenet().verdicts(one))


def test_a_wrong_method_is_refused(capsys):
    with pytest.raises(SystemExit):
        lenet().main(["--methods=static,regal"])
    error = capsys.readouterr().err
    assert "unknown methods ['regal']" in error and "choose from dense, small-dense" in error
