"""`t5x-sparsity plan` on runs of the host in use: it says what they then are; it reads nothing."""

import dataclasses
import importlib.util
import json
import math
import re
import subprocess
import sys

import command_runs
import gin
import jax
import pytest
import tiny_t5

from t5x_sparsity import cli, host
from t5x_sparsity.core.trees import flatten

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)


@pytest.fixture
def run_file(tmp_path):
    """A run whose data, whose start and whose folder are not there, or not to be opened."""
    model_dir = tmp_path / "model_dir"
    (model_dir / "checkpoint_7/state").mkdir(parents=True)
    (model_dir / "checkpoint_7/state/_METADATA").write_bytes(b"no checkpoint")
    (model_dir / "checkpoint_7/_CHECKPOINT_METADATA").write_text("{}")
    more = "tasks.text_folder.path = '/no/such/folder'\n"
    more += (
        "t5x_sparsity.sparse_trainer.reference_losses = {'unigram': @tasks.byte_unigram_nats()}\n"
    )
    more += "tasks.byte_unigram_nats.task_or_name = 'no_such_task'\n"
    more += f"MODEL_DIR = '{model_dir}'\nTRAIN_STEPS = 1000\n"
    text = command_runs.write_run(tmp_path, more="import t5x_sparsity\n" + more)
    return text


def plan(capsys, run_file, *arguments):
    """(exit code, standard output, standard error)."""
    search = f"--gin_search_paths=.,{command_runs.ROOT / 'gin'}"
    code = cli.main(["plan", f"--gin_file={run_file}", search, *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def as_json(capsys, run_file, *arguments):
    code, out, err = plan(capsys, run_file, "--json", *arguments)
    assert code == 0, err
    return json.loads(out)


def test_a_ramp_that_jumps_is_warned_of(capsys, tmp_path):
    file = command_runs.write_run(tmp_path, "magnitude")
    assert (
        as_json(capsys, file, "--gin.TRAIN_STEPS=100", "--gin.MASK_UPDATE_PERIOD=5")["warnings"]
        == []
    )
    code, out, _ = plan(capsys, file, "--gin.TRAIN_STEPS=100", "--gin.MASK_UPDATE_PERIOD=40")
    assert code == 0
    assert "Beware: the level of Magnitude rises in 3 mask updates only, at steps 25, 65, 75" in out


def test_the_plan_is_what_a_run_then_has(capsys, run_file, tmp_path):
    files = sorted(tmp_path.rglob("*"))
    found = as_json(capsys, run_file, "--gin.SPARSITY=0.9")
    assert sorted(tmp_path.rglob("*")) == files
    assert found["host"] == host.NAME and found["is_sparse"] and found["topology"] is None
    sparse = {r["path"]: r for r in found["weights"] if r["is_sparse"]}
    wi = sparse["decoder/layers_0/mlp/wi_0/kernel"]
    assert wi["shape"] == [64, 64] and wi["axes"] == ["embed", "mlp"]
    assert wi["spec"] == [None, "model"] and wi["mask_bytes"] == 64 * 64 // 8
    assert wi["pattern"] == "Unstructured" and wi["algorithm"] == "RigL"
    totals = found["totals"]
    assert totals["sparsity"] == pytest.approx(0.9, abs=1e-3)
    assert sum(r["size"] for r in sparse.values()) == totals["sparse_weights"]
    kept = sum(r["kept"] for r in sparse.values())
    assert kept / totals["sparse_weights"] == pytest.approx(0.1, abs=1e-3)
    assert totals["kept"] == totals["weights"] - totals["sparse_weights"] + kept
    assert totals["mask_bytes"] == totals["sparse_weights"] // 8
    # on CPU, T5X splits weights over all devices
    parts = found["mesh"]["model"]
    assert totals["mask_bytes_per_device"] == totals["mask_bytes"] // parts
    shares = found["flops"]
    assert 0.1 < shares["inference_share"] < shares["training_share"] < 1
    # the whole of the dense model: 2 FLOPs a weight and token, and attention
    tokens = 8 * 32
    embedding = next(r for r in found["weights"] if "token_embedder" in r["path"])
    vocabulary, width = embedding["shape"]
    heads = sparse["decoder/layers_0/self_attention/query/kernel"]["shape"][1]
    expected = (
        2 * tokens * (totals["sparse_weights"] + vocabulary * width) + 4 * tokens * 32 * heads
    )
    assert shares["dense_forward"] == expected


def test_the_masks_of_a_real_state_are_as_large(capsys, run_file):
    from t5x_sparsity.commands import run_file as loader

    found = as_json(capsys, run_file)
    with loader.load([str(run_file)], [], [str(command_runs.ROOT / "gin")]) as config:
        # on one device, whatever the mesh
        config = dataclasses.replace(config, partitioner=tiny_t5.MeshPartitioner())
        state = config.initializer().from_scratch(jax.random.PRNGKey(0))
    masks = state._optimizer.state.sparsity.masks
    assert {p: m.nbytes for p, m in masks.items()} == {
        r["path"]: r["mask_bytes"] for r in found["weights"] if r["is_sparse"]
    }
    weights = flatten(state.params)
    assert [r["path"] for r in found["weights"]] == list(weights)
    assert [math.prod(r["shape"]) for r in found["weights"]] == [w.size for w in weights.values()]


def test_the_tables(capsys, run_file):
    code, out, _ = plan(capsys, run_file, "--gin.SPARSITY=0.5")
    assert code == 0
    assert re.search(r"wi_0/kernel +64x64 +embed, mlp +-, model +Unstructured +RigL .*4,096", out)
    assert re.search(r"^\d+ dense weights ", out, re.M) and "embedding" not in out
    assert re.search(r"^Sparse: [\d,]+ of [\d,]+ weights, 50\.\d\d% of them zero", out, re.M)
    assert re.search(r"training 0\.\d+ over 1,000 steps, inference 0\.\d+", out)
    _, out, _ = plan(capsys, run_file, "--all")
    assert re.search(r"token_embedder/embedding +\d+x64 +vocab, embed", out)


def test_a_method_with_one_threshold_has_a_total_alone(capsys, run_file, tmp_path):
    with_lamp = command_runs.write_run(tmp_path, method="lamp", more="TRAIN_STEPS = 100\n")
    found = as_json(capsys, with_lamp)
    sparse = [r for r in found["weights"] if r["is_sparse"]]
    assert all(r["sparsity"] is None and r["kept"] is None for r in sparse)
    assert found["totals"]["sparsity"] == pytest.approx(0.8, abs=1e-3)
    assert found["flops"]["training_share"] > found["flops"]["inference_share"]


def test_what_a_method_keeps_beside_masks_is_told(capsys, tmp_path):
    ste = command_runs.write_run(tmp_path, method="magnitude_ste", more="TRAIN_STEPS = 100\n")
    found = as_json(capsys, ste)["totals"]
    assert found["other_state_bytes"] == 4 * found["sparse_weights"]


def test_a_dense_run_says_so(capsys, run_file):
    text = run_file.read_text().replace("include 'sparsity/rigl.gin'\n", "")
    lines = [x for x in text.splitlines() if "sparse_trainer" not in x and "unigram" not in x]
    run_file.write_text("\n".join(lines))
    code, out, _ = plan(capsys, run_file)
    assert code == 0 and "The run is dense: it includes none of sparsity/*.gin." in out
    assert "training 1.000" in out and "inference 1.000" in out
    run_file.write_text("\n".join([*lines, "include 'sparsity/dense.gin'"]))
    code, out, _ = plan(capsys, run_file)
    assert code == 0 and "The run is dense: no weight is made sparse." in out


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--gin.SPARSTY=0.9"], "SPARSTY is bound, but nothing reads it; did you mean SPARSITY"),
        (["--gin.SPARSITY=1.5"], "sparsity (SPARSITY) must be a number in [0, 1), got 1.5"),
        (["--gin.TRAIN_STEPS=%gin.REQUIRED"],
         "TRAIN_STEPS isn't set, and mask updates and FLOPs depend on it; add, for example, "
         "--gin.TRAIN_STEPS=100000"),
        (["--gin_file=no_such.gin"], "no_such.gin"),
        (["--gin.no_such.Thing.value=1"], "no_such.Thing"),
        (["--gin.TASK_FEATURE_LENGTHS={}"], "the gin files don't make a run: "),
        (["--gin.MODEL=None"], "the gin files bind no train.model"),
        (["--gin.BATCH_SIZE=0"], "utils.DatasetConfig.batch_size is 0"),
        pytest.param(["--topology=nonsense"], "libtpu knows no TPU slice 'nonsense'",
                     marks=needs_libtpu),
        pytest.param(["--topology=v4:2x2x4"],
                     "the batch of 8 doesn't divide among the 16 data-parallel parts of v4:2x2x4; "
                     "set BATCH_SIZE to a multiple of 16", marks=needs_libtpu),
    ],
)  # fmt: skip
def test_what_can_not_be_planned_is_one_line(capsys, run_file, arguments, says):
    code, out, err = plan(capsys, run_file, *arguments)
    message = err.replace("planning ...\n", "")
    assert code == 2 and out == ""
    assert message.startswith("t5x-sparsity plan: error: ") and message.count("\n") == 1
    assert says in message


def test_a_rule_without_effect_is_refused_as_in_a_run(capsys, run_file):
    rules = """
t5x_sparsity.SparsityConfig.rules = [@t5x_sparsity.Rule()]
t5x_sparsity.Rule.path = 'nothing'
"""
    run_file.write_text(run_file.read_text() + rules)
    code, out, err = plan(capsys, run_file)
    assert code == 2 and out == ""
    assert "error: the run can't be planned: the rule for 'nothing' has no effect" in err


def test_a_missing_module_that_registers_tasks_is_passed_over(capsys, run_file):
    run_file.write_text("import no_such_package.tasks\n" + run_file.read_text())
    code, out, _ = plan(capsys, run_file)
    assert code == 0 and "Passed over, not installed: no_such_package.tasks" in out


def test_nothing_is_left_behind(capsys, run_file):
    before = jax.config.jax_default_prng_impl, list(gin.config._LOCATION_PREFIXES)
    as_json(capsys, run_file, "--gin.USE_HARDWARE_RNG=True")
    assert (jax.config.jax_default_prng_impl, gin.config._LOCATION_PREFIXES) == before
    assert not hasattr(sys.modules["__main__"], "train") and not gin.config._CONFIG


@pytest.mark.slow
def test_the_command_prints_json_alone(run_file):
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:t5x_sparsity", "-m", "t5x_sparsity.cli",
         "plan", f"--gin_file={run_file}", "--json"],
        env=command_runs.environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["host"] == host.NAME
    assert done.stderr.count("planning ...") == 1


# T5X has a default mesh for v4 alone
@pytest.mark.slow
@needs_libtpu
def test_the_steps_of_a_slice(capsys, run_file):
    bindings = ["--topology=v4:2x2x1", "--gin.host.partitioning.PjitPartitioner.num_partitions=2"]
    found = as_json(capsys, run_file, *bindings)
    totals, there = found["totals"], found["topology"]
    assert found["mesh"] == there["mesh"] == {"data": 2, "model": 2}
    assert totals["mask_bytes_per_device"] == totals["mask_bytes"] // 2
    assert there["chips"] == 4 and there["chip"] == "TPU v4" and there["fits"]
    steps = {kind: s["per_chip"] for kind, s in there["steps"].items()}
    assert list(steps) == ["dense", "plain", "update"]
    # masks are an argument more; both are laid out in tiles
    more = steps["plain"]["argument_bytes"] - steps["dense"]["argument_bytes"]
    assert totals["mask_bytes_per_device"] <= more < 8 * totals["mask_bytes_per_device"] + 10_000
    for kind in ("plain", "update"):
        for op in ("all-gather", "all-to-all", "collective-permute"):
            count = steps[kind]["collectives"].get(op, {"count": 0})["count"]
            assert count <= steps["dense"]["collectives"].get(op, {"count": 0})["count"], (kind, op)
    assert all(s["compile_seconds"] > 0 for s in there["steps"].values())


@pytest.mark.slow
@needs_libtpu
def test_a_slice_that_is_too_small_is_an_answer(capsys, run_file):
    arguments = ["--topology=v4:2x2x1", "--gin.BATCH_SIZE=800000"]
    code, out, err = plan(capsys, run_file, *arguments)
    assert code == 3, err
    assert re.search(r"^fits +no +no +no$", out, re.M)
    assert re.search(r"The update step does not fit: [\d.]+ of 30\.\d+ GiB\.", out)


@tiny_t5.t5x_only
def test_t5x_files_on_c4_without_the_package_that_reads_it(capsys):
    code, out, err = plan(
        capsys, command_runs.ROOT / "examples/t5x_rigl_c4_base.gin", "--gin.SPARSITY=0.9", "--json"
    )
    assert code == 0, err
    found = json.loads(out)
    sparse = sum(r["size"] for r in found["weights"] if r["is_sparse"])
    assert sparse == found["totals"]["sparse_weights"] == 198_180_864
    assert found["totals"]["mask_bytes"] == sparse // 8
    # ERK at 90%; embeddings and logits are dense
    assert found["flops"]["inference_share"] == pytest.approx(0.25, abs=0.1)
