"""Codebooks and batches of published models, by name, and the sizes ``N×K×D`` given on the command line."""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
from torch import Tensor

# Distance of a token to its code in units of the codes' spread, with `--near`.
_NOISE = 0.1


class Shape(NamedTuple):
    """One search: ``tokens`` rows of ``dim`` numbers against ``codes`` codes."""

    name: str
    tokens: int
    codes: int
    dim: int
    model_tokens: str  # what the model feeds in one training step; `tokens` is cut from it

    @property
    def size(self) -> str:
        """``N×K×D``."""
        return f"{self.tokens}×{self.codes}×{self.dim}"


_MODELS = (
    # name, tokens measured, codes, dim, tokens per training step
    Shape("esm3", 8192, 4096, 128, "8,192 to 262,144"),
    Shape("videogpt", 8192, 2048, 256, "32,768"),
    Shape("tats", 2048, 16384, 256, "2,048"),
    Shape("llamagen", 8192, 16384, 8, "32,768"),
    Shape("ldm-f4", 8192, 8192, 3, "32,768"),
    Shape("ldm-f8", 8192, 16384, 4, "10,240"),
    Shape("ldm-f16", 3584, 16384, 8, "3,584"),
    Shape("vqgan-lc", 4096, 100_000, 8, "65,536"),
    Shape("simvq", 2048, 262_144, 128, "16,384"),
    Shape("ibq", 1024, 262_144, 256, "1,024"),
    Shape("unitok", 8192, 4096, 8, "16,384, each of 8 heads"),
    Shape("rq-vae", 2048, 16384, 256, "2,048, each of 4 levels"),
    Shape("encodec", 4800, 1024, 128, "4,800, each of 8 levels"),
    Shape("dac", 2400, 1024, 8, "2,400, each of 9 levels"),
    Shape("wavtokenizer", 8192, 4096, 512, "9,000"),
    Shape("speechtokenizer", 900, 1024, 1024, "900, each of 8 levels"),
    Shape("mimi", 1, 2048, 256, "1 (streaming), each of 32 levels"),
    Shape("meshgpt", 6000, 16384, 192, "6,000, each of 2 levels"),
    Shape("recommender", 640, 256, 32, "640, each of 3 levels"),
    # Sizes of published kernel benchmarks
    Shape("k1024-d64", 8192, 1024, 64, "65,536"),
    Shape("k16384-d16", 8192, 16384, 16, "none: a size between those of models"),
    Shape("k16384-d64", 8192, 16384, 64, "65,536"),
)
MODELS = {shape.name: shape for shape in _MODELS}
QUICK = ("llamagen", "unitok", "encodec", "k1024-d64", "mimi", "recommender")


def parse_shapes(text: str) -> list[Shape]:
    """Shapes named in a list like ``"esm3,4096x1000x8"``; ``x`` and ``×`` both separate tokens, codes and dim.

    Raises:
        ValueError: a name is unknown or a size is not three positive integers.
    """
    return [_parse_shape(part.strip()) for part in text.split(",") if part.strip()]


def _parse_shape(text: str) -> Shape:
    if text in MODELS:
        return MODELS[text]
    size = re.fullmatch(r"([1-9]\d*)[x×]([1-9]\d*)[x×]([1-9]\d*)", text)
    if size is None:
        raise ValueError(f"shape must be tokens×codes×dim or one of {', '.join(MODELS)}, got {text!r}")
    tokens, codes, dim = map(int, size.groups())
    return Shape(f"{tokens}×{codes}×{dim}", tokens, codes, dim, "as given")


def make_data(shape: Shape, near: bool, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Float32 tokens ``[N, D]`` and codes ``[K, D]``, both from the standard normal distribution.

    With ``near`` every token is a random code plus noise of a tenth of the codes' spread, as after training;
    without it tokens and codes know nothing of each other.
    """
    generator = torch.Generator().manual_seed(seed)
    codebook = torch.randn(shape.codes, shape.dim, generator=generator)
    x = torch.randn(shape.tokens, shape.dim, generator=generator)
    if near:
        chosen = torch.randint(shape.codes, (shape.tokens,), generator=generator)
        x = codebook[chosen] + _NOISE * x
    return x, codebook
