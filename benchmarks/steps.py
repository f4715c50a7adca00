"""Times the plain and the mask-update train step against the dense one, on the host in use.

    python benchmarks/steps.py --devices=1
    python benchmarks/steps.py --devices=4
    python benchmarks/steps.py --methods=rigl,magnitude,snfs,magnitude_ste,top_kast

Methods are gin files of gin/sparsity, with their defaults but for the steps of mask updates. All
trainers take their steps in turn, so that a drift of the machine's speed hits all alike; a first
period of steps is left out. JaxPruner's RigL is timed next to RigL where it can be imported: see
peer.py for how it had to be mended.

Prints medians and ratios. `extra` is the time that a mask update adds to a step, in plain steps of
the same run. `compile` is the median time of tracing and compiling, in dense compiles; JaxPruner
has one program for both kinds of step. The bytes are those of one device: arguments and
temporaries as XLA has them, and of the arguments those that are masks. Collectives are those of one
step, each with its MB; JaxPruner's hold for its update steps, as all branches of a conditional
count.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import commandline
from tabulate import tabulate

PEER = "JaxPruner rigl"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = commandline.parser(__doc__)
    commandline.add_model_flags(parser)
    several = commandline.several
    parser.add_argument("--methods", type=several(str), default=["rigl"], help="by comma")
    parser.add_argument("--steps", type=commandline.positive, default=30, help="timed, a trainer")
    parser.add_argument(
        "--period", type=commandline.positive, default=5, help="steps between mask updates"
    )
    parser.add_argument("--compiles", type=commandline.positive, default=1, help="timed, per step")
    parser.add_argument(
        "--peer",
        choices=("auto", "yes", "no"),
        default="auto",
        help="time JaxPruner too; auto: where it can be imported and compared",
    )
    args = parser.parse_args(argv)
    if args.steps <= args.period:
        parser.error(f"--steps={args.steps} has no whole --period of {args.period}; take more")
    commandline.use_devices(args.devices)
    import peer
    import workload

    unknown = [m for m in args.methods if m not in workload.methods()]
    if unknown:
        parser.error(f"unknown methods {unknown}; choose from {', '.join(workload.methods())}")
    comparable = "rigl" in args.methods and args.optimizer == "adamw"
    if args.peer == "yes" and not comparable:
        parser.error("--peer=yes needs rigl among the --methods, and --optimizer=adamw")
    if args.peer == "yes" and peer.missing():
        parser.error(f"--peer=yes needs {', '.join(peer.missing())}, which can't be imported")
    args.peer = args.peer != "no" and comparable and not peer.missing()
    return args


class Run:
    """A trainer's steps, compiled; their state is kept as the flat list of its arrays."""

    def __init__(self, name: str, trainer: Any):
        self.name = name
        self.trainer = trainer
        self.compiled: dict[str, Any] = {}
        self.compile_times: dict[str, list[float]] = {}
        self.times: dict[str, list[float]] = {}
        self._leaves: list = []

    def compile(self, batch: Mapping) -> None:
        """Compiles every step anew."""
        import jax
        import workload

        for kind, step in workload.steps_of(self.trainer).items():
            jax.clear_caches()
            tick = time.perf_counter()
            self.compiled[kind] = step.lower(self.trainer.train_state, batch).compile()
            self.compile_times.setdefault(kind, []).append(time.perf_counter() - tick)

    def start(self) -> None:
        """Takes the trainer's state; the first step destroys it."""
        import jax

        self._leaves = jax.tree.leaves(self.trainer.train_state)

    def step(self, kind: str, batch: Mapping) -> float:
        """Takes a step; returns its seconds."""
        import jax

        compiled = self.compiled[kind if kind in self.compiled else "plain"]
        leaves = [*self._leaves, *jax.tree.leaves(batch)]
        arguments, _ = jax.tree.unflatten(compiled.in_tree, leaves)
        tick = time.perf_counter()
        out = jax.block_until_ready(compiled(*arguments))
        took = time.perf_counter() - tick
        self._leaves = jax.tree.leaves(out[0])
        return took


def runs_of(args: argparse.Namespace) -> list[Run]:
    """Dense, each method, and JaxPruner where it is asked for."""
    import peer
    import workload

    runs = [Run("dense", workload.make_trainer(args, None))]
    for method in args.methods:
        config = workload.config_of(
            method, begin=args.period, period=args.period, bindings=args.binding
        )
        run = Run(method, workload.make_trainer(args, config))
        runs.append(run)
        if method == "rigl" and args.peer:
            state = run.trainer.train_state._optimizer.state
            optimizer = peer.rigl(
                set(state.sparsity.masks),
                sparsity=config.sparsity,
                period=args.period,
                drop_fraction=config.algorithm.drop_fraction.initial,
                end=workload.TOTAL_STEPS,
            )
            runs.append(Run(PEER, workload.make_trainer(args, None, optimizer)))
    return runs


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything the table shows, and the times behind it."""
    import jax
    import workload

    from t5x_sparsity import host

    batch = workload.batch(args)
    runs = runs_of(args)
    # what the first trace and the first compilation of a process take is nobody's own
    workload.steps_of(runs[0].trainer)["plain"].lower(runs[0].trainer.train_state, batch)
    jax.jit(lambda x: x + 1).lower(1.0).compile()
    for _ in range(args.compiles):
        for run in runs:
            run.compile(batch)
    found = []
    for run in runs:
        if run.name == PEER:  # one program; when it updates masks is known beforehand
            run.times["update"] = []
        for kind, compiled in run.compiled.items():
            run.times.setdefault(kind, [])
            found.append(
                {
                    "run": run.name,
                    "step": kind,
                    "mask_bytes": workload.mask_bytes(run.trainer),
                    "compile_times": run.compile_times[kind],
                    **commandline.described(compiled),
                }
            )
    weights = workload.weights_of(runs[0].trainer)
    for run in runs:
        run.start()
    for i in range(args.period + 1 + args.steps):
        for run in runs:
            kind = "update" if i % args.period == 0 and "update" in run.times else "plain"
            took = run.step(kind, batch)
            if i > args.period:
                run.times[kind].append(took)
    times = {(run.name, kind): taken for run in runs for kind, taken in run.times.items()}
    if (PEER, "update") in times:
        (own,) = (x for x in found if x["run"] == PEER)
        found.append({**own, "step": "update"})
    for run in runs:
        run.trainer.close()
    dense = commandline.median(times["dense", "plain"])
    dense_compile = commandline.median(found[0]["compile_times"])
    for x in found:
        x["times"] = times[x["run"], x["step"]]
        x["seconds"] = commandline.median(x["times"])
        x["ratio"] = x["seconds"] / dense
        plain = commandline.median(times[x["run"], "plain"])
        x["extra"] = (x["seconds"] - plain) / plain if x["step"] == "update" else None
        x["compile_seconds"] = commandline.median(x["compile_times"])
        x["compile_ratio"] = x["compile_seconds"] / dense_compile
    return {
        "benchmark": "steps",
        "machine": commandline.machine(),
        "host": host.NAME,
        "weights": weights,
        **workload.settings(args, "methods", "steps", "period", "compiles"),
        "steps_timed": found,
    }


def title(result: Mapping[str, Any]) -> str:
    return (
        f"{result['host']} host, {result['weights'] / 1e6:.1f}M weights, {result['optimizer']}, "
        f"devices: {result['devices']}; {result['machine']}"
    )


def table(result: Mapping[str, Any], tablefmt: str = "simple") -> str:
    mb = commandline.megabytes
    rows = [
        (
            x["run"],
            x["step"],
            f"{x['seconds']:.4f}",
            f"{x['ratio']:.3f}",
            "" if x["extra"] is None else f"{x['extra']:.2f}",
            f"{x['compile_ratio']:.2f}",
            mb(x["argument_bytes"]),
            mb(x["temp_bytes"]),
            mb(x["mask_bytes"]),
            commandline.collectives_text(x["collectives"]),
        )
        for x in result["steps_timed"]
    ]
    headers = (
        "run", "step", "seconds", "x dense", "extra", "compile, x dense", "arguments, MB",
        "temporaries, MB", "masks, MB", "collectives (MB)",
    )  # fmt: skip
    align = ("left", "left", *["right"] * 7, "left")
    return tabulate(rows, headers=headers, tablefmt=tablefmt, colalign=align, disable_numparse=True)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    result = measure(args)
    print(f"{title(result)}\n\n{table(result)}")
    commandline.write_json(args.json, result)


if __name__ == "__main__":
    main(sys.argv[1:])
