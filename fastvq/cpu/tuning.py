"""Every size and threshold of the CPU backend that is chosen for speed, with its reason or measurement."""

import platform
from pathlib import Path
from typing import NamedTuple

import torch


def _is_amd() -> bool:
    try:
        with Path("/proc/cpuinfo").open() as file:
            described = file.read(1 << 10)  # the first core
    except OSError:  # not Linux
        described = platform.processor()
    return "AuthenticAMD" in described


# On these processors MKL, which ``torch.mm`` calls, uses half the width of AVX-512: oneDNN takes 0.45 of its time.
AMD = _is_amd()
AVX512_AMD = AMD and torch.backends.cpu.get_cpu_capability() == "AVX512"
# MKL beats oneDNN for fewer multiplications or rows: 35 us each with 32 x 1,024 x 64, 5 against 15 with 16 x 256 x 32,
# 2 ms against 13 with 1 x 262,144 x 8.
LEAST_WORK = 1 << 21
FEWEST_ROWS = 9
# oneDNN compiles a product of a new size in half a millisecond (bfloat16: some milliseconds): few sizes of tokens.
MULTIPLE, MULTIPLE_BF16 = 16, 128
# A product of 1 MiB stays in the level-2 cache of a Xeon's core (2 MiB: half the speed). On an EPYC larger ones, in
# fewer calls, take 5 to 10 % less time in float32, and 5 % less in bfloat16 up to 32 coordinates.
BYTES_PER_THREAD = {
    torch.float32: 1 << (21 if AMD else 20),
    torch.float64: 1 << (21 if AMD else 20),
    torch.bfloat16: 1 << (22 if AMD else 20),
}

# Blocks. Codes are packed and searched in blocks, so that memory does not grow with them: of 2^14 codes, at least 4 MiB
# and at most 32 MiB in float32.
CODES_PER_BLOCK, LEAST_CODE_VALUES, MOST_CODE_VALUES = 1 << 14, 1 << 20, 1 << 23
# Tokens per block, and values (8 MiB).
TOKENS_PER_BLOCK, TOKEN_VALUES = 8192, 1 << 21
# Tokens per product: few, so that it takes in many codes; many, so that its operands are read from memory rarely.
TOKENS_PER_PRODUCT = 512
# Maxima over other numbers of tokens than multiples of this take twice as long.
TOKENS_PER_MAXIMA = 32
# Values at a time, in float64, of codes that are packed and of tokens that a GPU adds up (2 MiB), of moving averages
# and of pairs that are decided (1 MiB).
PACK_VALUES, STATISTICS_VALUES, EMA_VALUES, DECIDE_VALUES = 1 << 18, 1 << 18, 1 << 17, 1 << 17

# Groups: (least K/D, codes per group). Where codes are long beside their number, refining the winning group costs more
# than more groups do.
GROUPS = ((512, 128), (128, 64), (0, 32))
# Scores that are refined at a time (8 MiB), in batches of pairs of one group: many small products take long to call.
REFINED_VALUES, TOKENS_PER_BATCH = 1 << 21, 32
# Up to so many codes, token-code pairs (4 MiB) or tokens, every score is computed.
FEW_CODES, FEW_SCORES, FEW_TOKENS = 2048, 1 << 20, 16

# Codes longer than so many times one of the shortest, of which there is one among so many, loosen the bounds of others.
LONG_CODE, SHORT_CODES = 16, 32
# Codes whose norms are so many times smaller after a shift are worth another scan in float32.
CLOSER = 8
# The shift is found from so many codes.
SHIFT_SAMPLE = 144


def most_candidates(n_codes: int) -> int:
    """Candidates per token that are decided; another scan costs less than more, which take memory too."""
    return max(4, min(64, n_codes // 128))


class WorthBF16(NamedTuple):
    """Sizes from which on a first scan in bfloat16 saves time."""

    coordinates: int
    work: float  # N K (D + 8): maxima of integers save as much as eight coordinates


FEWEST_CODES_BF16 = 2048
# Times relative to float32, on two cores each.
WORTH_BF16 = {
    # Xeon: 1.15 with 8,192 x 1,024 x 128, 1.0 with 512 x 16,384 x 64, 0.8 with 8,192 x 2,048 x 64 and with
    # 512 x 16,384 x 256, 0.5 with 8,192 x 4,096 x 256.
    "AMX": WorthBF16(32, 6e8),
    # EPYC (Zen 5), whose product is twice as fast as oneDNN's of float32: 1.2 with 8,192 x 1,024 x 64, 0.95 with
    # 8,192 x 2,048 x 64, 1.2 with 8,192 x 4,096 x 8, 1.0 with 8,192 x 4,096 x 16 and with 2,048 x 4,096 x 32, 0.9 with
    # 512 x 16,384 x 64, 0.6 with 8,192 x 4,096 x 128.
    "AVX-512 BF16": WorthBF16(16, 5e8),
}
# Products in bfloat16 are shifted by the best score among some codes of every 64th group; a rough shift will do.
GROUPS_PER_SAMPLE, CODES_PER_SAMPLE = 64, 8
# Groups per token, one in so many, from which on a finer scan is faster (in bfloat16 within limits): bounds the memory
# of the refinement.
GROUPS_PER_REFINED, FEWEST_REFINED, MOST_REFINED = 8, 8, 64
# Where more tokens are left for float32, the first scan is not worth its time.
MOST_FLOAT32 = 1 / 3
