"""`t5x-sparsity export` on checkpoints of the host in use, and on what is none."""

import errno
import json
import re
import shutil

import checkpoint_files as files
import inprocess_runs
import jax
import numpy as np
import pytest
import tiny_t5
from safetensors.numpy import load_file

import t5x_sparsity as ts
from t5x_sparsity import cli
from t5x_sparsity.artifacts.export import load_export
from t5x_sparsity.core import packing

UPDATES = ts.Periodic(begin=1, end=7, period=2)


def config(rules=()):
    return ts.SparsityConfig(algorithm=ts.RigL(updates=UPDATES), sparsity=0.75, rules=rules)


@pytest.fixture(scope="module")
def rigl(tmp_path_factory):
    """The folder of a sparse run that ended at step 4, and its leaves."""
    folder = tmp_path_factory.mktemp("rigl") / "run"
    return folder, inprocess_runs.run(folder, config(), 4)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense") / "run"
    return folder, inprocess_runs.run(folder, None, 2)


def export(capsys, *arguments):
    """(exit code, standard output, standard error)."""
    code = cli.main(["export", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def assert_same(loaded, leaves):
    weights = {k.removeprefix("target/"): x for k, x in leaves.items() if k.startswith("target/")}
    assert loaded.keys() == weights.keys() and weights
    for path, x in weights.items():
        assert loaded[path].dtype == x.dtype and loaded[path].tobytes() == x.tobytes(), path


def test_a_dense_export_is_the_checkpoint(capsys, tmp_path, rigl):
    folder, leaves = rigl
    out = tmp_path / "x.safetensors"
    code, text, err = export(capsys, folder / "checkpoint_4", out)
    assert code == 0 and not err
    assert_same(load_file(out), leaves)
    assert_same(load_export(out, flat=True), leaves)
    assert f"Wrote {out}: " in text and f"dense, step 4 of {folder / 'checkpoint_4'}" in text
    assert "mlp_wi" in text and "100.0%" in text and "1 dense weight " in text
    # the folder of the run stands for its last checkpoint
    again = tmp_path / "y.safetensors"
    assert export(capsys, folder, again)[0] == 0
    assert again.read_bytes() == out.read_bytes()
    assert export(capsys, folder / "checkpoint_2", again, "--overwrite")[0] == 0
    assert again.read_bytes() != out.read_bytes()


def test_a_compressed_export_has_the_weights_and_the_masks(capsys, tmp_path, rigl):
    folder, leaves = rigl
    out = tmp_path / "x.safetensors"
    code, text, err = export(capsys, folder, out, "--format=compressed")
    assert code == 0 and not err and " csr " in text
    assert_same(load_export(out, flat=True), leaves)
    found = load_export(out, "masks", flat=True)
    assert found.keys() == {"mlp_wi", "mlp_wo"}
    for path, mask in found.items():
        stored = leaves[f"state/sparsity/masks/{path}"]
        np.testing.assert_array_equal(mask, packing.unpack(stored, leaves[f"target/{path}"].shape))
    # what has just grown is 0, and kept
    kept = sum(m.sum() for m in found.values())
    bcoo = load_export(out, "bcoo", flat=True)
    assert kept == sum(bcoo[p].nse for p in found)
    said = json.loads(export(capsys, folder, tmp_path / "y.safetensors", "--json")[1])
    assert said["step"] == 4 and said["has_masks"] and said["format"] == "dense"
    by_path = {w["path"]: w for w in said["weights"]}
    assert by_path["mlp_wi"]["algorithm"] == "RigL"
    assert by_path["mlp_wi"]["sparsity"] == pytest.approx(0.75, abs=1e-3)
    assert said["totals"]["kept"] == kept + leaves["target/embedding"].size


def test_patterns_of_stacked_layers_and_weights_under_a_mask(capsys, tmp_path):
    rules = [
        ts.Rule(path="mlp_wi", pattern=ts.NByM(n=1, m=4)),
        ts.Rule(
            path="mlp_wo",
            pattern=ts.Block(height=4, width=2),
            algorithm=ts.MagnitudeSTE(updates=UPDATES),
        ),
    ]
    leaves = inprocess_runs.run(tmp_path / "run", config(rules), 2)
    out = tmp_path / "x.safetensors"
    code, text, _ = export(capsys, tmp_path / "run", out, "--format=compressed", "--json")
    assert code == 0
    weights = {w["path"]: w for w in json.loads(text)["weights"]}
    wi, wo = weights["mlp_wi"], weights["mlp_wo"]
    assert wi["shape"] == [32, 2, 64] and wi["mask"] and wo["mask"]
    assert (wi["encoding"], wi["n"], wi["m"], wi["axis"]) == ("nm", 1, 4, 0)
    assert (wo["encoding"], wo["block"]) == ("blocks", [4, 1, 2])
    found = load_export(out, "masks")
    for path, mask in found.items():
        stored = leaves[f"state/sparsity/masks/{path}"]
        np.testing.assert_array_equal(mask, packing.unpack(stored, mask.shape))
    # of the weights under a mask, those that the model sees: not the dense ones beneath
    assert_same(load_export(out, flat=True), leaves)
    dense = leaves["state/sparsity/dense/mlp_wo"]
    np.testing.assert_array_equal(
        load_export(out)["mlp_wo"], np.where(found["mlp_wo"], dense, np.float32(0))
    )


def test_an_exported_model_computes_what_the_checkpoint_does(capsys, tmp_path, rigl):
    folder, leaves = rigl
    out = tmp_path / "x.safetensors"
    assert export(capsys, folder, out, "--format=compressed", "--smallest")[0] == 0
    tokens = tiny_t5.batch()["decoder_input_tokens"]
    module = tiny_t5.Stacked(width=32, mlp_dim=64)
    target = {k.removeprefix("target/"): x for k, x in leaves.items() if k.startswith("target/")}
    ours = module.apply({"params": load_export(out)}, tokens, tokens)
    np.testing.assert_array_equal(ours, module.apply({"params": target}, tokens, tokens))
    halves = jax.tree.map(lambda x: x.dtype.name, export_as(capsys, folder, tmp_path, "bfloat16"))
    assert set(halves.values()) == {"bfloat16"}


def export_as(capsys, folder, tmp_path, dtype):
    out = tmp_path / f"{dtype}.safetensors"
    assert export(capsys, folder, out, f"--dtype={dtype}")[0] == 0
    return load_export(out, flat=True)


def test_a_dense_checkpoint_is_exported_with_a_note(capsys, tmp_path, dense):
    folder, leaves = dense
    out = tmp_path / "x.safetensors"
    for form in ("dense", "compressed"):
        code, text, _ = export(capsys, folder, out, f"--format={form}", "--overwrite")
        assert code == 0 and "The checkpoint has no masks: " in text
        assert "3 dense weights" in text
        assert_same(load_export(out, flat=True), leaves)


def half_written(folder, tmp_path, what):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    last = copy / "checkpoint_4"
    if what == "temporary":
        last.rename(copy / "checkpoint_4.orbax-checkpoint-tmp-1")
        return copy / "checkpoint_4.orbax-checkpoint-tmp-1"
    if what == "metadata":
        (last / "state/_METADATA").unlink()
    if what == "data":  # the arrays' bytes; what is small is within the list of arrays
        files = [p for d in (last / "state").rglob("d") for p in d.iterdir()]
        assert files
        for path in files:
            path.unlink()
    return last


@pytest.mark.parametrize("what", ["temporary", "metadata", "data"])
def test_half_written_checkpoints(capsys, tmp_path, rigl, what):
    checkpoint = half_written(rigl[0], tmp_path, what)
    before = sorted(tmp_path.rglob("*"))
    code, out, err = export(capsys, checkpoint, tmp_path / "x.safetensors")
    assert code == 2 and not out and len(err.splitlines()) == 1
    assert err.startswith("t5x-sparsity export: error: ")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_half_written_last_checkpoint_is_skipped_and_named(capsys, tmp_path, rigl):
    newer = half_written(rigl[0], tmp_path, "temporary")
    code, text, _ = export(capsys, newer.parent, tmp_path / "x.safetensors")
    assert code == 0 and "dense, step 2 of " in text
    assert f"Skipped, not complete: {newer.name}." in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}/no", "{out}"], "/no doesn't exist"),
        (["{tmp}", "{out}"], "checkpoint"),
        (["{tmp}/taken.safetensors", "{out}"], "is a file"),
        (["{run}", "{tmp}/no/x.safetensors"], "there is no folder .*; make it first"),
        (["{run}", "{tmp}/x"], "OUT must end in .safetensors, got '.*/x'"),
        (["{run}", "{tmp}/taken.safetensors"], "exists already; .* --overwrite to replace"),
        (["{run}", "{tmp}/folder.safetensors", "--overwrite"], "folder.safetensors exists already"),
        (["{run}", "{out}", "--dtype=int8"], "invalid choice: 'int8' .*bfloat16"),
        (["{run}", "{out}", "--format=zip"], "invalid choice: 'zip' .*compressed"),
        (["{run}", "{out}", "--include=("], "include is not a regular expression"),
        (["{run}", "{out}", "--include=attention"], "is found in no weight's path; these are emb"),
        (["{run}", "{out}", "--smallest"], "--smallest is of --format=compressed"),
        (["{run}"], "arguments are required: OUT"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_input_is_one_line_and_writes_nothing(capsys, tmp_path, rigl, arguments, message):
    (tmp_path / "taken.safetensors").write_text("mine")
    (tmp_path / "folder.safetensors").mkdir()
    before = sorted(tmp_path.rglob("*"))
    places = {"run": rigl[0], "tmp": tmp_path, "out": tmp_path / "x.safetensors"}
    code, out, err = export(capsys, *(a.format(**places) for a in arguments))
    assert code == 2 and not out
    (line,) = err.splitlines()
    assert line.startswith("t5x-sparsity export: error: ")
    assert re.search(message, line), line
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "taken.safetensors").read_text() == "mine"


def test_a_full_disk_is_one_line_and_leaves_nothing(capsys, tmp_path, rigl, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("t5x_sparsity.artifacts.tensor_files.shutil.copyfileobj", full)
    code, out, err = export(capsys, rigl[0], tmp_path / "x.safetensors")
    assert code == 2 and not out and not list(tmp_path.iterdir())
    (line,) = err.splitlines()
    assert re.search("x.safetensors can't be written: .*No space left on device", line)


def test_help_answers_questions(capsys):
    code, out, _ = export(capsys, "--help")
    assert code == 0
    for word in ("CHECKPOINT", "OUT", "compressed", "--overwrite", "examples:", "Exit code"):
        assert word in out


@pytest.mark.parametrize("axis, way", [(0, "inputs"), (1, "outputs")])
def test_export_and_inspect_name_an_unrecorded_one_of_three_alike(capsys, tmp_path, axis, way):
    groups = np.random.default_rng(0).permuted(np.tile(np.arange(3) == 0, (64, 32, 1)), axis=-1)
    mask = groups.reshape(64, 96).T if axis == 0 else groups.reshape(64, 96)
    leaves = files.sparse_leaves({"w": np.ones(mask.shape, np.float32)}, {"w": (mask, None)})
    files.write("t5x", tmp_path / "checkpoint_7", leaves)
    out = tmp_path / "w.safetensors"
    code, text, _ = export(capsys, tmp_path, out, "--format=compressed")
    assert code == 0 and f"1:3 along axis {axis}" in text
    arguments = tmp_path, out, "--overwrite", "--format=compressed", "--json"
    found = json.loads(export(capsys, *arguments)[1])
    weight = found["weights"][0]
    assert (weight["encoding"], weight["n"], weight["m"], weight["axis"]) == ("nm", 1, 3, axis)
    assert cli.main(["inspect", str(tmp_path), "--json"]) == 0
    weight = json.loads(capsys.readouterr().out)["weights"][0]
    assert weight["pattern"].startswith(f"1:3 along {way}")
    assert weight[f"n_by_m_{way}"] == [1, 3]
