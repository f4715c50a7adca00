"""The benchmark scripts, at tiny sizes: that they measure what they say, and write it."""

import argparse
import functools
import importlib
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import tiny_t5

BENCHMARKS = tiny_t5.ROOT / "benchmarks"
# K is 1,024
WEIGHTS = 16 << 10


@pytest.fixture
def script(monkeypatch):
    """Imports a script of benchmarks/ by its name; what it sets for jax is undone."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])
    return importlib.import_module


@functools.cache
def selection_result():
    """What selection.py measures on two devices."""
    args = argparse.Namespace(
        dtypes=["float32"],
        weights=[WEIGHTS],
        tensors=[1, 2],
        tensors_weights=WEIGHTS,
        repeats=1,
        sort_seconds=10.0,
    )
    return importlib.import_module("selection").measure(args, 2)


def test_selection_is_timed_beside_a_sort_that_moves_the_weights(script):
    script("selection")
    points = {(p["how"], p["tensors"]): p for p in selection_result()}
    assert list(points) == [("ours", 1), ("sort", 1), ("ours", 2), ("sort", 2)]
    assert all(p["seconds"] > 0 and p["weights"] == WEIGHTS for p in points.values())
    ours, sort = points["ours", 1]["collectives"], points["sort", 1]["collectives"]
    assert set(ours) == {"all-reduce"} and ours["all-reduce"]["bytes"] < WEIGHTS
    assert sort["all-gather"]["bytes"] >= 4 * WEIGHTS
    # two tensors are no more work for the network than one; shorter ones may take one pass less
    two = points["ours", 2]["collectives"]["all-reduce"]
    assert 0 < two["count"] <= ours["all-reduce"]["count"]


def test_masks_that_are_not_a_sort_s_stop_the_benchmark(script):
    check = script("selection").check_equal
    masks = {"a": np.array([True, False])}
    check(masks, dict(masks), 2)
    with pytest.raises(RuntimeError, match="the masks of 2 weights are not those of a sort"):
        check(masks, {"a": np.array([False, True])}, 2)


def test_a_selection_too_large_for_the_memory_is_compiled_only(script, monkeypatch):
    selection = script("selection")
    monkeypatch.setattr(selection, "_free_bytes", lambda: 1000)
    args = argparse.Namespace(
        dtypes=["bfloat16"],
        weights=[WEIGHTS],
        tensors=[1],
        repeats=1,
        sort_seconds=0.0,
    )
    (point,) = selection.measure(args, 1)
    assert point["how"] == "ours" and point["seconds"] is None and point["temp_bytes"] > 0
    assert "not run" in selection.table({"points": [point]})


def test_the_plot_has_one_curve_per_case_and_is_small(script, tmp_path):
    pytest.importorskip("matplotlib")
    selection = script("selection")
    points = [
        {
            "how": how,
            "weights": n,
            "tensors": 1,
            "dtype": dtype,
            "devices": devices,
            "seconds": n * 1e-8,
        }
        for how in ("ours", "sort")
        for n in (1 << 20, 1 << 24)
        for dtype in ("float32", "bfloat16")
        for devices in (1, 8)
    ]
    for name in ("a.svg", "b.svg"):
        selection.plot(points, tmp_path / "img" / name)
    text = (tmp_path / "img/a.svg").read_text()
    assert text == (tmp_path / "img/b.svg").read_text() and len(text) < 60_000
    labels = re.findall(r">(t5x_sparsity|a sort), (\w+), (\d) devices?<", text)
    expected = {("float32", "1"), ("bfloat16", "1"), ("float32", "8")}
    assert {x[1:] for x in labels if x[0] == "a sort"} == expected
    assert {x[1:] for x in labels if x[0] == "t5x_sparsity"} == expected


def test_a_method_updates_masks_at_the_steps_that_are_timed(script):
    config = script("workload").config_of("rigl", begin=3, period=7, bindings=["SPARSITY = 0.7"])
    due = [step for step in range(20) if config.algorithm.updates.is_update(step)]
    assert due == [3, 10, 17] and config.sparsity == 0.7
    assert sys.modules["__main__"].__name__ != "workload"
    assert "rigl" in script("workload").methods() and "base" not in script("workload").methods()


def test_jaxpruner_s_maps_leave_none_alone(script):
    tree_map = script("peer")._tree_map
    assert tree_map(lambda x, y: x + y, {"a": 1, "b": None}, {"a": 2, "b": 3}) == {
        "a": 3,
        "b": None,
    }
    # an absent level reaches the function, as JaxPruner's first masks need it
    assert tree_map(lambda x, y: (x, y), {"a": 1}, {"a": None}) == {"a": (1, None)}


@pytest.mark.parametrize(
    "name, flags, message",
    [
        ("steps", ["--devices=0"], "'0' is no number of at least 1; K, M and G may follow one"),
        ("steps", ["--steps=3", "--period=3"], "--steps=3 has no whole --period of 3; take more"),
        ("steps", ["--methods=rigl,rigle"], r"unknown methods \['rigle'\]; choose from acdc, .*"),
        ("steps", ["--peer=yes", "--optimizer=adafactor"], "--peer=yes needs rigl among .*"),
        ("steps", ["--peer=yes"], "--peer=yes needs no_such_a, no_such_b, which can't be imported"),
        ("selection", ["--dtypes=int8"], "'int8' is not one of float32, bfloat16"),
        ("selection", ["--weights=5K"], "5120 weights in 1 tensors on 8 devices .* 8192"),
        ("whole_run", ["--method=x"], "unknown method 'x'; choose from acdc, .*"),
        ("slices", ["--sizes=huge"], "'huge' is not one of small, base, large, xl, xxl"),
        ("figures", ["--quick"], "--quick would write figures that mean nothing; .* --out"),
        ("figures", ["--only=step"], "'step' is not one of steps_1, .*"),
    ],
)
def test_bad_flags_are_one_line_and_nothing_is_written(
    script, name, flags, message, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "out.json"
    monkeypatch.setattr(script("peer"), "missing", lambda: ["no_such_a", "no_such_b"])
    with pytest.raises(SystemExit) as left:
        script(name).main([*flags, f"--json={out}"])
    said = capsys.readouterr().err
    assert left.value.code == 2 and said.count("\n") == 1 and not out.exists()
    assert re.search(rf"(: |: argument --\w+: ){message}; see --help\n$", said), said


def step(run, kind, **more):
    return {
        "run": run,
        "step": kind,
        "seconds": 0.25,
        "ratio": 1.5,
        "extra": 0.125 if kind == "update" else None,
        "compile_ratio": 2.25,
        "argument_bytes": 10**6,
        "temp_bytes": 10**9,
        "mask_bytes": 125_000 if run == "rigl" else 0,
        "collectives": {"all-gather": {"count": 3, "bytes": 12_345_678}},
        **more,
    }


def results():
    """Results as the scripts write them, with figures that are made up."""
    shared = {"machine": "a machine", "host": "embedded", "optimizer": "adamw", "devices": 1}
    model = {"weights": 1_000_000, "batch": 8, "length": 128}
    timed = [step("dense", "plain"), step("rigl", "plain"), step("rigl", "update")]
    steps = {**shared, **model, "steps_timed": timed}
    block = {"method": "rigl", "blocks": 5, "period": 100, "ratio": 1.0123, "quartiles": [1, 1.5]}
    whole = {**shared, **model, **block, "seconds": {"dense": 10.0, "sparse": 10.123}}
    point = {"how": "ours", "weights": 1 << 20, "tensors": 1, "dtype": "float32", "devices": 1}
    point |= {"temp_bytes": 0, "collectives": {}, "seconds": 0.125}
    chip = {"size": "base", "weights": 82_000_000, "mask_bytes": 2_000_000, "compile_seconds": 10.0}
    refused = {**chip, "step": "update", "needed_bytes": 17_900_000_000, "compile_seconds": 30.0}
    fits = {"temp_bytes": 1, "argument_bytes": 1, "peak_bytes": 12_300_000, "collectives": {}}
    names = ("topology", "chips", "kind", "model_parallel", "method", "batch", "length")
    return {
        **dict.fromkeys(("steps_1", "adafactor", "methods", "large", "deep"), steps),
        "steps_4": {**steps, "devices": 4},
        "whole_run_1": whole,
        "whole_run_4": {**whole, "devices": 4},
        "selection": {
            "machine": "a machine",
            "points": [point, {**point, "how": "sort", "seconds": 1.5}],
        },
        "slices": {
            **shared,
            **{name: f"the {name}" for name in names},
            "param_dims": 2,
            "compiled": [{**chip, **fits, "step": "dense"}, refused],
        },
    }


def cells(text):
    return [[c.strip() for c in row.strip("|").split("|")] for row in text.splitlines()[4:]]


def test_figures_are_written_between_the_markers_of_what_was_run(script):
    figures = script("figures")
    page = "".join(f"<!-- figures: {n} -->\nold\n<!-- /figures: {n} -->\n" for n in figures.BLOCKS)
    new = figures.filled(f"a\n{page}b\n", results(), figures.PUBLISHED, list(figures.PUBLISHED))
    assert new.startswith("a\n") and new.endswith("b\n") and "old" not in new
    again = figures.filled(new, results(), figures.PUBLISHED, list(figures.PUBLISHED))
    assert again == new
    some = figures.filled(page, results(), figures.PUBLISHED, ["steps_4"])
    assert some.count("old") == len(figures.BLOCKS) - 2  # steps, steps_4
    none = {k: v for k, v in results().items() if k != "steps_1"}
    assert "steps_1" in figures.BLOCKS["steps"][0]
    assert figures.filled(page, none, figures.PUBLISHED, ["steps_4"]).count("old") == (
        len(figures.BLOCKS) - 1
    )
    assert "    python benchmarks/steps.py --devices=4 --compiles=3\n" in some


def test_the_tables_say_what_was_measured(script):
    blocks = {name: make(results()) for name, (_, make) in script("figures").BLOCKS.items()}
    assert cells(blocks["steps"])[1:3] == [
        ["1", "rigl", "1.500x", "0.12", "3, 3", "2.2x, 2.2x", "1.00"],
        ["4", "dense", "1.500x", "", "3", "2.2x", "0.00"],
    ]
    assert cells(blocks["steps_1"])[2] == [
        *("rigl", "update", "0.2500", "1.500", "0.12", "2.25", "1.00", "1,000", "0.12"),
        "3 all-gather (12.3)",
    ]
    image, rest = blocks["selection"].split("\n\n", 1)
    assert image.endswith("](img/mask_update.svg)")
    assert cells(rest) == [
        ["1M", "1", "float32", "1", "0.125", "1.500", "12.0", "0.00", "0.00", "none", "none"]
    ]
    assert cells(blocks["whole_run"])[1] == [
        *("4", "rigl", "1.0M", "5 x 100 steps", "10.00", "10.12", "1.0123", "1.000 to 1.500")
    ]
    assert [row[2:7] + row[-1:] for row in cells(blocks["slices"])] == [
        ["dense", "0.00", "0.00", "12.3", "2.00", "10 s (1.0x)"],
        ["update", "", "", "17,900: does not fit", "2.00", "30 s (3.0x)"],
    ]
    assert "1M weights" in blocks["large"] and "adds 0.12 plain steps" in blocks["large"]


def test_markers_of_the_pages_belong_to_figures(script):
    figures = script("figures")
    for page in figures.PAGES:
        figures.check_markers((tiny_t5.ROOT / page).read_text())
    docs = (tiny_t5.ROOT / "docs/benchmarks.md").read_text()
    assert set(figures.OPENING.findall(docs)) == set(figures.BLOCKS)
    with pytest.raises(ValueError, match="no figures are called 'stepz'; there are steps, "):
        figures.check_markers("<!-- figures: stepz -->")
    with pytest.raises(ValueError, match="needs a '<!-- /figures: steps -->'"):
        figures.check_markers("<!-- figures: steps -->")


@pytest.mark.slow
def test_the_command_runs_everything_and_writes_the_pages(tmp_path):
    pytest.importorskip("matplotlib")
    only = "steps_4,selection,whole_run_1"
    done = subprocess.run(
        [
            sys.executable,
            str(BENCHMARKS / "figures.py"),
            "--quick",
            f"--out={tmp_path}",
            f"--only={only}",
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tiny_t5.ROOT), *sys.path])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    page = (tmp_path / "docs/benchmarks.md").read_text()
    for name in ("steps_4", "selection"):
        assert re.search(rf"<!-- figures: {name} -->\n\n    python [^<]*\n\|-", page), name
    assert (tmp_path / "docs/img/mask_update.svg").exists()
    steps = json.loads((tmp_path / "runs/figures/steps_4.json").read_text())
    of = {(x["run"], x["step"]): x for x in steps["steps_timed"] if "rigl" == x["run"]}
    dense = steps["steps_timed"][0]
    assert dense["run"] == "dense" and dense["mask_bytes"] == 0
    # of 4 steps, at a period of 2, two update masks
    assert [len(of["rigl", kind]["times"]) for kind in ("plain", "update")] == [2, 2]
    assert all(
        x["collectives"]["all-gather"] == dense["collectives"]["all-gather"] for x in of.values()
    )
    whole = json.loads((tmp_path / "runs/figures/whole_run_1.json").read_text())
    assert whole["devices"] == 1 and len(whole["times"]["sparse"]) == 1 and whole["ratio"] > 0
