"""The page of `t5x-sparsity report`: what it says, what it draws, and the command around it."""

import dataclasses
import html.parser
import json
import math
import re
import shutil
import subprocess

import numpy as np
import plotly.graph_objects as go
import pytest
import run_folders
from hypothesis import given
from hypothesis import strategies as st

from t5x_sparsity import cli
from t5x_sparsity.artifacts.events import Histogram, Image, Series, read_run
from t5x_sparsity.commands import text
from t5x_sparsity.commands.output import generator
from t5x_sparsity.commands.report import command as report_command
from t5x_sparsity.commands.report import figures as report_figures
from t5x_sparsity.commands.report import page as report_page
from t5x_sparsity.commands.report.page import make_page
from t5x_sparsity.commands.report.run import ReportRun, smoothed, window

HOSTILE = "<script>alert(1)</script>\"'&"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Runs that no test writes to."""
    root = tmp_path_factory.mktemp("runs")
    run_folders.make_run(root / "rigl", steps=400)
    run_folders.make_run(root / "granet", method="GraNet", ramp=True, sparsity=0.9, steps=400)
    run_folders.make_run(root / "dense", method=None, steps=400)
    return root


def series(values, steps=None):
    values = np.array(values, np.float64)
    return Series(np.arange(len(values)) if steps is None else np.array(steps), values)


def made(name="run", index=0, **changes):
    """A run as it would be read, with no more than a loss."""
    nothing = {
        "folder": "/runs/a", "train": {"loss": series([2.0, 1.0])}, "evals": {}, "masks": {},
        "fan_in": {}, "record": {}, "config": None, "bindings": {}, "weights": None, "remarks": (),
    }  # fmt: skip
    return ReportRun(name=name, index=index, **(nothing | changes))


def read(folders, *names):
    return [
        ReportRun(**vars(read_run(str(folders / n))), name=n, index=i) for i, n in enumerate(names)
    ]


class Page(html.parser.HTMLParser):
    """Elements of a page, and its text."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.text, self._inside = [], "", []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._inside.append(tag)

    def handle_endtag(self, tag):
        while self._inside and self._inside.pop() != tag:
            pass

    def handle_data(self, data):
        if not {"script", "style"} & set(self._inside):
            self.text += data

    def all(self, tag, kind=None):
        found = [a for t, a in self.elements if t == tag]
        return [a for a in found if kind is None or kind in a.get("class", "").split()]


def charts(page):
    text = re.search(r'<script type="application/json" id="charts">(.*?)</script>', page)[1]
    return {c["id"]: c for c in json.loads(text)}


def colored(value):
    """A chart with colours that plotly knows in place of the theme's."""
    text = json.dumps(value).replace('"@heat"', '"Blues"')
    return json.loads(re.sub(r'"@\w+"', '"#123456"', text))


# -- the page -------------------------------------------------------------------------------------


def test_a_page_has_every_chart_of_a_whole_run(folders):
    page = make_page(read(folders, "rigl"))
    found = charts(page)
    assert list(found) == [
        "chart-train-loss", "chart-validation-0", "chart-sparsity", "chart-explored", "chart-churn",
        "chart-grown", "chart-churn-layers-0", "chart-flops", "chart-flops-share",
    ]  # fmt: skip
    for chart in found.values():
        layout = {k: v for k, v in chart["layout"].items() if k != "meta"}
        go.Figure(colored(chart["data"]), colored(layout))
        assert any(trace["x"] for trace in chart["data"])
    where = [a["id"] for a in Page(page).all("div", "plot")]
    assert where == list(found)
    ids = [a["id"] for _, a in Page(page).elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert len(Page(page).all("img", "pixels")) == 3 * 10
    assert "notes" not in page.split("<body>")[1].split("<script")[0]


def test_several_runs_share_charts_each_in_its_colour(folders):
    found = charts(make_page(read(folders, "rigl", "granet", "dense")))
    losses = found["chart-validation-0"]["data"]
    assert [t["line"]["color"] for t in losses] == ["@run0", "@run1", "@run2"]
    assert [t["meta"] for t in found["chart-churn"]["data"]] == [0, 1]
    assert {"chart-churn-layers-0", "chart-churn-layers-1"} < set(found)
    by_flops = found["chart-loss-flops-0"]["data"]
    assert [t["meta"] for t in by_flops] == [0, 1]
    assert by_flops[0]["x"][-1] == pytest.approx(
        read(folders, "rigl")[0].last("flops/training"), rel=1e-6
    )


def test_a_page_needs_nothing_but_itself(folders):
    page = make_page(read(folders, "rigl"))
    for tag, attributes in Page(page).elements:
        assert tag not in ("link", "iframe", "object", "base")
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("#", "data:image/png;base64,"))
    (policy,) = [a for a in Page(page).all("meta") if a.get("http-equiv")]
    assert "default-src 'none'" in policy["content"]
    # the library is there once, and is most of the page
    assert page.count("Licensed under the MIT license") >= 1 and 4e6 < len(page) < 6e6


def test_text_of_a_run_is_text(folders):
    hostile = made(
        HOSTILE,
        folder=HOSTILE,
        train={
            "loss": series([1.0, 2.0]),
            f"sparsity/{HOSTILE}": series([0.5]),
            "sparsity/total": series([0.5]),
            f"mask_churn/{HOSTILE}": series([0.5]),
        },
        evals={HOSTILE: {"loss": series([1.0])}},
        masks={HOSTILE: [Image(0, 1, 1, b"png")]},
        fan_in={HOSTILE: [Histogram(0, np.array([0.5, 1.5]), np.array([1.0]))]},
        record={
            HOSTILE: {
                "shape": [1, 1], "sparsity": 0.5, "pattern": HOSTILE, "algorithm": HOSTILE,
            }
        },
        config=HOSTILE,
        bindings={"SPARSITY": HOSTILE, "SparsityConfig.distribution": repr(HOSTILE)},
        remarks=(HOSTILE,),
    )  # fmt: skip
    for runs in ([hostile], [hostile, made("b", 1)]):
        page = make_page(runs)
        assert "<script>alert" not in page
        # the data, plotly, and the page's own
        assert len(Page(page).all("script")) == 3
        assert HOSTILE in Page(page).text
        assert Page(page).all("h1") == [{}]
        assert charts(page)


def test_what_a_run_lacks_is_noted(folders):
    text = Page(make_page([made()])).text
    assert "The run has no validation loss in its events." in text
    assert "No weight was made sparse" in text
    old = made(
        train={"loss": series([1.0]), "sparsity/a": series([0.5]), "sparsity/total": series([0.5])},
        record={"a": {"shape": [4, 4], "sparsity": 0.5}},
    )
    text = Page(make_page([old])).text
    for what in (
        "has no targets in its events; bars are set against the plan",
        "has no churn in its events: no mask update had happened, or",
        "has no images of masks",
        "has no FLOPs",
    ):
        assert what in text
    two = Page(make_page([old, made("flat", 1, evals={"t": {"loss": series([1.0])}})])).text
    assert "Dense, so not in this part of the page: flat." in two
    assert "run has no validation loss in its events." in two


def test_losses_that_are_no_numbers_break_nothing():
    loss = series([3.0, math.nan, math.inf, 2.0, math.nan])
    run = made(train={"loss": loss}, evals={"t": {"loss": series([math.nan])}})
    page = make_page([run])
    assert charts(page)["chart-train-loss"]["data"][0]["y"] == [3.0, None, None, 2.0, None]
    assert "nan" in Page(page).text
    numbers = run.key_numbers()
    assert numbers["train_loss"] is None
    assert numbers["validation"]["t"] == {
        "step": 0, "loss": None, "best_step": None, "best_loss": None,
    }  # fmt: skip
    json.dumps(numbers, allow_nan=False)


def test_key_numbers_are_those_of_the_run(folders):
    (run,) = read(folders, "rigl")
    numbers = run.key_numbers()
    assert numbers["methods"] == ["RigL"] and numbers["patterns"] == ["Unstructured"]
    assert numbers["distribution"] == "erk"
    assert numbers["steps"] == numbers["total_steps"] == 400
    assert numbers["sparse_weights"] == 2 * (3 * 8192 + 2 * 4096)
    pruned = numbers["sparsity"] * numbers["sparse_weights"]
    assert numbers["weights_kept"] == pytest.approx(numbers["weights"] - pruned, abs=1)
    assert numbers["validation"][run_folders.TASK]["best_step"] == 400
    text = Page(make_page([run])).text
    assert f"{numbers['validation'][run_folders.TASK]['loss']:.4f}" in text
    assert f"{numbers['weights_kept']:,}" in text


def test_bars_are_as_long_as_layers_are_sparse():
    run = made(
        train={
            "loss": series([1.0]),
            "sparsity/a/x": series([0.1, 0.75]),
            "sparsity/b/x": series([0.2, 0.5]),
            "sparsity/total": series([0.2, 0.6]),
            "sparsity_target/a/x": series([0.5, 0.8]),
            "sparsity_target/total": series([0.5, 0.7]),
        }
    )
    page = Page(report_page.layers_section([run]))
    assert [a["style"] for a in page.all("i")] == ["width:75.000%", "width:50.000%"]
    # under one threshold, a layer has no target of its own
    assert [a["style"] for a in page.all("b")] == ["left:80.000%"]
    assert [a["title"] for a in page.all("div", "name")] == ["a/x", "b/x"]
    assert "named without “/x”" in page.text


def test_many_layers_are_folded_by_blocks():
    paths = [f"decoder/layers_{i}/{w}/kernel" for i in range(25) for w in ("wi", "wo")]
    train = {f"sparsity/{p}": series([0.5 if "wi" in p else 0.8]) for p in paths}
    record = {p: {"shape": [10, 20 if "wi" in p else 10], "sparsity": 0.5} for p in paths}
    page = Page(report_page.layers_section([made(train=train, record=record)]))
    assert len(page.all("details")) == 25 and len(page.all("i")) == 25 * 3
    # (0.5 x 200 + 0.8 x 100) / 300
    assert page.all("i")[0]["style"] == "width:60.000%"
    assert page.text.index("layers_9 (2)") < page.text.index("layers_10 (2)")


def test_settings_that_differ_come_first_and_are_marked():
    a = made("a", bindings={"SPARSITY": "0.8", "TRAIN_STEPS": "10", "MODEL_DIR": "'a'", "x.y": "1"})
    b = made("b", 1, bindings={"SPARSITY": "0.8", "TRAIN_STEPS": "20", "MODEL_DIR": "'b'"})
    text = report_page.config_section([a, b]).replace("<wbr>", "")
    rows = re.findall(r'<tr class="(\w*)"><th>(.*?)</th>', text)
    assert rows == [("differs", "TRAIN_STEPS"), ("differs", "x.y"), ("", "SPARSITY")]
    assert "2 settings differ" in text
    assert re.findall(r"<code>(.*?)</code>", text) == ["10", "20", "1", "–", "0.8", "0.8"]
    assert "No setting differs" in report_page.config_section(
        [a, dataclasses.replace(a, name="c", index=1)]
    )


@pytest.mark.parametrize(
    "shape, says",
    [
        ([4, 6], "4×6. A pixel is a weight."),
        ([8, 6], "8×6. A pixel is the share kept of 2×1 weights."),
        ([9, 6], "9×6. A pixel is the share kept of about 2.2×1 weights."),
        ([2, 2, 6], "2×2×6. A pixel is the share kept of a cell of weights."),
        (None, "A pixel is the share kept of a cell of weights."),
    ],
)
def test_a_pixel_is_said_to_be_what_it_is(shape, says):
    record = {} if shape is None else {"a": {"shape": shape}}
    run = made(masks={"a": [Image(0, 6, 4, b"")]}, record=record)
    assert says in Page(report_page.masks_section([run])).text


def test_masks_are_the_first_the_last_and_one_between():
    images = [Image(s, 32, 8, b"png") for s in range(0, 90, 10)]
    assert [i.step for i in text.evenly_spaced(images, report_page.MAX_IMAGES)] == [0, 40, 80]
    assert text.evenly_spaced(images[:2], report_page.MAX_IMAGES) == images[:2]
    page = Page(report_page.masks_section([made(masks={"a": images})]))
    # whole multiples of pixels
    assert {(a["width"], a["height"]) for a in page.all("img")} == {("128", "32")}


def test_fan_in_is_by_whole_numbers():
    # 0.8 wide: [3, 3.8) has 3, [3.8, 4.6) has 4, [4.6, 5.4) has 5, [5.4, 6.2) has 6, [6.2, 7] has 7
    edges = np.linspace(3, 7, 6)
    h = report_page._whole_numbers(Histogram(1, edges, np.array([1.0, 2, 3, 2, 1])))
    assert h.edges.tolist() == [2.5, 3.5, 4.5, 5.5, 6.5, 7.5]
    # 0.5 wide, so that every other bucket can have none
    h = report_page._whole_numbers(Histogram(1, np.linspace(0, 2, 5), np.array([5.0, 0, 6, 7])))
    assert h.edges.tolist() == [-0.5, 0.5, 1.5, 2.5] and h.counts.tolist() == [5, 6, 7]
    # 1.5 wide: 0 and 1, 2, 3 and 4, 5 and 6
    h = report_page._whole_numbers(Histogram(1, np.linspace(0, 6, 5), np.array([4.0, 2, 4, 4])))
    assert h.edges.tolist() == [-0.5, 1.5, 2.5, 4.5, 6.5]
    np.testing.assert_allclose(report_page._density(h), np.full(4, 2 / 14))


# -- curves and names -----------------------------------------------------------------------------


@given(
    st.lists(st.floats(-1e6, 1e6) | st.just(math.nan) | st.just(math.inf), max_size=300),
    st.integers(4, 40),
)
def test_a_thinned_curve_keeps_its_ends_and_its_extremes(values, limit):
    whole = series(values)
    thin = report_figures.thinned(whole, limit)
    assert len(thin.steps) <= max(limit, 0) or len(values) <= limit
    assert (np.diff(thin.steps) > 0).all()
    np.testing.assert_array_equal(thin.values, whole.values[thin.steps])
    if values:
        assert thin.steps[-1] == len(values) - 1
    finite = whole.values[np.isfinite(whole.values)]
    kept = thin.values[np.isfinite(thin.values)]
    if len(finite):
        assert kept.min() == finite.min() and kept.max() == finite.max()


def test_a_smoothed_curve_is_the_exponential_mean():
    flat = series(np.full(300, 2.0))
    np.testing.assert_allclose(smoothed(flat).values, 2.0)
    assert window(flat) == 10 and window(series([1.0])) == 1
    ramp = series(np.arange(90.0))
    keep = 1 - 2 / 4
    by_hand = sum(keep**k * (89 - k) for k in range(90)) / sum(keep**k for k in range(90))
    assert smoothed(ramp).last == pytest.approx(by_hand)
    gap = series([1.0] * 100 + [math.nan] + [1.0] * 100)
    found = smoothed(gap).values
    assert np.flatnonzero(np.isnan(found)).tolist() == [100]
    np.testing.assert_allclose(np.delete(found, 100), 1.0)


def test_a_heatmap_has_a_row_a_layer_and_gaps_where_nothing_was_logged():
    run = made(
        train={
            "mask_churn/layers_10/w": series([0.1, 0.2], [1, 3]),
            "mask_churn/layers_2/w": series([0.3], [2]),
            "mask_churn/total": series([0.2], [2]),
        }
    )
    chart = list(report_figures.churn_charts([run]))[-1]
    (trace,) = chart.data
    assert trace["y"] == ["layers_2/w", "layers_10/w"] and trace["x"] == [1, 2, 3]
    assert trace["z"] == [[None, 0.3, None], [0.1, None, 0.2]]
    assert trace["zmax"] == 0.3


def test_a_heatmap_has_every_layer_however_its_updates_fall():
    # in turns, as under schedules of their own; every other step would show one alone
    n = 2 * report_figures.MAX_COLUMNS - 1
    train = {
        f"mask_churn/{path}": series(np.arange(first, n, 2) / n, np.arange(first, n, 2))
        for first, path in enumerate("ab")
    }
    chart = list(report_figures.churn_charts([made(train=train)]))[-1]
    (trace,) = chart.data
    assert trace["x"] == list(range(0, n, 2))
    a, b = trace["z"]
    assert a == pytest.approx([s / n for s in range(0, n, 2)], rel=1e-6)
    # the last of the steps after the column before
    assert b[0] is None and b[1:] == pytest.approx([s / n for s in range(1, n, 2)], rel=1e-6)


def test_churn_that_is_no_number_breaks_nothing():
    for values, mean, last in (
        ([0.1, math.nan, 0.3, math.nan], 0.2, None),
        ([math.nan, 0.25], 0.25, 0.25),
        ([math.nan, math.inf], None, None),
    ):
        churn = {f"mask_churn/{p}": series(values) for p in ("a", "total")}
        run = made(train={"loss": series([1.0]), "sparsity/total": series([0.5])} | churn)
        numbers, text = run.key_numbers(), Page(make_page([run])).text
        assert numbers["churn_mean"] == (None if mean is None else pytest.approx(mean))
        assert numbers["churn"] == last
        assert ("Mean churn" in text) == (mean is not None)
        assert ("last 25.00%" in text) == (last is not None)


def test_a_run_that_only_prunes_has_a_note_in_place_of_a_heatmap():
    churn = {f"mask_churn/{p}": series([0.0, 0.0]) for p in ("a", "total")}
    run = made(train={"loss": series([1.0]), "sparsity/total": series([0.5])} | churn)
    page = make_page([run])
    assert "chart-churn" in charts(page) and "chart-churn-layers-0" not in charts(page)
    assert "The run never grew a weight back, so the churn is 0 throughout." in Page(page).text


@pytest.mark.parametrize("layers, columns", [(3, 7), (200, 500)])
def test_a_heatmap_stays_readable(layers, columns):
    rng = np.random.default_rng(0)
    train = {
        f"mask_churn/decoder/layers_{i}/mlp/wi/kernel": series(rng.random(columns))
        for i in range(layers)
    }
    (chart,) = report_figures.churn_charts([made(train=train)])
    assert len(chart.data[0]["x"]) == min(columns, report_figures.MAX_COLUMNS)
    assert chart.height <= 1000
    axis, names = chart.layout["yaxis"], chart.layout["meta"]["long"]
    assert len(names) == len(axis["tickvals"]) <= 80
    assert names[0] in ("layers_0", "decoder/layers_0")


def test_names_are_short_and_in_order():
    names = ["a/layers_10/w", "a/layers_2/w", "a/norm"]
    assert sorted(names, key=text.natural) == ["a/layers_2/w", "a/layers_10/w", "a/norm"]
    assert text.trim(["d/l_0/wi/kernel", "d/l_1/wo/kernel"]) == ["l_0/wi", "l_1/wo"]
    assert text.trim(["a/b/kernel"]) == ["kernel"]
    assert text.trim(["a", "b/c"]) == ["a", "b/c"]
    assert text.trim(["x/k", "x/k/k"]) == ["k", "k/k"]
    assert text.trim([]) == []
    assert text.block_of("decoder/layers_3/mlp/wi") == "decoder/layers_3"
    assert text.block_of("decoder/mlp/wi") == "decoder"
    assert text.short("abcdefghij", 10) == "abcdefghij"
    assert text.short("abcdefghijk", 10) == "abc…fghijk"


# -- the command ----------------------------------------------------------------------------------


def report(capsys, *arguments):
    """(exit code, standard output, standard error)."""
    code = cli.main(["report", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_one_runs_page_is_in_its_folder_and_is_made_again(capsys, tmp_path):
    folder = run_folders.make_run(tmp_path / "rigl", steps=40)
    page = folder / "sparsity_report.html"
    for _ in range(2):
        assert report(capsys, folder) == (0, f"{page}\n", "")
        assert generator("report") in page.read_text() and "<title>rigl</title>" in page.read_text()
    assert not list(folder.glob("*.tmp"))


def test_pages_of_several_runs_are_where_one_is(capsys, folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = sorted(folders.rglob("*"))
    code, out, err = report(capsys, "--json", folders / "rigl", folders / "dense", "--name=ä",
                            "--name=<b>")  # fmt: skip
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["page"] == "sparsity_report.html" and (tmp_path / found["page"]).exists()
    assert [r["name"] for r in found["runs"]] == ["ä", "<b>"]
    assert found["runs"][0]["flops_training_share"] and found["runs"][1]["sparsity"] is None
    assert sorted(folders.rglob("*")) == files


def test_runs_of_one_name_are_told_apart_by_their_folders(capsys, tmp_path):
    for seed in ("a", "b"):
        run_folders.make_run(tmp_path / seed / "run", steps=20, method=None)
    out = tmp_path / "page.html"
    code, text, _ = report(capsys, tmp_path / "a/run", f"{tmp_path}/b/run/", "--out", out, "--json")
    assert code == 0 and [r["name"] for r in json.loads(text)["runs"]] == ["a/run", "b/run"]


def test_a_file_of_the_users_is_not_replaced(capsys, folders, tmp_path):
    out = tmp_path / "notes.html"
    out.write_text("my notes")
    code, text, err = report(capsys, folders / "rigl", "--out", out)
    assert (code, text) == (2, "") and out.read_text() == "my notes"
    assert err == (
        f"t5x-sparsity report: error: {out} is there and is no page of this command, so it isn't "
        "replaced; name another by --out\n"
    )


@pytest.mark.parametrize(
    "arguments, says",
    [
        ([], "the following arguments are required: MODEL_DIR"),
        (["{0}/none"], "there is no {0}/none; give the folder of a run, its MODEL_DIR"),
        (["{0}"], "{0} is not the folder of a run: it has no events in train/ or training_eval/"),
        (["{0}/rigl", "{0}/rigl/"], "one folder is given twice; give each run once"),
        (["{0}/rigl", "--name=a", "--name=b"],
         "2 names for 1 runs; give --name once a run, in their order"),
        (["{0}/rigl", "{0}/dense", "--name=a", "--name=a"], "two runs have one name: a, a"),
        (["{0}/rigl"] * 9,
         "9 runs are too many to tell apart on a page; give at most 8"),
        (["{0}/rigl", "--out={0}"],
         "--out {0} is a folder; name a file in it, such as page.html"),
        (["{0}/rigl", "--out={0}/no/page.html"],
         "there is no folder {0}/no to write page.html to; make it first"),
        (["{0}/rigl", "--out={0}/" + "a" * 300], "can't be written"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_nothing_is_written(capsys, folders, arguments, says):
    files = sorted(folders.rglob("*"))
    code, out, err = report(capsys, *(a.format(folders) for a in arguments))
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert err.startswith("t5x-sparsity report: error: ") and says.format(folders) in err
    assert sorted(folders.rglob("*")) == files


def test_an_error_of_several_lines_is_one(capsys, folders, monkeypatch, tmp_path):
    def refuse(folder):
        raise ValueError("train/events has a value of a\nb that can't be read")

    monkeypatch.setattr(report_command, "read_run", refuse)
    code, out, err = report(capsys, folders / "rigl", "--out", tmp_path / "page.html")
    assert (code, out) == (2, "") and err.count("\n") == 1 and "of a b that" in err


def test_help_answers_questions(capsys):
    code, out, _ = report(capsys, "--help")
    assert code == 0
    for what in ("no network", "--out", "examples:", "any other file is not", "Exit code"):
        assert what in out


# -- in a browser ---------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

# Reports from inside the page; a frame is the only way to a width of a phone.
PROBE = """<script>
window.found = {errors: []};
addEventListener("error", (e) => found.errors.push(String(e.message)));
addEventListener("securitypolicyviolation", (e) => found.errors.push(e.blockedURI));
addEventListener("load", () => setTimeout(() => {
  const root = document.documentElement;
  const plots = [...document.querySelectorAll(".plot")];
  found.wide = root.scrollWidth - root.clientWidth;
  found.width = root.clientWidth;
  found.plots = plots.length;
  found.drawn = plots.filter((p) => p.querySelector(".trace, .hm image")).length;
  const wide = (p) => p.querySelector(".main-svg").clientWidth > p.clientWidth;
  found.spilt = plots.filter(wide).length;
  found.masks = [...document.images].filter((i) => i.naturalWidth > 0).length;
  const button = document.querySelectorAll("[data-toggle]")[1];
  if (button) {
    button.click();
    found.shown = [...document.querySelectorAll("#chart-validation-0 .trace")].length;
    found.off = document.querySelectorAll(".panel.off").length;
  }
  parent.postMessage(JSON.stringify(found), "*");
}, 500));
</script>"""
FRAME = """<!doctype html><body style="margin:0"><script>
addEventListener("message", (e) => { document.title = e.data; });
</script><iframe src="page.html" style="width:WIDTHpx;height:900px;border:0"></iframe>"""


def probe(page, tmp_path, width, *flags):
    (tmp_path / "page.html").write_text(page.replace("<head>", "<head>" + PROBE, 1))
    (tmp_path / "frame.html").write_text(FRAME.replace("WIDTH", str(width)))
    found = subprocess.run(
        [
            CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            f"--user-data-dir={tmp_path}/profile", "--window-size=1600,1000", *flags,
            "--virtual-time-budget=20000", "--dump-dom", f"file://{tmp_path}/frame.html",
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    title = re.search(r"<title>(.*?)</title>", found.stdout)
    assert title, found.stderr
    return json.loads(html.unescape(title[1]))


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("width", [390, 1440])
def test_a_browser_draws_all_of_it_at_any_width(folders, tmp_path, width):
    runs = read(folders, "rigl", "granet", "dense")
    page = make_page(runs)
    found = probe(page, tmp_path, width)
    assert found["errors"] == []
    assert found["width"] == width and found["wide"] == 0 and found["spilt"] == 0
    assert found["plots"] == found["drawn"] == len(charts(page))
    assert found["masks"] == 2 * 10 * 3
    # without the second run
    assert found["shown"] == 2 and found["off"] == 1


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_browser_draws_long_names_in_the_dark(tmp_path):
    run_folders.make_run(tmp_path / "run", steps=40)
    run = read_run(str(tmp_path / "run"))
    long = "a_name_without_end_" * 8
    runs = [ReportRun(**vars(run), name=long + str(i), index=i) for i in range(2)]
    page = make_page(runs)
    found = probe(page, tmp_path, 390, "--blink-settings=preferredColorScheme=0")
    assert found["errors"] == [] and found["wide"] == 0 and found["spilt"] == 0
    assert found["drawn"] == len(charts(page))
