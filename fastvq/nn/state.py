"""The state of an EMA codebook: three float32 buffers that survive casts, copies and checkpoints."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastvq.backends.codebook_cache import CodebookCache
from fastvq.common.ema_step import is_dead
from fastvq.common.precision import at_least_float32, full_precision
from fastvq.functional import lookup
from fastvq.nn.memory import Float32Memory, own_memory

_Self = TypeVar("_Self", bound="CodebookState")


class CodebookState(nn.Module):
    """Buffers ``embeddings [K, D]``, ``N [K]`` and ``z_avg [K, D]``, the keys of ESM3's, VideoGPT's and TATS's class.

    The buffers stay float32 whatever the module is cast to: in half precision the increments of the averages round
    away. A cast behind the module's back (FSDP's ``buffer_dtype``, ``tensor.data``) is undone by the next call.

    While the codebook does not learn (``eval()`` or ``freeze_codebook``), eager calls on the CPU cache the packed
    codebook until a value of ``embeddings`` changes. A GPU, where comparing values would wait for the device, caches it
    with ``freeze_codebook = True`` only, until PyTorch counts a write to ``embeddings``. It does not count writes
    through ``.data``, ``torch.distributed.broadcast`` or the replay of a CUDA graph: then call :meth:`reset_cache`.
    """

    embeddings: Tensor
    N: Tensor
    z_avg: Tensor
    ema_decay: float
    restart_thres: float
    restart_threshold_relative: float | None
    _dtype: torch.dtype  # what the module was cast to

    def __init__(self, embeddings: Tensor) -> None:
        super().__init__()
        self.register_buffer("embeddings", embeddings)
        self.register_buffer("N", embeddings.new_zeros(len(embeddings)))
        self.register_buffer("z_avg", embeddings.clone())
        self._dtype = torch.get_default_dtype()
        self._codebook_cache = CodebookCache()
        self._float32_memory = Float32Memory()
        self._own_memory()

    def _own_memory(self) -> None:
        own_memory(self._buffers)
        self._float32_memory.hold(self._buffers)

    def _keep_float32(self) -> None:
        if any(buffer is not None and buffer.dtype != torch.float32 for buffer in self._buffers.values()):
            self._float32_memory.undo_casts(self._buffers)

    def dictionary_lookup(self, encodings: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Codes ``[..., D]`` of the indices ``encodings [...]``, int64 or int32; zeros for -1.

        In ``dtype``, by default the one that the module was cast to, or else the default dtype it was built under, as
        ``from_pretrained(dtype=...)`` sets it.
        """
        self._keep_float32()
        return lookup(encodings, self.embeddings).to(self._dtype if dtype is None else dtype)

    def soft_codebook_lookup(self, weights: Tensor) -> Tensor:
        """Mixtures of codes, ``weights @ embeddings``: ``[..., K]`` to ``[..., D]``, in the dtype of ``weights``.

        Computed in float32 at least, under autocast too.
        """
        self._keep_float32()
        precise = at_least_float32(weights.dtype)
        with full_precision(weights.device):
            return (weights.to(precise) @ self.embeddings.to(precise)).to(weights.dtype)

    @property
    def usage(self) -> Tensor:
        """Share of the codes that are not dead; a scalar tensor, no host sync."""
        return 1 - self.dead_codes / len(self.N)

    @property
    def dead_codes(self) -> Tensor:
        """Number of codes with a moving count of 0 or below the restart threshold; a scalar tensor, no host sync."""
        return (is_dead(self.N, self.restart_thres, self.restart_threshold_relative) | (self.N <= 0)).sum()

    @property
    def perplexity(self) -> Tensor:
        """``exp(-Σ p_k log p_k)`` with ``p = N / ΣN``: the effective number of codes; 0 before any was used."""
        total = self.N.sum()
        return torch.where(total > 0, torch.special.entr(self.N / total).sum().exp(), 0)

    def reset_parameters(self) -> None:
        """Nothing to reset: the module has no parameters."""

    def reset_cache(self) -> None:
        """Drop the packed codebook; needed only after a write on a GPU that PyTorch does not count."""
        self._codebook_cache.clear()

    def train(self: _Self, mode: bool = True) -> _Self:
        """Switches the mode as in any module; training frees the packed codebook of evaluation."""
        if mode:
            self.reset_cache()
        super().train(mode)
        return self

    def _apply(self: _Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Self:
        """Moves the state like any module, but keeps it float32."""

        def keep_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if tensor.is_meta and not moved.is_meta:
                return moved.zero_()  # `to_empty` leaves arbitrary values
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        self.reset_cache()
        # The buffers do not tell a cast to float32 from a move.
        self._dtype = fn(self.embeddings.new_empty(0, dtype=self._dtype)).dtype
        super()._apply(keep_float32, recurse)
        self._own_memory()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.reset_cache()
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._own_memory()  # with `assign=True` the buffers are the checkpoint's tensors

    def __setstate__(self, state: dict[str, Any]) -> None:
        memories = {"_codebook_cache": CodebookCache(), "_float32_memory": Float32Memory()}
        super().__setstate__({"_dtype": torch.float32, **memories, **state})
        self._own_memory()

    def extra_repr(self) -> str:
        """Shown by ``print``."""
        return f"n_codes={len(self.N)}, embedding_dim={self.embeddings.shape[1]}, ema_decay={self.ema_decay}"
