"""Gin flags and the record of the configuration."""

import gin
import pytest

from t5x_sparsity.embedded import gin_utils


@gin.configurable(module="test_gin_utils")
def pair(a=1, b=2):
    return a, b


@pytest.fixture(autouse=True)
def clean_gin():
    gin.clear_config()
    yield
    gin.clear_config()


def test_rewrites_only_gin_arguments():
    assert gin_utils.rewrite_gin_args(["x", "--gin.A='b=c'", "--other=1", "--gin.pair.a = 3"]) == [
        "x",
        "--gin_bindings=A = 'b=c'",
        "--other=1",
        "--gin_bindings=pair.a  =  3",
    ]
    for bad in ("--gin.A", "--gin.=3"):
        with pytest.raises(ValueError, match=f"'{bad}' sets nothing; write --gin.NAME=VALUE"):
            gin_utils.rewrite_gin_args([bad])


def test_bindings_override_files_and_files_are_searched(tmp_path):
    (tmp_path / "one.gin").write_text("pair.a = 10\npair.b = %B\nB = 20\n")
    gin_utils.parse_gin_flags([str(tmp_path)], ["one.gin"], ["B = 30"])
    assert pair() == (10, 30)
    with pytest.raises(RuntimeError, match="locked"):
        gin.bind_parameter("pair.a", 1)


def test_unknown_bindings_raise_unless_skipped():
    with pytest.raises(ValueError, match="nobody"):
        gin_utils.parse_gin_flags([], [], ["nobody.a = 1"], finalize_config=False)
    gin_utils.parse_gin_flags([], None, ["nobody.a = 1", "pair.a = 5"], skip_unknown=True)
    assert pair() == (5, 2)


def test_summary_is_written(tmp_path):
    gin_utils.parse_gin_flags([], [], ["pair.a = 77"])
    pair()

    class Writer:
        texts = []

        def write_texts(self, step, texts):
            self.texts.append((step, texts))

        def flush(self):
            self.texts.append("flushed")

    writer = Writer()
    gin_utils.summarize_gin_config(str(tmp_path / "new"), writer, 12)
    assert "pair.a = 77" in (tmp_path / "new" / "config.gin").read_text()
    (step, texts), flushed = writer.texts
    assert step == 12 and "77" in texts["config"] and flushed == "flushed"
    gin_utils.summarize_gin_config(str(tmp_path), None, 0)
