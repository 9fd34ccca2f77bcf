"""A kernel compiles once per dimension, dtype and metric, whatever the sizes, strides and offsets.

Triton compiles again for an integer argument that is 1 or divisible by 16 where another was not, and for another
alignment of an address. What it distinguishes is asked of Triton itself, in a process of its own that launches nothing
(the interpreter, which runs the other tests, compiles nothing).
"""

import json
import os
import sys

import pytest
import torch
from checkout import run

TOKENS = (16, 1, 7, 100, 4096)
CODES = (1024, 1, 100, 100_000)
FAMILIES = [
    (dim, dtype, metric, target)
    for dim, dtype, metric in (
        (1, "float32", "euclidean"),
        (3, "float32", "cosine"),
        (8, "float64", "dot"),
        (12, "bfloat16", "euclidean"),
        (64, "float32", "cosine"),
        (192, "float16", "euclidean"),
    )
    for target in ("sm_80", "sm_90")
]


@pytest.fixture(scope="module")
def launches():
    """For each family, the specialisations of all kernels launched for each of its problems."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("TRITON_INTERPRET", None)
    done = run(__file__, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("family", range(len(FAMILIES)), ids=["-".join(map(str, family)) for family in FAMILIES])
def test_sizes_strides_and_offsets_never_compile_again(launches, family):
    expected, *others = launches[family].items()
    kernels = {kernel for kernel, _ in expected[1]}
    assert {"pack_codes_kernel", "pack_tokens_kernel", "scan_kernel", "refine_kernel", "rescan_kernel"} < kernels
    assert {"measure_rows_kernel", "decide_kernel", "scan_float64_kernel", "exhaustive_kernel"} < kernels
    assert {"accumulate_kernel", "sum_runs_kernel", "ema_kernel"} < kernels
    for name, found in others:
        for kernel in found:
            assert kernel in expected[1], f"{name} compiles {kernel[0]} again, after {expected[0]}"


@pytest.mark.parametrize("family", range(len(FAMILIES)), ids=["-".join(map(str, family)) for family in FAMILIES])
def test_a_search_is_eleven_launches_and_by_cosine_twelve(launches, family):
    searches = [[kernel for kernel, _ in found] for found in launches[family].values()]
    counts = {kernels.index("accumulate_kernel") for kernels in searches}
    assert counts == {12 if "cosine" in FAMILIES[family] else 11}


def test_another_dimension_or_dtype_is_told_apart(launches):
    found = [tuple(map(tuple, next(iter(problems.values())))) for problems in launches]
    assert len(set(found)) == len(FAMILIES)


def problems(dim, dtype):
    """Pairs of tokens and codes by name; the first is the ordinary one."""
    for n in TOKENS:
        yield f"{n} tokens", torch.ones(n, dim, dtype=dtype), torch.ones(CODES[0], dim, dtype=dtype)
    for k in CODES[1:]:
        yield f"{k} codes", torch.ones(TOKENS[0], dim, dtype=dtype), torch.ones(k, dim, dtype=dtype)
    yield "heads", torch.ones(2, 7, dim, dtype=dtype), torch.ones(2, 100, dim, dtype=dtype)
    x, codebook = torch.ones(50, 3, dim, dtype=dtype), torch.ones(90, 3, dim, dtype=dtype)
    yield "heads between", x.transpose(0, 1), codebook.transpose(0, 1)
    yield "wide rows", torch.ones(50, dim + 5, dtype=dtype)[:, :dim], torch.ones(90, dim + 3, dtype=dtype)[:, :dim]
    yield "one code for all rows", x[:, 0], codebook[:1, 0].expand(70, dim)
    yield "columns", torch.ones(dim, 50, dtype=dtype).t(), torch.ones(dim, 90, dtype=dtype).t()
    for offset in (1, 2, 3):
        x, codebook = torch.ones(30 * dim + 3, dtype=dtype), torch.ones(90 * dim + 3, dtype=dtype)
        yield (
            f"offset {offset}",
            x[offset : offset + 30 * dim].view(30, dim),
            codebook[offset : offset + 90 * dim].view(90, dim),
        )


def record(families):
    """What :func:`launches` returns."""
    from bench.static.launches import recording
    from fastvq_kernels.search.pack_codes import pack_codebook
    from fastvq_kernels.search.pipeline import certified_search
    from fastvq_kernels.update.accumulate import code_statistics
    from fastvq_kernels.update.ema import ema_step

    for dim, dtype, metric, target in families:
        launched = {}
        for name, x, codebook in problems(dim, getattr(torch, dtype)):
            with recording(target) as found:
                certified_search(x if x.dim() == 3 else x[None], pack_codebook(codebook, metric))
                tokens = x.reshape(-1, dim)
                buffer = torch.zeros(len(tokens) + 1, dtype=torch.int64)
                indices, n_codes = buffer[1:] if "offset" in name else buffer[:-1], codebook.shape[-2]
                code_statistics(tokens, indices, n_codes, False)
                _, sums = code_statistics(tokens, indices, n_codes, True)
                state = torch.zeros(n_codes, dim), torch.zeros(n_codes), torch.zeros(n_codes, dim)
                counts, moved = torch.zeros(n_codes, 1 + dim, dtype=torch.float64).split([1, dim], 1)
                ema_step(*state, counts[:, 0], moved, sums.float(), torch.tensor(True), 0.99, 1.0, None, False, 1e-7)
            launched[name] = [[each.name, f"{vars(each.source)} {each.options}"] for each in found]
        yield launched


if __name__ == "__main__":
    json.dump(list(record(FAMILIES)), sys.stdout)
