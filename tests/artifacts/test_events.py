"""What is read of a run's folder, by folders made by hand and by CLU's own writer."""

import json
import math
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
import run_folders
from clu import metric_writers
from tensorboard.compat.proto import event_pb2
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

from t5x_sparsity.artifacts import events


def write(folder, *scalars):
    """A file of events; scalars: (step, tag, value)."""
    writer = metric_writers.SummaryWriter(str(folder))
    for step, tag, value in scalars:
        writer.write_scalars(step, {tag: value})
    writer.close()


def event_file(folder, name, wall_time, *scalars, version=True):
    """A file of events, byte by byte, with a wall time of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    made = [event_pb2.Event(wall_time=wall_time, file_version="brain.Event:2")] if version else []
    for step, tag, value in scalars:
        event = event_pb2.Event(wall_time=wall_time, step=step)
        event.summary.value.add(tag=tag, simple_value=value)
        made.append(event)
    data = b""
    for event in made:
        body = event.SerializeToString()
        length = struct.pack("<Q", len(body))
        data += length + struct.pack("<I", masked_crc32c(length))
        data += body + struct.pack("<I", masked_crc32c(body))
    path = folder / f"events.out.tfevents.{name}"
    path.write_bytes(data)
    return path


def points(series):
    return list(zip(series.steps.tolist(), series.values.tolist(), strict=True))


def test_a_whole_run_is_read(tmp_path):
    run = events.read_run(str(run_folders.make_run(tmp_path / "run", steps=80)))
    wi = "decoder/layers_0/mlp/wi_0/kernel"
    assert run.folder == str(tmp_path / "run") and run.remarks == ()
    assert run.train["loss_per_nonpadding_target_token"].steps.tolist() == list(range(10, 81, 10))
    assert list(run.evals) == [run_folders.TASK]
    assert len(run.group("sparsity")) == 11 and "total" in run.group("sparsity")
    assert run.group("sparsity")[wi].last == pytest.approx(run.record[wi]["sparsity"], abs=1e-3)
    assert run.weights == 2 * (3 * 8192 + 2 * 4096) + 10_000
    assert [i.step for i in run.masks[wi]] == [0, 40, 80]
    image = run.masks[wi][0]
    assert (image.width, image.height) == (128, 64) and image.png.startswith(b"\x89PNG")
    histogram = run.fan_in[wi][-1]
    assert histogram.step == 80 and histogram.counts.sum() == 128
    assert len(histogram.edges) == len(histogram.counts) + 1
    assert "SparsityConfig" in run.config
    assert run.bindings["SPARSITY"] == "0.8"


def test_values_are_what_was_written(tmp_path):
    write(tmp_path / "train", (1, "a", 0.5), (3, "a", math.nan), (2, "a", 2.0), (1, "b/c", 7))
    run = events.read_run(str(tmp_path))
    assert run.train["a"].steps.tolist() == [1, 2, 3]
    np.testing.assert_array_equal(run.train["a"].values, [0.5, 2.0, math.nan])
    assert points(run.group("b")["c"]) == [(1, 7.0)]
    assert run.record == {} and run.config is None and run.bindings == {} and run.weights is None


def test_a_fan_in_that_all_neurons_share_is_one_bucket(tmp_path):
    writer = metric_writers.SummaryWriter(str(tmp_path / "train"))
    writer.write_histograms(1, {"mask_fan_in/a": np.full(16, 3.0)})
    writer.write_scalars(1, {"loss": 1.0})
    writer.close()
    (histogram,) = events.read_run(str(tmp_path)).fan_in["a"]
    assert histogram.edges.tolist() == [2.5, 3.5] and histogram.counts.tolist() == [16]


def test_a_resumed_run_has_what_it_wrote_last(tmp_path):
    # stopped at 40, resumed from 20, with another period
    event_file(tmp_path / "train", "1.a", 100, *((s, "x", float(s)) for s in (10, 20, 30, 40)))
    event_file(tmp_path / "train", "2.a", 200, (25, "x", -25.0), (50, "x", -50.0), (25, "y", 1.0))
    found = events.read_run(str(tmp_path)).train
    assert points(found["x"]) == [(10, 10), (20, 20), (25, -25), (50, -50)]
    assert points(found["y"]) == [(25, 1)]


def test_files_are_in_the_order_of_their_time_not_of_their_names(tmp_path):
    event_file(tmp_path / "train", "9.a", 100, (10, "x", 1.0), (20, "x", 1.0))
    event_file(tmp_path / "train", "10.a", 200, (20, "x", 2.0))
    assert points(events.read_run(str(tmp_path)).train["x"]) == [(10, 1), (20, 2)]


def test_a_later_write_of_a_step_counts(tmp_path):
    event_file(tmp_path / "train", "1.a", 100, (10, "x", 1.0), (10, "x", 2.0))
    assert points(events.read_run(str(tmp_path)).train["x"]) == [(10, 2)]


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_events_cut_in_the_middle_are_read_as_far_as_they_go(tmp_path, cut):
    path = event_file(tmp_path / "train", "1.a", 100, (10, "x", 1.0), (20, "x", 2.0))
    path.write_bytes(path.read_bytes()[:-cut])
    run = events.read_run(str(tmp_path))
    assert points(run.train["x"]) == [(10, 1)]
    (remark,) = run.remarks
    assert remark.startswith("train/events.out.tfevents.1.a ends in the middle of an event")


def test_zeros_after_the_events_are_no_events(tmp_path):
    path = event_file(tmp_path / "train", "1.a", 100, (10, "x", 1.0))
    path.write_bytes(path.read_bytes() + bytes(64))
    run = events.read_run(str(tmp_path))
    assert points(run.train["x"]) == [(10, 1)] and len(run.remarks) == 1


def test_files_beside_that_cannot_be_read_are_remarked_on(tmp_path):
    event_file(tmp_path / "train", "1.a", 100, (10, "x", 1.0))
    (tmp_path / "sparsity.json").write_text('{"a": {"shape": [2')
    (tmp_path / "config.gin").write_text("SPARSITY = = 3\n")
    run = events.read_run(str(tmp_path))
    assert run.record == {} and run.bindings == {} and run.config == "SPARSITY = = 3\n"
    assert sorted(r.split(" can't")[0] for r in run.remarks) == ["config.gin", "sparsity.json"]


@pytest.mark.parametrize("words", ["Weights in all: 123", "Total number of parameters: 123"])
def test_the_model_is_as_large_as_either_host_says(tmp_path, words):
    event_file(tmp_path / "train", "1.a", 100, (10, "x", 1.0))
    (tmp_path / "model-info.txt").write_text(f"{words}\n\n")
    assert events.read_run(str(tmp_path)).weights == 123


def test_a_record_that_is_no_runs_is_remarked_on(tmp_path):
    event_file(tmp_path / "train", "1.a", 100, (10, "x", 1.0))
    for record, why in (({"a": {"shape": "ab"}}, 'shape of a is "ab"'), ([], "it is []")):
        (tmp_path / "sparsity.json").write_text(json.dumps(record))
        run = events.read_run(str(tmp_path))
        (remark,) = run.remarks
        assert run.record == {} and remark.startswith(f"sparsity.json can't be read ({why}, not ")


def damaged_tensor(value):
    value.tensor.dtype = 1
    value.tensor.tensor_shape.dim.add(size=3)
    value.tensor.tensor_content = b"abc"


def unknown_type(value):
    value.tensor.dtype = 99


def no_size(value):
    value.tag = "masks/a"
    value.tensor.dtype = 7
    value.tensor.string_val.extend([b"x", b"y", b"\x89PNG\r\n"])


@pytest.mark.parametrize("spoil", [damaged_tensor, unknown_type, no_size])
@pytest.mark.parametrize("times", [1, 2])
def test_a_value_that_can_not_be_read_is_remarked_on(tmp_path, spoil, times):
    path = event_file(tmp_path / "train", "1.a", 100, (10, "x", 1.0), (20, "x", 2.0))
    event = event_pb2.Event(wall_time=100, step=20)
    for _ in range(times):
        spoil(event.summary.value.add(tag="bad"))
    body = event.SerializeToString()
    length = struct.pack("<Q", len(body))
    record = length + struct.pack("<I", masked_crc32c(length)) + body + bytes(4)
    rest = path.read_bytes()
    path.write_bytes(record + rest)
    run = events.read_run(str(tmp_path))
    assert points(run.train["x"]) == [(10, 1), (20, 2)] and run.train.keys() == {"x"}
    assert run.remarks == (
        f"train/{path.name} has {'a value' if times == 1 else '2 values'} of "
        f"{event.summary.value[0].tag} that can't be read; all others are here.",
    )


def refuse(monkeypatch, method, name):
    """Lets no path of that name be read, as of another user's."""
    kind = type(events.epath.Path())
    honest = getattr(kind, method)

    def read(path):
        if path.name == name:
            raise PermissionError(13, "Permission denied", str(path))
        return honest(path)

    monkeypatch.setattr(kind, method, read)


@pytest.mark.parametrize(
    "method, name, says",
    [
        ("iterdir", "train", "train/ can't be read (Permission denied), and is left out."),
        ("iterdir", "training_eval", "training_eval/ can't be read (Permission denied), and is"),
        ("iterdir", "task", "task/ can't be read (Permission denied), and is left out."),
        ("read_bytes", "events.out.tfevents.1.a", "train/events.out.tfevents.1.a can't be read"),
    ],
)
def test_what_may_not_be_read_is_remarked_on(tmp_path, monkeypatch, method, name, says):
    event_file(tmp_path / "train", "1.a", 100, (10, "x", 1.0))
    event_file(tmp_path / "training_eval/task", "2.a", 100, (10, "y", 1.0))
    refuse(monkeypatch, method, name)
    run = events.read_run(str(tmp_path))
    (remark,) = run.remarks
    assert remark.startswith(says)
    assert bool(run.train) != bool(run.evals)


def test_nothing_that_may_be_read_is_an_error(tmp_path, monkeypatch):
    event_file(tmp_path / "train", "1.a", 100, (10, "x", 1.0))
    refuse(monkeypatch, "iterdir", "train")
    with pytest.raises(ValueError) as e:
        events.read_run(str(tmp_path))
    assert str(e.value) == (
        f"{tmp_path} has no events that can be read: train/ can't be read (Permission denied), "
        "and is left out."
    )


def test_a_path_is_utf8(tmp_path, monkeypatch):
    folder = os.fsdecode(bytes(tmp_path) + b"/\xff")
    os.mkdir(folder)
    monkeypatch.chdir(folder)
    for path in (folder, "."):
        with pytest.raises(ValueError, match=r"\\udcff' is not UTF-8, as text on a page has to be"):
            events.read_run(path)


def no_folder(tmp_path):
    return tmp_path / "none", "there is no {}; give the folder of a run, its MODEL_DIR"


def a_file(tmp_path):
    (tmp_path / "file").write_text("")
    return tmp_path / "file", "{} is a file; give the folder of a run, its MODEL_DIR"


def a_strange_folder(tmp_path):
    return tmp_path, "{} is not the folder of a run: it has no events in train/ or training_eval/"


def a_checkpoint(tmp_path):
    (tmp_path / "checkpoint_30").mkdir()
    return tmp_path / "checkpoint_30", "{} is a checkpoint; give the folder that it is in"


def the_events_themselves(tmp_path):
    event_file(tmp_path / "train", "1.a", 100, (10, "x", 1.0))
    return tmp_path / "train", "{} is part of a run's folder; give the folder that it is in"


def a_run_that_began_just_now(tmp_path):
    event_file(tmp_path / "train", "1.a", 100)
    (tmp_path / "config.gin").write_text("")
    return tmp_path, (
        "{0} is of a run that has written no events yet; they come to {0}/train with the first "
        "statistics"
    )


@pytest.mark.parametrize(
    "make",
    [
        no_folder,
        a_file,
        a_strange_folder,
        a_checkpoint,
        the_events_themselves,
        a_run_that_began_just_now,
    ],
)
def test_what_is_no_run_is_said_so(tmp_path, make):
    folder, says = make(tmp_path)
    with pytest.raises(ValueError) as e:
        events.read_run(str(folder))
    assert str(e.value) == says.format(folder)


def test_bindings_resolve_through_macros():
    bindings = {
        "A": "%B",
        "B": "'erk'",
        "t5x_sparsity.SparsityConfig.distribution": "%A",
        "t5x_sparsity.SparsityConfig.algorithm": "@t5x_sparsity.RigL()",
        "LOOP": "%LOOP",
    }
    assert events.resolve(bindings, "SparsityConfig.distribution") == "erk"
    assert events.resolve(bindings, "SparsityConfig.algorithm") == "@t5x_sparsity.RigL()"
    assert events.resolve(bindings, "parsityConfig.algorithm") is None
    assert events.resolve(bindings, "LOOP") is None
    assert events.resolve({}, "A") is None


def test_scopes_macros_and_long_values_are_bindings(tmp_path):
    event_file(tmp_path / "train", "1.a", 100, (10, "x", 1.0))
    (tmp_path / "config.gin").write_text(
        "import a.b\nX = \\\n    [@a.B,\n     @a.C()]\nscope/a.b.c = %X\na.b.d = 'text'\n"
    )
    found = events.read_run(str(tmp_path)).bindings
    assert found == {"X": "[@a.B, @a.C()]", "scope/a.b.c": "%X", "a.b.d": "'text'"}


def test_reading_imports_no_tensorflow(tmp_path):
    event_file(tmp_path / "train", "1.a", 100, (10, "x", 1.0))
    code = (
        "import sys, json; from t5x_sparsity.artifacts.events import read_run;"
        "run = read_run(sys.argv[1]);"
        "print(json.dumps([m for m in ('tensorflow', 'jax', 'flax') if m in sys.modules]))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, text=True
    )
    assert json.loads(found.stdout) == []
