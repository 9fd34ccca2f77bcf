"""Kernels in the interpreter (or on the GPU), and compiled offline for the chips they are meant for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastvq import reference
from fastvq_kernels.nearest import nearest_code

ROOT = Path(__file__).parents[1]


def run_static(**environment):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, "-m", "bench.static", "--json"]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def compiled():
    done = run_static()
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_target_is_compiled(compiled):
    assert {row["target"] for row in compiled} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert {row["kernel"] for row in compiled} == {"nearest_code_kernel", "accumulate_kernel"}


def test_no_kernel_spills_registers(compiled):
    assert [row for row in compiled if row["spill_bytes"]] == []


def test_shared_memory_fits_the_chip(compiled):
    assert [row for row in compiled if row["shared_bytes"] > row["shared_limit_bytes"]] == []


def test_search_uses_matrix_instructions(compiled):
    expected = {"sm_80": {"HMMA"}, "sm_90": {"HGMMA"}, "sm_100": {"UTCHMMA"}, "gfx942": {"v_mfma"}}
    for row in compiled:
        assert set(row["matrix_instructions"]) == (expected[row["target"]] if row["multiplies"] else set()), row


def test_offline_compilation_refuses_the_interpreter():
    done = run_static(TRITON_INTERPRET="1")
    assert done.returncode != 0
    assert "unset TRITON_INTERPRET" in done.stderr


@pytest.mark.parametrize("metric", ["euclidean", "cosine", "dot"])
@pytest.mark.parametrize(("n", "k", "d"), [(1, 1, 1), (65, 300, 16), (130, 129, 48), (33, 65, 100), (5, 70, 513)])
def test_fused_search_equals_float64_where_scores_are_apart(kernel_device, n, k, d, metric):
    # Coordinates on a grid of 1/8 with few bits: every product and sum is exact in float32.
    x, codebook = torch.randint(-8, 9, (n, d)) / 8 + 0.0, torch.randint(-8, 9, (k, d)) / 8 + 0.0
    if metric == "cosine":
        codebook = torch.randn(k, d)
    indices = nearest_code(x.to(kernel_device), codebook.to(kernel_device), metric).cpu()
    # The shift by the mean rounds; what it may flip are pairs that tie exactly, and there the scores must agree.
    tokens = reference.coordinates_first(x)
    expected = reference.nearest_code(x, codebook, metric)
    chosen, best = (
        reference.pair_score(tokens, reference.coordinates_first(codebook[i]), metric) for i in (indices, expected)
    )
    assert torch.allclose(chosen, best, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65])
def test_fused_search_writes_every_index_and_nothing_else(kernel_device, n, monkeypatch):
    guard = torch.full((n + 64,), -7, dtype=torch.int64, device=kernel_device)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **kw: guard[:n] if size == (n,) else empty(*size, **kw))
    indices = nearest_code(torch.randn(n, 3, device=kernel_device), torch.randn(5, 3, device=kernel_device), "dot")
    assert ((indices >= 0) & (indices < 5)).all()
    assert (guard[n:] == -7).all()
