"""The searches that are measured: published models by name, sizes `N×K×D`, and their data."""

import re
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from fastvq.testing.worst import WORST

# Distance of a token to its code after training, in standard deviations of the codes.
_NOISE = 0.1


@dataclass(frozen=True)
class Problem:
    """One search: ``heads`` times ``tokens`` rows of ``dim`` numbers, each head against its own ``codes`` codes.

    With ``whole``, contenders may not compute a ``[tokens, codes]`` matrix in chunks.
    """

    name: str
    tokens: int
    codes: int
    dim: int
    heads: int = 1
    metric: str = "euclidean"
    dtype: torch.dtype = torch.float32
    whole: bool = False

    @property
    def size(self) -> str:
        """``N×K×D``, or ``H×N×K×D`` with several heads."""
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
    Problem("mimi", 1, 2048, 256),
    Problem("wavtokenizer", 9000, 4096, 512),
    Problem("speechtokenizer", 900, 1024, 1024),
    Problem("meshgpt", 6000, 16_384, 192),
    Problem("dac", 2400, 1024, 8, metric="cosine"),
    Problem("tats", 2048, 16_384, 256),
    Problem("rq-vae", 2048, 16_384, 256),
    Problem("ldm-f8", 10_240, 16_384, 4),
    Problem("ldm-f16", 3584, 16_384, 8),
    Problem("recommender", 640, 256, 32),
)
# Sizes of published kernel benchmarks, and one between those of models.
SIZES = (
    Problem("k1024-d64", 65_536, 1024, 64),
    Problem("k16384-d16", 65_536, 16_384, 16),
    Problem("k16384-d64", 65_536, 16_384, 64),
)
NAMED = {problem.name: problem for problem in (*MODELS, *SIZES)}

# Tokens and token-code pairs on a CPU: half a second of the fastest search, several seconds of the slowest.
_CPU_TOKENS = 8192
_CPU_PAIRS = 1 << 29


def parse_problems(text: str) -> list[Problem]:
    """Problems of a list like ``"esm3,4096x1000x8"``, with ``x`` or ``×``. ValueError names an unknown one."""
    found = []
    for name in filter(None, map(str.strip, text.split(","))):
        size = re.fullmatch(r"([1-9]\d*)[x×]([1-9]\d*)[x×]([1-9]\d*)", name)
        if size:
            tokens, codes, dim = map(int, size.groups())
            found.append(Problem(f"{tokens}×{codes}×{dim}", tokens, codes, dim))
        elif name in NAMED:
            found.append(NAMED[name])
        else:
            raise ValueError(f"shape must be tokens×codes×dim or one of {', '.join(NAMED)}, got {name!r}")
    return found


def plain(problem: Problem) -> Problem:
    """The same sizes with one head and Euclidean distances, which every contender knows."""
    return replace(problem, heads=1, metric="euclidean")


def for_cpu(problem: Problem, tokens: int = _CPU_TOKENS) -> Problem:
    """The problem with at most ``tokens`` tokens, and fewer if the codebook is very large."""
    affordable = 1 << max(0, (_CPU_PAIRS // problem.codes).bit_length() - 1)
    return replace(problem, tokens=min(problem.tokens, tokens, affordable))


def make_inputs(
    problem: Problem, device: torch.device, buffers: int = 1, kind: str = "gaussian", seed: int = 0, offset: float = 30
) -> tuple[list[Tensor], Tensor]:
    """``buffers`` batches of tokens ``[N, D]`` or ``[H, N, D]`` and one codebook, drawn on the device.

    ``kind`` is ``"gaussian"`` (standard normal tokens and codes), ``"offset"`` (the same, both plus ``offset``),
    ``"near"`` (tokens are codes with noise) or, in one batch that the CPU draws, one of
    :data:`fastvq.testing.worst.WORST`. A GPU draws other numbers for the others than the CPU.
    """
    if kind in WORST:
        drawn = partial(torch.randn, generator=torch.Generator().manual_seed(seed))
        x, codebook = WORST[kind](drawn, problem.tokens, problem.codes, problem.dim)
        return [x.to(device, problem.dtype)], codebook.to(device, problem.dtype)
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
        batches.append((x + offset if kind == "offset" else x).to(problem.dtype))
        del x
    return batches, (codebook + offset if kind == "offset" else codebook).to(problem.dtype)
