"""sparsity.json: what is read of it, and what older versions wrote."""

import checkpoint_files as files
import pytest

from t5x_sparsity.artifacts.record import WeightRecord, read_record, write_record


def test_what_is_written_is_read(tmp_path):
    record = {
        "a/b": WeightRecord(shape=(8, 4), kept=16, pattern="Unstructured()", axes=("embed", None)),
        "c": WeightRecord(shape=(4,)),
    }
    write_record(tmp_path / "sparsity.json", record)
    assert read_record(tmp_path / "sparsity.json") == record


def test_axes_may_have_fewer_names_than_the_shape(tmp_path):
    files.write_record(tmp_path, w={"shape": [8, 4], "axes": ["embed"]})
    assert read_record(tmp_path / "sparsity.json")["w"].axes == ("embed", None)


def test_axes_may_not_have_more_names_than_the_shape(tmp_path):
    files.write_record(tmp_path, w={"shape": [8], "axes": ["embed", "mlp"]})
    with pytest.raises(ValueError, match="at most one per axis of the shape"):
        read_record(tmp_path / "sparsity.json")


def test_a_pattern_of_several_lines_is_read_as_one(tmp_path):
    files.write_record(tmp_path, w={"shape": [8], "pattern": "Mine(\n  n=2,\n)"})
    assert read_record(tmp_path / "sparsity.json")["w"].pattern == "Mine( n=2, )"
