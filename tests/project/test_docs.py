"""The README and the docs: their tables are what the code is, and their example runs as it is."""

import contextlib
import io
import pkgutil
import re
import subprocess
import tomllib

import gin
import jax.numpy as jnp
import model_table
import numpy as np
import optax
import optimizer_table
import pytest
import tiny_t5
from command_runs import command, environment, saved, write_run

import t5x_sparsity as ts
from t5x_sparsity.core.train_step import init_state

DOCS = tiny_t5.ROOT / "docs"
INCLUDES = sorted(
    p.stem
    for p in (tiny_t5.ROOT / "gin/sparsity").glob("*.gin")
    if p.stem not in ("base", "from_dense")
)


def tables(page):
    """The rows of each table of a page, as lists of cells; the head first."""
    found = re.findall(r"(?:^\|.*\n)+", (DOCS / page).read_text(), re.MULTILINE)
    rows = [[line.strip("|\n").split("|") for line in table.splitlines(True)] for table in found]
    return [
        [[cell.strip() for cell in row] for row in table if "---" not in row[0]] for table in rows
    ]


def assert_links_lead_somewhere(text, folder):
    """That the files and headings are there to which a page of `folder` links."""
    for link in re.findall(r"\]\((?!http)([^)]*)\)", text):
        name, _, place = link.partition("#")
        assert (folder / name).exists(), link
        if place:
            headings = re.findall(r"^#+ (.*)$", (folder / name).read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
            assert place in slugs, link


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", (DOCS / page).read_text(), re.M | re.DOTALL)


def config_of(include, *bindings):
    steps = [] if include in ("dense", "static") else ["TRAIN_STEPS = 100"]
    with tiny_t5.gin_script() as parse:
        parse(f"include 'sparsity/{include}.gin'", *steps, *bindings)
        return gin.get_configurable(ts.SparsityConfig)()


def extra_state(config):
    """Bytes a sparse weight beside its mask."""
    weights = {"kernel": jnp.ones((64, 128))}
    state = init_state(config, config.plan(weights), weights)
    arrays = [x for slot in state.slots.values() for x in slot.values()]
    return sum(x.nbytes for x in arrays) / weights["kernel"].size


def shown_imports():
    """(file, module, name) of every import of ours that a page or an example shows."""
    files = [tiny_t5.ROOT / "README.md", *DOCS.glob("*.md")]
    files += [p for p in (tiny_t5.ROOT / "examples").iterdir() if p.suffix in (".py", ".ipynb")]
    pattern = r"^[ \"]*from (t5x_sparsity[\w.]*) import ([\w, ]+)"
    for path in sorted(files):
        for module, names in re.findall(pattern, path.read_text(), re.MULTILINE):
            yield from ((path.name, module, name.strip()) for name in names.split(","))


def test_imports_that_pages_and_examples_show_work():
    shown = list(shown_imports())
    assert len({page for page, _, _ in shown}) > 5 and len(shown) > 10
    for page, module, name in shown:
        try:
            pkgutil.resolve_name(f"{module}.{name}")
        except (ImportError, AttributeError) as e:
            raise AssertionError(f"{page} shows an import that fails: {e}") from e


def test_every_method_has_a_row_in_both_tables():
    methods, defaults = tables("methods.md")
    assert sorted(row[0].strip("`") for row in methods[1:]) == INCLUDES
    named = [name for row in defaults[1:] for name in re.findall(r"`(\w+)`", row[0])]
    assert sorted([*named, "dense", "static"]) == INCLUDES
    algorithms = {x for n in ts.__all__ if isinstance(x := getattr(ts, n), type)}
    algorithms = {x.__name__ for x in algorithms if issubclass(x, ts.Algorithm)} - {"Algorithm"}
    assert {row[1].strip("`") for row in methods[1:]} == algorithms


@pytest.mark.parametrize("row", tables("methods.md")[0][1:], ids=lambda row: row[0])
def test_a_row_is_what_the_code_is(row):
    include, name, _, dense_gradients, state, between, paper = (cell.strip("`") for cell in row)
    config = config_of(include)
    assert type(config.algorithm).__name__ == name
    assert dense_gradients == config.algorithm.dense_gradients.value
    assert float(state) == extra_state(config)
    assert between
    head = re.match(r"(#.*\n)+", (tiny_t5.ROOT / f"gin/sparsity/{include}.gin").read_text()).group()
    for arxiv in re.findall(r"\[([\d.]+)\]\(https://arxiv.org/abs/\1\)", paper):
        assert f"arXiv:{arxiv}" in head
    assert bool(paper) == ("arxiv.org" in paper)


@pytest.mark.parametrize("include", ["saliency", "global_saliency"])
def test_sums_of_gradients_take_what_the_page_says(include):
    assert extra_state(config_of(include, "GRADIENT_STEPS = 2")) == 4


def test_the_tests_that_the_table_names_are_there():
    page = (DOCS / "t5x_tests.md").read_text()
    named = re.findall(r"`(test_\w+)\.py::(test_\w+)(?:\[([\w-]+)\])?`", page)
    assert len(named) > 40
    for file, function, case in named:
        text = (tiny_t5.ROOT / f"tests/host/{file}.py").read_text()
        assert re.search(rf"^def {function}\(", text, re.MULTILINE), function
        if case:
            cases = {"test_optimizer": optimizer_table.CASES, "test_model": model_table.CASES}
            assert case in cases.get(function, model_table.CASES), case
    common = re.findall(r"`(test_\w+)`", page)
    text = (tiny_t5.ROOT / "tests/host/test_optimizer.py").read_text()
    assert len(common) == 5 and all(f"def {name}(name" in text for name in common)
    rows = [cell for table in tables("t5x_tests.md")[:1] for row in table[1:] for cell in row[1:2]]
    ids = {name for cell in rows for name in re.findall(r"`([\w-]+)`", cell)}
    assert ids == set(optimizer_table.CASES) | set(optimizer_table.T5X_ONLY)


@pytest.mark.parametrize("page", sorted(p.name for p in DOCS.glob("*.md")))
def test_files_that_a_page_names_are_there(page):
    text = (DOCS / page).read_text()
    for name in re.findall(r"`((?:\w+/)+\w+\.\w+)`", text):
        assert (tiny_t5.ROOT / name).exists() or (tiny_t5.ROOT / "gin" / name).exists(), name
    for name in re.findall(r"`(\w+\.py)`", text):
        folders = [tiny_t5.ROOT / "t5x_sparsity", tiny_t5.ROOT / "t5x_sparsity/algorithms"]
        assert name == "my_pruner.py" or any((x / name).exists() for x in folders), name
    assert_links_lead_somewhere(text, DOCS)


@pytest.mark.slow
def test_the_example_of_a_new_method_trains(tmp_path):
    module, with_optax = blocks("new_algorithm.md", "python")
    (run_file,) = blocks("new_algorithm.md", "gin")
    assert len([line for line in module.splitlines() if line.strip()]) <= 20
    (tmp_path / "my_pruner.py").write_text(module)

    # by gin, in a run that takes seconds: the page's file over a run file of that name
    write_run(tmp_path, "dense").rename(tmp_path / "my_run.gin")
    (tmp_path / "my_pruner_run.gin").write_text(run_file)
    bindings = ["MASK_UPDATE_PERIOD=2", "my_pruner.MyPruner.power=0.5", "EVAL_PERIOD=8"]
    arguments = command("my_pruner_run.gin", tmp_path / "run", *bindings, "CHECKPOINT_PERIOD=8")
    done = subprocess.run(
        arguments,
        cwd=tmp_path,  # where Python and gin both find what the page has
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "my_pruner.MyPruner.power = 0.5" in done.stdout
    leaves = saved(tmp_path / "run", 8)
    masks = {
        k.removeprefix("state/sparsity/masks/"): x for k, x in leaves.items() if "/masks/" in k
    }
    assert len(masks) == 7
    for path, mask in masks.items():
        weight = leaves[f"target/{path}"]
        kept = int(np.unpackbits(mask).sum())
        assert kept == round(weight.size * 0.2) and np.count_nonzero(weight) <= kept


def test_the_example_with_optax_prints_what_the_page_says(tmp_path, monkeypatch):
    module, with_optax = blocks("new_algorithm.md", "python")
    (tmp_path / "my_pruner.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(with_optax, "new_algorithm.md", "exec"), {})
    said = re.search(r"It prints `(.*)`, where magnitude", (DOCS / "new_algorithm.md").read_text())
    assert printed.getvalue().strip() == said[1]
    magnitude = with_optax.replace(
        "from my_pruner import MyPruner", "from t5x_sparsity import Magnitude"
    )
    scope = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(
            compile(magnitude.replace("MyPruner(", "Magnitude("), "new_algorithm.md", "exec"), scope
        )
    assert scope["kernel"].tolist() == [[8.0, 0.0], [4.0, 0.0]]


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_of_the_top_pages_lead_somewhere(page):
    text = (tiny_t5.ROOT / page).read_text()
    assert_links_lead_somewhere(text, tiny_t5.ROOT)
    for name in re.findall(r"`((?:[\w.]+/)+\w+\.\w+)`", text):
        assert (tiny_t5.ROOT / name).exists(), name


def test_the_readme_is_short_and_has_two_commands():
    text = (tiny_t5.ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    found = re.findall(r"^```sh\n(.*?)^```", text, re.M | re.DOTALL)
    assert len(found) == 2 and all(block.count("\n") == 1 for block in found)
    assert "t5x_sparsity.train --gin_file=examples/rigl_stdlib.gin" in found[0]
    assert found[1].endswith("-m pytest\n")


def test_the_readme_s_lines_for_optax_run():
    (code,) = re.findall(
        r"^```python\n(.*?)^```", (tiny_t5.ROOT / "README.md").read_text(), re.M | re.DOTALL
    )
    scope = {"ts": ts, "optax": optax, "params": {"kernel": jnp.ones((8, 20))}}
    exec(code, scope)
    masked = ts.apply_masks(scope["params"], scope["state"])
    assert np.count_nonzero(masked["kernel"]) == 16


def test_the_readme_s_methods_are_those_of_the_gin_files():
    text = (tiny_t5.ROOT / "README.md").read_text().partition("## Methods")[2]
    families = re.findall(r"^- \*\*[\w ]+\*\*: ((?:.|\n  )*)\.$", text, re.MULTILINE)
    names = [name for family in families for name in family.replace("\n ", "").split(", ")]
    assert len(names) == len(set(names)) == len(INCLUDES) - 1  # dense is the baseline
    assert re.search(rf"^\| methods that train sparse \| {len(names)} \|", text, re.MULTILINE)


def test_the_readme_compares_with_jaxpruner_by_the_measured_figures():
    text = (tiny_t5.ROOT / "README.md").read_text().partition("## Against JaxPruner")[2]
    rows = re.findall(r"^\| ([^|]+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.MULTILINE)
    measured = {row[1]: row for row in tables("benchmarks.md")[0] if row[0] == "4"}
    ours, theirs = measured["rigl"], measured["JaxPruner rigl"]
    assert [row[1:] for row in rows[:3]] == [
        (ours[3], theirs[3]),
        (ours[4].split(",")[0], theirs[4].split(",")[0]),
        (ours[6], theirs[6]),
    ]
    assert f"has {measured['dense'][4]}" in rows[1][0] and len(rows) == 4


def test_extras_that_a_page_names_are_there():
    pages = [tiny_t5.ROOT / "README.md", tiny_t5.ROOT / "CONTRIBUTING.md", *DOCS.glob("*.md")]
    project = tomllib.loads((tiny_t5.ROOT / "pyproject.toml").read_text())["project"]
    declared = set(project["optional-dependencies"])
    named = {
        extra
        for page in pages
        for extras in re.findall(r"(?:\.|t5x_sparsity)\[([\w,]+)\]", page.read_text())
        for extra in extras.split(",")
    }
    assert "embedded" in named and named <= declared
    table = tables("installation.md")[0]
    rows = {name for row in table[1:] for name in re.findall(r"`\[(\w+)\]`", row[0])}
    assert rows == declared


def test_the_design_names_every_layer_and_every_module_of_the_core():
    layers, core = tables("design.md")[:2]
    package = tiny_t5.ROOT / "t5x_sparsity"
    named = [name for row in layers[1:] for name in re.findall(r"`([\w.]+)/?`", row[0])]
    there = {p.name for p in package.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert sorted(named) == sorted(there - {"__init__.py"})
    modules = [name for row in core[1:] for name in re.findall(r"`(\w+)`", row[0])]
    assert sorted(modules) == sorted(p.stem for p in package.glob("core/[!_]*.py"))


def test_modules_that_the_design_names_are_there():
    text = (DOCS / "design.md").read_text()
    layers = "core|algorithms|artifacts|monitoring|scaling|ahead_of_time|t5x|embedded"
    named = set(re.findall(rf"`((?:{layers})\.\w+)[`.]", text))
    assert len(named) > 8
    for name in named:
        assert (tiny_t5.ROOT / "t5x_sparsity" / f"{name.replace('.', '/')}.py").exists(), name


def test_the_three_files_to_read_first_are_short():
    text = (tiny_t5.ROOT / "CONTRIBUTING.md").read_text()
    first = re.findall(r"^\d\. `([\w/]+\.py)`:", text.partition("## Check")[0], re.MULTILINE)
    assert len(first) == 3
    lines = sum((tiny_t5.ROOT / name).read_text().count("\n") for name in first)
    assert abs(lines - int(re.search(r"about (\d+) lines", text)[1])) < 100


# what other packages say
_NOT_OURS = ("Couldn't resolve selector", "Encountered error while", "No bindings specified for")


def test_errors_are_listed_by_the_text_that_they_have():
    """Each text of the guide's table is in a message: its parts are found in one file of ours."""
    rows = [row for table in tables("t5x.md") if table[0][0] == "the error says" for row in table]
    texts = [text for row in rows[1:] for text in re.findall(r"`([^`]+)`", row[0])]
    assert len(texts) > 15
    files = [
        re.sub(r'"\s*\n\s*(?:rf|fr|f|r)?"', "", p.read_text())
        for p in (tiny_t5.ROOT / "t5x_sparsity").rglob("*.py")
    ]
    for text in texts:
        if text.startswith(_NOT_OURS):
            continue
        parts = [x.strip() for x in re.split(r"\.\.\.|SPARSTY", text) if x.strip()]
        assert any(all(part in file for part in parts) for file in files), text


def test_hooks_and_the_workflow_run_what_ci_runs():
    hooks = (tiny_t5.ROOT / ".pre-commit-config.yaml").read_text()
    assert re.findall(r"repo: (\w+)", hooks) == ["local"]  # a hook must not fetch
    entries = re.findall(r"entry: (.*)", hooks)
    page = (tiny_t5.ROOT / "CONTRIBUTING.md").read_text()
    assert len(entries) == 4 and all(f"`{entry}`" in page.replace("\n", " ") for entry in entries)
    assert {entry.split()[0] for entry in entries} == {".ci/check"}
    workflow = (tiny_t5.ROOT / ".github/workflows/check.yml").read_text()
    runs = re.findall(r"- run: (.*)", workflow)
    assert runs == [".ci/run"] and (tiny_t5.ROOT / runs[0]).exists()
    pythons = re.findall(r"3\.\d+", re.search(r"python: \[(.*)\]", workflow)[1])
    readme = (tiny_t5.ROOT / "README.md").read_text()
    assert re.search(r"Python (\S+) to (\S+) and", readme).groups() == (pythons[0], pythons[-1])
