"""Modelled worst case of the exhaustive walk on an H100, all codes equal, against a plain float64 scan of all codes.

Every token is open and walks through every bin, so arithmetic counts. The instructions per chunk of codes, from the
machine code, are compared with those of a kernel that only evaluates all codes in float64. Memory is left out: its
scattered loads burden both kernels alike.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from bench.static.issue_model import ALU_PIPE, H100
from bench.static.launches import recording
from bench.static.offline import Compiled, compile_offline
from bench.static.sass_flow import Flow, read_flow
from fastvq_kernels.search.exhaustive import BLOCK_K, exact_best

# Lanes per SM and clock, CUDA C++ Programming Guide (9.0): float64 64, conversions from and to 64-bit types 16;
# 32 load-store units per SM: NVIDIA H100 whitepaper. Shuffles and shared memory pass through these as well.
_PIPES: Mapping[str, tuple[int, frozenset[str]]] = {
    "alu": (H100.alu_lanes, frozenset(ALU_PIPE)),
    "float64": (64, frozenset({"DADD", "DMUL", "DFMA", "DSETP"})),
    "conversion": (16, frozenset({"F2F"})),
    "load-store": (32, frozenset({"LDG", "STG", "LDS", "STS", "SHFL"})),
}


@triton.jit
def exact_scan_kernel(
    tokens: tl.tensor,
    codes: tl.tensor,
    norms: tl.tensor,
    half_sq: tl.tensor,
    indices: tl.tensor,
    K: tl.tensor,
    D: tl.tensor,
    BK: tl.constexpr,
) -> None:
    """One program evaluates all codes for one token in float64 and nothing else."""
    i = tl.program_id(0).to(tl.int64)
    best = tl.full([], float("inf"), tl.float64)
    code = tl.full([], -1, tl.int64)
    for k in range(0, K, BK):
        o_k = k + tl.arange(0, BK).to(tl.int64)
        best, code, _ = exact_best(tokens + i * D, codes, norms, half_sq, o_k, o_k < K, best, code, D, "euclidean")
    tl.store(indices + i, code)


def exact_scan(dim: int) -> Compiled:
    """`exact_scan_kernel` for sm_90, with the chunks and warps of the exhaustive walk."""
    x, codes = torch.empty(16, dim), torch.empty(16, dim)
    norms, half_sq, indices = torch.empty(16, dtype=torch.float64), torch.empty(16), torch.empty(16, dtype=torch.int64)
    with recording("sm_90") as found:
        # A number of codes that is no multiple of 16, so that nothing is assumed of it.
        exact_scan_kernel[(16,)](x, codes, norms, half_sq, indices, 15, dim, BK=BLOCK_K, enable_fp_fusion=False)
    return compile_offline(found[0], "sm_90")


def chunk_clocks(compiled: Compiled, dim: int) -> tuple[float, float]:
    """Clocks per thread and SM that one chunk of codes costs: pipes overlapped, and phase after phase.

    A chunk is one pass of the smallest loop around other loops, by the shortest way that evaluates it in float64: that
    of equal codes, which are not asked for bounds. The loop over columns, told by its products, has one for each column
    of a pass.
    """
    flow = read_flow(compiled.assembly, compiled.name)
    loops = flow.loops()
    around = [head for head in loops if any(body < loops[head] for body in loops.values())]
    chunk = min(around, key=lambda head: len(loops[head]))
    columns = {head: _count(flow, body)["DMUL"] for head, body in loops.items() if body < loops[chunk]}
    widest = max(columns, key=lambda head: columns[head])  # others take what is left of columns
    path = set(flow.shortest_pass(chunk, loops[chunk], widest))
    passes = dim // columns[widest]
    exact = Counter({opcode: passes * n for opcode, n in _count(flow, loops[widest]).items()})
    rest = _count(flow, path - loops[widest])
    return _clocks(exact + rest), _clocks(exact) + _clocks(rest)


def _count(flow: Flow, instructions: set[int]) -> Counter[str]:
    return Counter(flow.opcodes[at].split(".")[0] for at in instructions)


def _clocks(counts: Counter[str]) -> float:
    pipes = [sum(n for op, n in counts.items() if op in ops) / lanes for lanes, ops in _PIPES.values()]
    return max(sum(counts.values()) / H100.issue_lanes, *pipes)


def worst_case_row(walk: Compiled, dim: int) -> dict[str, Any]:
    """The walk with every token open and every bin visited, against the plain float64 scan; ratios of clocks."""
    ours, plain = chunk_clocks(walk, dim), chunk_clocks(exact_scan(dim), dim)
    return {
        "kernel": "exhaustive worst-case model",
        "target": "sm_90",
        "D": dim,
        "ratio_overlapped": ours[0] / plain[0],
        "ratio_serial": ours[1] / plain[1],
    }
