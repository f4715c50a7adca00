"""What `pip install .` alone can do, and what it says of the rest; `.ci/wheel` runs it.

Run by an environment that has the package and no extra: it exits with an error where something
doesn't hold.
"""

import importlib.util
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax

import t5x_sparsity as ts


def train(algorithm, **config):
    """The loss before and after 60 steps of a least-squares problem, and the share of zeros."""
    key = jax.random.key(0)
    x = jax.random.normal(key, (256, 32))
    truth = jnp.where(jax.random.uniform(jax.random.key(1), (32, 16)) < 0.2, 1.0, 0.0)
    params = {"dense": {"kernel": jax.random.normal(jax.random.key(2), (32, 16))}}
    tx = ts.sparsify(optax.adamw(3e-2), algorithm, sparsity=0.75, **config)
    state = tx.init(params)
    params = ts.apply_masks(params, state)

    def loss_of(params):
        return jnp.mean((x @ params["dense"]["kernel"] - x @ truth) ** 2)

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for _ in range(60):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    zeros = float(jnp.mean(params["dense"]["kernel"] == 0))
    print(ts.summary_table(ts.sparsity_summary(params, state)))
    return losses[0], losses[-1], zeros


def one_line_of(*command):
    """What a command that can't run says."""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1, (command, done.returncode, done.stderr)
    return lines[0]


def is_installed(name):
    """Whether there is such a package; a folder of that name, such as 'gin/', is none."""
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None


def main():
    """Runs every check."""
    for name in ("tensorflow", "flax", "seqio", "orbax", "gin"):
        assert not is_installed(name), f"{name} is installed: is this the base?"
    updates = ts.Periodic(begin=5, end=40, period=5)
    for algorithm, pattern in (
        (ts.RigL(updates=updates), None),
        (ts.Magnitude(updates=updates), ts.NByM(n=1, m=4)),
    ):
        first, last, zeros = train(algorithm, pattern=pattern)
        assert last < first / 2 and zeros == 0.75, (algorithm, first, last, zeros)
    cli = ("-m", "t5x_sparsity.cli")
    for command, extra in (
        ((*cli, "inspect", "run"), "tools"),
        ((*cli, "export", "run", "x.safetensors"), "tools"),
        ((*cli, "report", "run"), "tools"),
        ((*cli, "fit-scaling", "runs.csv"), "tools"),
        ((*cli, "plan", "--gin_file=run.gin"), "embedded"),
        (("-m", "t5x_sparsity.train", "--gin_file=run.gin"), "embedded"),
    ):
        line = one_line_of(*command)
        assert f"t5x_sparsity[{extra}" in line and "pip install" in line, line
    for name in ("sparse_trainer", "SparseOptimizer", "load_export", "host"):
        try:
            getattr(ts, name)
        except ImportError as e:
            assert "pip install" in str(e) and "\n" not in str(e), (name, e)
        else:
            raise AssertionError(f"{name} needs no extra?")
    print("the base install does what it should")


if __name__ == "__main__":
    main()
