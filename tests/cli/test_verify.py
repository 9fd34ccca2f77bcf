import io
from unittest.mock import Mock

import pytest
import torch
from rich.console import Console

from fastvq import reference
from fastvq.cli.verify import print_verdicts
from fastvq.cpu import search as cpu_search
from fastvq.testing.cases import Case, adversarial_cases
from fastvq.testing.judge import judge_all
from fastvq_kernels.search import pipeline as search

CPU = torch.device("cpu")
# One or two of every family; the whole set belongs to the command.
SUBSET = (
    "D 1",
    "D 252",
    "K 1",
    "K 1024",
    "empty input",
    "offset of 1000 sigma",
    "scale 1e-30",
    "duplicate codes",
    "lattice ties",
    "near ties, one ulp apart",
    "one code 1e+06 times larger",
    "bfloat16",
    "sliced views",
    "tokens with NaN",
    "codes with infinity",
    "no finite code",
    "cosine, zero tokens and zero codes",
    "dot, codes of all lengths",
)


def cases_named(*names: str) -> list[Case]:
    return [case for case in adversarial_cases() if case.name in names]


def test_case_names_are_unique_and_cover_the_subset():
    names = [case.name for case in adversarial_cases()]
    assert len(set(names)) == len(names)
    assert set(SUBSET) <= set(names)


def test_cases_are_the_same_every_time():
    for first, second in zip(adversarial_cases(), adversarial_cases(), strict=True):
        assert torch.equal(first.x.double().nan_to_num(), second.x.double().nan_to_num())
        assert torch.equal(first.codebook.double().nan_to_num(), second.codebook.double().nan_to_num())


def test_cases_hold_what_their_names_say():
    cases = {case.name: case for case in adversarial_cases()}
    assert not cases["transposed views"].x.is_contiguous()
    assert not cases["sliced views"].codebook.is_contiguous()
    assert cases["empty input"].x.shape == (0, 16)
    assert cases["K 100000"].codebook.shape[0] == 100_000
    ties = cases["lattice ties"]
    distances = torch.cdist(ties.x.double(), ties.codebook.double(), compute_mode="donot_use_mm_for_euclid_dist")
    assert ((distances == distances.amin(1, keepdim=True)).sum(1) > 1).any()
    near = cases["near ties, one ulp apart"].codebook
    assert (near - near[-1]).abs().max() < 1e-6
    assert len(near.unique(dim=0)) > 10


@pytest.mark.parametrize("case", cases_named(*SUBSET), ids=lambda case: case.name)
def test_every_backend_passes(case, kernel_device):
    rows = list(judge_all([case], kernel_device))
    assert {row.backend.split()[0] for row in rows} == {"torch", "triton"}
    assert all(row.passed and row.rule == "equal" for row in rows), rows


def test_a_wrong_cpu_index_fails(monkeypatch):
    def off_by_one(x, codebook, metric, prepare_once):
        indices = reference.nearest_code(x, codebook, metric)
        indices[0] = (indices[0] + 1) % len(codebook)
        return indices

    monkeypatch.setattr(cpu_search, "nearest_code", off_by_one)
    output = io.StringIO()
    assert not print_verdicts(cases_named("K 100"), CPU, Console(file=output, width=150))
    assert "1 wrong" in output.getvalue()


def test_a_wrong_triton_index_fails(monkeypatch, kernel_device):
    monkeypatch.setattr(search, "nearest_code", lambda *problem: reference.nearest_code(*problem[:3]).clamp(min=0))
    row = list(judge_all(cases_named("tokens with NaN"), kernel_device))[-1]
    assert row.backend.startswith("triton")
    assert row.passed is False
    assert int(row.result.split()[0]) > 0


def test_a_backend_that_raises_fails(monkeypatch):
    monkeypatch.setattr(cpu_search, "nearest_code", Mock(side_effect=RuntimeError("out of order")))
    row = next(judge_all([next(adversarial_cases())], CPU))
    assert row.passed is False
    assert row.result == "RuntimeError: out of order"


def test_triton_that_cannot_run_is_a_row_and_no_failure(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    output = io.StringIO()
    assert print_verdicts(list(adversarial_cases())[:2], CPU, Console(file=output, width=150))
    assert "not judged" in output.getvalue()
    assert "2 of 2 rows passed" in output.getvalue()
