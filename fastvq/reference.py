"""The formulas in plain PyTorch: oracle, fallback and documentation of the fast path.

The functions are those of :mod:`fastvq.functional` without checks, search and quantization for one codebook only.
:func:`nearest_code` is the oracle that every backend must equal. :func:`nearest_code_expanded` is the formula in common
use, which materialises a ``[tokens, codes]`` matrix: the baseline.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import _register_namedtuple

from fastvq.common.distributed import all_reduce_sum, broadcast_from_rank_0
from fastvq.common.ema_step import EMAStep, is_dead, must_stay

# One [tokens, codes] float64 tile and one temporary of the same size stay in a core's cache.
_TOKENS_PER_TILE = 64
_CODES_PER_TILE = 2048


class Quantized(NamedTuple):
    """Result of ``quantize``: ``quantized [..., D]``, ``indices [...]`` int64 and the scalar ``loss``."""

    quantized: Tensor
    indices: Tensor
    loss: Tensor


# torch.export saves a named tuple as the result of a program by this name only.
_register_namedtuple(Quantized, serialized_type_name="fastvq.Quantized")


def nearest_code(x: Tensor, codebook: Tensor, metric: str = "euclidean") -> Tensor:
    """Index of the nearest code of every token, evaluated in float64.

    ``euclidean``: ``argmin_k Σ_j (x_j - e_kj)²``; ``dot``: ``argmax_k Σ_j x_j e_kj``;
    ``cosine``: ``argmax_k (Σ_j x_j e_kj) / |e_k|`` with similarity 0 where ``|e_k| = 0``.
    Every operation is rounded to float64 by itself, sums run over ascending ``j``, and the lowest ``k`` wins a tie.
    This defines what "exact" means in fastvq.

    Args:
        x: tokens ``[N, D]``, any floating dtype.
        codebook: codes ``[K, D]``, any floating dtype.
        metric: ``"euclidean"``, ``"cosine"`` or ``"dot"``.

    Returns:
        int64 ``[N]``. A token with a NaN or an infinity gets -1; a code with one is never chosen.
    """
    indices = x.new_full((len(x),), -1, dtype=torch.int64)
    best = x.new_full((len(x),), -torch.inf, dtype=torch.float64)
    for k0 in range(0, len(codebook), _CODES_PER_TILE):
        codes = codebook[k0 : k0 + _CODES_PER_TILE]
        excluded = ~torch.isfinite(codes).all(1)
        columns = codes.double().t().contiguous()[:, None, :]  # every coordinate contiguous, as pair_score wants them
        for i0 in range(0, len(x), _TOKENS_PER_TILE):
            rows = slice(i0, i0 + _TOKENS_PER_TILE)
            score = pair_score(x[rows].double().t().contiguous()[:, :, None], columns, metric)
            # A distance that overflows still loses to none but the excluded codes.
            score.nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=torch.finfo(torch.float64).min)
            score.masked_fill_(excluded, -torch.inf)
            tile_best, tile_index = score.max(1)
            better = tile_best > best[rows]
            best[rows] = torch.where(better, tile_best, best[rows])
            indices[rows] = torch.where(better, tile_index + k0, indices[rows])
    return indices.masked_fill_(~torch.isfinite(x).all(1), -1)


def pair_score(tokens: Tensor, codes: Tensor, metric: str) -> Tensor:
    """Float64 score of token-code pairs, larger is nearer: the oracle's arithmetic, in one place.

    Args:
        tokens, codes: float64 ``[D, ...]``, the coordinates first, broadcast against each other.
        metric: ``"euclidean"`` gives the negated squared distance, the others the similarity
            (for ``"cosine"`` without the factor ``1/|x|``, which does not change the order).
    """
    shape = torch.broadcast_shapes(tokens.shape[1:], codes.shape[1:])
    score = tokens.new_zeros(shape)
    term = torch.empty_like(score)
    for x_j, e_j in zip(tokens, codes, strict=True):
        # Separate operations: a fused multiply-add would round differently on every machine.
        if metric == "euclidean":
            torch.sub(x_j, e_j, out=term)
            score.sub_(term.mul_(term))
        else:
            torch.mul(x_j, e_j, out=term)
            score.add_(term)
    if metric == "cosine":
        squares = torch.zeros_like(codes[0])
        for e_j in codes:
            squares.add_(e_j * e_j)
        norm = root(squares)
        score = torch.where(norm > 0, score / norm, 0.0)
    return score


def root(squares: Tensor) -> Tensor:
    """Square roots rounded as IEEE 754 demands; PyTorch's on the CPU come from MKL, which rounds otherwise."""
    return torch.from_numpy(np.sqrt(squares.numpy())) if squares.device.type == "cpu" else squares.sqrt()


def nearest_code_expanded(x: Tensor, codebook: Tensor, metric: str = "euclidean") -> Tensor:
    """The search in common use: ``argmin |x|² - 2 x·Eᵀ + |E|²`` over a full ``[N, K]`` matrix.

    Computed in the dtype of the inputs, with the rounding of the modules that fastvq replaces (VideoGPT
    ``videogpt/vqvae.py``, ESM3 ``esm/layers/codebook.py``).

    Shapes as in :func:`nearest_code`, tokens and codes of one dtype.
    """
    if metric == "cosine":
        x, codebook = F.normalize(x, dim=1), F.normalize(codebook, dim=1)
    if metric != "euclidean":
        return (x @ codebook.t()).argmax(1)
    distances = (x**2).sum(1, keepdim=True) - 2 * x @ codebook.t() + (codebook.t() ** 2).sum(0, keepdim=True)
    return distances.argmin(1)


def code_statistics(
    x: Tensor, indices: Tensor, n_codes: int, *, mask: Tensor | None = None, heads: bool = False
) -> tuple[Tensor, Tensor]:
    """Tokens per code and their sums: ``counts = Σ one_hot``, ``sums = one_hotᵀ x``, materialising the one-hot.

    Shapes and dtypes as in :func:`fastvq.code_statistics`.
    """
    if heads:
        masks = [None] * len(x) if mask is None else list(mask)
        per_head = [code_statistics(t, i, n_codes, mask=m) for t, i, m in zip(x, indices, masks, strict=True)]
        return torch.stack([counts for counts, _ in per_head]), torch.stack([sums for _, sums in per_head])
    codes = indices.reshape(-1) if mask is None else torch.where(mask, indices, -1).reshape(-1)
    counts, sums = add_up(x.reshape(-1, x.shape[-1]), codes, n_codes)
    return counts.float(), sums.float()


def add_up(x: Tensor, indices: Tensor, n_codes: int) -> tuple[Tensor, Tensor]:
    """:func:`code_statistics` of ``x [N, D]`` before its rounding: counts int64, sums float64."""
    kept = indices >= 0
    one_hot = F.one_hot(indices[kept], n_codes)
    return one_hot.sum(0), one_hot.double().t() @ x[kept].double()


@torch.no_grad()
def ema_step(step: EMAStep) -> Tensor:
    """Move the codes in place by the formulas of :class:`fastvq.common.ema_step.EMAStep`.

    Returns:
        The codes that stayed because they would not be finite, bool ``[K]``.
    """
    embeddings, N, z_avg, counts, _, rows, found, decay, *_ = step
    moved = N.double() * decay + counts * (1 - decay)
    total = moved.sum()
    factors = 1 / ((moved + step.smoothing) / (total + len(N) * step.smoothing) * total)
    averages = z_avg.double() * decay + step.all_sums() * (1 - decay)
    stays = must_stay(averages, factors) & (total > 0)
    moves = (total > 0) & ~stays[:, None]
    z_avg.copy_(torch.where(moves, averages, z_avg))
    embeddings.copy_(torch.where(moves, averages * factors[:, None], embeddings))
    if rows is not None:
        dead = is_dead(moved, step.restart_thres, step.restart_thres_relative) & ~stays
        if found is not None:
            dead = dead & found.reshape(())
        embeddings.copy_(torch.where(dead[:, None], rows, embeddings))
        if step.resets:
            z_avg.copy_(torch.where(dead[:, None], rows, z_avg))
            moved = torch.where(dead, 1, moved)
    N.copy_(torch.where(stays, N, moved))
    return stays


def quantize(x: Tensor, codebook: Tensor, *, commitment_weight: float = 0.25, mask: Tensor | None = None) -> Quantized:
    """Nearest code with a straight-through gradient, written with ``detach``.

    ``q = E[argmin_k |x - e_k|²]``, ``loss = w · mse(x, sg[q])``, ``quantized = x + sg[q - x]``
    (van den Oord et al. 2017, "Neural Discrete Representation Learning").
    Shapes and dtypes as in :func:`fastvq.quantize`.
    """
    flat = x.reshape(-1, x.shape[-1])
    indices = nearest_code(flat.detach(), codebook.detach()).view(x.shape[:-1])
    if mask is not None:
        indices = indices.masked_fill(~mask, -1)
    codes = codebook.detach()[indices.clamp(min=0)]
    kept = indices >= 0
    loss = (
        commitment_weight * F.mse_loss(x[kept].float(), codes[kept].float()) if kept.any() else x.new_zeros(()).float()
    )
    quantized = (x + (codes - x).detach()).to(x.dtype)
    if mask is not None:
        quantized = torch.where(mask[..., None], quantized, 0)
    return Quantized(quantized, indices, loss)


class EMACodebook(nn.Module):
    """The published module with its EMA update filled in; it materialises ``[tokens, n_codes]`` matrices.

    Forward and update follow ESM3's ``esm/layers/codebook.py`` (EvolutionaryScale's esm, Apache-2.0), whose training
    branch is missing, and VideoGPT's ``videogpt/vqvae.py``. ``search`` replaces the expanded formula, for example by
    :func:`nearest_code`.
    """

    embeddings: Tensor
    N: Tensor
    z_avg: Tensor

    def __init__(
        self,
        n_codes: int,
        embedding_dim: int,
        no_random_restart: bool = True,
        restart_thres: float = 1.0,
        ema_decay: float = 0.99,
        search: Callable[[Tensor, Tensor], Tensor] = nearest_code_expanded,
    ) -> None:
        super().__init__()
        self.register_buffer("embeddings", torch.randn(n_codes, embedding_dim))
        self.register_buffer("N", torch.zeros(n_codes))
        self.register_buffer("z_avg", self.embeddings.clone())
        self.n_codes = n_codes
        self.embedding_dim = embedding_dim
        self.no_random_restart = no_random_restart
        self.restart_thres = restart_thres
        self.ema_decay = ema_decay
        self.search = search
        self.freeze_codebook = False
        self._need_init = True

    def _tile(self, x: Tensor) -> Tensor:
        if len(x) < self.n_codes:
            repeats = -(-self.n_codes // len(x))
            x = x.repeat(repeats, 1)
            x = x + torch.randn_like(x) * (0.01 / self.embedding_dim**0.5)
        return x

    def _draw(self, flat: Tensor) -> Tensor:
        tiled = self._tile(flat)
        return broadcast_from_rank_0(tiled[torch.randperm(len(tiled), device=tiled.device)][: self.n_codes])

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize ``z [..., D]`` and, in training, update the codebook: ``(quantized, indices, loss)``."""
        flat = z.detach().reshape(-1, self.embedding_dim)
        learns = self.training and not self.freeze_codebook
        if learns and self._need_init:
            self._need_init = False
            rows = self._draw(flat)
            self.embeddings.copy_(rows)
            self.z_avg.copy_(rows)
            self.N.fill_(1)
        indices = self.search(flat, self.embeddings)
        codes = F.embedding(indices, self.embeddings).view(z.shape)
        loss = 0.25 * F.mse_loss(z, codes.detach())
        if learns:
            self._update(flat, F.one_hot(indices, self.n_codes).type_as(flat))
        return z + (codes - z).detach(), indices.view(z.shape[:-1]), loss

    @torch.no_grad()
    def _update(self, flat: Tensor, one_hot: Tensor) -> None:
        n_total = all_reduce_sum(one_hot.sum(0))
        sums = all_reduce_sum(one_hot.t() @ flat)
        self.N.mul_(self.ema_decay).add_(n_total, alpha=1 - self.ema_decay)
        self.z_avg.mul_(self.ema_decay).add_(sums, alpha=1 - self.ema_decay)
        n = self.N.sum()
        weights = (self.N + 1e-7) / (n + self.n_codes * 1e-7) * n
        self.embeddings.copy_(self.z_avg / weights[:, None])
        if not self.no_random_restart:
            used = (self.N >= self.restart_thres)[:, None]
            self.embeddings.copy_(torch.where(used, self.embeddings, self._draw(flat)))
