"""The table of ``fastvq info``."""

import torch
from rich.table import Column, Table

from fastvq.backends.choose import choose, why_not_triton
from fastvq.backends.triton import interpreting
from fastvq.cpu.matmul import bfloat16_units
from fastvq.testing.machine import device_name, versions


def info_table(device: torch.device) -> Table:
    """Versions, ``device``, and the backend that runs there and why."""
    rows = versions()
    if torch.version.cuda or torch.version.hip:
        rows["CUDA" if torch.version.cuda else "ROCm"] = str(torch.version.cuda or torch.version.hip)
    rows["device"] = f"{device.type}: {device_name(device)}"
    reason = why_not_triton(device) or f"tensors are on {device.type} and Triton {rows['triton']} is installed"
    rows["backend"] = f"{choose(device).name} ({reason})"
    if device.type == "cpu":
        units = bfloat16_units()
        rows["large searches"] = f"bfloat16 first ({units})" if units else "float32"
    if interpreting():
        rows["TRITON_INTERPRET"] = '1: backend "triton" runs interpreted, on CPU tensors'
    columns = Column(style="bold", no_wrap=True), Column(overflow="fold")
    table = Table(*columns, title="fastvq on this machine", show_header=False)
    for row in rows.items():
        table.add_row(*row)
    return table
