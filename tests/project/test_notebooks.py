"""The notebooks run from top to bottom, and end at what they say."""

import importlib.util
import json
import os
import re
import shutil
import sys

import pytest
import tiny_t5

EXAMPLES = tiny_t5.ROOT / "examples"
NOTEBOOKS = sorted(p.name for p in EXAMPLES.glob("*.ipynb"))


def run(name, folder, result):
    """The value of the expression `result` at the end of the notebook, run in `folder`."""
    for needed in ("nbclient", "ipykernel", "matplotlib", "mlxtend"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"needs {needed}: pip install '.[docs]'")
    import nbclient
    import nbformat

    notebook = nbformat.read(EXAMPLES / name, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(f"import json; print(json.dumps({result}))"))
    shutil.copy(EXAMPLES / "rigl_stdlib.gin", folder)
    client = nbclient.NotebookClient(
        notebook, timeout=1200, resources={"metadata": {"path": str(folder)}}
    )
    # no kernel that is registered on the machine, but this very Python
    kernel = client.create_kernel_manager()
    kernel.kernel_spec.argv = [
        sys.executable,
        "-m",
        "ipykernel_launcher",
        "-f",
        "{connection_file}",
    ]
    path = os.pathsep.join([str(tiny_t5.ROOT), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
    client.execute(env={**os.environ, "PYTHONPATH": path, "XLA_FLAGS": "", "MPLBACKEND": ""})
    return json.loads(notebook.cells[-1].outputs[-1].text)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_saved_as_run_from_top_to_bottom(name):
    notebook = json.loads((EXAMPLES / name).read_text())
    cells = [c for c in notebook["cells"] if c["cell_type"] == "code"]
    assert [c["execution_count"] for c in cells] == list(range(1, len(cells) + 1))
    outputs = [o for c in cells for o in c["outputs"]]
    assert any("image/png" in o.get("data", {}) for o in outputs)
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    shown = json.dumps(
        [{**o.get("data", {}), "image/png": ""} | {"text": o.get("text")} for o in outputs]
    )
    assert not re.search(
        r"/(home|tmp|root|opt|work|usr)/|site-packages", shown + json.dumps(cells[0])
    )
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"


def test_there_are_two():
    assert NOTEBOOKS == ["mnist_optax.ipynb", "sparse_t5.ipynb"]


@pytest.mark.slow
def test_digits_by_optax(tmp_path):
    result = "{name: (curve[-1], kept(params)) for name, (params, _, curve) in runs.items()}"
    found = run("mnist_optax.ipynb", tmp_path, result)
    dense, rigl, gradual = (found[n] for n in ("dense", "RigL", "gradual magnitude"))
    assert dense[0] > 92 and dense[1] > 0.99
    assert rigl[0] > dense[0] - 5 and gradual[0] > dense[0] - 3
    assert abs(rigl[1] - 0.05) < 1e-4 and abs(gradual[1] - 0.05) < 1e-4


@pytest.mark.slow
def test_a_sparse_t5_from_run_to_report(tmp_path):
    result = (
        "{'loss': {n: list(r.evals['stdlib_lm']['loss_per_nonpadding_target_token'].values) "
        "for n, r in runs.items()}, "
        "'sparsity': {n: r.group('sparsity')['total'].last for n, r in runs.items()}}"
    )
    found = run("sparse_t5.ipynb", tmp_path, result)
    for name in ("rigl", "magnitude"):
        loss = found["loss"][name]
        assert len(loss) == 4 and loss[-1] < loss[0] and loss[-1] < 3.24  # the byte unigram's
        assert abs(found["sparsity"][name] - 0.8) < 1e-3
    runs = tmp_path / "runs/sparse_t5"
    page = (runs / "report.html").read_text()
    assert page.lstrip().lower().startswith("<!doctype html") and "Gradual" in page
    small, dense = (runs / f"{n}.safetensors" for n in ("small", "dense"))
    assert small.stat().st_size < 0.5 * dense.stat().st_size
