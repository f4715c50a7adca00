"""`t5x-sparsity fit-scaling`: the table, the report, the page, and every mistake."""

import base64
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from t5x_sparsity import cli
from t5x_sparsity.commands.fit_scaling.options import COSTS as COST_NAMES
from t5x_sparsity.commands.fit_scaling.table import read
from t5x_sparsity.scaling import intervals as scaling_intervals
from t5x_sparsity.scaling import law as scaling
from t5x_sparsity.scaling.law import COEFFICIENTS, Law
from t5x_sparsity.scaling.optimum import COSTS, training_flops

EXAMPLE = Path(__file__).parents[2] / "examples" / "synthetic_scaling_table.csv"
LAW = Law(a_s=16.0, b_s=0.8, c_s=44.0, b_n=0.25, a_d=7e8, b_d=0.3, c=0.8)
HEADER = "sparsity,nonzero_weights,tokens,loss"
FAST = ("--starts=4", "--bootstrap=0")


def run(capsys, *arguments):
    code = cli.main(["fit-scaling", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def rows(law=LAW):
    grid = np.meshgrid([0, 0.5, 0.875], [1e6, 4e6, 1.6e7], [1e9, 4e9, 1.6e10], indexing="ij")
    s, n, d = (x.ravel() for x in grid)
    return list(zip(s, n, d, law.loss(s, n, d), strict=True))


def text(header=HEADER, delimiter=",", values=None, row="{:.17g}"):
    lines = [header] + [
        delimiter.join(row.format(x) for x in r) for r in (rows() if values is None else values)
    ]
    return "\n".join(lines) + "\n"


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text(text())
    return path


def test_the_report(capsys):
    code, out, err = run(capsys, EXAMPLE, "--starts=4", "--bootstrap=20", "--compute", "1e19")
    assert code == 0 and err == "fitting ...\n"
    assert out.startswith(f"64 runs of {EXAMPLE}: sparsity 0 to 0.875, non-zero weights 1e+06 to")
    for name in COEFFICIENTS:
        line = re.search(rf"^{name} +([\d.e+-]+) +([\d.e+-]+) to ([\d.e+-]+)", out, re.M)
        value, low, high = map(float, line.groups())
        assert low <= value <= high
        assert value == pytest.approx(getattr(LAW, name), rel=0.05)
    assert "Starts: 4 of 4 end at the best objective" in out
    assert "Bootstrap: 20 tables, 0 of them without a fit" in out
    assert "at gradual cost (* outside the table)" in out
    assert re.search(r"^ *1e\+19 +best +\S+ +\S+ +0\.50\d \*", out, re.M)
    assert re.search(r"^ *1e\+19 +given +1.6e\+07 +\S+ +0\.7\d\d", out, re.M)


def test_the_example_is_made_as_it_says():
    lines = EXAMPLE.read_text()
    assert lines.startswith("# SYNTHETIC")
    found = read(str(EXAMPLE)).table
    noise = np.exp(0.003 * np.random.default_rng(0).standard_normal(64))
    wanted = LAW.loss(found.sparsity, found.nonzero, found.tokens) * noise
    np.testing.assert_allclose(found.loss, wanted, atol=6e-6)


def test_the_example_in_the_docs_is_what_the_command_says(capsys):
    page = (EXAMPLE.parents[1] / "docs" / "fit_scaling.md").read_text()
    code, out, _ = run(capsys, EXAMPLE, *FAST, "--compute", "1e18", "1e20", "--json")
    found = json.loads(out)
    assert code == 0
    for name, c in found["coefficients"].items():
        assert re.search(rf"^    {name} +{re.escape(format(c['value'], '.5g'))} ", page, re.M), name
    assert f"mean Huber loss {found['fit']['objective']:.5g}" in page
    for r in found["optima"]:
        shown = f"{r['compute']:.3g} ", f" {r['sparsity']:.3f} ", f" {r['loss']:.4f} "
        row = ".*".join(map(re.escape, shown))
        assert re.search(f"^ +{row}", page, re.M), row
    for h in found["held_out"]:
        assert h["column"] in page


def test_json(capsys, table):
    code, out, _ = run(
        capsys, table, *FAST, "--json", "--size", "2e6", "--compute", "1e17", "1e18", "--cost=dense"
    )
    assert code == 0
    found = json.loads(out)
    for name in COEFFICIENTS:
        assert found["coefficients"][name]["value"] == pytest.approx(getattr(LAW, name), rel=1e-6)
        assert found["coefficients"][name]["interval"] is None
    assert found["table"] == {
        "path": str(table), "runs": 27, "size_column": "nonzero_weights", "unused_columns": [],
    }  # fmt: skip
    assert found["starts"] | {"spread": 0} == {
        "number": 4, "agreeing": 4, "failed": 0, "seed": 0, "spread": 0,
    }  # fmt: skip
    assert found["bootstrap"] is None and len(found["fit"]["residuals"]) == 27
    assert [(r["compute"], r["given_size"]) for r in found["optima"]] == [
        (1e17, False), (1e17, True), (1e18, False), (1e18, True),
    ]  # fmt: skip
    for r in found["optima"]:
        flops = training_flops(r["sparsity"], r["nonzero"], r["tokens"], "dense")
        assert flops == pytest.approx(r["compute"])
    assert found["cost"] == "dense" and found["optima"][1]["nonzero"] == 2e6
    # nothing is left of 3 amounts and sizes without the largest
    assert [h["column"] for h in found["held_out"]] == ["nonzero_weights", "tokens", "sparsity"]
    assert all(h["rmse"] is None and h["rows"] == 9 for h in found["held_out"])
    gains = {g["sparsity"]: g["times"] for g in found["dense_equivalent"]}
    assert gains == pytest.approx({s: LAW.dense_equivalent(s) for s in (0.5, 0.875)})


def test_json_with_intervals(capsys, table):
    code, out, _ = run(capsys, table, "--starts=2", "--bootstrap=20", "--level=0.5", "--json")
    found = json.loads(out)
    assert code == 0 and found["bootstrap"]["tables"] == 20 and found["bootstrap"]["level"] == 0.5
    assert len(found["bootstrap"]["rank_correlations"]) == 21
    for value in found["coefficients"].values():
        low, high = value["interval"]
        assert low <= high and low == pytest.approx(value["value"], rel=1e-3)
    # without --compute, from the least to the most that runs took
    flops = [training_flops(s, n, d, "gradual") for s, n, d, _ in rows()]
    compute = sorted({r["compute"] for r in found["optima"]})
    assert compute == pytest.approx([min(flops), (min(flops) * max(flops)) ** 0.5, max(flops)])
    assert {r["nonzero"] for r in found["optima"] if r["given_size"]} == {4e6}


def test_optima_beyond_the_table_are_marked(capsys, table):
    code, out, _ = run(capsys, table, *FAST, "--cost=sparse", "--compute=1e18")
    assert code == 0 and "0.875 *" in out
    assert "2 of the best sparsities are at the edge of the table's range: the more the better" in (
        out
    )
    code, out, _ = run(capsys, table, *FAST, "--size=2e6", "--compute=1e21")
    assert re.search(r"edge of the table's range: 0\.9\d+ by the law itself", out)
    assert "Marked rows have nonzero_weights or tokens outside the table's range" in out
    code, out, _ = run(capsys, table, *FAST, "--size=4e6", "--compute=2e17", "--json")
    given = json.loads(out)["optima"][1]
    assert given["outside"] == [] and given["sparsity_beyond_table"] is None


def test_the_costs_of_the_command_line_are_those_there_are():
    assert set(COST_NAMES) == set(COSTS)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.replace(",", ";"),
        lambda t: t.replace(",", "\t"),
        lambda t: "\ufeff" + t,
        lambda t: t.replace("\n", "\r\n"),
        lambda t: "# a remark, with commas\n\n" + t + "\n# the end\n,,,\n",
        lambda t: t.replace("sparsity,", '"sparsity", '),
    ],
    ids=["semicolons", "tabs", "mark", "windows", "remarks", "quotes"],
)
def test_ways_to_write_the_table(tmp_path, change):
    path = tmp_path / "runs.csv"
    path.write_bytes(change(text()).encode())
    found = read(str(path))
    wanted = np.array(rows())
    for i, name in enumerate(("sparsity", "nonzero", "tokens", "loss")):
        np.testing.assert_array_equal(getattr(found.table, name), wanted[:, i])


def test_weights_in_all_and_other_columns(capsys, tmp_path):
    path = tmp_path / "runs.csv"
    values = [(f"run{i}", d, n / (1 - s), loss, s) for i, (s, n, d, loss) in enumerate(rows())]
    path.write_text(text("name,tokens,weights,loss,sparsity", values=values, row="{}"))
    found = read(str(path))
    np.testing.assert_allclose(found.table.nonzero, [r[1] for r in rows()])
    assert found.size_column == "weights" and found.unused == ("name",)
    code, out, _ = run(capsys, path, *FAST)
    assert code == 0 and "Columns passed over: name.\n" in out


def test_the_page(capsys, tmp_path, table):
    page = tmp_path / "law & <page>.html"
    code, out, err = run(capsys, table, "--starts=2", "--bootstrap=20", f"--plots={page}")
    assert code == 0 and out.startswith("27 runs") and f"wrote {page}" in err
    html = page.read_text()
    # self-contained: nothing is loaded from elsewhere
    assert not re.search(r"<(script|img|iframe)[^>]* src=|<link|@import|url\(http", html)
    assert 'name="viewport"' in html and html.count("<script>") == 2
    figures = re.findall(r"<script type='application/json'>(.*?)</script>", html, re.S)
    # 3 amounts of data, 2 of errors, the contours, 7 coefficients, and what is tied
    assert 13 <= len(figures) <= 17
    names = [json.loads(f)["layout"]["title"]["text"] for f in figures]
    assert names[:6] == ["1e+09 tokens", "4e+09 tokens", "1.6e+10 tokens", "Loss",
                         "Errors of the fit", ""]  # fmt: skip
    assert names[6:13] == list(COEFFICIENTS)
    points = [d for d in json.loads(figures[0])["data"] if d["mode"] == "markers"]
    assert len(points) == 3 and "Best sparsity for weights and compute" in html
    # as any new file's, and no other file left
    assert os.stat(page).st_mode == os.stat(table).st_mode
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([page.name, table.name])


def test_the_page_without_intervals_and_with_scattered_runs(capsys, tmp_path):
    random = np.random.default_rng(0)
    s, n, d = (
        random.uniform(0, 0.9, 30),
        10 ** random.uniform(6, 8, 30),
        10 ** random.uniform(9, 11, 30),
    )
    path, page = tmp_path / "<b>.csv", tmp_path / "page.html"
    path.write_text(text(values=zip(s, n, d, LAW.loss(s, n, d), strict=True)))
    code, _, _ = run(capsys, path, *FAST, f"--plots={page}")
    html = page.read_text()
    assert code == 0 and "<b>.csv" not in html and "&lt;b&gt;.csv" in html
    figures = re.findall(r"<script type='application/json'>(.*?)</script>", html, re.S)
    assert len(figures) == 6 and "bootstrap</h2>" not in html
    # each run is a point of one panel
    shown = [d for f in figures[:3] for d in json.loads(f)["data"] if d["mode"] == "markers"]
    arrays = [d["x"]["bdata"] for d in shown if d["x"]]
    assert sum(len(base64.b64decode(x)) for x in arrays) == 30 * 8


ROW = "0.5,1e6,1e9,3.0"


@pytest.mark.parametrize(
    "content, says",
    [
        ("", "is empty; its first line names the columns: sparsity, nonzero_weights (or weights), "
             "tokens, loss"),
        ("# only a remark\n", "is empty"),
        (HEADER + "\n", "has 0 rows for 7 coefficients; at least 8"),
        (b"\x89PNG\r\n\x1a\n\xff\xfe", "isn't text in UTF-8; save the table as comma-separated"),
        ("a\0b", "isn't text; save the table"),
        ("sparsity,nonzero_weights,tokens\n", "line 1: no column loss. The columns are 'sparsity', "
         "'nonzero_weights', 'tokens'; needed are sparsity, nonzero_weights (or weights), tokens"),
        ("sparsity,nonzero_weights,token,loss\n", "line 1: no column tokens (is 'token' meant?)."),
        ("Sparsity,nonzero_weights,tokens,loss\n", "no column sparsity (is 'Sparsity' meant?)."),
        ("sparsity,nonzero-weight,tokens,loss\n",
         "no column nonzero_weights, nor weights (is 'nonzero-weight' meant?)."),
        ("sparsity,params,tokens,loss\n", "no column nonzero_weights, nor weights. The columns"),
        ("sparsity,weights,nonzero_weights,tokens,loss\n",
         "line 1: columns nonzero_weights and weights; keep one"),
        ("loss,sparsity,nonzero_weights,tokens,loss\n", "line 1: 2 columns are named loss; keep"),
        (f"{HEADER}\n{ROW}\n0.5,1e6,1e9\n", "line 3: 3 values for 4 columns, which commas divide"),
        (f"# remark\n{HEADER}\n{ROW}\n0.5,big,1e9,3\n",
         "line 4, column nonzero_weights: 'big' isn't a number"),
        (f"{HEADER}\n0.5,1e6,,3.0\n", "line 2, column tokens: no value; every run needs all four"),
        (f"{HEADER}\n{ROW}\n".replace(",", ";").replace("3.0", "3,0"),
         "line 2, column loss: '3,0' isn't a number; write a decimal point, not a comma"),
        (f"{HEADER}\n0.5,1e6,1e9,nan\n", "column loss: 'nan' isn't finite; leave out runs that"),
        (f"{HEADER}\n50,1e6,1e9,3\n",
         "column sparsity: 50 is outside [0, 1); divide percentages by 100"),
        (f"{HEADER}\n-0.1,1e6,1e9,3\n", "column sparsity: -0.1 is outside [0, 1)"),
        (f"{HEADER}\n1,1e6,1e9,3\n", "column sparsity: 1 is outside [0, 1)"),
        (f"{HEADER}\n0.5,0,1e9,3\n", "column nonzero_weights: 0 isn't above 0"),
        (f"{HEADER}\n0.5,1e6,-1,3\n", "column tokens: -1 isn't above 0"),
        (f"{HEADER}\n0.5,1e6,1e9,0\n", "column loss: 0 isn't above 0"),
        (f"{HEADER}\n0.5,1e6,1e300,3\n",
         "line 2, column tokens: 1e300 is outside 1e-30 to 1e+30"),
        (f"{HEADER}\n0.5,1e-31,1e9,3\n", "column nonzero_weights: 1e-31 is outside 1e-30 to 1e"),
        (f"{HEADER}\n0.5,1e6,1e9,1e31\n", "column loss: 1e31 is outside 1e-30 to 1e+30"),
        (f'{HEADER}\n0.5,"1e6,1e9,3\n', "line 2: not comma-separated values:"),
        (text(values=rows()[:7]), "has 7 rows for 7 coefficients; at least 8"),
        (text(values=rows()[:18]), "column sparsity: too few different values, 0, 0.5; at least 3"),
        (text(values=[(s, 1e6, d, x) for s, _, d, x in rows()]),
         "column nonzero_weights: too few different values, 1e+06; at least 3"),
        (text(values=[(s, n, 1e9, x) for s, n, _, x in rows()]),
         "column tokens: too few different values, 1e+09; at least 3"),
        (text(values=[(s, n, 20 * n, x) for s, n, _, x in rows()]),
         ": the columns nonzero_weights and tokens vary together, so no fit can tell apart what"),
    ],
)  # fmt: skip
def test_a_wrong_table_is_one_line(capsys, tmp_path, content, says):
    path, page = tmp_path / "runs.csv", tmp_path / "page.html"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    code, out, err = run(capsys, path, f"--plots={page}")
    lines = [line for line in err.splitlines() if line != "fitting ..."]
    assert code == 2 and out == "" and len(lines) == 1
    assert lines[0].startswith(f"t5x-sparsity fit-scaling: error: {path}")
    assert says in lines[0]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "arguments, says",
    [
        ([], "error: the following arguments are required: TABLE"),
        (["nowhere.csv"], "error: no such file: nowhere.csv"),
        (["."], "error: . is a folder; give a file of comma-separated values"),
        (["t", "--compute", "0"], "--compute: must be a number from 1e-60 to 1e+60, got '0'"),
        (["t", "--compute", "much"], "must be a number from 1e-60 to 1e+60, got 'much'"),
        (["t", "--compute=1e308"], "--compute: must be a number from 1e-60 to 1e+60, got '1e308'"),
        (["t", "--size=inf"], "argument --size: must be a number from 1e-30 to 1e+30, got 'inf'"),
        (["t", "--size=1e308"], "--size: must be a number from 1e-30 to 1e+30, got '1e308'"),
        (["t", "--cost=free"], "argument --cost: invalid choice: 'free'"),
        (["t", "--level=1"], "argument --level: must be a number between 0 and 1, got '1'"),
        (["t", "--bootstrap=5"],
         "argument --bootstrap: must be a whole number, 0 or at least 20, got '5'"),
        (["t", "--starts=0"], "argument --starts: must be a whole number, at least 1, got '0'"),
        (["t", "--seed=x"], "argument --seed: must be a whole number, at least 0, got 'x'"),
        (["t", "--delta=0"], "--delta: must be a number from 1e-12 to 1e+12, got '0'"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_one_line(capsys, arguments, says):
    code, out, err = run(capsys, *arguments)
    assert code == 2 and out == "" and err.count("\n") == 1 and says in err


def test_where_a_page_can_not_go(capsys, tmp_path, table):
    before = table.read_text()
    for target, says in (
        (tmp_path, "is a folder; name a file in it"),
        (tmp_path / "no" / "page.html", "there is no folder"),
        (table, "is no page of this command, so it isn't replaced"),
    ):
        code, out, err = run(capsys, table, *FAST, f"--plots={target}")
        assert code == 2 and out == "" and err.count("\n") == 1 and says in err
    assert table.read_text() == before and list(tmp_path.iterdir()) == [table]


def test_a_page_that_can_not_be_written_leaves_nothing(capsys, tmp_path, table, monkeypatch):
    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    for name in ("write_text", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(type(epath.Path(tmp_path)), name, refuse)
            code, out, err = run(capsys, table, *FAST, f"--plots={tmp_path / 'page.html'}")
        assert code == 2 and out == "" and "No space left on device); name another" in err
        assert list(tmp_path.iterdir()) == [table]


def test_fits_that_fail_are_one_line(capsys, table, monkeypatch):
    monkeypatch.setattr(scaling._Scaled, "minimize", lambda *_: None)
    code, out, err = run(capsys, table, *FAST)
    assert code == 2 and out == ""
    assert err.endswith("none of 4 starts converged; look for wrong values among the losses\n")


def test_warnings(capsys, tmp_path, table, monkeypatch):
    wrong = tmp_path / "wrong.csv"
    grid = np.meshgrid([0, 0.5, 0.875], [1e6, 2e6, 4e6, 8e6], [1e9, 4e9, 1.6e10], indexing="ij")
    s, n, d = (x.ravel() for x in grid)
    loss = LAW.loss(s, n, d) - 0.8 - 0.01
    wrong.write_text(text(values=zip(s, n, d, np.where(n == 8e6, 0.9, 1) * loss, strict=True)))
    code, out, _ = run(capsys, wrong, *FAST)
    assert code == 0 and "Beware:" in out
    assert "Runs of the largest nonzero_weights are +" in out and "extrapolates badly" in out
    assert "The coefficient c ends at its bound, 0." in out

    real = scaling.fit

    def doubtful(*args, **kwargs):
        changed = {"agreeing": 1, "spread": 0.5, "condition": 1e6}
        return scaling.dataclasses.replace(real(*args, **kwargs), **changed)

    none = scaling_intervals.Bootstrap(laws=(LAW,), failed=5, redrawn=0)
    monkeypatch.setattr(scaling, "fit", doubtful)
    monkeypatch.setattr(scaling_intervals, "bootstrap", lambda *_, **__: none)
    code, out, _ = run(capsys, table, "--starts=4", "--bootstrap=20")
    assert code == 0 and "Only 1 of 4 starts end at the best objective" in out
    assert "The objective is flat: coefficients 50% apart" in out
    assert "hardly tells coefficients apart (condition number 1e+06)" in out
    assert "5 resampled tables have no fit" in out


def written(path, law):
    path.write_text(text(values=rows(law)))
    return path


def strict(out):
    def refuse(name):
        raise ValueError(name)

    return json.loads(out, parse_constant=refuse)


def test_a_loss_beyond_any_number_is_one_line(capsys, tmp_path):
    steep = scaling.dataclasses.replace(LAW, b_d=5.0)
    path = written(tmp_path / "runs.csv", steep)
    ask = ("--compute=1e-60", "--size=1e30")
    code, out, err = run(capsys, path, *FAST, *ask)
    nearer = "; give --compute and --size nearer to the table's runs\n"
    assert code == 2 and out == ""
    assert err.endswith(f"{path}: the law has no finite loss for 1e-60 FLOPs{nearer}")
    code, out, err = run(capsys, path, *FAST, "--compute=1e-30", "--size=1e30")
    assert code == 2 and err.endswith(f" for 1e-30 FLOPs and 1e+30 weights{nearer}")
    # the same with a law that has one
    code, out, _ = run(capsys, written(path, LAW), *FAST, *ask, "--json")
    assert code == 0 and strict(out)["optima"][1]["nonzero"] == 1e30
    code, out, _ = run(capsys, path, *FAST, "--compute=1e60", "--size=1e-30", "--json")
    assert code == 0 and strict(out)["optima"][1]["nonzero"] == 1e-30


@pytest.mark.parametrize("scale", [1e-30, 1e20])
def test_tables_at_the_ends_of_what_is_allowed(capsys, tmp_path, scale):
    path = tmp_path / "runs.csv"
    values = [(s, n / 1e6 * scale, d / 1e9 * scale, x * scale) for s, n, d, x in rows()]
    path.write_text(text(values=values))
    code, out, _ = run(capsys, path, *FAST, "--json")
    assert code == 0
    for name in ("b_s", "b_n", "b_d"):
        found = strict(out)["coefficients"][name]["value"]
        assert found == pytest.approx(getattr(LAW, name), rel=1e-4)


def test_a_loss_that_never_changes(capsys, tmp_path):
    path = tmp_path / "runs.csv"
    grid = np.meshgrid([0, 0.5, 0.75, 0.875], [1, 2, 4, 8], [1, 2, 4, 8], indexing="ij")
    s, n, d = (x.ravel() for x in grid)
    path.write_text(text(values=[(*r, 2.0) for r in zip(s, 1e6 * n, 1e9 * d, strict=True)]))
    code, out, err = run(capsys, path, "--starts=4", "--bootstrap=20")
    assert code == 0 and err == "fitting ...\n"
    assert "The fit doesn't depend on data, or on weights" in out
    assert "extrapolates badly" not in out and "nan" not in out and "times its size" not in out
    code, out, _ = run(capsys, path, "--starts=4", "--bootstrap=20", "--json")
    found = strict(out)
    assert code == 0 and found["dense_equivalent"] == found["optima"] == []
    assert all(h["rmse"] is not None for h in found["held_out"])


def test_json_has_null_for_what_is_not_finite(capsys, table, monkeypatch):
    real = scaling.fit

    def doubtful(*args, **kwargs):
        return scaling.dataclasses.replace(real(*args, **kwargs), condition=np.inf, spread=np.nan)

    monkeypatch.setattr(scaling, "fit", doubtful)
    monkeypatch.setattr(Law, "dense_equivalent", lambda *_: np.float64(np.inf))
    code, out, _ = run(capsys, table, *FAST, "--json")
    found = strict(out)
    assert code == 0 and found["fit"]["condition"] is found["starts"]["spread"] is None
    assert {g["times"] for g in found["dense_equivalent"]} == {None}


def test_help_answers(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for word in ("nonzero_weights", "nats a token", "--plots=law.html", "docs/fit_scaling.md",
                 "2309.08520", "default: 200"):  # fmt: skip
        assert word in out
