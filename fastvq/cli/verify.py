"""The table of ``fastvq verify``."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from fastvq.testing.cases import Case
from fastvq.testing.judge import judge_all


def verify(cases: Iterable[Case], device: torch.device, console: Console) -> bool:
    """Judge all backends of ``device`` over ``cases``, print the table, and return whether all rows passed."""
    table = Table(title=f"indices compared with the float64 oracle on {device.type}", box=box.SIMPLE_HEAD)
    table.add_column("case", overflow="fold")
    for name in ("NxKxD", "dtype", "backend", "rule"):
        table.add_column(name, no_wrap=True)
    table.add_column("result", overflow="fold")
    table.add_column("seconds", justify="right", no_wrap=True)
    rows = []
    with console.status("verifying") as status:
        for row in judge_all(cases, device):
            status.update(f"verified: {row.case}")
            rows.append(row)
            style = {True: None, False: "bold red", None: "yellow"}[row.passed]
            table.add_row(
                row.case, row.shape, row.dtype, row.backend, row.rule, row.result, f"{row.seconds:.2f}", style=style
            )
    failed = sum(row.passed is False for row in rows)
    judged = sum(row.passed is not None for row in rows)
    console.print(table)
    console.print(f"{judged - failed} of {judged} rows passed" + (f", {failed} failed" if failed else ""))
    return failed == 0
