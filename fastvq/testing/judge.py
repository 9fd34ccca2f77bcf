"""Compare the indices of every backend with those of the float64 oracle."""

import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import fastvq
from fastvq.backends.triton import TRITON, interpreting
from fastvq.common.precision import full_precision
from fastvq.cpu import search
from fastvq.testing.cases import Case

# Interpreted kernels take up to a second for a token that reaches float64.
_INTERPRETED_TOKENS = 16


@dataclass(frozen=True)
class Row:
    """The verdict on one backend in one case; ``passed`` is None if the backend cannot run."""

    case: str
    shape: str
    dtype: str
    backend: str
    rule: str
    result: str
    seconds: float
    passed: bool | None


def judge_all(cases: Iterable[Case], device: torch.device) -> Iterator[Row]:
    """One row per case and backend: ``"torch"`` on the CPU and on ``device``, ``"triton"`` on ``device``."""
    runs = [("torch", place) for place in dict.fromkeys((torch.device("cpu"), device))]
    if obstacle := TRITON.obstacle(device):
        yield Row("all", "", "", "triton", "not judged", obstacle, 0.0, None)
    else:
        runs.append(("triton", device))
    for case in cases:
        oracle = fastvq.reference.nearest_code(case.x, case.codebook, case.metric)
        for backend, place in runs:
            yield _judge(case, oracle, backend, place)


def _judge(case: Case, oracle: Tensor, backend: str, device: torch.device) -> Row:
    if backend == "triton" and interpreting():
        case, oracle = replace(case, x=case.x[:_INTERPRETED_TOKENS]), oracle[:_INTERPRETED_TOKENS]
    x, codebook = case.x.to(device), case.codebook.to(device)
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            # Interpreted kernels compute with NumPy, and their bounds may overflow to infinity.
            warnings.simplefilter("ignore", RuntimeWarning)
            found = again = fastvq.nearest_code(x, codebook, metric=case.metric, backend=backend).cpu()
            if backend == "torch" and len(x):  # once more with a packed codebook, which few codes do not get
                with torch.no_grad(), full_precision(x.device):
                    again = search.search_packed(x, search.prepare(codebook, case.metric)).cpu()
    except Exception as error:  # fails this backend; the others still run
        passed, result = False, f"{type(error).__name__}: {error}".splitlines()[0]
    else:
        wrong = int(((found != oracle) | (again != oracle)).sum())
        passed, result = wrong == 0, f"{wrong} wrong"
    seconds = time.perf_counter() - start
    shape = f"{len(case.x)}x{len(case.codebook)}x{case.x.shape[1]}"
    dtype = str(case.x.dtype).removeprefix("torch.")
    return Row(case.name, shape, dtype, f"{backend} {device.type}", "equal", result, seconds, passed)
