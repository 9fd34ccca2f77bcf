"""No kernel touches memory that is not its own: in bounds, without races, nothing read that nobody has written."""

import pytest
import torch
import triton
import triton.language as tl
from sanitizer import AccessError, checked_memory
from strategies import METRICS
from triton.runtime.errors import InterpreterError

from fastvq import reference
from fastvq_kernels.search import pipeline as search
from fastvq_kernels.update import accumulate, ema

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is switched off; see bench.gpu")


@triton.jit
def faulty_kernel(source, target, counter, N, FAULT: tl.constexpr, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    if FAULT == "out of bounds":
        tl.store(target + i, tl.load(source + i), mask=i < N)
    elif FAULT == "one past the end":
        tl.store(target + i + 1, 1.0, mask=i < N)
    elif FAULT == "two programs write":
        tl.store(target + i % 4, 1.0)
    elif FAULT == "read of another program's":
        tl.store(target + i, 1.0, mask=i < N)
        tl.store(source + i, tl.load(target + (i + B) % N), mask=i < N)
    elif FAULT == "read of what others add to":
        tl.atomic_add(counter, 1)
        tl.store(target + i, tl.load(counter).to(tl.float32), mask=i < N)
    elif FAULT == "read after write":
        tl.store(target + i, 1.0, mask=i < N)
        tl.store(source + i, tl.load(target + i, mask=i < N), mask=i < N)
    elif FAULT == "elements of one store meet":
        tl.store(target + i // 2, i)
    else:
        at = tl.atomic_add(counter, 1)
        tl.store(target + at, tl.load(source + i, mask=i < N, other=0.0).to(tl.float32).sum())


def run_faulty(fault, n=12, block=8):
    source, target, counter = torch.zeros(n), torch.zeros(n), torch.zeros(1, dtype=torch.int32)
    with checked_memory():
        faulty_kernel[(2,)](source, target, counter, n, FAULT=fault, B=block)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("out of bounds", "reads 4 elements outside"),
        ("one past the end", "writes 1 elements outside"),
        ("two programs write", "one program changes"),
        ("read of another program's", "one program changes"),
        ("read of what others add to", "one program changes"),
        ("read after write", "has changed"),
        ("elements of one store meet", "twice in one program"),
    ],
)
def test_a_planted_fault_is_found(fault, words):
    with pytest.raises((AccessError, InterpreterError), match=words):
        run_faulty(fault)


def test_a_sound_kernel_passes():
    run_faulty(None)


def test_fresh_memory_holds_what_would_show():
    with checked_memory():
        assert torch.empty(3).isnan().all()
        assert torch.ones(2).new_empty(3, dtype=torch.int32).min() > 2**29


def check_search(x, codebook, metric="euclidean"):
    with checked_memory() as kernels:
        indices = search.nearest_code(x, codebook, metric)
    assert {"pack_codes_kernel", "scan_kernel", "refine_kernel", "rescan_kernel", "exhaustive_kernel"} <= set(kernels)
    assert torch.equal(indices.reshape(-1), torch.cat(
        [reference.nearest_code(tokens, codes, metric) for tokens, codes in zip(
            x.view(-1, *x.shape[-2:]), codebook.view(-1, *codebook.shape[-2:]), strict=True)]
    ))  # fmt: skip


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("n", "k", "d"), [(1, 1, 1), (33, 150, 8), (300, 129, 20), (40, 130, 64), (17, 140, 256)])
def test_search(n, k, d, metric):
    check_search(torch.randn(n, d), torch.randn(k, d), metric)


def test_search_with_column_chunks():
    check_search(torch.randn(9, 1024), torch.randn(70, 1024))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_search_in_heads_of_every_dtype(dtype):
    check_search(torch.randn(3, 40, 16).to(dtype), torch.randn(3, 100, 16).to(dtype))


def test_search_among_equal_codes():
    check_search(torch.randn(9, 4), torch.randn(3, 4).repeat(40, 1))


@pytest.mark.parametrize("metric", METRICS)
def test_search_of_crowded_tokens(metric):
    codebook = torch.randn(2, 1, 20) + 1e-7 * torch.randn(2, 100, 20)
    check_search(codebook[:, :70] + 0.1 * torch.randn(2, 70, 20), codebook, metric)


def test_search_of_tokens_with_many_ties():
    check_search(torch.randn(9, 6).sign() / 4, torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0])] * 6))
    check_search(torch.zeros(70, 6), torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 6))


def test_search_with_what_is_not_finite():
    x, codebook = torch.randn(12, 16), torch.randn(50, 16)
    x[3, 1], x[5, 2], codebook[7, 0] = torch.nan, torch.inf, -torch.inf
    x[9] *= 1e30
    check_search(x, codebook)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("n", "k", "d"), [(1, 1, 1), (60, 300, 130), (500, 2, 12), (4200, 1, 3)])
def test_statistics(n, k, d, deterministic):
    x, indices = torch.randint(-100, 100, (n, d)).float(), torch.randint(-1, k, (n,))
    with checked_memory() as kernels:
        counts, sums = accumulate.code_statistics(x, indices, k, deterministic)
    expected = reference.code_statistics(x, indices, k)
    assert kernels
    assert torch.equal(counts.float(), expected[0])
    assert torch.equal(sums.float(), expected[1])


@pytest.mark.parametrize("restarts", [False, True])
@pytest.mark.parametrize(("k", "d"), [(1, 1), (7, 3), (300, 8), (33, 130)])
def test_ema_step(k, d, restarts):
    state = torch.randn(k, d), torch.rand(k), torch.randn(k, d)
    rows = torch.randn(k, d) if restarts else None
    with checked_memory() as kernels:
        counts, sums = torch.ones(k, dtype=torch.float64), torch.randn(k, d, dtype=torch.float64)
        stayed = ema.ema_step(*state, counts, sums, rows, None, 0.99, 1.0, None, False, 1e-7)
    assert kernels
    assert not stayed.any()
    assert all(torch.isfinite(tensor).all() for tensor in state)
