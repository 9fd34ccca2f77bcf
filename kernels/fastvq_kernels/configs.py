"""Launch choices: one default per target and padded width, with the reason beside odd entries."""

import math
from dataclasses import dataclass

from . import launch
from .launch import cdiv, next_power_of_2

# Tokens that share one scale and one residual bound; every scan tile lies inside one such tile.
TOKEN_TILE = 256
# Codes are padded to a multiple of this, and of the scan's own tile.
CODE_TILE = 64
# Up to here the three products of the two-part split fit into the 16 or 32 columns that cost no time: below 64
# columns the maxima decide, not the products. One product would leave a third of the tokens open at D 4 and K 8192.
SPLIT_D = 10
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclass(frozen=True)
class ScanConfig:
    """Tile sizes and compiler options of the scan."""

    block_m: int = 128  # tokens per program, a divisor of TOKEN_TILE
    block_n: int = 128  # codes per step
    block_d: int = 64  # columns per matrix product, a divisor of the padded width
    lanes: int = 4  # threads that share a token's row of accumulators; block_n is 8, 16, 32 or 64 columns for each
    num_warps: int = 4
    num_stages: int = 2
    resident: bool = True  # the token tile stays on chip; else its columns are loaded again with every step
    bias_first: bool = True  # of chunks that are not resident; where it is added last, accumulators start at zero
    int_max: bool = False  # compare float bits as int32: sm_90 has a three-input integer maximum, but no float one
    tma: bool = False  # tensor descriptors: without the hardware they become masked pointers and lose the pipelining


def padded_width(d: int) -> int:
    """Columns of the packed rows: a power of two up to 64 (one swizzle atom), then whole atoms."""
    return max(16, next_power_of_2(d)) if d <= 64 else cdiv(d, 64) * 64


def packed_width(d: int) -> int:
    """Columns of the packed rows of d columns, or of the three products that stand for them."""
    return padded_width(3 * d if d <= SPLIT_D else d)


def column_chunk(d: int, most: int = 32) -> int:
    """Columns that are evaluated, or measured, at a time in fp32."""
    return min(max(8, next_power_of_2(d)), most)


def scan_config(width: int, target: str | None = None) -> ScanConfig:
    """The default for a padded width. Two stages everywhere: a second program per SM hides more than a third stage."""
    target = target or launch.current_target()
    block_d = width if width in (16, 32, 64, 128, 256) else 64
    if target == "sm_90":
        if width <= 256:
            return ScanConfig(block_d=block_d, int_max=True, tma=True)
        # 256 tokens share each load of codes: the row no longer fits beside its codes, so both come from L2 each step.
        return ScanConfig(
            256, block_d=128 if width % 128 == 0 else 64, num_warps=8, resident=False, int_max=True, tma=True
        )
    if target == "sm_100":
        # Resident rows in several chunks spill: each product waits in tensor memory for its predecessor. Accumulators
        # that start at zero stay there; a bias would be stored, and move them back and forth with every chunk.
        return ScanConfig(block_d=block_d, resident=block_d == width, bias_first=False, tma=True)
    if target == "gfx942":
        # 64 KiB of shared memory, through which 64 rows of accumulators pass to reach the layout of the maxima.
        return ScanConfig(64, block_d=min(block_d, 128) if width != 256 else 64, resident=width <= 128)
    # mma.m16n8k16 lays 8 warps out as 2 x 4, so 16 threads share a row; 4 warps spill from 128 columns on, and 8
    # with 192 resident columns. Rows of 256 would need 129 KiB, and the smaller chips that take this entry have 99.
    return ScanConfig(block_d=block_d if width <= 128 else 64, lanes=16, num_warps=8, resident=width <= 128)


@dataclass(frozen=True)
class RescanConfig:
    """Tile sizes of the second scan."""

    block_m: int = 128  # fewer tokens for each load of codes may be bound by L2
    block_n: int = 64  # a divisor of CODE_TILE
    few_n: int | None = None  # instead of block_n, where tiles of so many codes would leave programs without work
    num_warps: int = 8
    num_stages: int = 2
    resident: int = 128  # columns up to which both parts of the tokens stay on chip
    programs: int = 1  # per SM: more than 128 registers for each of 256 threads

    @property
    def columns(self) -> tuple[int, ...]:
        """Codes per tile, of many and of few."""
        return (self.block_n, self.few_n) if self.few_n else (self.block_n,)


def rescan_config(width: int, target: str | None = None) -> RescanConfig:
    """The default of the second scan for a padded width.

    Larger tiles than these spill, around the code that names candidates.
    """
    target = target or launch.current_target()
    if target == "sm_90":
        if 128 < width <= 256:
            # Both parts of the tokens fill most of shared memory. Loaded again with every step, they would be two
            # thirds of what is read.
            return RescanConfig(block_n=32, resident=256)
        # Eight warps would multiply parts of 64 x 32 twice. To read the codes for 64 tokens at a time takes as long as
        # the products of 128 columns from 9 TB/s of L2 on. With these, tiles of 64 codes spill (Triton 3.6).
        if width == 128:
            return RescanConfig(block_m=64, block_n=32, num_warps=4, programs=2)
        if width > 256 and width & (width - 1):  # offsets that are no shifts take the registers
            return RescanConfig(block_m=64, block_n=32, num_warps=4, programs=2)
        return RescanConfig(block_m=64, few_n=32, num_warps=4, programs=2)
    return {
        "sm_80": RescanConfig(block_n=32),
        "sm_100": RescanConfig(block_m=64, block_n=64 if width <= 128 else 32, programs=2),
        "gfx942": RescanConfig(block_m=64, num_warps=4, programs=2),
    }[target]


@dataclass(frozen=True)
class Float64Config:
    """Tile sizes of the third scan."""

    block_m: int = 64
    block_n: int = 64
    block_d: int = 16
    num_warps: int = 8
    num_stages: int = 2
    programs: int = 1  # per SM: more than 128 registers for each of 256 threads


def float64_config(target: str | None = None) -> Float64Config:
    """The default of the third scan."""
    if (target or launch.current_target()) == "sm_100":
        # Triton 3.7 makes no float64 matrix instructions for it, and larger products spill.
        return Float64Config(block_m=32, block_n=32)
    return Float64Config()


@dataclass(frozen=True)
class TileConfig:
    """Tile sizes of a kernel whose rows, of tokens or codes, are split over their dimensions."""

    tile: int  # elements per program
    block_d: int = 128  # dimensions at most
    num_warps: int = 4

    def blocks(self, dim: int) -> tuple[int, int]:
        """Rows and dimensions."""
        block_d = min(self.block_d, next_power_of_2(dim))
        return self.tile // block_d, block_d


@dataclass(frozen=True)
class OrderedConfig(TileConfig):
    """Tile sizes of the sums in a fixed order: runs of rows, and elements for each of the four chains."""

    log_run: int = 6  # part of the order: runs of 64 rows are short, and their sums few beside the tokens

    @property
    def run(self) -> int:
        """Rows that one program adds one after another."""
        return 1 << self.log_run


ACCUMULATE = TileConfig(2048)  # with few tokens of few dimensions, programs are scarce
ORDERED = OrderedConfig(512)
EMA = TileConfig(1024)  # elements at a time: a program takes all dimensions of its codes

# Seconds from one atomic addition to a row to the next, on Hopper.
HOT_ADD_SECONDS = 4.7e-9
# Extra cost of sorting: about ten launches one after another, and 60 bytes per token.
SORT_SECONDS, SORT_SECONDS_PER_TOKEN = 30e-6, 2e-11


def hottest_share(n_codes: int) -> float:
    """Share of the tokens that the most used code wins, by Zipf's law; training makes codebooks more even."""
    return min(1.0, 1 / (math.log(n_codes) + 0.58))


def atomics_would_queue(n_tokens: int, n_codes: int) -> bool:
    """Whether atomics on the most used code are expected to last longer than sorting the tokens."""
    queue = n_tokens * hottest_share(n_codes) * HOT_ADD_SECONDS
    return queue > SORT_SECONDS + n_tokens * SORT_SECONDS_PER_TOKEN
