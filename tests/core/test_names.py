"""Lists of names in messages."""

from t5x_sparsity.core.names import first_few


def test_the_first_few_and_how_many_more():
    names = ["a", "b", "c", "d"]
    assert first_few(names) == "a, b, c and 1 more" and first_few(names, 4) == "a, b, c, d"
    assert first_few(names, 2, "; ") == "a; b and 2 more" and first_few([]) == ""
