"""The macros of the gin files, as the package reads them, and those of any text."""

import pytest

from t5x_sparsity.artifacts.macros import OF_A_RUN, macros_in, shown_macros, sparsity_macros


def test_a_macro_has_its_comment_and_its_default_in_every_file():
    macros = sparsity_macros()
    assert macros["DROP_FRACTION"].comment.startswith("Share of a layer's active weights that an")
    assert macros["DROP_FRACTION"].defaults == {
        "granet": 0.5,
        "mest": 0.3,
        "rigl": 0.3,
        "set": 0.3,
        "snfs": 0.5,
        "srigl": 0.3,
    }
    assert macros["SPARSITY_DISTRIBUTION"].defaults["rigl"] == "erk"
    assert macros["SPARSITY_DISTRIBUTION"].defaults["magnitude"] == "uniform"
    assert macros["SPARSITY_PATTERN"].defaults["srigl"] == "@t5x_sparsity.ConstantFanIn()"
    # bound, and read by nothing
    assert "PATTERNS_TO_CHOOSE" not in macros
    assert all(macro.name == name for name, macro in macros.items())


def test_the_macros_of_sparsity_are_shown_before_those_of_a_run():
    shown = shown_macros()
    assert shown[0] == "SPARSITY" and len(set(shown)) == len(shown)
    assert shown[-len(OF_A_RUN) :] == OF_A_RUN


GOOD = "SPARSITY = 0.9\nOPTIMIZER = @a.b.Adam()\nMODEL = %OTHER\nNAME = \\\n    'x'\n"
READ = {"SPARSITY": "0.9", "OPTIMIZER": "@a.b.Adam()", "MODEL": "%OTHER", "NAME": "'x'"}


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "a.b = 1\nscope/NM_N = 3\n",
        "a.b:\n  NM_N = 3\n",
        "NM_N =\n",
        "NM_N = {1: 2\n",
        "NM_N = 'open\n",
        "NM_N: 3\n  x\n",
        "\0\1\2 = \n",
        "   odd indentation\n\tand another\n",
        "{not gin at all}\n- yaml: [\n",
        "'''\n",
    ],
)
def test_what_is_not_gin_is_skipped(bad):
    assert macros_in(GOOD + bad) == READ
    assert macros_in(bad + GOOD) == READ
    assert macros_in(bad) == {}
