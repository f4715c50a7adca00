"""`t5x-sparsity inspect` on what runs saved, against their arrays, and on all that is wrong."""

import functools
import json
import re
import shutil
import sys

import checkpoint_files as files
import command_runs
import inprocess_runs
import numpy as np
import pytest
import tiny_t5

import t5x_sparsity as ts
from t5x_sparsity import cli
from t5x_sparsity.artifacts import checkpoint_arrays
from t5x_sparsity.artifacts.checkpoint import open_checkpoint
from t5x_sparsity.artifacts.checkpoint_arrays import SavedArray
from t5x_sparsity.commands.inspect import weights as inspected
from t5x_sparsity.core import packing

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def sparse(rigl_run):
    """The folder of a sparse run of stacked layers, saved at 0, 2 and 4."""
    return rigl_run[0]


@pytest.fixture(scope="module")
def dense(dense_run):
    """The folder of a dense run, saved at 0, 2 and 4."""
    return dense_run[0]


def inspect(capsys, *arguments):
    """(exit code, standard output, standard error)."""
    code = cli.main(["inspect", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def as_json(capsys, *arguments):
    code, out, err = inspect(capsys, *arguments, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def as_text(capsys, *arguments):
    code, out, err = inspect(capsys, *arguments)
    assert (code, err) == (0, "")
    return out


def row(text, name):
    return next(line.split() for line in text.splitlines() if line.startswith(name))


def masks_of(leaves):
    prefix = "state/sparsity/masks/"
    stored = {k.removeprefix(prefix): x for k, x in leaves.items() if k.startswith(prefix)}
    return {
        p: np.asarray(packing.unpack(x, leaves[f"target/{p}"].shape)) for p, x in stored.items()
    }


# what runs saved ----------------------------------------------------------------------------------


def test_a_run_is_shown_as_it_is(capsys, sparse):
    found = as_json(capsys, sparse)
    leaves = command_runs.saved(sparse, 4)
    assert found["path"] == str(sparse / "checkpoint_4") and found["step"] == 4
    assert found["layout"] == "orbax" and found["is_sparse"] and found["masks"] == 2
    assert found["algorithms"] == ["RigL"] and found["patterns"] == ["Unstructured()"]
    assert found["start_steps"] == [0]
    rows = {r["path"]: r for r in found["weights"]}
    assert {f"target/{p}" for p in rows} == {k for k in leaves if k.startswith("target/")}
    for path, mask in masks_of(leaves).items():
        weight, r = leaves[f"target/{path}"], rows[path]
        assert r["has_mask"] and r["stack_axes"] == [1] and r["shape"] == list(weight.shape)
        assert r["kept"] == mask.sum() and r["nonzero"] == (weight != 0).sum()
        assert r["kept_zeros"] == (mask & (weight == 0)).sum() and r["pruned_nonzeros"] == 0
        assert r["sparsity"] == 1 - mask.mean() and r["target"] == 0.5
        # of the layers, which are axis 1, one by one
        assert r["rows"] == mask.shape[0] * 2 and r["columns"] == mask.shape[2] * 2
        assert r["dead_rows"] == (~mask.any(axis=2)).sum()
        assert r["dead_columns"] == (~mask.any(axis=0)).sum()
        assert r["pattern"].startswith("unstructured") and r["follows_record"] is True
    assert not rows["embedding"]["is_sparse"] and rows["embedding"]["pattern"] == "dense"
    kept = sum(int(m.sum()) for m in masks_of(leaves).values())
    size = sum(m.size for m in masks_of(leaves).values())
    total = found["total"]["sparse"]
    assert (total["size"], total["kept"], total["sparsity"]) == (size, kept, 1 - kept / size)
    assert total["target"] == 0.5
    every = sum(x.size for k, x in leaves.items() if k.startswith("target/"))
    assert found["total"]["all"]["size"] == every
    assert found["total"]["all"]["kept"] == every - size + kept
    assert found["bytes"]["weights"] == 4 * every and found["bytes"]["masks"] == size // 8
    optimizer = [x.nbytes for k, x in leaves.items() if k.startswith("state/param_states/")]
    assert found["bytes"]["optimizer"] == sum(optimizer)
    assert found["bytes"]["method"] == 0 and found["slots"] == {}


def test_the_table_has_the_numbers_of_the_json(capsys, sparse):
    found, text = as_json(capsys, sparse), as_text(capsys, sparse)
    assert text.startswith(f"{sparse}/checkpoint_4: step 4, Orbax layout\n")
    for r in (r for r in found["weights"] if r["is_sparse"]):
        cells = row(text, r["path"])
        assert cells[1] == "x".join(map(str, r["shape"]))
        assert cells[2:5] == [f"{r['size']:,}", f"{r['kept']:,}", f"{r['sparsity']:.2%}"]
        assert cells[5:8] == ["50.00%", f"{r['dead_rows']}", f"{r['dead_columns']}"]
    assert row(text, "1 dense weight")[3:] == ["2,048", "2,048"]
    assert "embedding" not in text and "embedding" in as_text(capsys, sparse, "--all")
    assert f"{found['total']['sparse']['sparsity']:.2%}" in row(text, "total, sparse")


def test_steps_are_compared(capsys, sparse):
    a, b = command_runs.saved(sparse, 2), command_runs.saved(sparse, 4)
    found = as_json(capsys, sparse / "checkpoint_2", "--compare", sparse)
    assert found["checkpoint"]["step"] == 2 and found["other"]["step"] == 4
    rows = {r["path"]: r for r in found["weights"]}
    for path, r in rows.items():
        x, y = a[f"target/{path}"].astype(float), b[f"target/{path}"].astype(float)
        assert r["change"] == pytest.approx(np.linalg.norm(y - x) / np.linalg.norm(x))
    together = np.zeros(4)
    for path, mask in masks_of(a).items():
        other, r = masks_of(b)[path], rows[path]
        counts = mask.sum(), other.sum(), (mask & other).sum(), (mask | other).sum()
        assert (r["kept"], r["other_kept"], r["both"]) == counts[:3]
        assert r["overlap"] == counts[2] / counts[3] < 1
        assert r["share_kept"] == counts[2] / counts[0]
        assert r["churn"] == pytest.approx((other & ~mask).sum() / counts[1])
        together += counts
    total = found["total"]["sparse"]
    assert total["overlap"] == together[2] / together[3]
    text = as_text(capsys, sparse / "checkpoint_2", "--compare", sparse)
    assert f"A: {sparse}/checkpoint_2: step 2, Orbax layout, sparse by RigL\nB: " in text
    assert f"{total['overlap']:.2%}" in row(text, "total, sparse")
    assert "embedding" not in text
    assert "embedding" in as_text(capsys, sparse / "checkpoint_2", "--compare", sparse, "--all")


def test_a_dense_checkpoint_says_that_it_is_dense(capsys, dense):
    found, text = as_json(capsys, dense), as_text(capsys, dense)
    assert not found["is_sparse"] and found["masks"] == 0
    assert "The checkpoint is dense: it has no masks, and none of its matrices a zero." in text
    assert row(text, "3 dense weights") and "mlp_wi" not in text
    assert found["total"]["sparse"]["weights"] == 0
    assert "mlp_wi" in as_text(capsys, dense, "--all")


def test_sparse_is_compared_with_dense(capsys, sparse, dense):
    found = as_json(capsys, sparse, "--compare", dense)
    r = next(r for r in found["weights"] if r["path"] == "mlp_wi")
    assert (r["kept"], r["other_kept"], r["overlap"]) == (r["size"] // 2, r["size"], 0.5)
    assert (r["share_kept"], r["churn"]) == (1.0, 0.5) and 0 < r["change"]
    assert "no masks" in as_text(capsys, sparse, "--compare", dense)
    same = as_text(capsys, dense, "--compare", dense)
    assert "Neither prunes any" in same and row(same, "total")[-1] == "0"


def test_what_several_devices_saved_is_read_alike(capsys, tmp_path):
    leaves = inprocess_runs.run(tmp_path / "run", tiny_t5.rigl(0.5), 0, mesh=(2, 2))
    found = open_checkpoint(str(tmp_path / "run"))
    wi = found.weights["mlp_wi"].array
    assert wi.chunk_shape != wi.shape
    for path, mask in masks_of(leaves).items():
        weight = found.weights[path]
        np.testing.assert_array_equal(weight.read_mask(), mask)
        np.testing.assert_array_equal(weight.array.read(), leaves[f"target/{path}"])
    rows = {r["path"]: r for r in as_json(capsys, tmp_path / "run")["weights"]}
    assert rows["mlp_wi"]["kept"] == masks_of(leaves)["mlp_wi"].sum()


@tiny_t5.t5x_only
def test_t5x_own_layout_is_read_alike(capsys, tmp_path, sparse):
    config = tiny_t5.rigl(0.5, begin=1, end=7, period=2)
    inprocess_runs.run(tmp_path / "own", config, 4, use_orbax=False, save={"save_dataset": False})
    found, expected = as_json(capsys, tmp_path / "own"), as_json(capsys, sparse)
    assert found["layout"] == "t5x"
    for key in ("weights", "total", "algorithms", "bytes", "step"):
        assert found[key] == expected[key]
    total = as_json(capsys, tmp_path / "own", "--compare", sparse)["total"]["all"]
    assert total["change"] == 0 and total["overlap"] == 1


PATTERNS = {
    "a_wi": (ts.NByM(n=2, m=4), "2:4 along inputs"),
    "a_wo": (ts.ConstantFanIn(), "constant fan-in 32"),
    "b_wi": (ts.Block(height=4, width=2), "blocks 4x2"),
    "b_wo": (ts.Channel(), "whole channels"),
}


def test_the_patterns_of_a_run_are_found(capsys, tmp_path):
    rules = [ts.Rule(path=p, pattern=pattern) for p, (pattern, _) in PATTERNS.items()]
    config = ts.SparsityConfig(algorithm=ts.Static(), sparsity=0.5, rules=rules)
    build = functools.partial(inprocess_runs.stacked, names=("a", "b"))
    inprocess_runs.run(tmp_path / "run", config, 0, build=build)
    found = as_json(capsys, tmp_path / "run")
    rows = {r["path"]: r for r in found["weights"] if r["is_sparse"]}
    assert rows.keys() == PATTERNS.keys()
    for path, (pattern, expected) in PATTERNS.items():
        assert rows[path]["pattern"] == expected and rows[path]["follows_record"] is True
        assert rows[path]["recorded_pattern"] == repr(pattern)
    assert found["patterns"] == sorted(repr(pattern) for pattern, _ in PATTERNS.values())


# checkpoints written by hand ----------------------------------------------------------------------

W = {
    "mlp/wi": RNG.normal(size=(16, 8)).astype(np.float32),
    "norm/scale": np.zeros(8, np.float32),
}
MASK = RNG.random((16, 8)) < 0.5


def written(folder, weights=None, pruned=None, layout="t5x", **kwargs):
    pruned = {"mlp/wi": (MASK, 0)} if pruned is None else pruned
    return files.write(layout, folder, files.sparse_leaves(weights or W, pruned), **kwargs)


@pytest.mark.parametrize("layout", files.LAYOUTS)
def test_zeros_alone_count_where_nothing_has_a_mask(capsys, tmp_path, layout):
    weights = {**W, "mlp/wi": np.where(MASK, W["mlp/wi"], 0)}
    folder = written(tmp_path / "checkpoint_7", weights, {}, layout)
    found = as_json(capsys, folder)
    rows = {r["path"]: r for r in found["weights"]}
    assert rows["mlp/wi"]["kept"] == rows["mlp/wi"]["nonzero"] == MASK.sum()
    assert rows["mlp/wi"]["is_sparse"] and not rows["mlp/wi"]["has_mask"]
    assert not rows["norm/scale"]["is_sparse"]  # its zeros are no pruned weights
    assert "The checkpoint has no masks" in as_text(capsys, folder)
    # as the mask would have it
    masked = as_json(capsys, written(tmp_path / "masked/checkpoint_7"))
    mine = next(r for r in masked["weights"] if r["path"] == "mlp/wi")
    different = {k for k in mine if mine[k] != rows["mlp/wi"][k]}
    assert different == {"has_mask"}


def test_bfloat16_and_slots_of_a_method(capsys, tmp_path):
    import ml_dtypes

    leaves = files.sparse_leaves(
        {"w": W["mlp/wi"].astype(ml_dtypes.bfloat16)}, {"w": (MASK, None)}
    ) | {"state/sparsity/dense/w": W["mlp/wi"], "state/sparsity/rng": np.zeros(2, np.uint32)}
    found = as_json(capsys, files.write("t5x", tmp_path / "checkpoint_7", leaves))
    assert found["weights"][0]["dtype"] == "bfloat16"
    assert found["weights"][0]["kept"] == MASK.sum()
    assert found["slots"] == {"dense": {"arrays": 1, "bytes": 512}}
    assert found["bytes"] == {"weights": 256, "masks": 128, "method": 512, "optimizer": 0}
    assert "the method's dense 512 B in 1 array" in as_text(capsys, tmp_path)


def test_what_is_odd_is_said(capsys, tmp_path):
    weights = {**W, "mlp/wi": W["mlp/wi"].copy()}
    kept = np.argwhere(MASK)
    weights["mlp/wi"][tuple(kept[0])] = 0
    leaves = files.sparse_leaves(weights, {"mlp/wi": (MASK, 0)})
    leaves["target/mlp/wi"][tuple(np.argwhere(~MASK)[0])] = 1
    files.write("t5x", tmp_path / "checkpoint_7", leaves)
    pattern = "NByM(n=2, m=4, axis=-2)"
    entry = {"shape": [16, 8], "sparsity": 0.5, "pattern": pattern, "algorithm": "SRSTE"}
    files.write_record(tmp_path, mlp__wi=entry, other={"shape": [2]})
    (tmp_path / "checkpoint_9").mkdir()
    text = as_text(capsys, tmp_path)
    assert "Inconsistent: not zero where the mask prunes: 1 weight of mlp/wi." in text
    assert "Kept but exactly zero, as weights are that were just grown: 1." in text
    assert f"Not (yet) as sparsity.json says, {pattern}: mlp/wi." in text
    assert f"unstructured (not {pattern})" in text
    assert "sparsity.json next to the checkpoint is not of its masks: other there" in text
    assert "7 is the last complete one; skipped as half-written: checkpoint_9." in text
    notes = as_json(capsys, tmp_path)["notes"]
    assert len(notes) == 5 and all(note in text for note in notes)
    (tmp_path / "sparsity.json").unlink()
    assert "There is no sparsity.json next to the checkpoint" in as_text(capsys, tmp_path)


def test_what_is_assumed_of_stacks_is_said(capsys, tmp_path):
    mask = RNG.random((16, 3, 8)) < 0.5
    weights = {"w": RNG.normal(size=(16, 3, 8)).astype(np.float32)}
    written(tmp_path / "checkpoint_7", weights, {"w": (mask, 0)})
    assert "Which axes are stacked is not known for w: each is taken" in as_text(capsys, tmp_path)
    files.write_record(tmp_path, w={"shape": [16, 3, 8], "axes": None, "stack_axes": [1]})
    assert "stacked" not in as_text(capsys, tmp_path)
    assert as_json(capsys, tmp_path)["weights"][0]["rows"] == 48


CONFIG = """
from __gin__ import dynamic_registration
import t5x_sparsity

# Macros:
BATCH_SIZE = 8
MASK_UPDATE_PERIOD = 10
MODEL_DIR = '/somewhere'
OPTIMIZER = @host.adafactor.Adafactor()
PATTERNS_TO_CHOOSE = \\
    [@t5x_sparsity.Block]
SPARSITY = 0.8
SPARSITY_DISTRIBUTION = \\
    'erk'
SPARSITY_PATTERN = [1,
    2]

# Parameters:
t5x_sparsity.RigL.SPARSITY = 1
"""


def test_the_configuration_that_matters_is_shown(capsys, tmp_path):
    written(tmp_path / "checkpoint_7")
    (tmp_path / "config.gin").write_text(CONFIG)
    assert as_json(capsys, tmp_path)["configuration"] == {
        "BATCH_SIZE": "8",
        "MASK_UPDATE_PERIOD": "10",
        "OPTIMIZER": "@host.adafactor.Adafactor()",
        "SPARSITY": "0.8",
        "SPARSITY_DISTRIBUTION": "'erk'",
        "SPARSITY_PATTERN": "[1, 2]",
    }
    assert row(as_text(capsys, tmp_path), "  SPARSITY_DISTRIBUTION")[1] == "'erk'"


def test_what_only_one_has_is_listed(capsys, tmp_path):
    written(tmp_path / "a/checkpoint_7", {**W, "mine": np.ones((2, 2)), "odd": np.ones((2, 3))})
    written(tmp_path / "b/checkpoint_9", {**W, "yours": np.ones((2, 2)), "odd": np.ones((3, 2))})
    arguments = tmp_path / "a", "--compare", tmp_path / "b"
    found, text = as_json(capsys, *arguments), as_text(capsys, *arguments)
    assert [r["path"] for r in found["weights"]] == ["mlp/wi", "norm/scale"]
    assert (found["only_in_checkpoint"], found["only_in_other"]) == (["mine"], ["yours"])
    assert found["other_shape"] == {"odd": [[2, 3], [3, 2]]}
    for line in (
        "Only in A: mine.",
        "Only in B: yours.",
        "Of another shape, and left out: odd (2x3, 3x2).",
    ):
        assert line in text.splitlines()


def test_a_change_that_is_no_number_is_null(capsys, tmp_path):
    ones = np.ones((2, 2), np.float32)
    written(tmp_path / "a/checkpoint_7", {"w": 0 * ones, "v": ones, "u": 0 * ones}, {})
    written(tmp_path / "b/checkpoint_7", {"w": ones, "v": ones * np.nan, "u": 0 * ones}, {})
    found = as_json(capsys, tmp_path / "a", "--compare", tmp_path / "b")
    assert {r["path"]: r["change"] for r in found["weights"]} == {"w": None, "v": None, "u": 0.0}
    none = next(r for r in found["weights"] if r["path"] == "u")
    assert none["overlap"] is None and none["churn"] is None and none["share_kept"] is None
    assert row(as_text(capsys, tmp_path / "a", "--compare", tmp_path / "b"), "w ")[-1] == "-"


def test_no_more_than_a_part_is_read_at_once(capsys, tmp_path, monkeypatch):
    shape = (16, 3, 64)
    mask = RNG.random(shape) < 0.5
    weights = {"w": RNG.normal(size=shape).astype(np.float32)}
    chunks = {"target/w": (8, 3, 16)}
    for folder in ("a", "b"):
        written(tmp_path / folder / "checkpoint_7", weights, {"w": (mask, 0)}, chunks=chunks)
        files.write_record(tmp_path / folder, w={"shape": shape, "stack_axes": [1]})
    alone, both = (tmp_path / "a",), (tmp_path / "a", "--compare", tmp_path / "b")
    expected = as_json(capsys, *alone), as_json(capsys, *both)
    sizes = []

    def spy(read):
        def wrapped(self, source, index):
            part = read(self, source, index)
            sizes.append(part.nbytes)
            return part

        return wrapped

    monkeypatch.setattr(SavedArray, "_read", spy(SavedArray._read))
    monkeypatch.setattr(checkpoint_arrays, "PART_BYTES", 500)
    monkeypatch.setattr(inspected, "COMPARED_BYTES", 300)
    monkeypatch.setattr(inspected, "BITS_BYTES", 16 * 64 * 2 // 8)  # two slices of three
    assert (as_json(capsys, *alone), as_json(capsys, *both)) == expected
    assert 300 < max(sizes) <= 500


def test_progress_is_for_terminals(capsys, tmp_path, monkeypatch):
    written(tmp_path / "checkpoint_7")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    code, out, err = inspect(capsys, tmp_path, "--json")
    assert code == 0 and "reading" in err and json.loads(out)


# what is wrong ------------------------------------------------------------------------------------


def no_such_path(folder):
    return folder / "none", "none doesn't exist; give a folder checkpoint_<step>"


def no_checkpoint(folder):
    folder.mkdir()
    return folder, "holds no checkpoint: neither is it one"


def a_file(folder):
    folder.write_text("")
    return folder, "is a file; give a folder"


def half_written(folder):
    shutil.copytree(written(folder / "checkpoint_7"), folder / "checkpoint_8.tmp-1")
    return folder / "checkpoint_8.tmp-1", "half-written"


def a_chunk_gone(folder):
    (written(folder / "checkpoint_7") / "target.mlp.wi/0.0").unlink()
    return folder, "1 of 1 chunks of target/mlp/wi are missing"


def a_chunk_cut(folder):
    chunk = written(folder / "checkpoint_7") / "target.mlp.wi/0.0"
    chunk.write_bytes(chunk.read_bytes()[:20])
    return folder, "damaged or half-written: target/mlp/wi can't be read"


def a_mask_that_does_not_fit(folder):
    leaves = files.sparse_leaves(W) | {"state/sparsity/masks/mlp/wi": np.zeros((3, 8), np.uint8)}
    return files.write("t5x", folder / "checkpoint_7", leaves), "the mask of mlp/wi is damaged"


def a_record_cut(folder):
    written(folder / "checkpoint_7")
    (folder / "sparsity.json").write_text("{")
    return folder, "sparsity.json is damaged"


def a_record_of_other_values(folder):
    written(folder / "checkpoint_7")
    files.write_record(folder, mlp__wi={"shape": [16, 8], "pattern": None})
    return folder, "sparsity.json is damaged (pattern of mlp/wi is null, not text)"


def a_mask_of_another_type(folder):
    mask = files.pack(MASK, 0).astype(np.int32)
    leaves = files.sparse_leaves(W) | {"state/sparsity/masks/mlp/wi": mask}
    return files.write("t5x", folder / "checkpoint_7", leaves), "it is packed, but of int32"


def tensorflow(folder):
    folder.mkdir()
    (folder / "model.ckpt-1.index").write_bytes(b"")
    return folder / "model.ckpt-1", "is a TensorFlow checkpoint"


@pytest.mark.parametrize(
    "make",
    [
        no_such_path,
        no_checkpoint,
        a_file,
        half_written,
        a_chunk_gone,
        a_chunk_cut,
        a_mask_that_does_not_fit,
        a_record_cut,
        a_record_of_other_values,
        a_mask_of_another_type,
        tensorflow,
    ],
)
def test_bad_input_is_one_line(capsys, tmp_path, make):
    path, message = make(tmp_path / "bad")
    good = written(tmp_path / "good/checkpoint_7")
    before = sorted(tmp_path.rglob("*"))
    for arguments in ((path,), (path, "--compare", good), (good, "--compare", path, "--json")):
        code, out, err = inspect(capsys, *arguments)
        assert (code, out) == (2, "")
        assert err.startswith("t5x-sparsity inspect: error: ") and err.count("\n") == 1
        assert message in err and "Traceback" not in err
    assert sorted(tmp_path.rglob("*")) == before


def test_checkpoints_of_other_models_can_not_be_compared(capsys, tmp_path):
    a = written(tmp_path / "a/checkpoint_7")
    for weights, message in (
        ({"x": np.ones((2, 2))}, "have no weight in common: the one has mlp/wi, the other x"),
        ({"mlp/wi": np.ones((2, 2))}, "are of models of other sizes: each of the 1 weights that"),
    ):
        b = files.write("t5x", tmp_path / "b/checkpoint_7", files.sparse_leaves(weights))
        code, out, err = inspect(capsys, a, "--compare", b)
        assert (code, out) == (2, "") and message in err and err.count("\n") == 1


@pytest.mark.parametrize("arguments", [(), ("a", "b"), ("a", "--comp", "b"), ("a", "--compare")])
def test_arguments_that_are_wrong(capsys, arguments):
    code, out, err = inspect(capsys, *arguments)
    assert (code, out) == (2, "") and err.count("\n") == 1


def test_help_says_what_there_is(capsys):
    code, out, _ = inspect(capsys, "--help")
    assert code == 0
    for word in ("CHECKPOINT", "--compare", "--json", "--all", "examples:", "Exit code"):
        assert word in out


def test_the_docs_name_every_key(capsys, tmp_path):
    folder = written(tmp_path / "checkpoint_7")
    documented = set(re.findall(r"`(\w+)`", (tiny_t5.ROOT / "docs/inspect.md").read_text()))

    def keys(x):
        if isinstance(x, list):
            return set().union(*map(keys, x))
        return set(x).union(*map(keys, x.values())) if isinstance(x, dict) else set()

    found = keys(as_json(capsys, folder)) | keys(as_json(capsys, folder, "--compare", folder))
    assert found - documented == set() and len(found) > 40
