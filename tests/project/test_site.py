"""The documentation site: it builds without warnings, its links lead somewhere, examples run."""

import contextlib
import html.parser
import importlib.util
import io
import os
import pkgutil
import re
import subprocess
import sys
import urllib.parse

import pytest
import tiny_t5

import t5x_sparsity

DOCS = tiny_t5.ROOT / "docs"
# what the site is built on a machine without T5X with
NEEDED = ("sphinx", "myst_nb", "furo")


def code_blocks():
    """(page, place in it, code): Python that a page shows and that needs no run or file."""
    for page in ("faq.md", "migration.md", "quickstart.md"):
        found = re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.M | re.DOTALL)
        yield from ((page, i, code) for i, code in enumerate(found))


@pytest.mark.parametrize("page, place, code", list(code_blocks()), ids=lambda x: str(x)[:12])
def test_an_example_runs_and_prints_what_its_comment_says(page, place, code):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, f"{page}, block {place}", "exec"), {})
    for said in re.findall(r"^print\(.*\)  # (\(.*)$", code, re.MULTILINE):
        assert said == printed.getvalue().strip()


def test_pruning_once_keeps_what_the_page_says():
    (code,) = [code for page, _, code in code_blocks() if "OneShot" in code]
    scope = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(code, scope)
    assert scope["pruned"]["kernel"].tolist() == [[0] * 4] * 3 + [[13, 14, 15, 16]]


def test_quick_start_keeps_what_it_says():
    (code,) = [code for page, _, code in code_blocks() if page == "quickstart.md"]
    scope = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(code, scope)
    said = re.search(
        r"(\d+) of ([\d,]+) weights of the kernel", (DOCS / "quickstart.md").read_text()
    )
    kernel = scope["params"]["kernel"]
    assert int(said[2].replace(",", "")) == kernel.size
    assert (
        int(said[1])
        == int((kernel != 0).sum())
        == t5x_sparsity.sparsity_summary(scope["params"], scope["state"])[-1].kept
    )


@pytest.mark.parametrize("page", ["faq.md", "migration.md", "quickstart.md", "index.md"])
def test_names_of_ours_are_there(page):
    text = (DOCS / page).read_text()
    names = set(re.findall(r"\bts\.([A-Za-z_][\w.]*\w)", text))
    names |= set(re.findall(r"`t5x_sparsity\.([A-Za-z_][\w.]*\w)", text))
    assert len(names) > (40 if page == "migration.md" else 1)
    for name in names:
        pkgutil.resolve_name(f"t5x_sparsity.{name}")


def test_every_algorithm_of_jaxpruner_s_registry_has_a_row():
    theirs = {"no_prune", "magnitude", "random", "saliency", "magnitude_ste", "random_ste"}
    theirs |= {"global_magnitude", "global_saliency", "static_sparse", "rigl", "set"}
    text = (DOCS / "migration.md").read_text()
    rows = re.findall(r"^\| `\w+` \| `(\w+)` \| `ts\.(\w+)` \|", text, re.MULTILINE)
    assert {row[0] for row in rows} == theirs and len(rows) == 11


class Links(html.parser.HTMLParser):
    """Where a page leads, and the places in it that others may lead to."""

    def __init__(self, text):
        super().__init__()
        self.targets, self.places = set(), {""}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.places |= {attrs.get("id"), attrs.get("name")}
        self.targets |= {attrs[k] for k in ("href", "src") if attrs.get(k)}


def run_python(*arguments, **variables):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=DOCS,
        env={**os.environ, "T5X_SPARSITY_HOST": "auto", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site."""
    for name in NEEDED:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs {name}: pip install '.[docs]'")
    out = tmp_path_factory.mktemp("site")
    flags = ["-W", "--keep-going", "-q", "-E", "-d", out / "doctrees", "-b", "html"]
    done = run_python("-m", "sphinx", *flags, DOCS, out / "html")
    assert done.returncode == 0, done.stdout[-5000:]
    return out / "html"


@pytest.mark.slow
def test_every_page_is_reached_from_the_index_and_all_links_resolve(site):
    pages = {path: Links(path.read_text()) for path in site.rglob("*.html")}
    reached, left, checked = set(), [site / "index.html"], 0
    while left:
        page = left.pop()
        if page in reached:
            continue
        reached.add(page)
        for target in pages[page].targets:
            url = urllib.parse.urlsplit(target)
            if url.scheme or url.netloc:
                continue
            path = (page.parent / urllib.parse.unquote(url.path)).resolve() if url.path else page
            assert path.exists(), f"{page.name} leads to {target}"
            if path in pages:
                assert urllib.parse.unquote(url.fragment) in pages[path].places, (page.name, target)
                left.append(path)
            checked += 1
    assert checked > 1000
    names = {str(path.relative_to(site).with_suffix("")) for path in reached}
    written = {str(p.relative_to(DOCS).with_suffix("")) for p in DOCS.rglob("*.md")}
    written |= {f"notebooks/{p.stem}" for p in (tiny_t5.ROOT / "examples").glob("*.ipynb")}
    assert len(written) > 15 and written <= names


@pytest.mark.slow
def test_public_names_are_shown_by_the_name_that_users_import(site):
    text = "".join(p.read_text() for p in (site / "api").glob("*.html"))
    for name in ("RigL", "sparsify", "SparsityConfig", "sparse_trainer", "Periodic", "NByM"):
        assert f'id="t5x_sparsity.{name}"' in text
    assert (
        'id="t5x_sparsity.core.packing.unpack"' in text
        and 'id="t5x_sparsity.monitoring.flops.FlopsSoFar"' in text
    )


@pytest.mark.slow
def test_a_public_name_without_docstring_or_page_fails_the_build():
    code = (
        "import conf, t5x_sparsity as ts\n"
        "every = {name for name, _ in conf._public()}\n"
        "assert conf.uncovered(every) == [], conf.uncovered(every)\n"
        "print(len(every), *conf.uncovered(every - {'t5x_sparsity.core.packing.pack'}),"
        " sep='\\n')\n"
        "ts.RigL.__doc__ = None\n"
        "print(*conf.uncovered(every), sep='\\n')\n"
    )
    done = run_python("-c", code, PYTHONPATH=f"{DOCS}{os.pathsep}{tiny_t5.ROOT}")
    assert done.returncode == 0, done.stdout[-3000:]
    count, *problems = done.stdout.splitlines()[-3:]
    assert int(count) > 100
    assert problems == [
        "t5x_sparsity.core.packing.pack is public, but on no page of docs/api",
        "t5x_sparsity.RigL is public, but has no docstring",
    ]
