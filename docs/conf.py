"""Builds the site: `pip install ".[docs]"`, then `sphinx-build -W -b html docs docs/_build/html`.

The build fails on any warning, and `uncovered` makes a warning of every public name that has no
docstring or is on no page. Notebooks are shown with the outputs that they were saved with;
tests/project/test_notebooks.py runs them.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from collections.abc import Iterator, Set
from pathlib import Path

# the plugin's classes derive from a host's; the embedded one is always there
os.environ["T5X_SPARSITY_HOST"] = "embedded"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import t5x_sparsity

project = "t5x_sparsity"
copyright = "the t5x_sparsity developers"
version = release = t5x_sparsity.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "jupyter_execute"]
html_theme = "furo"
html_title = f"t5x_sparsity {version}"
html_copy_source = False
html_show_sourcelink = False

nb_execution_mode = "off"
myst_heading_anchors = 3

# docstrings are plain text with names in single backticks
default_role = "literal"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
maximum_signature_line_length = 90
# as a list of their own, without types: the signature has those
napoleon_custom_sections = [("Attributes", "params_style")]
napoleon_use_rtype = False

# Modules whose functions and classes are documented next to the names of the package itself.
MODULES = (
    "ahead_of_time.program",
    "ahead_of_time.slices",
    "algorithms.common",
    "algorithms.drop_and_grow",
    "algorithms.gradual",
    "algorithms.straight_through",
    "artifacts.checkpoint",
    "artifacts.compression",
    "artifacts.encodings",
    "artifacts.events",
    "artifacts.export",
    "artifacts.found_patterns",
    "artifacts.macros",
    "artifacts.record",
    "artifacts.structure",
    "core.contract",
    "core.distributions",
    "core.exact_sums",
    "core.matrix_axes",
    "core.optimizer_slots",
    "core.packing",
    "core.patterns",
    "core.plan",
    "core.schedules",
    "core.selection",
    "core.stacking",
    "core.topk",
    "core.train_step",
    "core.trees",
    "monitoring.flops",
    "monitoring.mask_metrics",
    "monitoring.matrix_products",
    "monitoring.summary",
    "monitoring.text_table",
    "scaling.intervals",
    "scaling.law",
    "scaling.optimum",
    "transformation",
)

# Names of the package that a page lists as such; the pages of their modules leave them out.
_LISTED = {
    name
    for page in (Path(__file__).parent / "api").glob("*.rst")
    for name in re.findall(r"^\.\. auto\w+:: t5x_sparsity\.(\w+)$", page.read_text(), re.MULTILINE)
} & set(t5x_sparsity.__all__)

# Links out of this folder, as on GitHub, and the pages that they are on the site.
_PAGES = {
    "../CHANGELOG.md": "/changelog",
    "../CONTRIBUTING.md": "/contributing",
    "../examples/mnist_optax.ipynb": "/notebooks/mnist_optax",
    "../examples/sparse_t5.ipynb": "/notebooks/sparse_t5",
}


def _public() -> Iterator[tuple[str, object]]:
    """Every name that must be on a page, with what it is."""
    for name in t5x_sparsity.__all__:
        yield f"t5x_sparsity.{name}", getattr(t5x_sparsity, name)
    for module_name in MODULES:
        module = importlib.import_module(f"t5x_sparsity.{module_name}")
        for name, value in vars(module).items():
            own = getattr(value, "__module__", None) == module.__name__ and not name.startswith("_")
            if own and callable(value) and not _is_at_top(name, value):
                yield f"{module.__name__}.{name}", value


def _is_at_top(name: str, value: object) -> bool:
    return name in _LISTED and getattr(t5x_sparsity, name) is value


def uncovered(documented: Set[str]) -> list[str]:
    """What is wrong with the API pages, one sentence each.

    documented: full names of what the pages describe.
    """
    found = []
    for name, value in _public():
        # not what a class inherits
        text = vars(value).get("__doc__") if inspect.isclass(value) else inspect.getdoc(value)
        # a dataclass without one gets its signature
        if not text or text.startswith(f"{name.rsplit('.', 1)[-1]}("):
            found.append(f"{name} is public, but has no docstring")
        if not {name, f"{getattr(value, '__module__', '')}.{name.split('.')[-1]}"} & documented:
            found.append(f"{name} is public, but on no page of docs/api")
    return found


def _check(app, env) -> None:
    from sphinx.util import logging

    for problem in uncovered(set(env.get_domain("py").objects)):
        logging.getLogger(__name__).warning(problem, type="api")


def _link(app, name: str, source: list[str]) -> None:
    def to_page(match: re.Match) -> str:
        page = _PAGES.get(match[2])
        return f"{{doc}}`{match[1]} <{page}>`" if page else match[0]

    source[0] = re.sub(r"\[([^]]+)\]\((\.\./[^)\s]+)\)", to_page, source[0])


def _escape(app, what, name, obj, options, lines: list[str]) -> None:
    """Takes |w| and 2**31 in docstrings for the text that they are, as reStructuredText doesn't."""
    for i, line in enumerate(lines):
        parts = re.split(r"(`+[^`]*`+)", line)
        parts[::2] = [re.sub(r"([|*])", r"\\\1", part) for part in parts[::2]]
        lines[i] = "".join(parts)


def _skip(app, what, name, obj, skip, options) -> bool | None:
    """Leaves out fields of tuples, whose class describes them, and what the package's page has."""
    if type(obj).__name__ == "_tuplegetter" or (what == "module" and _is_at_top(name, obj)):
        return True
    return None


def setup(app) -> None:
    """Called by Sphinx."""
    from pygments.lexers import PythonLexer

    # close enough: gin has Python's literals and comments
    app.add_lexer("gin", PythonLexer)
    app.connect("source-read", _link)
    app.connect("env-check-consistency", _check)
    app.connect("autodoc-skip-member", _skip)
    # before napoleon, which writes reStructuredText of its own
    app.connect("autodoc-process-docstring", _escape, priority=400)
