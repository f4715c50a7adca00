"""The command line itself; what the subcommands do is tested with the hosts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from forked_commands import run_code, without

from t5x_sparsity import cli
from t5x_sparsity.artifacts.gin_flags import rewrite_gin_args


def run(capsys, *arguments):
    code = cli.main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize(
    "arguments, says",
    [
        ([], "t5x-sparsity: error: the following arguments are required: COMMAND"),
        (["plam"], "t5x-sparsity: error: argument COMMAND: invalid choice: 'plam'"),
        (["plan"], "t5x-sparsity plan: error: the following arguments are required: --gin_file"),
        (["plan", "--gin_file=a", "--topologi=v5e:4x4"],
         "t5x-sparsity plan: error: unrecognized arguments: --topologi=v5e:4x4"),
        (["plan", "--gin_file=a", "--gin.SPARSITY"],
         "t5x-sparsity: error: The argument '--gin.SPARSITY' sets nothing; write --gin.NAME=VALUE"),
        (["plan", "--gin_file=a", "--host=laptop"],
         "t5x-sparsity plan: error: argument --host: invalid choice: 'laptop'"),
        (["inspect"], "t5x-sparsity inspect: error: the following arguments are required"),
    ],
)  # fmt: skip
def test_a_wrong_command_line_is_one_line(capsys, arguments, says):
    code, out, err = run(capsys, *arguments)
    assert code == 2 and out == ""
    assert err.startswith(says) and err.count("\n") == 1


def test_help_lists_the_subcommands(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0 and "plan" in out
    code, out, _ = run(capsys, "plan", "--help")
    assert code == 0 and "--topology" in out and "--gin.NAME=VALUE" in out


def test_gin_bindings_are_rewritten_as_the_train_script_does():
    arguments = ["--gin.A.b='x=y'", "--gin_file=f", "--gin.C=1", "--json"]
    found = rewrite_gin_args(arguments)
    assert found == ["--gin_bindings=A.b = 'x=y'", "--gin_file=f", "--gin_bindings=C = 1", "--json"]


def test_options_and_parsers_need_the_standard_library_alone():
    """Fails where parsing a command line would load what only the command itself needs."""
    code = (
        "import sys; from t5x_sparsity import cli; cli._parsers(); "
        "sys.exit(', '.join({m.split('.')[0] for m in sys.modules} - sys.stdlib_module_names "
        "- {'t5x_sparsity', '__main__'} - set(sys.argv[1].split())) or 0)"
    )
    # what Python itself has loaded before, such as hooks of installed packages
    before = "import sys; print(*{m.split('.')[0] for m in sys.modules})"
    python = [sys.executable, "-c"]
    loaded = subprocess.run([*python, before], check=True, capture_output=True, text=True).stdout
    subprocess.run([*python, code, loaded], check=True)


def test_help_imports_no_host():
    code = (
        "import sys; from t5x_sparsity import cli; cli.main(['--help']); "
        "sys.exit(any(m in sys.modules for m in ('tensorflow', 'seqio', 't5x', 'flax')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    "arguments, missing, extra",
    [
        (["inspect", "x"], "tensorstore", "tools"),
        (["export", "x", "x.safetensors"], "safetensors", "tools"),
        (["report", "x"], "tensorboard", "tools"),
        (["fit-scaling", "x"], "scipy", "tools"),
        (["plan", "--gin_file=x", "--host=embedded"], "gin", "embedded"),
    ],
)
def test_a_command_without_its_extra_says_what_installs_it(arguments, missing, extra):
    code = f"from t5x_sparsity import cli; sys.exit(cli.main({arguments!r}))"
    done = run_code(without(missing) + code)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"t5x-sparsity {arguments[0]}: error: ")
    assert f"needs {missing}, which isn't installed; install it by pip install " in done.stderr
    assert f'"t5x_sparsity[{extra}]"' in done.stderr
    assert done.stderr.count("\n") == 1


def shell(line, **variables):
    """Runs a line in which `$X` is the command, buffered as it is for users."""
    x = f"{sys.executable} -m t5x_sparsity.cli"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line],
        env={**env, "X": x, **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr


EXAMPLE = Path(__file__).parents[2] / "examples/synthetic_scaling_table.csv"
FIT = f"$X fit-scaling {EXAMPLE} --bootstrap=0 --starts=2"


@pytest.mark.parametrize(
    "line, code, says",
    [
        (f"{FIT} | true", 0, ""),
        (f"{FIT} --json > /dev/full", 2, "No space left on device"),
        (f"{FIT} 2>&- >/dev/null", 0, ""),
    ],
)
def test_output_that_nobody_takes_is_no_traceback(line, code, says):
    found, _, err = shell(line)
    assert found == code and says in err
    assert "Traceback" not in err and "Exception ignored" not in err


def test_names_that_a_terminal_cannot_show_are_escaped(tmp_path):
    table = tmp_path / "na\u540d.csv"
    table.write_text(EXAMPLE.read_text())
    line = f"$X fit-scaling {table} --bootstrap=0 --starts=2"
    code, out, err = shell(line, PYTHONIOENCODING="ascii")
    assert code == 0 and "na\\u540d.csv" in out and "Traceback" not in err


def test_public_names_are_there_and_others_are_not():
    import t5x_sparsity

    for name in t5x_sparsity.__all__:
        assert getattr(t5x_sparsity, name) is not None
    assert set(t5x_sparsity.__all__) <= set(dir(t5x_sparsity))
    assert callable(t5x_sparsity.sparsify) and callable(t5x_sparsity.load_export)
    with pytest.raises(AttributeError, match="has no attribute 'RigLL'"):
        getattr(t5x_sparsity, "RigLL")  # noqa: B009
