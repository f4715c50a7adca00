"""The command line itself; what the subcommands do is tested with the hosts."""

import subprocess
import sys

import pytest

from t5x_sparsity import cli


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
         "t5x-sparsity: error: unrecognized arguments: --topologi=v5e:4x4"),
        (["plan", "--gin_file=a", "--gin.SPARSITY"],
         "t5x-sparsity: error: unrecognized arguments: --gin.SPARSITY"),
        (["plan", "--gin_file=a", "--host=laptop"],
         "t5x-sparsity plan: error: argument --host: invalid choice: 'laptop'"),
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
    found = cli._with_bindings(["--gin.A.b='x=y'", "--gin_file=f", "--gin.C=1", "--json"])
    assert found == ["--gin_bindings=A.b = 'x=y'", "--gin_file=f", "--gin_bindings=C = 1", "--json"]


def test_help_imports_no_host():
    code = (
        "import sys; from t5x_sparsity import cli; cli.main(['--help']); "
        "sys.exit(any(m in sys.modules for m in ('tensorflow', 'seqio', 't5x', 'flax')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
