"""The public names: where they are, that type checkers see them, and what importing them takes."""

import ast
import inspect
import subprocess
import sys

import t5x_sparsity


def checked_imports():
    """name -> module of the imports that only type checkers read."""
    tree = ast.parse(inspect.getsource(t5x_sparsity))
    block = next(n for n in tree.body if isinstance(n, ast.If))
    return {
        alias.asname: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def test_type_checkers_see_what_is_loaded():
    found = checked_imports()
    assert found.pop("host") == "t5x_sparsity"
    assert found == {n: f"t5x_sparsity.{m}" for n, m in t5x_sparsity._MODULE_OF.items()}
    assert sorted([*found, "host"]) == t5x_sparsity.__all__


def test_every_public_name_is_there():
    for name in t5x_sparsity.__all__:
        assert getattr(t5x_sparsity, name).__doc__, name
    assert set(t5x_sparsity.__all__) <= set(dir(t5x_sparsity))


def test_a_name_that_is_not_there_is_an_attribute_error():
    assert not hasattr(t5x_sparsity, "RigX")


def test_the_core_imports_jax_optax_and_numpy_alone():
    """What `pip install .` brings is enough for `sparsify`, whatever else is installed."""
    code = """
import sys
import t5x_sparsity as ts
ts.sparsify, ts.RigL, ts.NByM, ts.Periodic, ts.SparsityConfig, ts.sparsity_summary, ts.summary_table
import t5x_sparsity.monitoring.flops
heavy = {"clu", "flax", "gin", "orbax", "rich", "seqio", "tabulate", "tensorflow"}
print(*sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == []
