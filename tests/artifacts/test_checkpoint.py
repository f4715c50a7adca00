"""Reading checkpoints: both layouts, part by part, and all that can be wrong with one."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import checkpoint_files as files
import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts
from hypothesis import given
from hypothesis import strategies as st

from t5x_sparsity.artifacts import checkpoint, checkpoint_arrays
from t5x_sparsity.artifacts.checkpoint import CheckpointError, open_checkpoint
from t5x_sparsity.artifacts.checkpoint_arrays import SavedArray
from t5x_sparsity.artifacts.record import WeightRecord
from t5x_sparsity.core import packing

RNG = np.random.default_rng(0)
MASK = RNG.random((16, 2, 8)) < 0.4
LEAVES = files.sparse_leaves(
    {
        "mlp/wi": RNG.normal(size=(16, 2, 8)).astype(np.float32),
        "attention/query": RNG.normal(size=(6, 5)).astype(ml_dtypes.bfloat16),
        "norm/scale": np.ones(6, np.float32),
    },
    {"mlp/wi": (MASK, 0)},
) | {
    "state/param_states/mlp/wi/m": np.zeros((16, 2, 8), np.float32),
    "state/sparsity/dense/mlp/wi": np.ones((16, 2, 8), np.float32),
    "state/sparsity/rng": np.zeros(2, np.uint32),
}


@pytest.fixture(scope="module", params=files.LAYOUTS)
def whole(request, tmp_path_factory):
    """(layout, folder) of a checkpoint in each layout."""
    folder = tmp_path_factory.mktemp(request.param) / "run/checkpoint_7"
    return request.param, files.write(request.param, folder, LEAVES)


@pytest.fixture
def copy(whole, tmp_path):
    """One to spoil."""
    return shutil.copytree(whole[1], tmp_path / "run/checkpoint_7")


@pytest.fixture(scope="module")
def copy_once(tmp_path_factory):
    """One whose record tests write anew."""
    folder = tmp_path_factory.mktemp("once") / "checkpoint_7"
    return files.write("t5x", folder, LEAVES)


def error(path, *patterns):
    """The one line that opening `path` fails with; holds all patterns."""
    with pytest.raises(CheckpointError) as e:
        open_checkpoint(str(path))
    message = str(e.value)
    assert "\n" not in message and len(message) < 600
    for pattern in patterns:
        assert re.search(pattern, message), message
    return message


def test_it_holds_what_was_written(whole):
    layout, folder = whole
    found = open_checkpoint(str(folder))
    assert (found.path, found.step, found.layout) == (str(folder), 7, layout)
    assert found.arrays.keys() == LEAVES.keys()
    for name, x in LEAVES.items():
        leaf = found.arrays[name]
        assert leaf.name == name and leaf.shape == x.shape and leaf.dtype == x.dtype
        assert leaf.nbytes == x.nbytes and leaf.size == x.size
        read = leaf.read()
        assert isinstance(read, np.ndarray) and read.dtype == x.dtype
        np.testing.assert_array_equal(read, x)
    assert found.weights.keys() == {"mlp/wi", "attention/query", "norm/scale"}
    assert [w.path for w in found.masked] == ["mlp/wi"]
    assert [x.name for x in found.slots["dense"]] == ["state/sparsity/dense/mlp/wi"]
    assert found.slots.keys() == {"dense"}
    assert found.record == {} and found.config_gin is None and found.skipped == ()


def test_a_part_is_what_it_is_of_the_whole(whole):
    weight, wi = LEAVES["target/mlp/wi"], open_checkpoint(str(whole[1])).weights["mlp/wi"]
    for at in ((slice(3, 9),), (slice(None), slice(1, 2), slice(2, None)), (slice(-4, 99),)):
        np.testing.assert_array_equal(wi.array.read(at), weight[at])
        np.testing.assert_array_equal(wi.read_mask(at), MASK[at])
    np.testing.assert_array_equal(wi.read_mask(), MASK)
    for at, x in wi.array.parts(max_bytes=40):
        assert x.nbytes <= 40
        np.testing.assert_array_equal(x, weight[at])
    with pytest.raises(IndexError, match="4 slices for an array of shape"):
        wi.array.read((slice(None),) * 4)


@given(st.data())
def test_pieces_cover_a_region_once_and_follow_the_chunks(data):
    shape = data.draw(st.lists(st.integers(0, 9), max_size=3))
    chunk = [data.draw(st.integers(1, 10)) for _ in shape]
    region = [slice(*sorted(data.draw(st.tuples(*[st.integers(0, n)] * 2)))) for n in shape]
    x = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    array = SavedArray(Path("here"), "x", x, tuple(chunk))
    most = data.draw(st.integers(1, 200)) * x.itemsize
    seen = np.zeros(shape, int)
    order = []
    for at, part in array.parts(region, most):
        np.testing.assert_array_equal(part, x[at])
        assert part.nbytes <= most
        seen[at] += 1
        within = [(s.start // c, -(-s.stop // c)) for s, c in zip(at, chunk, strict=True)]
        if all(b - a == 1 for a, b in within):
            order.append(tuple(a for a, _ in within))
        else:  # several chunks are taken whole, or as far as the region has them
            for s, c, r in zip(at, chunk, region, strict=True):
                one = s.start // c == (s.stop - 1) // c
                assert one or (s.start % c == 0 or s.start == r.start)
                assert one or (s.stop % c == 0 or s.stop == r.stop)
    expected = np.zeros(shape, int)
    expected[tuple(region)] = 1
    np.testing.assert_array_equal(seen, expected)
    # the pieces of a chunk follow one another
    changes = sum(a != b for a, b in zip(order, order[1:], strict=False))
    assert changes == max(0, len(set(order)) - 1)


@given(st.data())
def test_parts_of_masks_are_those_of_whole_masks(data):
    shape = tuple(8 * n if data.draw(st.booleans()) else n for n in (1, 2, 3))
    axes = [None, *(a for a, n in enumerate(shape) if n % 8 == 0)]
    axis = data.draw(st.sampled_from(axes))
    mask = np.random.default_rng(data.draw(st.integers(0, 99))).random(shape) < 0.5
    stored = files.pack(mask, axis)
    np.testing.assert_array_equal(packing.unpack(stored, shape), mask)
    region = [slice(*sorted(data.draw(st.tuples(*[st.integers(0, n)] * 2)))) for n in shape]
    found = weight_of(np.zeros(shape), stored)
    np.testing.assert_array_equal(found.read_mask(region), mask[tuple(region)])


def weight_of(weight, stored):
    leaves = {"target/w": weight, "state/sparsity/masks/w": stored}
    return files.in_memory(leaves).weights["w"]


def test_a_mask_of_another_shape_is_an_error():
    found = weight_of(np.zeros((8, 4)), np.zeros((2, 4), np.uint8))
    with pytest.raises(CheckpointError, match=r"the mask of w is damaged: .*\(2, 4\) does not fit"):
        found.read_mask()


def test_a_packed_mask_of_another_type_is_an_error():
    found = weight_of(np.zeros((8, 4)), np.zeros((1, 4), np.int32))
    with pytest.raises(CheckpointError, match="here: the mask of w is damaged: .*int32, not uint8"):
        found.read_mask()


@pytest.mark.parametrize("layout", files.LAYOUTS)
@pytest.mark.parametrize(
    "step, says",
    [
        (np.array([7, 8]), r"state/step is int64 of shape \(2,\), not a number"),
        (np.array(True), r"state/step is bool of shape \(\), not a number"),
        (np.float32(np.nan), "state/step is nan, which is no step"),
        (np.float32(0.5), "state/step is 0.5, which is no step"),
        (np.int32(-1), "state/step is -1, which is no step"),
    ],
)
def test_a_step_is_a_whole_number(tmp_path, layout, step, says):
    folder = files.write(layout, tmp_path / "checkpoint_7", LEAVES | {"state/step": step})
    error(folder, f"checkpoint_7 is damaged or half-written: {says}")


@pytest.mark.parametrize("layout", files.LAYOUTS)
def test_a_large_step_is_read(tmp_path, layout):
    leaves = LEAVES | {"state/step": np.int64(2**40)}
    folder = files.write(layout, tmp_path / "checkpoint_7", leaves)
    assert open_checkpoint(str(folder)).step == 2**40


def test_no_more_than_a_part_is_read_at_once(tmp_path, monkeypatch):
    x = RNG.normal(size=(64, 32)).astype(np.float32)
    folder = files.write(
        "t5x", tmp_path / "checkpoint_1", {"target/w": x}, chunks={"target/w": (16, 8)}
    )
    monkeypatch.setattr(checkpoint_arrays, "PART_BYTES", 1000)
    parts = list(open_checkpoint(str(folder)).weights["w"].array.parts())
    assert max(part.nbytes for _, part in parts) == 512  # a chunk
    monkeypatch.setattr(checkpoint_arrays, "PART_BYTES", 300)
    cut = list(open_checkpoint(str(folder)).weights["w"].array.parts())
    assert 200 < max(part.nbytes for _, part in cut) <= 300
    for at, part in [*parts, *cut]:
        np.testing.assert_array_equal(part, x[at])


def test_every_file_that_is_gone_or_cut_is_an_error_or_changes_nothing(whole, tmp_path):
    layout, folder = whole
    harmless = []
    for file in sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file()):
        for keep in (0.5, None):
            spoilt = shutil.copytree(folder, tmp_path / "spoilt/checkpoint_7")
            target = spoilt / file
            if keep is None:
                target.unlink()
            else:
                target.write_bytes(target.read_bytes()[: int(keep * target.stat().st_size)])
            try:
                found = open_checkpoint(str(spoilt))
                for name, x in LEAVES.items():
                    np.testing.assert_array_equal(found.arrays[name].read(), x)
                harmless.append(file.name)
            except CheckpointError as e:
                assert str(spoilt) in str(e) and "\n" not in str(e)
            shutil.rmtree(spoilt)
    assert not {"_METADATA", "checkpoint", ".zarray", "0.0", "0.0.0"} & set(harmless)
    if layout == "t5x":
        assert not harmless


@pytest.mark.parametrize("use_ocdbt", [True, False])
@pytest.mark.parametrize("use_zarr3", [True, False])
def test_orbax_has_several_ways_of_its_own(tmp_path, use_ocdbt, use_zarr3):
    kwargs = {"use_ocdbt": use_ocdbt, "use_zarr3": use_zarr3}
    folder = files.write("orbax", tmp_path / "checkpoint_7", LEAVES, **kwargs)
    found = open_checkpoint(str(folder))
    for name, x in LEAVES.items():
        np.testing.assert_array_equal(found.arrays[name].read(), x)
    store = {"driver": "file", "path": f"{folder}/state/"}
    if use_ocdbt:
        store = {"driver": "ocdbt", "base": store}
    store = ts.KvStore.open(store).result()
    [chunk] = [
        k
        for k in store.list().result()
        if k.startswith(b"target.mlp.wi/") and not k.endswith((b".zarray", b"zarr.json"))
    ]
    store.write(chunk, None).result()
    error(folder, "damaged or half-written: 1 of 1 chunks of target/mlp/wi are missing; copy it")


def test_a_chunk_that_is_gone_is_not_read_as_zeros(tmp_path):
    folder = files.write("t5x", tmp_path / "checkpoint_7", LEAVES)
    (folder / "target.mlp.wi/0.0.0").unlink()
    error(folder, "damaged or half-written: 1 of 1 chunks of target/mlp/wi are missing; copy it")


def test_what_is_missing_is_named(copy, whole):
    if whole[0] == "orbax":
        manifest = copy / "state/manifest.ocdbt"
        kept = manifest.read_bytes()
        manifest.unlink()
        error(copy, "damaged or half-written: the file state/manifest.ocdbt is missing")
        manifest.write_bytes(kept)
        metadata = copy / "state/_METADATA"
        metadata.write_text(metadata.read_text()[:50])
        error(copy, r"the file state/_METADATA is cut \(")
        metadata.write_text("[]")
        error(copy, r"the file state/_METADATA is cut \(")
        metadata.unlink()
        error(copy, "the file state/_METADATA is missing; copy it again")
        shutil.rmtree(copy / "state")
    else:
        (copy / "target.mlp.wi/.zarray").unlink()
        error(copy, r"target/mlp/wi is missing or damaged \(NOT_FOUND")
        (copy / "checkpoint").write_bytes((copy / "checkpoint").read_bytes()[:-9])
        error(copy, "the file 'checkpoint' is cut or not T5X's")
        (copy / "checkpoint").write_bytes(b"\x81\xa1a\x01")
        error(copy, "is no checkpoint of T5X: its file 'checkpoint' holds no 'optimizer'")
        (copy / "checkpoint").unlink()
    error(copy, "is no whole checkpoint: it holds neither 'state/' nor 'checkpoint'")
    error(copy.parent, "holds no complete checkpoint: checkpoint_7 is half-written")


def test_a_mask_needs_its_weight(tmp_path):
    leaves = {k: x for k, x in LEAVES.items() if k != "target/mlp/wi"}
    folder = files.write("t5x", tmp_path / "checkpoint_7", leaves)
    error(folder, "it holds state/sparsity/masks/mlp/wi, but no weight of that name")


def test_weights_are_what_makes_a_checkpoint(tmp_path):
    folder = files.write("t5x", tmp_path / "checkpoint_7", {"state/step": np.int32(7)})
    error(folder, "is no checkpoint of a training run: it holds no weights")


def test_a_model_dir_stands_for_its_last_complete_checkpoint(whole, tmp_path):
    for step in (7, 10, 9):
        shutil.copytree(whole[1], tmp_path / f"checkpoint_{step}")
    for name in ("checkpoint_12", "checkpoint_11.orbax-checkpoint-tmp-0", "checkpoint_8.tmp-1"):
        (tmp_path / name).mkdir()
    (tmp_path / "config.gin").write_text("A = 1")
    found = open_checkpoint(str(tmp_path))
    assert found.path == str(tmp_path / "checkpoint_10")
    assert found.step == 7  # what it holds, not what it is called
    assert found.skipped == ("checkpoint_11.orbax-checkpoint-tmp-0", "checkpoint_12")
    assert found.config_gin == str(tmp_path / "config.gin")


@pytest.mark.parametrize(
    "name",
    [
        "checkpoint_1.orbax-checkpoint-tmp-0",
        "checkpoint_1.orbax-checkpoint-tmp",
        "checkpoint_1.tmp-9",
        "checkpoint_1.tmp",
    ],
)
def test_a_temporary_folder_is_half_written(whole, tmp_path, name):
    error(shutil.copytree(whole[1], tmp_path / name), "half-written: its name is that of a save")


@pytest.mark.parametrize("name", ["run.tmp", "run.tmp-2", "a.orbax-checkpoint-tmp"])
def test_a_model_dir_has_any_name(whole, tmp_path, name):
    shutil.copytree(whole[1], tmp_path / name / "checkpoint_7")
    assert open_checkpoint(str(tmp_path / name)).path == str(tmp_path / name / "checkpoint_7")


def test_a_copy_by_another_name_is_not_half_written(whole, tmp_path):
    copy = shutil.copytree(whole[1], tmp_path / "checkpoint_200_good")
    assert open_checkpoint(str(copy)).step == 7
    message = error(tmp_path, "holds no checkpoint: neither is it one, nor has it a folder")
    assert "half-written" not in message
    shutil.copytree(whole[1], tmp_path / "checkpoint_100")
    found = open_checkpoint(str(tmp_path))
    assert found.path == str(tmp_path / "checkpoint_100") and found.skipped == ()


def test_a_path_is_utf8(whole, tmp_path):
    folder = os.fsdecode(bytes(tmp_path) + b"/\xff")
    shutil.copytree(whole[1], f"{folder}/checkpoint_7")
    for path in (folder, f"{folder}/checkpoint_7"):
        error(path, r"\\udcff.* can't be read: it is not UTF-8, as tensorstore needs paths to be")


def test_what_is_no_checkpoint(tmp_path):
    error(tmp_path / "none", "none doesn't exist; give a folder checkpoint_<step>, or a MODEL_DIR")
    error(tmp_path, "holds no checkpoint: neither is it one, nor has it a folder checkpoint_<step>")
    (tmp_path / "file").write_text("")
    error(tmp_path / "file", "file is a file; give a folder")
    (tmp_path / "checkpoint_3.tmp-1").mkdir()
    error(tmp_path, "holds no complete checkpoint: checkpoint_3.tmp-1 is half-written")


def test_a_tensorflow_checkpoint_is_named_as_such(tmp_path):
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "model.ckpt-100"')
    (tmp_path / "model.ckpt-100.index").write_bytes(b"")
    for path in (tmp_path, tmp_path / "model.ckpt-100"):
        error(path, "is a TensorFlow checkpoint, which is not read here; convert it by T5X's")
    folder = tmp_path / "checkpoint_5"
    folder.mkdir()
    (folder / "m.index").write_bytes(b"")
    (folder / "checkpoint").write_text("model_checkpoint_path")
    error(folder, "is a TensorFlow checkpoint")


def test_the_record_is_that_of_its_weights(copy):
    entry = {"shape": [16, 2, 8], "axes": ["embed", "layers", "mlp"], "stack_axes": [1]}
    files.write_record(copy.parent, mlp__wi=entry, attention__query={"shape": [9, 9], "axes": None})
    weights = open_checkpoint(str(copy)).weights
    wi = weights["mlp/wi"]
    assert wi.record.stack_axes == (1,) and wi.axes.stack == (1,)
    assert wi.record.axes == ("embed", "layers", "mlp")
    # that of a weight of another shape, and none
    assert weights["attention/query"].record == weights["norm/scale"].record == WeightRecord()
    assert weights["norm/scale"].axes.stack == ()
    # as before there were axes in it
    files.write_record(copy.parent, mlp__wi={"shape": [16, 2, 8], "kept": 3})
    wi = open_checkpoint(str(copy)).weights["mlp/wi"]
    assert wi.record.stack_axes is None and wi.axes.stack == ()
    (copy.parent / "sparsity.json").write_text('{"mlp')
    error(
        copy, r"sparsity.json is damaged \(Unterminated string.*; move it away to go on without it"
    )


BAD_RECORDS = {
    b"[]": r"it is \[\], not an object with one entry per weight",
    b"null": "it is null, not an object",
    b'{"w": 3}': "the entry of w is 3, not an object",
    b'{"\\ud800": {}}': r'"\\ud800" is no path of a weight',
    b"[" * 100_000: "it is nested too deeply",
    b'{"w": {"shape": ' + b"[" * 100_000 + b"]" * 100_000 + b"}}": "it is nested too deeply",
    b"\xff\xff\xff": "can't decode byte 0xff",
    b"9" * 5000: "limit",
}
BAD_ENTRIES = [
    *(
        ("shape", x, "list of whole")
        for x in (5, None, "ab", [1.5], [True], [-1], [2**70], [8] * 65)
    ),
    ("shape", [2**32, 2**31], "list of whole"),
    *(("sparsity", x, "a number in") for x in ("abc", None, [1], True, float("nan"), -0.1, 1.1)),
    *(("kept", x, "a whole number") for x in (None, 0.5, -1, "3")),
    *(("pattern", x, "text") for x in (None, 3, ["a"], "a\0b", "\ud800")),
    *(("algorithm", x, "text") for x in (None, 3, ["a"], "a\nb")),
    *(("start_step", x, "a step") for x in (None, "x", -1, 1.0, True)),
    *(("axes", x, "null or a list of") for x in (3, "abc", ["a"] * 4, [1, 2, 3], ["a", "b", "\n"])),
    *(("stack_axes", x, "different axes") for x in (1, None, "ab", [0, 1, 2], [3], [-1], [1, 1])),
    *(("stack_axes", x, "different axes") for x in ([[1]], [True], [1.0])),
]


@pytest.mark.parametrize("key, value, allowed", BAD_ENTRIES)
def test_an_entry_of_the_record_is_of_its_type_and_range(copy_once, key, value, allowed):
    entry = {"shape": [16, 2, 8], key: value}
    files.write_record(copy_once.parent, norm__scale={}, mlp__wi=entry)
    message = error(
        copy_once, rf"sparsity.json is damaged \({key} of mlp/wi is .*, not .*{allowed}"
    )
    assert message.endswith("; move it away to go on without it") and message.isprintable()


@pytest.mark.parametrize("text", BAD_RECORDS, ids=range(len(BAD_RECORDS)))
def test_a_record_has_one_entry_per_weight(copy_once, text):
    (copy_once.parent / "sparsity.json").write_bytes(text)
    error(copy_once, rf"sparsity.json is damaged \(.*{BAD_RECORDS[text]}")


def test_axes_need_a_shape(copy_once):
    for key, value in (("axes", ["embed"]), ("stack_axes", [0])):
        files.write_record(copy_once.parent, mlp__wi={key: value})
        error(copy_once, f"{key} of mlp/wi is .*of the shape")


def test_what_a_record_may_have(copy_once):
    entry = {
        "shape": [16, 2, 8], "sparsity": 1, "kept": 0, "pattern": "Block(größe=2)", "algorithm": "",
        "start_step": 0, "axes": ["embed", None, "mlp"], "stack_axes": [], "of a later version": {},
    }  # fmt: skip
    for record in (entry, entry | {"axes": None, "stack_axes": [2, 0]}, {}):
        files.write_record(copy_once.parent, mlp__wi=record)
        assert open_checkpoint(str(copy_once)).record == {"mlp/wi": WeightRecord.from_dict(record)}


def test_a_link_has_what_is_beside_it_or_beside_what_it_links_to(copy, tmp_path):
    files.write_record(copy.parent, mlp__wi={"shape": [16, 2, 8], "stack_axes": [1]})
    (copy.parent / "config.gin").write_text("A = 1")
    other = tmp_path / "other"
    other.mkdir()
    (other / "checkpoint_7").symlink_to(copy)
    for path in (other, other / "checkpoint_7"):
        found = open_checkpoint(str(path))
        assert found.weights["mlp/wi"].record.stack_axes == (1,)
        assert found.path == str(other / "checkpoint_7")
        assert found.config_gin == str(copy.parent / "config.gin")
    files.write_record(other, mlp__wi={"shape": [16, 2, 8], "stack_axes": [2]})
    (other / "config.gin").write_text("A = 2")
    found = open_checkpoint(str(other))
    assert found.weights["mlp/wi"].record.stack_axes == (2,)
    assert found.config_gin == str(other / "config.gin")


def test_a_folder_that_may_not_be_read(copy, monkeypatch):
    def refuse(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(checkpoint, "layout_of", refuse)
    error(copy, r"can't be read \(PermissionError: .*Permission denied")


def test_chunks_that_hold_the_fill_value_may_be_left_out(tmp_path):
    folder = files.write("t5x", tmp_path / "checkpoint_7", LEAVES)
    place = folder / "target.mlp.wi"
    shutil.rmtree(place)
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{place}/"},
        "metadata": {"shape": [16, 2, 8], "chunks": [8, 2, 8], "dtype": "<f4", "fill_value": 0},
    }
    x = LEAVES["target/mlp/wi"].copy()
    x[:8] = 0
    ts.open(spec, create=True).result().write(x).result()
    assert not (place / "0.0.0").exists()
    np.testing.assert_array_equal(open_checkpoint(str(folder)).weights["mlp/wi"].array.read(), x)


def test_opening_one_takes_no_jax(whole):
    code = f"""
import sys
from t5x_sparsity.artifacts.checkpoint import open_checkpoint

open_checkpoint({str(whole[1])!r})
assert not {{'jax', 'flax', 'orbax'}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_t5x_own_file_has_large_arrays_in_chunks(tmp_path, monkeypatch, dtype):
    from flax import serialization

    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 32)
    x = RNG.normal(size=100).astype(dtype)
    leaves = {"target/bias": x, "target/scale": dtype(3), "state/step": np.int32(7)}
    folder = files.write("t5x", tmp_path / "checkpoint_7", leaves)
    assert b"__msgpack_chunked_array__" in (folder / "checkpoint").read_bytes()
    found = open_checkpoint(str(folder)).arrays
    for name, expected in leaves.items():
        read = found[name].read()
        assert read.dtype == expected.dtype and read.shape == expected.shape
        np.testing.assert_array_equal(read, expected)
