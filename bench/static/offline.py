"""Compile Triton kernels for GPUs that are not there and read what they will occupy.

The machine code is the real one: `ptxas`, `cuobjdump` and `nvdisasm` ship inside the Triton wheel, so registers,
spills, shared memory and matrix instructions can be checked on any CPU, in about a second per kernel.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS: Mapping[str, GPUTarget] = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

# Most shared memory one program may ask for. On CUDA 1 KiB of each SM's 164 or 228 KiB belongs to the driver.
SHARED_LIMIT_BYTES: Mapping[str, int] = {
    "sm_80": 163 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "gfx942": 64 * 1024,
}

# HMMA (one warp), HGMMA (one warp group), UTCHMMA and its siblings (tcgen05, one thread for the whole program).
# FFMA and HFMA2 end in other letters and stay out.
CUDA_MATRIX = re.compile(r"(?:UTC)?[A-Z]{1,2}MMA")
SASS_LINE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", re.MULTILINE)


class Launch(NamedTuple):
    """A kernel by name, with the types, constants and compiler options of one launch, as Triton found them."""

    name: str
    source: ASTSource
    options: dict[str, Any]


@dataclass(frozen=True)
class Compiled:
    """One kernel compiled for one target, with what it occupies there.

    target: a key of `TARGETS`. name: the kernel's name. threads: threads of one program.
    registers: 32-bit registers per thread; for gfx942 vector and accumulation registers together, as they share
        one file of 512 there.
    spill_bytes: bytes of local memory (scratch on AMD) that a thread reads or writes; 0 means that nothing spills.
    shared_bytes: shared memory of one program, to be held against `shared_limit_bytes`: compiling does not check it.
    matrix_instructions: count by name, HMMA, HGMMA, UTCHMMA (tcgen05) or v_mfma; empty when no matrix unit is used.
    assembly: SASS from nvdisasm for CUDA, amdgcn for AMD.
    """

    target: str
    name: str
    threads: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    matrix_instructions: Mapping[str, int]
    assembly: str

    @property
    def shared_limit_bytes(self) -> int:
        """Most shared memory, in bytes, that one program may use on this target."""
        return SHARED_LIMIT_BYTES[self.target]


def compile_offline(launch: Launch, target: str) -> Compiled:
    """Compile a recorded launch for ``target`` without a GPU."""
    gpu = TARGETS[target]
    built = triton.compile(launch.source, target=gpu, options=launch.options)
    common = {
        "target": target,
        "name": built.metadata.name,
        "threads": built.metadata.num_warps * gpu.warp_size,
        "shared_bytes": built.metadata.shared,
    }
    if gpu.backend == "cuda":
        return Compiled(**common, **_cuda_resources(built.metadata.name, built.asm["cubin"]))
    return Compiled(**common, **_hip_resources(built.asm["amdgcn"]))


def _cuda_resources(name: str, cubin: bytes) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _output(triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path))
        sass = _output(triton.knobs.nvidia.nvdisasm.path, "-c", str(path))
    # Functions that were not inlined have entries of their own beside the kernel's.
    entry = usage.split(f" Function {name}:")[1].split(" Function ")[0]
    details = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", entry)}
    opcodes = Counter(SASS_LINE.findall(sass))
    return {
        "registers": details["REG"],
        # A stack frame nobody touches (kept for calls) costs nothing.
        "spill_bytes": details["STACK"] + details["LOCAL"] if opcodes["LDL"] + opcodes["STL"] else 0,
        "matrix_instructions": {op: n for op, n in opcodes.items() if CUDA_MATRIX.fullmatch(op)},
        "assembly": sass,
    }


def _hip_resources(assembly: str) -> dict[str, Any]:
    keys = "vgpr_count|agpr_count|sgpr_count|vgpr_spill_count|sgpr_spill_count|private_segment_fixed_size"
    details = {key: int(value) for key, value in re.findall(rf"^[\s-]+\.({keys}):\s+(\d+)", assembly, re.MULTILINE)}
    matrix = len(re.findall(r"^\s+v_s?mfma", assembly, re.MULTILINE))
    return {
        "registers": details["vgpr_count"],
        # Scratch counts arrays on the stack too; spilled scalars go to lanes of vector registers and cost no memory.
        "spill_bytes": max(details["private_segment_fixed_size"], 4 * details["vgpr_spill_count"]),
        "matrix_instructions": {"v_mfma": matrix} if matrix else {},
        "assembly": assembly,
    }


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed with {done.returncode}: {done.stderr.strip()}")
    return done.stdout
