"""What the benchmark scripts share before jax is imported: flags, devices, results."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def parser(doc: str) -> Parser:
    """A parser whose help is a script's docstring; with --json."""
    made = Parser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    made.add_argument("--json", type=Path, metavar="FILE", help="write the results there, too")
    return made


def positive(text: str) -> int:
    """An integer of at least 1; K, M and G are 2 to the 10th, 20th and 30th."""
    number, factor = text.strip(), 1
    if number[-1:] in "KMG" and number:
        factor = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}[number[-1]]
        number = number[:-1]
    if not number.isdecimal() or int(number) < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number of at least 1; K, M and G may follow one"
        )
    return int(number) * factor


def several(of: Callable[[str], Any]) -> Callable[[str], list]:
    """Comma-separated values."""

    def parse(text: str) -> list:
        return [of(part) for part in text.split(",") if part]

    return parse


def one_of(*allowed: str) -> Callable[[str], str]:
    """One of the names."""

    def parse(text: str) -> str:
        if text not in allowed:
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(allowed)}")
        return text

    return parse


def add_model_flags(to: argparse.ArgumentParser) -> None:
    """The size of the model and of its batches, the optimizer and the devices."""
    to.add_argument("--devices", type=positive, default=1, help="all model-parallel")
    to.add_argument("--optimizer", choices=("adamw", "adafactor"), default="adamw")
    to.add_argument("--d_model", type=positive, default=256, help="d_ff is four times that")
    to.add_argument("--layers", type=positive, default=2, help="of the encoder and of the decoder")
    to.add_argument("--batch", type=positive, default=8, help="sequences")
    to.add_argument("--length", type=positive, default=128, help="tokens a sequence")
    to.add_argument("--binding", action="append", default=[], help="a gin binding of all methods")


def use_devices(count: int) -> None:
    """Has jax make so many devices of the CPU, unless JAX_PLATFORMS names another platform."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={count}".strip()


def devices(count: int) -> list:
    """The first devices there are; leaves with a message if there are fewer."""
    import jax

    found = jax.devices()
    if len(found) < count:
        raise SystemExit(f"{count} devices are asked for, but there are {len(found)} {found[0]}")
    return found[:count]


def machine() -> str:
    """What a figure was measured on."""
    import jax

    first = jax.devices()[0]
    if first.platform == "cpu":
        what = f"{os.cpu_count()} CPU cores ({_cpu()})"
    else:
        what = f"{jax.device_count()} x {first.device_kind}"
    return f"{what}, jax {importlib.metadata.version('jax')}, Python {platform.python_version()}"


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.machine()


def write_json(path: Path | None, result: Mapping[str, Any]) -> None:
    """Writes all of the results or none; nothing where no path is given."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.tmp")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(path)


def median(times: Sequence[float]) -> float | None:
    """The median; None of nothing."""
    return statistics.median(times) if times else None


def megabytes(count: float) -> str:
    """Bytes as MB, with three digits that count."""
    value = count / 1e6
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f}"


def collectives_text(found: Mapping[str, Mapping[str, int]]) -> str:
    """Collectives as a table has them: how many of a kind, and how many MB."""
    return (
        ", ".join(f"{x['count']} {kind} ({megabytes(x['bytes'])})" for kind, x in found.items())
        or "none"
    )


def described(step: Any) -> dict[str, Any]:
    """What a compiled program takes on each device, as JSON has it.

    step: the program, or what `t5x_sparsity.ahead_of_time.program.describe` has made of it.
    """
    from t5x_sparsity.ahead_of_time.program import CompiledStep, describe

    step = step if isinstance(step, CompiledStep) else describe(step)
    return {
        "argument_bytes": step.argument_bytes,
        "temp_bytes": step.temp_bytes,
        "peak_bytes": step.peak_bytes,
        "flops": step.flops,
        "collectives": {
            kind: {"count": x.count, "bytes": x.bytes} for kind, x in step.collectives.items()
        },
        "open_loops": step.open_loops,
    }
