"""Compile Triton kernels for GPUs that are not there and read what they will occupy.

The machine code is the real one: `ptxas`, `cuobjdump` and `nvdisasm` ship inside the Triton wheel, so registers,
spills, shared memory and matrix instructions can be checked on any CPU, in about a second per kernel.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

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


@dataclass(frozen=True)
class Compiled:
    """One kernel compiled for one target, with what it occupies there.

    target: a key of `TARGETS`. name: the kernel's name. threads: threads of one program.
    registers: 32-bit registers per thread; for gfx942 vector and accumulation registers together, as they share
        one file of 512 there.
    spill_bytes: bytes of local memory (scratch on AMD) that a thread reads or writes; 0 means that nothing spills.
    shared_bytes: shared memory of one program, to be held against `shared_limit_bytes`: compiling does not check it.
    matrix_instructions: count by name, HMMA, HGMMA, UTCHMMA (tcgen05) or v_mfma; empty when no matrix unit is used.
    details: the compiler's own figures behind these, by the compiler's own names.
    assembly: SASS from nvdisasm for CUDA, amdgcn for AMD.
    """

    target: str
    name: str
    threads: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    matrix_instructions: Mapping[str, int]
    details: Mapping[str, int]
    assembly: str

    @property
    def shared_limit_bytes(self) -> int:
        """Most shared memory, in bytes, that one program may use on this target."""
        return SHARED_LIMIT_BYTES[self.target]


def compile_offline(
    kernel: Any,
    *,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    target: str,
    num_warps: int,
    num_stages: int,
    divisible: Iterable[str] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """Compile `kernel` for `target` without a GPU.

    kernel: a `triton.jit` function; heuristics and autotuners around it are taken off.
    signature: Triton type of each run-time argument, such as {"x": "*fp16", "n_tokens": "i32"}.
    constexprs: value of each constexpr. Together the two must name every argument once.
    divisible: arguments that are multiples of 16, as a launch finds out from their values; None marks every
        pointer, which is what whole tensors give, and no size.
    options: further compiler options of the backend, such as {"maxnreg": 168}.

    Raises RuntimeError under TRITON_INTERPRET=1, ValueError for an unknown target or argument names that do not fit.
    """
    if target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {target!r}")
    function = _jit_function(kernel)
    names = list(function.arg_names)
    given = [*signature, *constexprs]
    if sorted(given) != sorted(names):
        raise ValueError(f"signature and constexprs must name each of {names} once, got {given}")
    marked = [n for n, kind in signature.items() if kind.startswith("*")] if divisible is None else list(divisible)
    if unknown := [n for n in marked if n not in signature]:
        raise ValueError(f"divisible must name arguments of signature {list(signature)}, got {unknown}")
    source = ASTSource(
        function,
        {name: signature.get(name, "constexpr") for name in names},
        dict(constexprs),
        {(names.index(name),): [["tt.divisibility", 16]] for name in marked},
    )
    gpu = TARGETS[target]
    built = triton.compile(
        source, target=gpu, options={"num_warps": num_warps, "num_stages": num_stages, **(options or {})}
    )
    common = {
        "target": target,
        "name": built.metadata.name,
        "threads": built.metadata.num_warps * gpu.warp_size,
        "shared_bytes": built.metadata.shared,
    }
    if gpu.backend == "cuda":
        tmem_columns = getattr(built.metadata, "tmem_size", None) or 0
        return Compiled(**common, **_cuda_resources(built.metadata.name, built.asm["cubin"], tmem_columns))
    return Compiled(**common, **_hip_resources(built.asm["amdgcn"]))


def _jit_function(kernel: Any) -> JITFunction:
    while not isinstance(kernel, JITFunction) and hasattr(kernel, "fn") and hasattr(kernel.fn, "arg_names"):
        kernel = kernel.fn
    # Triton decides at decoration: its own library (tl.max) may be interpreted where the variable was unset later.
    if triton.knobs.runtime.interpret or not isinstance(tl.max, JITFunction):
        raise RuntimeError("compiling offline needs real kernels: unset TRITON_INTERPRET and start Python again")
    if not isinstance(kernel, JITFunction):
        raise TypeError(f"kernel must be a triton.jit function, got {type(kernel).__name__}")
    return kernel


def _cuda_resources(name: str, cubin: bytes, tmem_columns: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _output(triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path))
        sass = _output(triton.knobs.nvidia.nvdisasm.path, "-c", str(path))
    # Functions that were not inlined have entries of their own beside the kernel's.
    entry = usage.split(f" Function {name}:")[1].split(" Function ")[0]
    details = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", entry)}
    opcodes = Counter(SASS_LINE.findall(sass))
    details["TMEM_COLUMNS"] = tmem_columns
    details["LOCAL_ACCESSES"] = opcodes["LDL"] + opcodes["STL"]
    return {
        "registers": details["REG"],
        # A stack frame nobody touches (kept for calls) costs nothing.
        "spill_bytes": details["STACK"] + details["LOCAL"] if details["LOCAL_ACCESSES"] else 0,
        "matrix_instructions": {op: n for op, n in opcodes.items() if CUDA_MATRIX.fullmatch(op)},
        "details": details,
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
        "details": details,
        "assembly": assembly,
    }


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed with {done.returncode}: {done.stderr.strip()}")
    return done.stdout
