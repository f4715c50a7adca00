"""The arguments of `t5x-sparsity report`."""

from __future__ import annotations


def add(commands) -> None:
    """Adds the subcommand to those of `t5x-sparsity`."""
    commands.add_parser("report", allow_abbrev=False, help="make one HTML page of one or more runs")
