"""The codebook as a module: nearest code, straight-through gradient, update by exponential moving averages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastvq import ops
from fastvq.distributed import all_reduce_sum, broadcast_from_rank_0, is_distributed
from fastvq.functional import code_statistics, lookup, quantize_keeping
from fastvq.kept import KeptCodebook
from fastvq.reference import Quantized


class EMACodebook(nn.Module):
    """Vector quantizer whose codes follow the tokens they win; a drop-in for ESM3's and VideoGPT's class.

    A training step, with ``γ = ema_decay``, ``n_k`` tokens won by code k and ``s_k`` their sum over all ranks::

        N_k   ← γ N_k + (1 - γ) n_k
        z_k   ← γ z_k + (1 - γ) s_k
        E_k   ← z_k / w_k,   w_k = (N_k + ε) / (ΣN + K ε) · ΣN,   ε = 1e-7
        E_k   ← a random token where N_k < restart_thres,  if random restart is on

    The returned codes are those before the update. Sources: van den Oord et al. 2017 (arXiv 1711.00937, appendix
    A.1); ESM3 ``esm/layers/codebook.py``; VideoGPT ``videogpt/vqvae.py``.

    State (buffers, the keys of the original classes, always float32): ``embeddings [K, D]``, ``N [K]``,
    ``z_avg [K, D]``. The first training batch initialises them with random tokens, unless a state was loaded.

    Args:
        n_codes: K ≥ 1.
        embedding_dim: D ≥ 1.
        no_random_restart: leave rarely used codes alone. False re-draws them from the batch in every step.
        restart_thres: a code is rarely used while its moving count ``N_k`` is below this many tokens per step.
        ema_decay: γ in [0, 1).
        backend: as in :func:`fastvq.nearest_code`.
        device: where the buffers are created.

    Attributes:
        freeze_codebook: True stops initialisation and updates in training as well, and promises that the codes stay.

    While nothing is learned (``eval()`` or ``freeze_codebook``), eager calls on the CPU keep what the search prepares
    of the codebook until a value of ``embeddings`` changes, however it is changed. On a GPU, where comparing values
    would wait for the device, it is kept with ``freeze_codebook = True`` only, until PyTorch counts a write to
    ``embeddings``; after one that it does not count (``.data``, ``torch.distributed.broadcast``) call
    :meth:`reset_cache`.

    Raises:
        ValueError: a size is not positive, or ``ema_decay`` is outside [0, 1).
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
        *,
        backend: str = "auto",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("n_codes", n_codes), ("embedding_dim", embedding_dim)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if not 0 <= ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {ema_decay}")
        embeddings = torch.randn(n_codes, embedding_dim, dtype=torch.float32, device=device)
        self.register_buffer("embeddings", embeddings)
        self.register_buffer("N", torch.zeros(n_codes, dtype=torch.float32, device=device))
        self.register_buffer("z_avg", embeddings.clone())
        self.n_codes = n_codes
        self.embedding_dim = embedding_dim
        self.no_random_restart = no_random_restart
        self.restart_thres = restart_thres
        self.ema_decay = ema_decay
        self.backend = backend
        self.freeze_codebook = False
        self._need_init = True
        self._kept = KeptCodebook()

    def reset_parameters(self) -> None:
        """Nothing to reset: the module has no parameters."""

    def forward(self, z: Tensor, mask: Tensor | None = None) -> Quantized:
        """Quantize ``z``; in training also update the codebook.

        Args:
            z: tokens ``[..., D]``, any floating dtype and strides.
            mask: bool ``[...]``, True for a real token; padding takes no part in anything. Default: all.

        Returns:
            ``(quantized [..., D], indices [...] int64, commitment loss)`` as :func:`fastvq.quantize`, weight 0.25.

        Raises:
            TypeError, ValueError: as :func:`fastvq.quantize`.
        """
        if z.shape[-1:] != (self.embedding_dim,):
            raise ValueError(f"z must be [..., {self.embedding_dim}] to match embedding_dim, got {list(z.shape)}")
        learns = self.training and not self.freeze_codebook
        if learns and self._need_init:
            self._init_embeddings(z, mask)
        kept = None if learns or (z.is_cuda and not self.freeze_codebook) else self._kept
        result = quantize_keeping(kept, z, self.embeddings, 0.25, mask, self.backend)
        if learns:
            self._update(z.detach(), result.indices)
        return result

    def dictionary_lookup(self, encodings: Tensor) -> Tensor:
        """Codes ``[..., D]`` of the indices ``encodings [...]``; a zero row for -1."""
        return lookup(encodings, self.embeddings)

    def soft_codebook_lookup(self, weights: Tensor) -> Tensor:
        """Mixtures of codes, ``weights @ embeddings``: ``[..., K]`` to ``[..., D]``."""
        return weights @ self.embeddings

    @property
    def usage(self) -> Tensor:
        """Share of the codes with a moving count of at least ``restart_thres``; a scalar tensor, no host sync."""
        return (self.N >= self.restart_thres).float().mean()

    @property
    def perplexity(self) -> Tensor:
        """``exp(-Σ p_k log p_k)`` with ``p = N / ΣN``: the effective number of codes; a scalar tensor."""
        return torch.special.entr(self.N / self.N.sum()).sum().exp()

    @torch.no_grad()
    def _init_embeddings(self, z: Tensor, mask: Tensor | None = None) -> None:
        """Random tokens of the batch become the codes, the same on every rank."""
        tokens, real = self._real_tokens(z.detach(), mask)
        if len(tokens) == 0 and not is_distributed():
            return
        self._need_init = False
        rows, found = self._draw(tokens, real)
        self.embeddings.copy_(torch.where(found, rows, self.embeddings))
        self.z_avg.copy_(self.embeddings)
        self.N.fill_(1)

    @torch.no_grad()
    def _update(self, z: Tensor, indices: Tensor) -> None:
        counts, sums = code_statistics(z, indices, self.n_codes)
        counts, sums = all_reduce_sum(torch.cat([counts[:, None], sums], 1)).split([1, self.embedding_dim], 1)
        rows, found = (None, None) if self.no_random_restart else self._draw(*self._real_tokens(z, indices >= 0))
        state = self.embeddings, self.N, self.z_avg
        ops.ema_step(*state, counts[:, 0], sums, rows, found, decay=self.ema_decay, restart_thres=self.restart_thres)

    def _real_tokens(self, z: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """All tokens ``[n, D]`` float32 and which of them may become a code ``[n]``."""
        tokens = z.reshape(-1, self.embedding_dim).float()
        real = torch.isfinite(tokens).all(1)
        return tokens, real if mask is None else real & mask.reshape(-1)

    def _tile(self, x: Tensor) -> Tensor:
        """``x [n, D]`` if it has at least K rows, otherwise repeated with a little noise."""
        if len(x) >= self.n_codes or len(x) == 0:
            return x
        x = x.repeat(-(-self.n_codes // len(x)), 1)
        return x + torch.randn_like(x) * (0.01 / self.embedding_dim**0.5)

    def _draw(self, tokens: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """K random real tokens ``[K, D]`` of rank 0, and whether there was one, a scalar bool tensor."""
        if len(tokens) == 0:
            rows, found = tokens.new_zeros(self.n_codes, self.embedding_dim), real.new_zeros(())
        else:
            tiled = self._tile(tokens)
            real = real.repeat(-(-len(tiled) // len(tokens)))
            order = torch.randperm(len(tiled), device=tiled.device)
            # Real tokens first, in their random order; the draw starts over when they do not suffice.
            # (gather: TorchInductor 2.13 fails to match its own pattern on an index by randperm.)
            order = order.gather(0, torch.argsort(~real.gather(0, order), stable=True))
            turns = torch.arange(self.n_codes, device=tiled.device) % real.sum().clamp(min=1)
            rows, found = tiled[order[turns]], real.any()
        drawn = broadcast_from_rank_0(torch.cat([rows, found.to(rows).expand(self.n_codes, 1)], 1))
        return drawn[:, :-1], drawn[:1, -1:] > 0

    def reset_cache(self) -> None:
        """Forget what was prepared of the codebook; needed only after a write on a GPU that PyTorch does not count."""
        self._kept.clear()

    def train(self, mode: bool = True) -> EMACodebook:
        """Switches as in any module; what evaluation has kept is given back when training starts."""
        if mode:
            self.reset_cache()
        super().train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EMACodebook:
        """Moves the state like any module, but keeps it float32: in half precision its increments round away."""

        def keep_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        self.reset_cache()
        super()._apply(keep_float32, recurse)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.reset_cache()
        if prefix + "embeddings" in state_dict:
            self._need_init = False

    def extra_repr(self) -> str:
        """Shown by ``print``."""
        return f"n_codes={self.n_codes}, embedding_dim={self.embedding_dim}, ema_decay={self.ema_decay}"
