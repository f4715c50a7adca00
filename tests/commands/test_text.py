"""Tables of facts: numbers by their format, text as it is, and nothing where there is no value."""

import doctest

from t5x_sparsity.commands import text

COLUMNS = (("weight", "path", ""), ("kept", "kept", ","), ("overlap", "overlap", ".2%"))


def test_numbers_text_and_what_is_not_there():
    rows = [
        {"path": "a", "kept": 1234, "overlap": 0.5, "other": 1},
        {"path": "b", "kept": 0, "overlap": "-"},
        {"path": "c", "kept": None},
    ]
    assert text.fact_table(rows, COLUMNS, "lrr").split("\n")[2:] == [
        "a          1,234     50.00%",
        "b              0          -",
        "c",
    ]


def test_the_example_is_true():
    assert doctest.testmod(text) == (0, 2)


def test_shapes_and_counts():
    assert text.shape_text((2, 3)) == "2x3" and text.shape_text(()) == ""
    assert text.count(1, "array") == "1 array"
    assert text.count(1200, "array") == "1,200 arrays"
