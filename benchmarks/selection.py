"""Times the selection of one RigL mask update over the number of weights, ours and a sort's.

    python benchmarks/selection.py
    python benchmarks/selection.py --weights=1M,16M --dtypes=float32 --devices=4
    python benchmarks/selection.py --plot=mask_update.svg

From weights, gradients and masks the update makes masks with 30% of the active weights dropped and
as many grown, at 80% sparsity. A sort's does the same by two stable argsorts of a flat array, and
their masks are compared bit for bit. Weights lie in one matrix, split by its columns over the
devices, or in several of --tensors that together have --tensors_weights.

Seconds are medians of --repeats, fewer where they take long. A sort is left out from the size on at
which it would take more than --sort_seconds. What doesn't fit the memory is compiled, not run.
Temporaries are those of one device. Collectives are of one update, with their MB; those that only
ties need are among them. Several numbers of devices are run one after another, each in a process.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import commandline
from tabulate import tabulate

SPARSITY = 0.8
CHUNK = 1 << 22
OURS, SORT = "ours", "sort"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = commandline.parser(__doc__)
    several, positive = commandline.several, commandline.positive
    dtype = commandline.one_of("float32", "bfloat16")
    parser.add_argument(
        "--weights", type=several(positive), default="1M,4M,16M,64M,256M", help="by comma"
    )
    parser.add_argument(
        "--dtypes", type=several(dtype), default="float32,bfloat16", help="by comma"
    )
    parser.add_argument("--devices", type=several(positive), default="1,2,4,8", help="by comma")
    parser.add_argument(
        "--tensors", type=several(positive), default="1,8,64", help="by comma, of one search"
    )
    parser.add_argument("--tensors_weights", type=positive, default="16M", help="in all of them")
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--sort_seconds", type=float, default=30.0, help="no longer sorts; 0: none")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw seconds over weights there")
    args = parser.parse_args(argv)
    most = max(args.devices)
    for weights, tensors in cases(args):
        if weights % (1024 * tensors * most):
            parser.error(
                f"{weights} weights in {tensors} tensors on {most} devices don't divide evenly; "
                f"take a multiple of {1024 * tensors * most}"
            )
    return args


def cases(args: argparse.Namespace) -> list[tuple[int, int]]:
    """(weights, tensors) of every measurement, by size."""
    sizes = [(n, 1) for n in sorted(args.weights)]
    return sizes + [(args.tensors_weights, n) for n in sorted(args.tensors) if n > 1]


def shape_of(weights: int) -> tuple[int, int]:
    """Rows, a power of 2, and columns of a matrix of so many weights, nearly square."""
    rows = 1 << (math.isqrt(weights).bit_length() - 1)
    return math.gcd(rows, weights), weights // math.gcd(rows, weights)


class Case:
    """The update of some weights on so many devices."""

    def __init__(self, weights: int, tensors: int, dtype: str, devices: int):
        import jax
        import jax.numpy as jnp
        import numpy as np
        from jax.sharding import Mesh, NamedSharding, PartitionSpec

        import t5x_sparsity as ts

        self.dtype, self.count = jnp.dtype(dtype), devices
        self.shape = shape_of(weights // tensors)
        mesh = Mesh(np.array(commandline.devices(devices)), ("model",))
        self.sharding = NamedSharding(mesh, PartitionSpec(None, "model"))
        # begins at step 0, so at the first drop fraction, 30%
        self.algorithm = ts.RigL(updates=ts.Periodic(begin=0, end=10**6, period=100))
        paths = [f"layer_{i}/kernel" for i in range(tensors)]
        like = jax.ShapeDtypeStruct(self.shape, self.dtype)
        config = ts.SparsityConfig(algorithm=self.algorithm, sparsity=SPARSITY)
        self.plan = config.plan(dict.fromkeys(paths, like), dict.fromkeys(paths, ("embed", "mlp")))

    def arguments(self):
        """Weights, gradients and masks: normal noise, and one weight in five kept."""
        import numpy as np

        rng = np.random.default_rng(0)
        size = math.prod(self.shape)
        out: tuple[dict, dict, dict] = ({}, {}, {})
        for path in self.plan:
            for kind, arrays in enumerate(out):
                flat = np.empty(size, bool if kind == 2 else self.dtype)
                # drawn in double precision, or a draw would be one of few floats
                for start in range(0, size, CHUNK):
                    part = flat[start : start + CHUNK]
                    drawn = rng.random if kind == 2 else rng.standard_normal
                    part[:] = drawn(part.size) < 1 - SPARSITY if kind == 2 else drawn(part.size)
                arrays[path] = self._put(flat.reshape(self.shape))
        return out

    def _put(self, x):
        import jax

        return jax.device_put(x, self.sharding)

    def compile(self, how: str):
        """(compiled, seconds it took)."""
        import jax

        fn = self._ours if how == OURS else self._sort
        abstract = functools.partial(jax.ShapeDtypeStruct, self.shape, sharding=self.sharding)
        weights = {p: abstract(self.dtype) for p in self.plan}
        masks = {p: abstract(bool) for p in self.plan}
        tick = time.perf_counter()
        jitted = jax.jit(fn, out_shardings=dict.fromkeys(self.plan, self.sharding))
        compiled = jitted.lower(weights, weights, masks).compile()
        return compiled, time.perf_counter() - tick

    def _ours(self, weights, grads, masks):
        import jax
        import jax.numpy as jnp

        from t5x_sparsity.algorithms import Update

        key = jax.random.key(0, impl="threefry2x32")
        update = Update(jnp.int32(0), weights, grads, masks, key)
        return self.algorithm.update_masks(self.plan, update)

    def _sort(self, weights, grads, masks):
        import jax.numpy as jnp

        fraction = self.algorithm.drop_fraction(self.algorithm.updates.progress(jnp.int32(0)))
        out = {}
        for path, layer in self.plan.items():
            kept = layer.kept
            left = kept - jnp.round(fraction * jnp.float32(kept)).astype(jnp.int32)
            drop = jnp.where(masks[path], jnp.abs(weights[path]), -1)
            stay = _largest(drop, left)
            grow = jnp.where(stay, jnp.inf, jnp.abs(grads[path]))
            out[path] = _largest(grow, kept)
        return out

    def fits(self, step: Mapping[str, int]) -> bool:
        """Whether a CPU's memory has room for a compiled update and its arguments."""
        import jax

        if jax.default_backend() != "cpu":
            return True
        free = _free_bytes()
        return free is None or step["peak_bytes"] * self.count < 0.8 * free


def _largest(scores, k):
    """The mask of the k largest by a stable sort; ties to the lower index."""
    import jax.numpy as jnp

    flat = scores.reshape(-1)
    last = jnp.argsort(flat, descending=True, stable=True)[k - 1]
    at_most = jnp.arange(flat.size) <= last
    return ((flat > flat[last]) | ((flat == flat[last]) & at_most)).reshape(scores.shape)


def _free_bytes() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def timed(programs: Mapping[str, Any], arguments, repeats: int) -> tuple[dict, dict]:
    """Seconds of so many runs of each after one to warm up, in turn; and the masks of each.

    Where runs take long there are fewer, so many as there are in 20 seconds.
    """
    import jax

    times: dict[str, list[float]] = {how: [] for how in programs}
    masks = {}
    for _ in range(repeats + 1):
        for how, compiled in programs.items():
            if sum(times[how]) < 20:
                tick = time.perf_counter()
                masks[how] = jax.block_until_ready(compiled(*arguments))
                times[how].append(time.perf_counter() - tick)
    return {how: taken[1:] or taken for how, taken in times.items()}, masks


def measure(args: argparse.Namespace, devices: int) -> list[dict[str, Any]]:
    """The points of one number of devices."""
    points: list[dict[str, Any]] = []
    for dtype in args.dtypes:
        sort_rate = 0.0  # seconds per weight, at the size before
        for weights, tensors in cases(args):
            case = Case(weights, tensors, dtype, devices)
            sorts = [SORT] if sort_rate * weights * 1.2 < args.sort_seconds else []
            found, programs = {}, {}
            for how in [OURS, *sorts]:
                programs[how], seconds = case.compile(how)
                found[how] = {
                    "how": how,
                    "weights": weights,
                    "tensors": tensors,
                    "dtype": dtype,
                    "devices": devices,
                    "compile_seconds": seconds,
                    **commandline.described(programs[how]),
                }
            fitting = {how: x for how, x in programs.items() if case.fits(found[how])}
            times, masks = timed(fitting, case.arguments() if fitting else (), args.repeats)
            if len(masks) == 2:
                check_equal(masks[OURS], masks[SORT], weights)
            for how, point in found.items():
                point["times"] = times.get(how, [])
                point["seconds"] = commandline.median(point["times"])
                points.append(point)
                took = "not run" if point["seconds"] is None else f"{point['seconds']:.3f} s"
                print(
                    f"{how}, {millions(weights)} weights, tensors: {tensors}, {dtype}, "
                    f"devices: {devices}: {took}",
                    file=sys.stderr,
                    flush=True,
                )
            if tensors == 1 and times.get(SORT):
                sort_rate = found[SORT]["seconds"] / weights
    return points


def check_equal(masks: Mapping[str, Any], expected: Mapping[str, Any], weights: int) -> None:
    """Raises RuntimeError unless the masks are the same."""
    import numpy as np

    if any(not np.array_equal(masks[p], expected[p]) for p in expected):
        raise RuntimeError(f"the masks of {weights} weights are not those of a sort")


def millions(weights: int) -> str:
    """A number of weights, M for 2 to the 20th."""
    return f"{weights / 2**20:.4g}M"


def in_processes(args: argparse.Namespace, argv: Sequence[str]) -> dict[str, Any]:
    """The results of every number of devices, each from a process of its own."""
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in args.devices:
            file = Path(folder) / f"{count}.json"
            # later flags override earlier ones
            command = [sys.executable, __file__, *argv, f"--devices={count}", f"--json={file}"]
            done = subprocess.run(command, stdout=subprocess.DEVNULL)
            if done.returncode:
                raise SystemExit(f"the run with --devices={count} failed")
            one = json.loads(file.read_text())
            points = result.get("points", []) + one["points"]
            result = {**one, "points": points}
    return result


def table(result: Mapping[str, Any], tablefmt: str = "simple") -> str:
    mb, seen = commandline.megabytes, {}
    for p in result["points"]:
        key = (p["devices"], p["dtype"], p["tensors"], p["weights"])
        seen.setdefault(key, {})[p["how"]] = p
    rows = []
    for (devices, dtype, tensors, weights), found in seen.items():
        ours, sort = found[OURS], found.get(SORT)
        both = sort and ours["seconds"] and sort["seconds"]
        rows.append(
            (
                millions(weights),
                tensors,
                dtype,
                devices,
                _seconds(ours),
                _seconds(sort),
                f"{sort['seconds'] / ours['seconds']:.1f}" if both else "",
                mb(ours["temp_bytes"]),
                mb(sort["temp_bytes"]) if sort else "",
                commandline.collectives_text(ours["collectives"]),
                commandline.collectives_text(sort["collectives"]) if sort else "",
            )
        )
    headers = (
        "weights", "tensors", "dtype", "devices", "ours, s", "sort, s", "sort / ours",
        "temporaries, MB", "a sort's", "collectives (MB)", "a sort's",
    )  # fmt: skip
    align = ("right", "right", "left", *["right"] * 6, "left", "left")
    return tabulate(rows, headers=headers, tablefmt=tablefmt, colalign=align, disable_numparse=True)


def _seconds(point: Mapping[str, Any] | None) -> str:
    if point is None:
        return ""
    return "not run" if point["seconds"] is None else f"{point['seconds']:.3f}"


def plot(points: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws seconds over weights, both by powers of ten."""
    import matplotlib

    matplotlib.use("Agg")
    # text as text, and nothing that differs from one drawing to the next
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "mask_update"})
    from matplotlib import pyplot

    curves: dict[tuple, list[tuple[int, float]]] = {}
    few, many = min(p["devices"] for p in points), max(p["devices"] for p in points)
    for p in points:
        shown = p["devices"] == few or (p["devices"] == many and p["dtype"] == "float32")
        if p["tensors"] == 1 and p["seconds"] and shown:
            key = (p["how"], p["dtype"], p["devices"])
            curves.setdefault(key, []).append((p["weights"], p["seconds"]))
    figure, axes = pyplot.subplots(figsize=(8.5, 4))
    for (how, dtype, devices), curve in sorted(curves.items()):
        axes.plot(
            *zip(*sorted(curve), strict=True),
            color="tab:blue" if how == OURS else "tab:red",
            linestyle="-" if devices == few else "--",
            marker="o" if dtype == "float32" else "^",
            label=f"{'t5x_sparsity' if how == OURS else 'a sort'}, {dtype}, "
            f"{devices} device{'s' if devices > 1 else ''}",
        )
    axes.set(xscale="log", yscale="log", xlabel="weights", ylabel="seconds a mask update")
    axes.grid(True, which="major", alpha=0.4)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parse(argv)
    if len(args.devices) > 1:
        result = in_processes(args, argv)
    else:
        (count,) = args.devices
        commandline.use_devices(count)
        points = measure(args, count)
        result = {
            "benchmark": "selection",
            "machine": commandline.machine(),
            "repeats": args.repeats,
            "sort_seconds": args.sort_seconds,
            "points": points,
        }
    print(f"{result['machine']}\n\n{table(result)}")
    commandline.write_json(args.json, result)
    if args.plot:
        plot(result["points"], args.plot)


if __name__ == "__main__":
    main()
