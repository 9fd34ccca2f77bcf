"""Count what the main loop of a compiled kernel issues for one tile of codes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from .offline import CUDA_MATRIX, Compiled
from .sass_flow import Flow, read_flow

# The shape in the name, M·N·K: HMMA.16816 is 16x8x16 and belongs to one warp, HGMMA.64x128x16 to four.
HMMA_SHAPE = re.compile(r"HMMA\.(16)(8)(8|16)\b")
HGMMA_SHAPE = re.compile(r"HGMMA\.(\d+)x(\d+)x(\d+)\b")


@dataclass(frozen=True)
class Loop:
    """Instructions that one thread issues in one pass of a loop.

    counts: by mnemonic without modifiers; every instruction once, whichever branches are taken.
    skippable: the part of `counts` that a pass can jump over (conditional updates, what only the warp that starts
        tcgen05 products does, repeated waits): the truth lies between `counts - skippable` and `counts`.
    macs_per_warp: multiply-adds of the HMMA or HGMMA in `counts`, one warp's share of them; None where the names do
        not show the shape (tcgen05).
    inner_loops: loops inside this one. They count as one pass unless `main_loop` was told otherwise.
    """

    counts: Counter[str]
    skippable: Counter[str]
    macs_per_warp: float | None
    inner_loops: int


def main_loop(compiled: Compiled, *, inner_passes: int | None = None) -> Loop:
    """The innermost loop with matrix instructions; of several, the one with most of them.

    A software-pipelined loop starts the products of one tile and finishes those of another, and is still passed
    once per tile. A warp-specialised kernel has a loop per role, of which this is the one that multiplies.

    inner_passes: for kernels that walk D in a loop inside the loop over code tiles. The result is then the loop
        around the innermost one, in which the innermost counts this many times.

    Raises ValueError for a kernel compiled for AMD, one without such a loop, and `inner_passes` where no loop with
    matrix instructions lies around the innermost.
    """
    if not compiled.target.startswith("sm_"):
        raise ValueError(f"main_loop reads NVIDIA machine code, got a kernel compiled for {compiled.target}")
    flow = read_flow(compiled.assembly, compiled.name)
    loops = flow.loops()
    busy = {head: body for head, body in loops.items() if _matrix(flow, body)}
    if not busy:
        raise ValueError(f"{compiled.name} for {compiled.target} has no loop with matrix instructions")
    innermost = {head: body for head, body in busy.items() if not any(other < body for other in busy.values())}
    head = max(innermost, key=lambda h: (_matrix(flow, innermost[h]), len(innermost[h])))
    if inner_passes is None:
        return _count(flow, loops, head, Counter(loops[head]))
    around = [h for h, body in busy.items() if loops[head] < body]
    if not around:
        raise ValueError(f"inner_passes needs a loop around the innermost one, {compiled.name} has none")
    outer = min(around, key=lambda h: len(loops[h]))
    passes = Counter({at: inner_passes if at in loops[head] else 1 for at in loops[outer]})
    return _count(flow, loops, outer, passes)


def code_tile_loop(compiled: Compiled, *, pairs: int, depth: int) -> Loop:
    """The region passed once per code tile, with its matrix instructions as proof.

    Whether a loop over slices of D survives or is unrolled into the loop over code tiles is the compiler's choice
    and changes with D and target; this takes the innermost loop if it multiplies a whole tile, and otherwise the
    loop around it with as many inner passes as the tile needs.

    pairs: BM·BN. depth: padded D. Raises ValueError where neither loop multiplies exactly one tile (the compiler
    peeled passes or unrolled tiles: use `main_loop` and `pairs_per_pass`), and for tcgen05 and AMD, which do not
    show their shapes.
    """
    loop = main_loop(compiled)
    passes = pairs / pairs_per_pass(loop, compiled.threads, depth)
    if passes > 1 and passes.is_integer():
        loop = main_loop(compiled, inner_passes=int(passes))
    if (found := pairs_per_pass(loop, compiled.threads, depth)) != pairs:
        raise ValueError(f"pairs must be what one pass of {compiled.name} multiplies, {found:g}, got {pairs}")
    return loop


def pairs_per_pass(loop: Loop, threads: int, depth: int) -> float:
    """(Token, code) pairs that one pass multiplies, from its matrix instructions: macs_per_warp · threads/32 / depth.

    Equals BM·BN when the counted region is passed once per code tile, a multiple of it when the compiler unrolled
    tiles, and a fraction when a pass covers only a slice of D. depth: padded D.

    Raises ValueError for tcgen05, whose instructions do not show their shape.
    """
    if loop.macs_per_warp is None:
        raise ValueError("the names of tcgen05 instructions do not show their shape: use BM·BN")
    return loop.macs_per_warp * threads / 32 / depth


def _matrix(flow: Flow, body: Iterable[int]) -> int:
    return sum(bool(CUDA_MATRIX.fullmatch(_base(flow.opcodes[at]))) for at in body)


def _base(opcode: str) -> str:
    return opcode.split(".")[0]


def _count(flow: Flow, loops: dict[int, set[int]], head: int, passes: Counter[int]) -> Loop:
    ends = [at for at in loops[head] if head in flow.successors[at]]
    counts: Counter[str] = Counter()
    skippable: Counter[str] = Counter()
    macs: float | None = 0.0
    for at, times in passes.items():
        opcode = flow.opcodes[at]
        counts[_base(opcode)] += times
        if not all(flow.dominates(at, end) for end in ends):
            skippable[_base(opcode)] += times
        if CUDA_MATRIX.fullmatch(_base(opcode)):
            shape = HMMA_SHAPE.match(opcode) or HGMMA_SHAPE.match(opcode)
            warps = 4 if opcode.startswith("HGMMA") else 1
            if shape is None or macs is None:
                macs = None
            else:
                macs += times * int(shape[1]) * int(shape[2]) * int(shape[3]) / warps
    return Loop(counts, skippable, macs, sum(body < loops[head] for body in loops.values()))
