"""Tables as text: aligned, never cut, and with no blanks at the ends of lines."""

import pytest

from t5x_sparsity.monitoring.text_table import text_table


def test_a_table():
    rows = [("decoder/wi", "1,024", ""), ("total", "65,536", "90.00%")]
    assert text_table(rows, headers=("weight", "kept", "actual"), align="lrr") == "\n".join(
        [
            "weight        kept    actual",
            "----------  ------  --------",
            "decoder/wi   1,024",
            "total       65,536    90.00%",
        ]
    )


def test_nothing_is_cut_and_no_rows_are_a_table_too():
    name = "a" * 300
    assert name in text_table([(name,)], headers=("weight",), align="l")
    assert text_table([], headers=("weight", "n"), align="lr") == "weight      n\n--------  ---"


def test_a_row_of_another_length_is_an_error():
    with pytest.raises(ValueError, match="zip"):
        text_table([("a", "b")], headers=("weight",), align="l")
