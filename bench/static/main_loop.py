"""Counts the instructions that the main loop of a compiled kernel issues for one tile of codes."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from bench.static.offline import CUDA_MATRIX, Compiled
from bench.static.sass_flow import Flow, read_flow

# The shape in the name, M·N·K: HMMA.16816 is 16x8x16 and belongs to one warp, HGMMA.64x128x16 to four.
HMMA_SHAPE = re.compile(r"HMMA\.(16)(8)(8|16)\b")
HGMMA_SHAPE = re.compile(r"HGMMA\.(\d+)x(\d+)x(\d+)\b")
Loops = dict[int, set[int]]  # the instructions of each, by the first


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

    A software-pipelined loop is passed once per tile, although it finishes the products of another tile than it starts.
    With `inner_passes`, for kernels that walk D in a loop of its own, the result is the loop around the innermost one,
    which counts this many times. Raises ValueError where there is no such loop, and for AMD.
    """
    flow, loops, innermost = _busy_loops(compiled)
    head = max(innermost, key=lambda h: (_matrix(flow, loops[h]), len(loops[h])))
    return _count_passes(compiled, flow, loops, head, inner_passes)


def code_tile_loop(compiled: Compiled, *, pairs: int, depth: int, chunks: int = 1) -> Loop:
    """The region passed once per code tile, with its matrix instructions as proof.

    The compiler may unroll a loop over chunks of D into the loop over code tiles. So this takes an innermost loop if it
    multiplies a whole tile of `pairs` = BM·BN at the padded `depth`, and otherwise the loop around one that multiplies
    a chunk. Raises ValueError where no loop multiplies exactly one tile, and for tcgen05 and AMD, which do not show
    their shapes.
    """
    flow, loops, innermost = _busy_loops(compiled)
    multiplied = []
    for head in innermost:
        loop = _count_passes(compiled, flow, loops, head)
        if chunks > 1 and pairs_per_pass(loop, compiled.threads, depth) * chunks == pairs:
            loop = _count_passes(compiled, flow, loops, head, chunks)
        multiplied.append(pairs_per_pass(loop, compiled.threads, depth))
        if multiplied[-1] == pairs:
            return loop
    found = " or ".join(f"{number:g}" for number in multiplied)
    raise ValueError(f"pairs must be what one pass of {compiled.name} multiplies, {found}, got {pairs}")


def flat_loop(compiled: Compiled, *, pairs: int, depth: int, chunks: int) -> Loop:
    """One tile of a loop over the chunks of all code tiles: `chunks` passes, one with the tile's end.

    The end of a tile is the longest stretch that a pass can jump over; other instructions count with every pass. Raises
    ValueError where there is not exactly one loop with the matrix instructions of one tile, and for AMD.
    """
    flow, loops, innermost = _busy_loops(compiled)
    if len(innermost) != 1:
        raise ValueError(f"{compiled.name} must have one loop with matrix instructions, got {len(innermost)}")
    body = loops[innermost[0]]
    end = max(_stretches(flow, _skippable(flow, body, innermost[0])), key=len)
    loop = _count(flow, loops, innermost[0], Counter({at: 1 if at in end else chunks for at in body}))
    if loop.macs_per_warp is not None and pairs_per_pass(loop, compiled.threads, depth) != pairs:
        found = pairs_per_pass(loop, compiled.threads, depth)
        raise ValueError(f"pairs must be what {chunks} passes of {compiled.name} multiply, {found:g}, got {pairs}")
    return loop


def pairs_per_pass(loop: Loop, threads: int, depth: int) -> float:
    """(Token, code) pairs that one pass multiplies, from its matrix instructions: macs_per_warp · threads/32 / depth.

    Raises ValueError for tcgen05, whose instructions do not show their shape.
    """
    if loop.macs_per_warp is None:
        raise ValueError("the names of tcgen05 instructions do not show their shape: use BM·BN")
    return loop.macs_per_warp * threads / 32 / depth


def _busy_loops(compiled: Compiled) -> tuple[Flow, Loops, list[int]]:
    """The instructions, all loops, and the innermost of those with matrix instructions."""
    if not compiled.target.startswith("sm_"):
        raise ValueError(f"loops are read in NVIDIA machine code, got a kernel compiled for {compiled.target}")
    flow = read_flow(compiled.assembly, compiled.name)
    loops = flow.loops()
    busy = {head: body for head, body in loops.items() if _matrix(flow, body)}
    if not busy:
        raise ValueError(f"{compiled.name} for {compiled.target} has no loop with matrix instructions")
    return flow, loops, [head for head, body in busy.items() if not any(other < body for other in busy.values())]


def _count_passes(compiled: Compiled, flow: Flow, loops: Loops, head: int, inner_passes: int | None = None) -> Loop:
    """One pass of a loop; with ``inner_passes`` of the loop around it, in which it counts so many times."""
    if inner_passes is None:
        return _count(flow, loops, head, Counter(loops[head]))
    around = [h for h, body in loops.items() if loops[head] < body]
    if not around:
        raise ValueError(f"inner_passes needs a loop around the innermost one, {compiled.name} has none")
    outer = min(around, key=lambda h: len(loops[h]))
    return _count(flow, loops, outer, Counter({at: inner_passes if at in loops[head] else 1 for at in loops[outer]}))


def _skippable(flow: Flow, body: set[int], head: int) -> set[int]:
    """Instructions that a pass can jump over."""
    ends = [at for at in body if head in flow.successors[at]]
    return {at for at in body if not all(flow.dominates(at, end) for end in ends)}


def _stretches(flow: Flow, skippable: set[int]) -> list[set[int]]:
    """Skippable instructions that follow one another, as sets."""
    found: list[set[int]] = []
    for at in sorted(skippable):
        before = [stretch for stretch in found if any(at in flow.successors[one] for one in stretch)]
        after = [stretch for stretch in found if not stretch.isdisjoint(flow.successors[at])]
        found = [stretch for stretch in found if stretch not in before + after]
        found.append({at}.union(*before, *after))
    return found


def _matrix(flow: Flow, body: Iterable[int]) -> int:
    return sum(bool(CUDA_MATRIX.fullmatch(_base(flow.opcodes[at]))) for at in body)


def _base(opcode: str) -> str:
    return opcode.split(".")[0]


def _count(flow: Flow, loops: Loops, head: int, passes: Counter[int]) -> Loop:
    skipped = _skippable(flow, loops[head], head)
    counts: Counter[str] = Counter()
    skippable: Counter[str] = Counter()
    macs: float | None = 0.0
    for at, times in passes.items():
        opcode = flow.opcodes[at]
        counts[_base(opcode)] += times
        if at in skipped:
            skippable[_base(opcode)] += times
        if CUDA_MATRIX.fullmatch(_base(opcode)):
            shape = HMMA_SHAPE.match(opcode) or HGMMA_SHAPE.match(opcode)
            warps = 4 if opcode.startswith("HGMMA") else 1
            if shape is None or macs is None:
                macs = None
            else:
                macs += times * int(shape[1]) * int(shape[2]) * int(shape[3]) / warps
    return Loop(counts, skippable, macs, sum(body < loops[head] for body in loops.values()))
