"""Compiles T5 1.1 train steps ahead of time for TPU slices that are not here, dense and sparse.

    python benchmarks/slices.py --sizes=base --topology=v5e:4x4
    python benchmarks/slices.py --sizes=xl --topology=v5e:8x8 --param_dims=2

It needs libtpu from the package index, and no TPU. Prints what each chip takes, in MB: arguments,
temporaries, the peak of both, masks, and collectives with their MB; and seconds of compiling on
this machine. A program that is too large for the chip is refused by the compiler, which the table
says. Weights are float32 and activations bfloat16, without dropout.

`t5x-sparsity plan --topology=...` shows the same for a run of your own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import commandline
from tabulate import tabulate

# d_model, layers of each half, heads, d_ff
SIZES = {
    "small": (512, 8, 6, 1024),
    "base": (768, 12, 12, 2048),
    "large": (1024, 24, 16, 2816),
    "xl": (2048, 24, 32, 5120),
    "xxl": (4096, 24, 64, 10240),
}
STEPS = ("dense", "plain", "update")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = commandline.parser(__doc__)
    several, positive, one_of = commandline.several, commandline.positive, commandline.one_of
    parser.add_argument("--sizes", type=several(one_of(*SIZES)), default="base", help="by comma")
    parser.add_argument("--topology", default="v5e:4x4", help="a slice that libtpu knows")
    parser.add_argument("--model_parallel", type=positive, default=4, help="chips a model")
    parser.add_argument(
        "--param_dims", type=int, choices=(1, 2), default=1, help="2: weights split both ways"
    )
    parser.add_argument("--layers", type=positive, help="of each half; the size's own by default")
    parser.add_argument("--vocab", type=positive, default=32128)
    parser.add_argument("--batch", type=positive, default=64, help="sequences, of all chips")
    parser.add_argument("--length", type=positive, default=512, help="tokens a sequence")
    parser.add_argument("--optimizer", choices=("adamw", "adafactor"), default="adafactor")
    parser.add_argument("--method", default="rigl", help="a gin file of gin/sparsity")
    parser.add_argument("--binding", action="append", default=[], help="a gin binding")
    parser.add_argument("--steps", type=several(one_of(*STEPS)), default=",".join(STEPS))
    args = parser.parse_args(argv)
    commandline.use_devices(1)
    import workload

    from t5x_sparsity import host
    from t5x_sparsity.ahead_of_time import slices as aot

    if args.method not in workload.methods():
        parser.error(f"unknown method {args.method!r}; choose from {', '.join(workload.methods())}")
    try:
        args.slice = aot.get_slice(args.topology, one_process=host.NAME == "embedded")
    except aot.TopologyError as e:
        parser.error(str(e))
    chips = len(args.slice.devices)
    if chips % args.model_parallel:
        parser.error(
            f"--model_parallel={args.model_parallel} doesn't divide the {chips} chips of "
            f"{args.topology}"
        )
    if args.batch % (chips // args.model_parallel):
        parser.error(
            f"--batch={args.batch} doesn't divide among the {chips // args.model_parallel} "
            "data-parallel parts; take a multiple"
        )
    return args


def partitioner_of(args: argparse.Namespace) -> Any:
    """The host's partitioner, over the slice."""
    import workload

    from t5x_sparsity import host
    from t5x_sparsity.ahead_of_time import slices as aot

    rules = host.partitioning.standard_logical_axis_rules(
        parameter_partitioning_dims=args.param_dims
    )
    devices = args.slice.devices
    with aot.on_slice(args.slice):
        return workload.Partitioner(devices, args.model_parallel, logical_axis_rules=rules)


def measure(args: argparse.Namespace, size: str) -> list[dict[str, Any]]:
    """What each step of a model takes on a chip."""
    import jax
    import jax.numpy as jnp
    import workload
    from jax.sharding import NamedSharding

    from t5x_sparsity.ahead_of_time import slices as aot

    partitioner = partitioner_of(args)
    mesh, shape = partitioner.mesh, (args.batch, args.length)
    sharding = NamedSharding(mesh, partitioner.data_partition_spec)
    batch = {
        k: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding) for k in workload.FEATURES
    }
    d_model, layers, heads, d_ff = SIZES[size]
    layers = args.layers or layers
    sparse = workload.config_of(args.method, begin=0, period=100, bindings=args.binding)
    found = []
    for config in (None, sparse):
        optimizer = workload.optimizer(args.optimizer)
        net = workload.t5(optimizer, args.vocab, d_model, layers, heads, d_ff, "bfloat16")

        def state_of(initializer):
            return aot.placed(
                initializer.global_train_state_shape, initializer.train_state_axes, mesh
            )

        with aot.on_slice(args.slice):
            trainer = workload.assemble(net, optimizer, partitioner, config, shape, state_of)
            steps = workload.steps_of(trainer)
        for kind, step in steps.items():
            name = "dense" if config is None else kind
            if name not in args.steps:
                continue
            made = aot.compile_step(step, args.slice, trainer.train_state, batch)
            found.append(
                {
                    "size": size,
                    "layers": layers,
                    "step": name,
                    "weights": workload.weights_of(trainer),
                    "mask_bytes": workload.mask_bytes(trainer),
                    "compile_seconds": made.compile_seconds,
                    "needed_bytes": made.needed_bytes,
                    "available_bytes": made.available_bytes,
                    **({} if made.per_chip is None else commandline.described(made.per_chip)),
                }
            )
            print(
                f"{size}, {name}: compiled in {made.compile_seconds:.0f} s",
                file=sys.stderr,
                flush=True,
            )
        trainer.close()
    return found


def table(result: Mapping[str, Any], tablefmt: str = "simple") -> str:
    mb = commandline.megabytes
    dense = {x["size"]: x["compile_seconds"] for x in result["compiled"] if x["step"] == "dense"}
    rows = []
    for x in result["compiled"]:
        fits = "temp_bytes" in x
        ratio = f" ({x['compile_seconds'] / dense[x['size']]:.1f}x)" if x["size"] in dense else ""
        sizes = [mb(x[k]) for k in ("argument_bytes", "temp_bytes", "peak_bytes")] if fits else []
        rows.append(
            (
                x["size"],
                f"{x['weights'] / 1e6:,.0f}M",
                x["step"],
                *(sizes or ("", "", _refused(x))),
                mb(x["mask_bytes"]),
                commandline.collectives_text(x["collectives"]) if fits else "",
                f"{x['compile_seconds']:.0f} s{ratio}",
            )
        )
    headers = (
        "T5 1.1", "weights", "step", "arguments", "temporaries", "peak", "masks",
        "collectives (MB)", "compiling",
    )  # fmt: skip
    align = ("left", "right", "left", *["right"] * 4, "left", "right")
    return tabulate(rows, headers=headers, tablefmt=tablefmt, colalign=align, disable_numparse=True)


def _refused(x: Mapping[str, Any]) -> str:
    if not x["needed_bytes"]:
        return "does not fit"
    return f"{commandline.megabytes(x['needed_bytes'])}: does not fit"


def title(result: Mapping[str, Any]) -> str:
    return (
        f"{result['topology']}, {result['chips']} chips of {result['kind']}, "
        f"{result['model_parallel']} model-parallel, weights split in {result['param_dims']} "
        f"dim{'s' if result['param_dims'] > 1 else ''}, {result['optimizer']}, {result['method']}, "
        f"{result['batch']} sequences of {result['length']}, {result['host']} host; compiled on "
        f"{result['machine']}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    from t5x_sparsity import host

    names = (
        "topology", "model_parallel", "param_dims", "vocab", "batch", "length", "optimizer",
        "method", "binding",
    )  # fmt: skip
    result = {
        "benchmark": "slices",
        "machine": commandline.machine(),
        "host": host.NAME,
        "chips": len(args.slice.devices),
        "kind": args.slice.kind,
        "hbm_bytes": args.slice.hbm_bytes,
        **{name: getattr(args, name) for name in names},
        "compiled": [x for size in args.sizes for x in measure(args, size)],
    }
    print(f"{title(result)}\n\n{table(result)}")
    commandline.write_json(args.json, result)


if __name__ == "__main__":
    main(sys.argv[1:])
