"""The arguments of `t5x-sparsity export`."""

from __future__ import annotations


def add(commands) -> None:
    """Adds the subcommand to those of `t5x-sparsity`."""
    commands.add_parser(
        "export",
        allow_abbrev=False,
        help="write a checkpoint's weights as safetensors, dense or compressed",
    )
