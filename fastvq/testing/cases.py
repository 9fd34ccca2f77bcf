"""Adversarial inputs for the search, where rounding, ties, sizes, layouts or special values can change the winner."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fastvq.testing.worst import WORST, Normal


@dataclass(frozen=True, eq=False)
class Case:
    """One search problem: tokens ``x [N, D]`` and ``codebook [K, D]``, on the CPU."""

    name: str
    x: Tensor
    codebook: Tensor
    metric: str = "euclidean"


def adversarial_cases(seed: int = 0) -> Iterator[Case]:
    """All cases of ``fastvq verify``, the same for the same ``seed``; names are unique."""
    normal = partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    families = (
        _shapes, _offsets_and_scales, _ties, _outliers, _worst, _layouts, _special_values, _other_metrics, _extremes,
    )  # fmt: skip
    for family in families:
        yield from family(normal)


def _shapes(normal: Normal) -> Iterator[Case]:
    for dim in (1, 2, 3, 4, 8, 12, 16, 18, 32, 64, 100, 128, 252, 512, 1024, 2048):
        # No size is a multiple of a tile. Wide codes are few, for speed.
        yield Case(f"D {dim}", normal(65, dim), normal(203 if dim < 512 else 77, dim))
    for n_codes, n_tokens in ((1, 70), (2, 70), (7, 70), (100, 129), (1024, 65), (100_000, 9)):
        yield Case(f"K {n_codes}", normal(n_tokens, 8), normal(n_codes, 8))
    for name, n_tokens in (("many tokens", 2001), ("one token", 1), ("empty input", 0)):
        yield Case(name, normal(n_tokens, 16), normal(130, 16))


def _offsets_and_scales(normal: Normal) -> Iterator[Case]:
    for sigmas in (3, 30, 1000):
        yield Case(f"offset of {sigmas} sigma", normal(200, 64) + sigmas, normal(300, 64) + sigmas)
    yield Case("tokens far from the codes", normal(200, 16) + 1000, normal(300, 16))
    for scale in (1e-30, 1e30):
        yield Case(f"scale {scale:.0e}", normal(100, 16) * scale, normal(130, 16) * scale)
    yield Case("tokens 1e20 times the codes", normal(100, 16) * 1e10, normal(130, 16) * 1e-10)
    yield Case("codes 1e20 times the tokens", normal(100, 16) * 1e-10, normal(130, 16) * 1e10)
    tiny = torch.finfo(torch.float32).smallest_normal
    yield Case("subnormal values", normal(50, 16) * tiny / 64, normal(70, 16) * tiny / 64)


def _ties(normal: Normal) -> Iterator[Case]:
    codes = normal(150, 16)
    yield Case("duplicate codes", normal(100, 16), torch.cat([codes, codes.flip(0)]))
    yield Case("all codes equal", normal(70, 16), codes[:1].expand(300, -1))
    yield Case("codes equal to tokens", codes[torch.arange(149, -1, -1)], codes)
    yield Case("tokens close to codes", codes + 1e-4 * normal(150, 16), codes)
    lattice = torch.cartesian_prod(*[torch.arange(-2.0, 3.0)] * 3)
    yield Case("lattice ties", torch.cartesian_prod(*[torch.arange(-1.5, 2.0, 0.5)] * 3), lattice)
    # The distances are equal but for the order in which a sum is rounded.
    permuted = normal(8)[torch.argsort(normal(64, 8), 1)]
    yield Case("permuted coordinates", normal(60, 1).expand(60, 8), permuted)
    near = codes[:1].repeat(33, 1)
    one_ulp = torch.where(torch.eye(33, 16, dtype=torch.bool), near.nextafter(torch.tensor(torch.inf)), near)
    yield Case("near ties, one ulp apart", normal(60, 16), one_ulp.flip(0))
    yield Case("near ties in a far cluster", normal(60, 16), torch.cat([one_ulp, normal(30, 16) + 50]))


def _outliers(normal: Normal) -> Iterator[Case]:
    for factor in (1e3, 1e6):
        codes = normal(300, 32)
        codes[17] *= factor
        yield Case(f"one code {factor:.0e} times larger", normal(150, 32), codes)
        tokens = normal(150, 32)
        tokens[3] *= factor
        yield Case(f"one token {factor:.0e} times larger", tokens, normal(300, 32))


def _worst(normal: Normal) -> Iterator[Case]:
    for name, make in WORST.items():
        yield Case(name, *make(normal, 90, 260, 24))
    for metric in ("cosine", "dot"):
        for name in ("equal codes, half", "16 clumps within 1e-7"):
            yield Case(f"{metric}, {name}", *WORST[name](normal, 90, 260, 24), metric)


def _layouts(normal: Normal) -> Iterator[Case]:
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        name = str(dtype).removeprefix("torch.")
        yield Case(name, normal(150, 32).to(dtype), normal(300, 32).to(dtype))
        yield Case(f"{name}, offset of 30 sigma", (normal(150, 32) + 30).to(dtype), (normal(300, 32) + 30).to(dtype))
    yield Case("bfloat16 tokens, float32 codes", normal(150, 32).bfloat16(), normal(300, 32))
    yield Case("transposed views", normal(24, 150).t(), normal(24, 300).t())
    yield Case("sliced views", normal(300, 70)[::2, 3:67:2], normal(900, 80)[1::3, :64:2])
    yield Case("views of one row and column", normal(1, 32).expand(70, 32), normal(100, 1).expand(100, 32))


def _special_values(normal: Normal) -> Iterator[Case]:
    for name, value in (("NaN", torch.nan), ("infinity", torch.inf), ("-infinity", -torch.inf)):
        tokens, codes = normal(100, 16), normal(130, 16)
        broken_codes = codes.clone()
        tokens[::7, 5], broken_codes[::5, 11] = value, value
        yield Case(f"tokens with {name}", tokens, codes)
        yield Case(f"codes with {name}", tokens, broken_codes)
    yield Case("no finite code", normal(20, 16), torch.full((10, 16), torch.nan))
    yield Case("zero codes", normal(70, 16), torch.zeros(100, 16))
    tokens, codes = normal(70, 16), normal(100, 16)
    tokens[::3], codes[40:60] = 0, 0
    yield Case("zero tokens and some zero codes", tokens, codes)


def _other_metrics(normal: Normal) -> Iterator[Case]:
    lengths = torch.logspace(-12, 12, 300)[:, None]
    for metric in ("cosine", "dot"):
        tokens, codes = normal(150, 64), normal(300, 64)
        zero_tokens, zero_codes = tokens.clone(), codes.clone()
        zero_tokens[::3], zero_codes[100:200] = 0, 0
        yield Case(metric, tokens, codes, metric)
        yield Case(f"{metric}, offset of 30 sigma", tokens + 30, codes + 30, metric)
        yield Case(f"{metric}, duplicate codes", tokens, torch.cat([codes, codes]), metric)
        yield Case(f"{metric}, codes of all lengths", tokens, codes * lengths, metric)
        yield Case(f"{metric}, tokens of all lengths", tokens * lengths[:150], codes, metric)
        yield Case(f"{metric}, zero tokens and zero codes", zero_tokens, zero_codes, metric)
        yield Case(f"{metric}, bfloat16", tokens.bfloat16(), codes.bfloat16(), metric)
        yield Case(f"{metric}, D 3", normal(70, 3), normal(100, 3), metric)
    # Multiples of one code have the same angle, up to the rounding of each norm.
    multiples = normal(1, 16) * torch.arange(1.0, 65.0)[:, None]
    yield Case("cosine, parallel codes", normal(50, 16), multiples, "cosine")


def _extremes(normal: Normal) -> Iterator[Case]:
    """Numbers whose products or norms overflow or underflow, and codes that differ in less than one rounding."""
    codes = torch.tensor([[2.0**20, value] for value in (4e-6, -4e-6, 4e-6 + 6e-11, -4e-6)])
    yield Case("dot, codes alike but for 1e-16 of their length", torch.ones(1, 2), codes, "dot")
    multiples = torch.tensor([[3.0, 3, 21], [1, 1, 7], [2, 2, 14], [7, 7, 49]])
    yield Case("cosine, parallel codes of integers", (4 * normal(40, 3)).round(), multiples, "cosine")
    longest = torch.finfo(torch.float32).max * (1 - 2.0**-10 * torch.linspace(0, 1, 60)[:, None])
    longest = longest * (1 - 2.0**-20 * normal(60, 512).abs())
    yield Case("cosine, codes whose inverse length is subnormal", normal(20, 512).abs(), longest, "cosine")
    steps = torch.tensor([1.7 * 2.0**-25, 1.8 * 2.0**-25, 1.1 * 2.0**-30, 0], dtype=torch.float64)[:, None]
    yield Case("dot, float64 codes equal in float32", torch.tensor([[2.0**-25]]), 2.0**-29 * (1 + steps), "dot")
    opposite = -normal(60, 16).double().abs()
    opposite[::2] *= -1e300
    for metric in ("dot", "cosine"):
        yield Case(f"{metric}, float64 codes whose squares overflow", 1e10 * normal(20, 16).abs(), opposite, metric)
        for scale in (1e307, 1e-323):
            tokens = scale * normal(40, 2).double()
            yield Case(f"{metric}, float64 tokens of {scale:.0e}", tokens, 3 * normal(60, 2), metric)
