"""Where a package of an extra is missing, the error is one line with the command to install it."""

import pytest
from forked_commands import run_code, without

from t5x_sparsity.extras import MissingExtra, requires

# what the base install has not
EXTRAS = ("absl", "clu", "etils", "flax", "gin", "orbax", "rich", "seqio", "tabulate", "tensorflow")


def last_line(code, *hidden):
    done = run_code(without(*hidden) + code)
    assert done.returncode == 1
    assert "During handling" not in done.stderr and "direct cause" not in done.stderr
    return done.stderr.splitlines()[-1]


def test_a_missing_package_is_named_with_its_extra():
    with pytest.raises(MissingExtra) as e, requires("tools", "t5x-sparsity report"):
        import no_such_package.inside  # noqa: F401
    assert str(e.value) == (
        "t5x-sparsity report needs no_such_package, which isn't installed; install it by "
        'pip install "t5x_sparsity[tools]"'
    )
    assert e.value.name.startswith("no_such_package") and e.value.__suppress_context__


def test_a_missing_module_of_this_package_is_no_missing_extra():
    with pytest.raises(ModuleNotFoundError, match="t5x_sparsity.no_such"), requires("tools", "it"):
        import t5x_sparsity.no_such  # noqa: F401


def test_a_package_that_lacks_a_module_is_no_missing_extra():
    with pytest.raises(ModuleNotFoundError) as e, requires("tools", "it"):
        import json.no_such_part  # noqa: F401
    assert not isinstance(e.value, MissingExtra)


def test_other_import_errors_pass():
    with pytest.raises(ImportError) as e, requires("tools", "it"):
        from math import no_such_function  # noqa: F401
    assert not isinstance(e.value, MissingExtra)


@pytest.mark.parametrize(
    "code",
    [
        "import t5x_sparsity.host",
        "import t5x_sparsity.t5x",
        "import t5x_sparsity.t5x.optimizer",
        "import t5x_sparsity; t5x_sparsity.sparse_trainer",
        "from t5x_sparsity import SparseTrainStateInitializer, host",
    ],
)
@pytest.mark.parametrize("hidden", [("t5x", *EXTRAS), ("t5x", "seqio")], ids=["base", "no seqio"])
def test_a_host_without_its_extra_is_one_line(code, hidden):
    line = last_line(code, *hidden)
    assert line.startswith("t5x_sparsity.extras.MissingExtra: the embedded host needs ")
    assert line.endswith(
        'which isn\'t installed; install it by pip install "t5x_sparsity[embedded]"'
    )


def test_load_export_without_its_extra_is_one_line():
    line = last_line("import t5x_sparsity; t5x_sparsity.load_export", "etils")
    assert line == (
        "t5x_sparsity.extras.MissingExtra: load_export needs etils, which isn't installed; "
        'install it by pip install "t5x_sparsity[tools]"'
    )
