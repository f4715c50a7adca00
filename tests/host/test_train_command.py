"""The train script's help, and what it says of a command that can't be carried out."""

import pytest
import tiny_t5
from command_runs import environment
from forked_commands import run_code, run_module, without

from t5x_sparsity.artifacts.macros import check_bindings


def train(*arguments, cwd=tiny_t5.ROOT):
    return run_module("t5x_sparsity.train", arguments, environment(), cwd=cwd)


def test_help_lists_the_flags_and_every_method():
    done = train("--helpfull")
    for flag in ("--gin_file", "--gin_bindings", "--gin_search_paths", "--host", "--process_count"):
        assert f"  {flag}:" in done.stdout
    methods = done.stdout.split("Methods:")[1].split(".")[0].replace(",", " ").split()
    files = {p.stem for p in (tiny_t5.ROOT / "gin/sparsity").glob("*.gin")}
    assert set(methods) == files - {"base", "from_dense"}
    assert "t5x-sparsity plan" in done.stdout and "Exit codes: 0; 2 " in done.stdout


EXAMPLE = "--gin_file=examples/rigl_stdlib.gin"


@pytest.mark.parametrize(
    "arguments, says",
    [
        ([], "no run is given; add --gin_file=FILE, such as --gin_file=examples/rigl_stdlib.gin"),
        (["--gin_file=nope.gin"], "Unable to open file: nope.gin"),
        ([EXAMPLE, "--gin.SPARSTY=0.9"], "SPARSTY is bound, but nothing reads it; did you mean"),
        (
            [EXAMPLE, "--gin.MODEL_DIR=/tmp/x"],
            "MODEL_DIR = /tmp/x has no value that gin can read; a text needs quotes of its own, as "
            "in --gin.MODEL_DIR=\"'text'\"",
        ),
        ([EXAMPLE, "sparsity/set.gin"], "unexpected arguments: sparsity/set.gin; --help lists"),
    ],
)
def test_a_command_that_cannot_be_read_is_one_line(tmp_path, arguments, says):
    model_dir = [f"--gin.MODEL_DIR='{tmp_path}/run'"] if EXAMPLE in arguments else []
    done = train(*arguments, *model_dir)
    assert done.returncode == 2 and done.stdout == ""
    last = done.stderr.rstrip("\n").split("\n")[-1]
    assert last.startswith(f"t5x_sparsity.train: error: {says}")
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_without_the_extra_it_says_what_installs_it():
    code = (
        "import runpy; sys.argv = ['train', '--host=embedded']; "
        "runpy.run_module('t5x_sparsity.train', run_name='__main__')"
    )
    done = run_code(without("seqio") + code, environment())
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        "t5x_sparsity.train: error: training needs seqio, which isn't installed; install it by "
        'pip install "t5x_sparsity[embedded]"\n'
    )


@pytest.mark.parametrize(
    "binding", ["A = 1", "a.B = 'x = y'", "A = @f()", "A = [%B, (1, 2.5), {'k': None}]", "A = @s/f"]
)
def test_what_gin_can_read_passes(binding):
    check_bindings([binding])
