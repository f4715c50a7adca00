"""Every import that is hidden in a string is named here; import-linter sees the others."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "t5x_sparsity"

# file -> what its strings lead to
KNOWN = {
    "__init__.py": "the public names, to the modules in _NAMES: it is above all layers",
    "cli.py": "the options and the command of each subcommand: commands is below cli",
    "embedded/data.py": "a module of the user, which registers tasks: T5X's DatasetConfig.module",
    "host.py": "T5X, or the embedded host: embedded is below host",
}


def imports_by_string(path):
    """Lines of a file that import what a string or a variable says."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else None
            name = node.func.id if isinstance(node.func, ast.Name) else name
            if name in ("import_module", "__import__", "resolve_name", "run_module"):
                found.append(node.lineno)
    return found


def test_they_are_known():
    found = {
        str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if imports_by_string(path)
    }
    assert found == set(KNOWN)


def test_none_leads_upwards():
    """What the strings name lies in the layers that KNOWN says."""
    import t5x_sparsity

    modules = {module.partition(".")[0] for module in t5x_sparsity._NAMES}
    folders = {p.stem for p in PACKAGE.iterdir()}
    assert modules <= folders and not modules & {"cli", "commands"}
    text = (PACKAGE / "cli.py").read_text()
    assert text.count("import_module(") == text.count('import_module(f"t5x_sparsity.commands.{')
