"""A checkpoint that one host has written goes on in the other.

Both keep the position in the training data in their own way, so save_dataset is False, as it is in
T5X's run files.
"""

import subprocess
import sys

import numpy as np
import pytest
import tiny_t5
from command_runs import environment
from inprocess_runs import assert_same
from xla_flags import QUICK_COMPILE

from t5x_sparsity.core import packing

pytestmark = [tiny_t5.t5x_only, pytest.mark.slow]

# each host in a process of its own: a process has one
SCRIPT = """
import sys
sys.path[:0] = {paths!r}
import numpy as np
import inprocess_runs
import tiny_t5
from t5x_sparsity import host

assert host.NAME == {host!r}
config = tiny_t5.rigl(0.5, begin=1, end=7, period=2) if {sparse!r} else None
restore = inprocess_runs.restore_dense({dense!r}) if {dense!r} else None
if {sparse_from!r}:
    restore = host.utils.RestoreCheckpointConfig(path={sparse_from!r}, mode="latest")
leaves = inprocess_runs.run(
    {model_dir!r}, config, {steps!r}, optimizer={optimizer!r},
    restore=restore, save={{"save_dataset": False}},
)
np.savez({result!r}, **leaves)
"""


def train(
    name,
    model_dir,
    steps,
    *,
    sparse=True,
    dense=None,
    sparse_from=None,
    optimizer="adamw",
):
    """Trains up to `steps` on the host of that name, saving every 2; the leaves at the end."""
    result = f"{model_dir}_{steps}.npz"
    text = SCRIPT.format(
        host=name,
        paths=[str(tiny_t5.ROOT / "tests/host"), str(tiny_t5.ROOT / "tests")],
        model_dir=str(model_dir),
        steps=steps,
        sparse=sparse,
        dense=dense and str(dense),
        sparse_from=sparse_from and str(sparse_from),
        optimizer=optimizer,
        result=result,
    )
    done = subprocess.run(
        [sys.executable, "-c", text],
        env={**environment(1, QUICK_COMPILE), "T5X_SPARSITY_HOST": name},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return dict(np.load(result))


def kept(leaves):
    prefix = "state/sparsity/masks/"
    stored = {k[len(prefix) :]: v for k, v in leaves.items() if k.startswith(prefix)}
    found = {
        p: np.asarray(packing.unpack(v, leaves[f"target/{p}"].shape)) for p, v in stored.items()
    }
    assert found
    return found


@pytest.mark.parametrize(
    ("first", "second", "optimizer"),
    [("t5x", "embedded", "adafactor"), ("embedded", "t5x", "adamw")],
)
def test_a_sparse_run_goes_on_in_the_other_host(tmp_path, first, second, optimizer):
    model_dir = tmp_path / "run"
    before = train(first, model_dir, 4, optimizer=optimizer)
    # as it is read
    restored = train(second, tmp_path / "copy", 4, optimizer=optimizer, sparse_from=model_dir)
    assert_same(restored, before)
    after = train(second, model_dir, 8, optimizer=optimizer)
    assert int(after["state/step"]) == 8 and after.keys() == before.keys()
    moved = 0
    for path, mask in kept(after).items():
        assert mask.sum() == kept(before)[path].sum()
        assert (after[f"target/{path}"][~mask] == 0).all()
        moved += (mask != kept(before)[path]).sum()
    assert moved


@pytest.mark.parametrize(("first", "second"), [("t5x", "embedded"), ("embedded", "t5x")])
def test_a_dense_checkpoint_starts_a_sparse_run_in_the_other_host(tmp_path, first, second):
    dense = train(first, tmp_path / "dense", 4, sparse=False)
    path = tmp_path / "dense/checkpoint_4"
    start = train(second, tmp_path / "start", 4, dense=path)
    for name, leaf in dense.items():
        if name.startswith("state/"):
            np.testing.assert_array_equal(start[name], leaf, err_msg=name)
    for name, mask in kept(start).items():
        weight = dense[f"target/{name}"]
        np.testing.assert_array_equal(start[f"target/{name}"], np.where(mask, weight, 0))
        assert mask.sum() == mask.size // 2
    end = train(second, tmp_path / "run", 6, dense=path)
    assert int(end["state/step"]) == 6 and end.keys() == start.keys()
