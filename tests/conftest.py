"""Devices and backends the tests run on."""

import os
import signal

import pytest
import torch

# Triton reads this when it decorates a kernel, so it has to be set before the first import of the kernels.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Test processes share the cores; threads of several would wait for each other at every operation.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# A shell that starts the tests in the background makes them ignore Ctrl-C, and with them what they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def kernel_device():
    """Where Triton kernels run: the GPU, or the interpreter on the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA or ROCm device")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no GPU on this machine"))
