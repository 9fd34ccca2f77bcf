"""Find the loops of a kernel in its SASS.

A backward branch alone does not make a loop: `ptxas` moves barrier waits behind the end of the kernel and jumps back
from there, which an interval of lines would read as one huge loop. So control flow is followed instruction by
instruction, and only natural loops count: those whose head lies on every way to the branch that goes back to it.
"""

import re
from collections import defaultdict
from dataclasses import dataclass

LABEL = re.compile(r"^(\.L_\w+):\s*$")
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
TARGET = re.compile(r"`\((\.L_\w+)\)")


@dataclass(frozen=True)
class Flow:
    """Instructions of one kernel and the ways through them; instructions are named by their position.

    opcodes: with modifiers, such as HGMMA.64x128x16.F32. successors: where control can go from each instruction.
    dominator: the nearest instruction on every way to this one; missing for what cannot be reached, the first
        instruction is its own.
    """

    opcodes: list[str]
    successors: list[list[int]]
    dominator: dict[int, int]

    def dominates(self, above: int, below: int) -> bool:
        """Whether every way to `below` passes `above`."""
        while below != above and below != self.dominator[below]:
            below = self.dominator[below]
        return below == above

    def loops(self) -> dict[int, set[int]]:
        """The instructions of each natural loop, by its head."""
        before = _predecessors(self.successors, self.dominator)
        found: dict[int, set[int]] = {}
        for source in self.dominator:
            for head in self.successors[source]:
                if self.dominates(head, source):
                    body, stack = found.setdefault(head, {head}), [source]
                    while stack:
                        if (at := stack.pop()) not in body:
                            body.add(at)
                            stack.extend(before[at])
        return found


def read_flow(sass: str, kernel: str) -> Flow:
    """Parse the section of `kernel` in the output of `nvdisasm -c`.

    Raises ValueError when there is no such section.
    """
    _, found, text = sass.partition(f"\n.text.{kernel}:")
    if not found:
        raise ValueError(f"the disassembly has no kernel named {kernel}")
    opcodes: list[str] = []
    falls: list[bool] = []
    jumps: dict[int, str] = {}
    labels: dict[str, int] = {}
    for line in text.partition("\n\t.section")[0].splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(opcodes)
        elif instruction := INSTRUCTION.match(line):
            predicate, opcode, operands = instruction.groups()
            base, target = opcode.split(".")[0], TARGET.search(operands)
            # BRA.DIV is the way of warps whose threads have parted, which costs nothing where they never do.
            if target and base in ("BRA", "JMP", "CALL") and not opcode.startswith("BRA.DIV"):
                jumps[len(opcodes)] = target[1]
            # A uniform predicate is an operand (BRA.U UP0, label), so a sure branch has nothing but its label.
            sure = base in ("BRA", "JMP") and operands.startswith("`")
            opcodes.append(opcode)
            falls.append(predicate is not None or not (sure or base in ("EXIT", "RET", "BRX")))
    successors = [[i + 1] if fall and i + 1 < len(opcodes) else [] for i, fall in enumerate(falls)]
    for source, name in jumps.items():
        if name in labels:
            successors[source].append(labels[name])
    return Flow(opcodes, successors, _dominators(successors))


def _predecessors(successors: list[list[int]], reached: dict[int, int]) -> dict[int, list[int]]:
    before: dict[int, list[int]] = defaultdict(list)
    for source in reached:
        for at in successors[source]:
            before[at].append(source)
    return before


def _dominators(successors: list[list[int]]) -> dict[int, int]:
    """Immediate dominators, after Cooper, Harvey and Kennedy, "A Simple, Fast Dominance Algorithm" (2001)."""
    finished: list[int] = []
    seen, stack = {0}, [(0, iter(successors[0]))]
    while stack:
        at, ways = stack[-1]
        if (to := next((s for s in ways if s not in seen), None)) is None:
            finished.append(at)
            stack.pop()
        else:
            seen.add(to)
            stack.append((to, iter(successors[to])))
    rank = {at: i for i, at in enumerate(finished)}
    before = _predecessors(successors, rank)
    dominator = {0: 0}
    changed = True
    while changed:
        changed = False
        for at in reversed(finished[:-1]):
            known = [p for p in before[at] if p in dominator]
            nearest = known[0]
            for other in known[1:]:
                while nearest != other:
                    if rank[nearest] < rank[other]:
                        nearest = dominator[nearest]
                    else:
                        other = dominator[other]
            changed |= dominator.get(at) != nearest
            dominator[at] = nearest
    return dominator
