"""Times whole stretches of training, dense and sparse in turn, host overhead included.

    python benchmarks/whole_run.py --devices=1
    python benchmarks/whole_run.py --devices=4

A block is one call of the trainer's `train`, as the host's own loop makes it, of as many steps as
there are from one mask update to the next: a sparse block has exactly one. Blocks of the dense and
of the sparse trainer alternate, each going first in turn, after one of each to warm up. Prints the
medians of the blocks, their ratio, and its spread over the pairs of blocks.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import commandline
import numpy as np
from tabulate import tabulate


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = commandline.parser(__doc__)
    commandline.add_model_flags(parser)
    parser.add_argument("--method", default="rigl", help="a gin file of gin/sparsity")
    parser.add_argument("--period", type=commandline.positive, default=100, help="steps per block")
    parser.add_argument("--blocks", type=commandline.positive, default=5, help="timed, a trainer")
    args = parser.parse_args(argv)
    commandline.use_devices(args.devices)
    import workload

    if args.method not in workload.methods():
        parser.error(f"unknown method {args.method!r}; choose from {', '.join(workload.methods())}")
    return args


class Run:
    """A trainer and the number of steps it has taken."""

    def __init__(self, trainer: Any, batch: Mapping):
        self.trainer = trainer
        self.batches = itertools.repeat(batch)
        self.step = 0
        self.times: list[float] = []
        trainer.compile_train(batch)

    def block(self, steps: int) -> float:
        """Trains; returns the seconds until the last array is there."""
        import jax

        tick = time.perf_counter()
        summary = self.trainer.train(self.batches, steps, start_step=self.step)
        summary.result()
        jax.block_until_ready(self.trainer.train_state)
        self.step += steps
        return time.perf_counter() - tick


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every block, and their ratio."""
    import workload

    from t5x_sparsity import host

    batch = workload.batch(args)
    # the update lies within a block, so that both ends of it are plain steps
    config = workload.config_of(
        args.method, begin=args.period // 2, period=args.period, bindings=args.binding
    )
    runs = {
        "dense": Run(workload.make_trainer(args, None), batch),
        args.method: Run(workload.make_trainer(args, config), batch),
    }
    weights = workload.weights_of(runs["dense"].trainer)
    for i in range(args.blocks + 1):
        for name in sorted(runs, reverse=i % 2 == 1):
            took = runs[name].block(args.period)
            if i > 0:
                runs[name].times.append(took)
    for run in runs.values():
        run.trainer.close()
    dense, sparse = runs["dense"].times, runs[args.method].times
    pairs = [b / a for a, b in zip(dense, sparse, strict=True)]
    return {
        "benchmark": "whole_run",
        "machine": commandline.machine(),
        "host": host.NAME,
        "weights": weights,
        **workload.settings(args, "method", "period", "blocks"),
        "times": {"dense": dense, "sparse": sparse},
        "seconds": {"dense": commandline.median(dense), "sparse": commandline.median(sparse)},
        "ratio": commandline.median(sparse) / commandline.median(dense),
        "quartiles": [float(np.quantile(pairs, q)) for q in (0.25, 0.75)],
    }


def table(results: Sequence[Mapping[str, Any]], tablefmt: str = "simple") -> str:
    rows = [
        (
            x["devices"],
            x["method"],
            f"{x['weights'] / 1e6:.1f}M",
            f"{x['blocks']} x {x['period']} steps",
            f"{x['seconds']['dense']:.2f}",
            f"{x['seconds']['sparse']:.2f}",
            f"{x['ratio']:.4f}",
            f"{x['quartiles'][0]:.3f} to {x['quartiles'][1]:.3f}",
        )
        for x in results
    ]
    headers = (
        "devices", "method", "weights", "blocks", "dense, s per block", "sparse, s per block",
        "ratio", "half of the pairs",
    )  # fmt: skip
    align = ("right", "left", *["right"] * 6)
    return tabulate(rows, headers=headers, tablefmt=tablefmt, colalign=align, disable_numparse=True)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    result = measure(args)
    print(f"{result['host']} host; {result['machine']}\n\n{table([result])}")
    commandline.write_json(args.json, result)


if __name__ == "__main__":
    main(sys.argv[1:])
