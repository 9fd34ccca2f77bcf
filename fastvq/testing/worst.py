"""Tokens and codebooks that training produces, and that cost a search most of its proofs."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

Normal = Callable[..., Tensor]  # draws standard normal numbers of a shape
_Make = Callable[[Normal, int, int, int], tuple[Tensor, Tensor]]


def _long(normal: Normal, n: int, k: int, d: int, *, ordinary: float, factor: float) -> tuple[Tensor, Tensor]:
    """Unused codes of moving averages: ``z / (tiny count)``."""
    codes = normal(k, d)
    codes[torch.arange(k) % k >= max(1, round(ordinary * k))] *= factor
    return normal(n, d), codes[_order(normal, k)]


def _crowd(normal: Normal, n: int, k: int, d: int, *, share: float, spread: float) -> tuple[Tensor, Tensor]:
    """Restarts from one token: a share of the codes agrees, and is nearest to all tokens."""
    codes, agreeing = 3 * normal(k, d), min(k, max(2, round(share * k)))
    codes[:agreeing] = 0.1 * normal(1, d) * (1 + spread * normal(agreeing, d))
    return normal(n, d) / 2, codes[_order(normal, k)]


def _clumps(normal: Normal, n: int, k: int, d: int, *, spread: float) -> tuple[Tensor, Tensor]:
    """Restarts from few tokens: a clump of codes near each of 16."""
    codes = normal(16, d)[torch.arange(k) % 16] * (1 + spread * normal(k, d))
    return normal(n, d), codes[_order(normal, k)]


def _half_equal(normal: Normal, n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Codes drawn from a batch of which half is one token."""
    x = normal(n, d)
    x[::2] = x[0].clone()
    return x, x[_order(normal, n)[torch.arange(k) % n]]


def _zeros(normal: Normal, n: int, k: int, d: int, *, share: float) -> tuple[Tensor, Tensor]:
    """Codebooks that start as zeros, or whose residuals have vanished."""
    codes = normal(k, d)
    codes[: round(share * k)] = 0
    return normal(n, d) / 100, codes[_order(normal, k)]


def _zero_tokens(normal: Normal, n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(n, d), torch.zeros(k, d)


def _long_token(normal: Normal, n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    x, codes = normal(n, d), normal(k, d)
    x[n // 2] *= 1e6
    codes[k // 2] *= 1e6
    return x, codes


def _offset(normal: Normal, n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    return 1000 + normal(n, d), 1000 + normal(k, d)


def _order(normal: Normal, n: int) -> Tensor:
    return normal(n).argsort()


# Of a source of random numbers, N, K and D: tokens [N, D] and codes [K, D], float32.
WORST: dict[str, _Make] = {
    "long codes, 3 of 4": partial(_long, ordinary=1 / 4, factor=1e5),
    "long codes, 15 of 16": partial(_long, ordinary=1 / 16, factor=1e3),
    "equal codes, 1 of 32": partial(_crowd, share=1 / 32, spread=0.0),
    "equal codes, half": partial(_crowd, share=1 / 2, spread=0.0),
    "codes within 1e-7, 1 of 128": partial(_crowd, share=1 / 128, spread=1e-7),
    "codes within 1e-7, 1 of 32": partial(_crowd, share=1 / 32, spread=1e-7),
    "codes within 1e-7, half": partial(_crowd, share=1 / 2, spread=1e-7),
    "16 clumps, equal": partial(_clumps, spread=0.0),
    "16 clumps within 1e-7": partial(_clumps, spread=1e-7),
    "half of the batch equal": _half_equal,
    "zero codes, half": partial(_zeros, share=1 / 2),
    "zero codes, all": partial(_zeros, share=1.0),
    "zero tokens and codes": _zero_tokens,
    "one long token, one long code": _long_token,
    "offset of 1000 times the spread": _offset,
}
