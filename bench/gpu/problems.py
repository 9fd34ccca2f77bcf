"""The searches that are timed on a GPU: sizes of published kernel benchmarks and of models, with their batches."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Distance of a token to its code in units of the codes' spread, as after training.
_NOISE = 0.1


@dataclass(frozen=True)
class Problem:
    """One search: ``heads`` times ``tokens`` rows of ``dim`` numbers, each head against its own ``codes`` codes."""

    name: str
    tokens: int
    codes: int
    dim: int
    heads: int = 1
    metric: str = "euclidean"
    dtype: torch.dtype = torch.float32

    @property
    def size(self) -> str:
        """``N×K×D``, after ``H×`` where there are heads."""
        return (f"{self.heads}×" if self.heads > 1 else "") + f"{self.tokens}×{self.codes}×{self.dim}"

    @property
    def pairs(self) -> int:
        """Token-code pairs of one call."""
        return self.heads * self.tokens * self.codes

    @property
    def flop(self) -> int:
        """Floating-point operations of the matrix product, ``2 H N K D``."""
        return 2 * self.pairs * self.dim

    def describe(self) -> dict[str, str | int]:
        """Columns of a row of results."""
        sizes = {"heads": self.heads, "tokens": self.tokens, "codes": self.codes, "dim": self.dim}
        return {"name": self.name, "size": self.size, **sizes, "metric": self.metric, "dtype": dtype_name(self.dtype)}


def dtype_name(dtype: torch.dtype) -> str:
    """``"float32"`` of ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


# Sizes of flash-kmeans' published grid.
PUBLISHED = (
    Problem("k16384-d64", 65_536, 16_384, 64, dtype=torch.float16),
    Problem("1M-k4096-d128", 1_048_576, 4096, 128, dtype=torch.float16),
    Problem("1M-k16384-d64", 1_048_576, 16_384, 64, dtype=torch.float16),
    Problem("1M-k4096-d256", 1_048_576, 4096, 256, dtype=torch.float16),
    Problem("k1024-d64", 65_536, 1024, 64, dtype=torch.float16),
    Problem("1M-k4096-d512", 1_048_576, 4096, 512, dtype=torch.float16),
)

# Tokens per training step of each model; quantizers run in float32.
MODELS = (
    Problem("llamagen", 32_768, 16_384, 8, metric="cosine"),
    Problem("esm3", 262_144, 4096, 128),
    Problem("vqgan-lc", 65_536, 100_000, 8),
    Problem("unitok", 16_384, 4096, 8, heads=8, metric="cosine"),
    Problem("simvq", 16_384, 262_144, 128),
    Problem("encodec", 4800, 1024, 128),
    Problem("ldm-f4", 32_768, 8192, 3),
    Problem("videogpt", 32_768, 2048, 256),
    Problem("ibq", 1024, 262_144, 256),
    Problem("mimi-stream", 1, 2048, 256),
    Problem("wavtokenizer", 9000, 4096, 512),
    Problem("speechtokenizer", 900, 1024, 1024),
    Problem("meshgpt", 6000, 16_384, 192),
    Problem("dac", 2400, 1024, 8, metric="cosine"),
    Problem("k16384-d16", 65_536, 16_384, 16),
    Problem("k16384-d32", 65_536, 16_384, 32),
    Problem("tats", 2048, 16_384, 256),
    Problem("ldm-f8", 10_240, 16_384, 4),
    Problem("ldm-f16", 3584, 16_384, 8),
    Problem("esm3-small", 8192, 4096, 128),
    Problem("recommender", 640, 256, 32),
)


def published(quick: bool) -> list[Problem]:
    """The published sizes in float16, then most of them in float32 and bfloat16; the first two with ``quick``."""
    if quick:
        return list(PUBLISHED[:2])
    return [
        *PUBLISHED,
        *(replace(problem, dtype=torch.float32) for problem in PUBLISHED),
        *(replace(problem, dtype=torch.bfloat16) for problem in PUBLISHED[:4]),
    ]


def tiny(problem: Problem) -> Problem:
    """The same problem at a size for the interpreter."""
    return replace(
        problem,
        tokens=min(problem.tokens, 12),
        codes=min(problem.codes, 40),
        dim=min(problem.dim, 32),
        heads=min(problem.heads, 2),
    )


def make_inputs(
    problem: Problem, device: torch.device, buffers: int = 1, kind: str = "gaussian", seed: int = 0
) -> tuple[list[Tensor], Tensor]:
    """``buffers`` batches of tokens ``[N, D]`` or ``[H, N, D]`` and one codebook, drawn on the device.

    Args:
        problem: sizes and dtype.
        device: where the numbers are drawn; those of a GPU differ from those of the CPU.
        buffers: how many different batches of tokens.
        kind: ``"gaussian"``: standard normal numbers, tokens and codes independent; ``"offset"``: the same 30
            standard deviations away from zero; ``"near"``: tokens are codes with noise.
        seed: of the generator.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    heads = (problem.heads,) if problem.heads > 1 else ()

    def normal(rows: int) -> Tensor:
        return torch.randn(*heads, rows, problem.dim, generator=generator, device=device)

    codebook = normal(problem.codes)
    batches = []
    for _ in range(buffers):
        x = normal(problem.tokens)
        if kind == "near":
            chosen = torch.randint(problem.codes, (problem.tokens,), generator=generator, device=device)
            x = codebook[..., chosen, :] + _NOISE * x
        batches.append((x + 30 if kind == "offset" else x).to(problem.dtype))
        del x
    return batches, (codebook + 30 if kind == "offset" else codebook).to(problem.dtype)
