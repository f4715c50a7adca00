"""`t5x-sparsity report` on a run of the host in use: what training wrote is what the page has."""

import json
import re

import command_runs
import pytest

from t5x_sparsity import cli


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    more = "MASK_UPDATE_PERIOD = 2\n"
    result = command_runs.run(command_runs.write_run(folder, more=more), folder / "run")
    assert result.returncode == 0, result.stdout[-4000:]
    return folder / "run"


def report(capsys, *arguments):
    """(exit code, standard output, standard error)."""
    code = cli.main(["report", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.slow
def test_the_page_has_all_that_the_run_wrote(capsys, model_dir, tmp_path):
    out = tmp_path / "page.html"
    code, text, err = report(capsys, model_dir, "--json", "--out", out)
    assert (code, err) == (0, "")
    (run,) = json.loads(text)["runs"]
    record = json.loads((model_dir / "sparsity.json").read_text())
    assert run["methods"] == ["RigL"] and run["patterns"] == ["Unstructured"]
    assert run["steps"] == run["total_steps"] == 8 and run["remarks"] == []
    assert run["sparsity"] == pytest.approx(0.8, abs=1e-2)
    assert run["sparsity"] == pytest.approx(run["sparsity_target"], abs=1e-3)
    assert run["weights"] > run["sparse_weights"] > 0
    assert 0 < run["flops_inference_share"] <= run["flops_training_share"] <= 1
    (validation,) = run["validation"].values()
    assert validation["step"] == 8 and 0 < validation["loss"] < 10
    page = out.read_text()
    charts = re.search(r'id="charts">(.*?)</script>', page)[1]
    found = {c["id"] for c in json.loads(charts)}
    assert {
        "chart-train-loss", "chart-validation-0", "chart-sparsity", "chart-churn",
        "chart-churn-layers-0", "chart-flops", "chart-flops-share",
    } <= found  # fmt: skip
    assert all(path in page for path in record)
    assert 'class="pixels"' in page and 'class="fan-in"' in page
    assert 'class="notes"' not in page


@pytest.mark.slow
def test_a_run_that_was_stopped_while_it_wrote_is_shown_as_far_as_it_got(
    capsys, model_dir, tmp_path
):
    folder = tmp_path / "run/train"
    folder.mkdir(parents=True)
    for path in (model_dir / "train").glob("events*"):
        data = path.read_bytes()
        (folder / path.name).write_bytes(data[: len(data) // 2])
    code, text, err = report(capsys, folder.parent, "--json")
    assert (code, err) == (0, "")
    (run,) = json.loads(text)["runs"]
    assert run["steps"] < 8 or run["validation"] == {}
    assert "ends in the middle of an event" in run["remarks"][0]


@pytest.mark.slow
def test_a_checkpoint_is_no_run(capsys, model_dir):
    folder = model_dir / "checkpoint_8"
    code, out, err = report(capsys, folder)
    assert (code, out) == (2, "")
    assert err == (
        f"t5x-sparsity report: error: {folder} is a checkpoint; give the folder that it is in\n"
    )
    assert not list(folder.glob("*.html"))
