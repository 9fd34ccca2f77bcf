"""The table of ``fastvq verify``."""

from collections.abc import Iterable

import torch
from rich import box
from rich.console import Console
from rich.table import Column, Table

from fastvq.testing.cases import Case
from fastvq.testing.judge import judge_all

_STYLES = {True: None, False: "bold red", None: "yellow"}


def print_verdicts(cases: Iterable[Case], device: torch.device, console: Console) -> bool:
    """Judge every backend of ``device`` on ``cases``, print a table, and return whether no row failed."""
    table = Table(
        Column("case", overflow="fold"),
        *(Column(name, no_wrap=True) for name in ("NxKxD", "dtype", "backend", "rule")),
        Column("result", overflow="fold"),
        Column("seconds", justify="right", no_wrap=True),
        title=f"indices compared with the float64 oracle on {device.type}",
        box=box.SIMPLE_HEAD,
    )
    verdicts = []
    with console.status("verifying") as status:
        for row in judge_all(cases, device):
            status.update(f"verified: {row.case}")
            cells = (row.case, row.shape, row.dtype, row.backend, row.rule, row.result, f"{row.seconds:.2f}")
            table.add_row(*cells, style=_STYLES[row.passed])
            verdicts.append(row.passed)
    passed, failed = verdicts.count(True), verdicts.count(False)
    console.print(table)
    console.print(f"{passed} of {passed + failed} rows passed" + (f", {failed} failed" if failed else ""))
    return not failed
