"""From instruction counts to time: issue slots and ALU work per (token, code) pair, and the roofline they give."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

# Instructions that run on the ALU pipe, which serves 64 lanes per SM and clock where issue serves 128. Sources: the
# throughput table of the CUDA C++ Programming Guide (compute capability 9.0) and the pipe descriptions of Nsight
# Compute ("ALU: bit manipulation, logic, integer instructions except IMAD and IMUL"; floating-point compare,
# minimum and maximum too). Instructions of the uniform datapath (UIADD3, USEL) are other mnemonics: they cost a slot.
ALU_PIPE: Mapping[str, str] = {
    "FMNMX": "float minimum and maximum: 64 lanes in the guide",
    "FMNMX3": "the same with three inputs (sm_100), taken at the rate of two inputs",
    "IMNMX": "integer minimum and maximum before sm_90",
    "VIMNMX": "integer minimum and maximum from sm_90",
    "VIMNMX3": "the same with three inputs; its rate is unmeasured, taken at that of two",
    "VIADDMNMX": "addition and minimum or maximum in one, taken at the rate of VIMNMX",
    "VIMNMX16X2": "minimum and maximum of two 16-bit halves, taken at the rate of VIMNMX",
    "HMNMX2": "half minimum and maximum, assumed to share the pipe of FMNMX",
    "FSETP": "float compare to predicate: 64 lanes in the guide",
    "FSET": "float compare to register, as FSETP",
    "FSEL": "select by predicate",
    "SEL": "select by predicate",
    "ISETP": "integer compare to predicate: 64 lanes in the guide",
    "PLOP3": "logic on predicates",
    "LOP3": "logic: 64 lanes in the guide",
    "SHF": "shift: 64 lanes in the guide",
    "SGXT": "sign extension, bit manipulation",
    "BMSK": "bit mask, bit manipulation",
    "PRMT": "byte permute, bit manipulation",
    "LEA": "shift and add, integer",
    "IADD3": "integer addition: 64 lanes in the guide for 9.0",
    "IADD": "the same with two inputs",
    "VIADD": "the same with two inputs from sm_90",
    "IABS": "integer absolute value",
    "VABSDIFF": "absolute difference",
    "P2R": "predicates to register, logic",
    "R2P": "register to predicates, logic",
    "VOTE": "vote: 64 lanes in the guide",
    "F2FP": "floats packed into halves: Nsight Compute places fast FP32 to FP16 conversion on the ALU from sm_80",
    "I2FP": "integer to float, assumed beside F2FP",
}

# What is left out although it moves or converts values: these cost their issue slot only.
NOT_ALU: Mapping[str, str] = {
    "FFMA, FADD, FMUL, IMAD": "multiply-add pipes; IMAD has the half of them that serves 64 lanes, beside the ALU",
    "MOV": "the compiler spreads moves over ALU and multiply-add pipes (IMAD.MOV) to balance them",
    "I2F, F2I, MUFU, POPC, FLO": "special function unit (XU)",
    "SHFL, LDS, STS, LDSM": "load-store unit, bounded by shared-memory bandwidth, which the model leaves out",
}


@dataclass(frozen=True)
class PairCost:
    """Work per (token, code) pair: slots on the issue port, alu on the ALU pipe, in lane instructions."""

    slots: float
    alu: float


def slots_per_pair(counts: Mapping[str, int], pairs_per_iteration: int, threads: int) -> PairCost:
    """Instructions per thread and pass, times threads, over the pairs of one pass (BM·BN)."""
    share = threads / pairs_per_iteration
    return PairCost(sum(counts.values()) * share, sum(n for op, n in counts.items() if op in ALU_PIPE) * share)


@dataclass(frozen=True)
class ChipModel:
    """Rates of one chip; the modelled time of a scan over N tokens and K codes of padded dimension D is

        N · K · max(2·D / tensor_flop, slots / issue_lanes, alu / alu_lanes) / (sms · clock_hz)

    tensor_flop, issue_lanes and alu_lanes are per SM and clock. Memory, start-up, the last incomplete wave and the
    wait between product and epilogue are not in it: it is a floor.
    """

    name: str = "H100 SXM / H200"
    sms: int = 132
    clock_hz: float = 1.755e9
    tensor_flop: int = 4096
    issue_lanes: int = 128
    alu_lanes: int = 64

    def __str__(self) -> str:
        rates = ", ".join(f"{key} {value:g}" for key, value in asdict(self).items() if key != "name")
        formula = "N·K·max(2·D/tensor_flop, slots/issue_lanes, alu/alu_lanes)/(sms·clock_hz)"
        return f"{self.name}: seconds = {formula} with {rates}"


H100 = ChipModel()


@dataclass(frozen=True)
class Modelled:
    """seconds: product and epilogue fully overlapped. limiter: "tensor", "issue" or "alu".

    serial_seconds: the product first and the epilogue after it, as one program alone on its SM would; the truth lies
        between the two. tflops: 2·N·K·D / seconds in 1e12. pairs_per_second: N·K / seconds.
    """

    seconds: float
    limiter: str
    serial_seconds: float
    tflops: float
    pairs_per_second: float


def modelled_time(n_tokens: int, n_codes: int, depth: int, cost: PairCost, chip: ChipModel = H100) -> Modelled:
    """Time of a scan on `chip`; `n_tokens` and `n_codes` as padded to tiles, `depth` as padded for the product."""
    clocks = {
        "tensor": 2 * depth / chip.tensor_flop,
        "issue": cost.slots / chip.issue_lanes,
        "alu": cost.alu / chip.alu_lanes,
    }
    limiter = max(clocks, key=lambda unit: clocks[unit])
    pairs = n_tokens * n_codes
    per_clock = pairs / (chip.sms * chip.clock_hz)
    seconds = per_clock * clocks[limiter]
    serial = per_clock * (clocks["tensor"] + max(clocks["issue"], clocks["alu"]))
    rate = pairs / seconds if seconds else 0.0
    return Modelled(seconds, limiter, serial, 2 * depth * rate / 1e12, rate)
