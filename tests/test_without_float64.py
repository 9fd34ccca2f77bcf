"""Devices without float64: everything works there, and gives what the CPU gives."""

import chip
import pytest
import torch
from checkout import run
from torch._subclasses import FakeTensorMode

from fastvq.common import devices


@pytest.fixture(scope="module")
def done():
    """What the programs printed, in a process that takes the simulated device for its own."""
    return run(chip.__file__)


@pytest.mark.skipif(not hasattr(torch._C, "_acc"), reason="this PyTorch has no devices written in Python")
@pytest.mark.parametrize("program", [program.__name__ for program in chip.PROGRAMS])
def test_results_are_those_of_the_cpu(program, done):
    assert program in done.stdout.split(), done.stderr


def test_apples_gpu_counts_as_one():
    assert devices.float64_device(torch.device("mps", 0)) == torch.device("cpu")
    for name in ("cpu", "cuda:1"):
        assert devices.float64_device(torch.device(name)) == torch.device(name)


def test_compilers_know_where_sums_are(monkeypatch):
    monkeypatch.setattr(devices, "has_float64", lambda device: device.type != "cuda")
    with FakeTensorMode():
        x, indices = torch.empty(9, 4, device="cuda"), torch.empty(9, dtype=torch.int64, device="cuda")
        for result in torch.ops.fastvq.code_statistics(x, indices, 5, None):
            assert result.device == torch.device("cpu")
