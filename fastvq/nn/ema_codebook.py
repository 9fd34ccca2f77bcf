"""The codebook as a module: nearest code, straight-through gradient, exponential moving averages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastvq.backends.base import Backend
from fastvq.backends.choose import check_backend
from fastvq.backends.operators import backend_for
from fastvq.common.checks import check_choice, check_count, check_mask, check_same_device
from fastvq.common.directions import directions, directions_or, has_direction
from fastvq.common.distributed import Ranks, check_group
from fastvq.common.ema_step import EMAStep
from fastvq.functional import pass_through, search_codes
from fastvq.learning.batch_statistics import Update, collect
from fastvq.nn.first_codes import FirstCodes
from fastvq.nn.layout import as_given, tokens_last
from fastvq.nn.memory import check_writable
from fastvq.nn.overflow import Overflow
from fastvq.reference import Quantized

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_INITS = ("first_batch", "kmeans")
_METRICS = ("euclidean", "cosine")


class EMACodebook(FirstCodes):
    """Vector quantizer whose codes follow the tokens they win; a drop-in for ESM3's class.

    A training step, with ``γ = ema_decay``, ``n_k`` tokens won by code k and ``s_k`` their sum over all ranks::

        N_k   ← γ N_k + (1 - γ) n_k
        z_k   ← γ z_k + (1 - γ) s_k
        E_k   ← z_k / w_k,   w_k = (N_k + ε) / (ΣN + K ε) · ΣN,   ε = 1e-7
        E_k   ← a random token where N_k < restart_thres,  if random restart is on

    Sums and averages are computed in float64 and rounded to float32 once a step. A code that tokens beyond float32's
    range would make infinite keeps its place for the step, and a warning names it, once.

    The forward returns the codes before the update. Sources: van den Oord et al. 2017 (arXiv 1711.00937, appendix
    A.1); ESM3 ``esm/layers/codebook.py``; VideoGPT ``videogpt/vqvae.py``.

    With ``metric="cosine"`` each token stands for its direction ``u = z / |z|``: the code with the largest
    ``u·e / |e|`` wins, ``s_k`` sums the ``u``, an update ends by normalising the codes, ``quantized`` is the code of
    norm 1, and ``loss = w · mean (u - e)² = w · 2 (1 - cos) / D``. Gradients reach z through u (the rule of LlamaGen's
    quantizer and of lucidrains' ``use_cosine_sim``).

    The state is three float32 buffers with the keys of the original classes: ``embeddings [K, D]``, ``N [K]`` and
    ``z_avg [K, D]``. Checkpoints of VideoGPT's and TATS's ``Codebook`` load too. The first training batch that holds a
    token initialises the state, unless codes were loaded, set (:meth:`set_codes`) or written into ``embeddings``; a
    compiled module needs a token in its first batch. A code with ``N_k = 0`` stays where it is until it wins a token,
    and then starts as if it had won itself once: ``N_k = 1``, ``z_k = E_k``.

    Every rank of a process group holds the same state, bit for bit, and may have no tokens. A step costs one all-reduce
    of ``[K, D + 1]``, and with random restart one of ``[K]`` and one of ``[K, D]``. Every rank loads a checkpoint;
    under DistributedDataParallel, which copies the buffers of rank 0, rank 0 is enough unless the module is compiled.

    Args:
        n_codes: K ≥ 1.
        embedding_dim: D ≥ 1.
        no_random_restart: leave dead codes alone. False re-draws them from the tokens of all ranks in every step:
            ``N`` and ``z_avg`` stay.
        restart_thres: a code is dead while its moving count ``N_k`` is below this many tokens per step.
        ema_decay: γ in [0, 1).
        restart_threshold_relative: replaces ``restart_thres`` by this share of the mean count ``ΣN / K``, whatever the
            batch size.
        restart_resets_statistics: a restarted code gets ``N = 1`` and ``z_avg`` = its token, and stays until its count
            has decayed again (RQ-VAE's rule).
        init: ``"first_batch"`` takes random tokens of the first batch, ``"kmeans"`` clusters it.
        kmeans_iterations: at most this many, for ``init="kmeans"``.
        metric: ``"euclidean"`` or ``"cosine"``.
        commitment_weight: ``w``, the factor of the loss.
        channel_first: tokens come and go as ``[b, D, ...]``, for example ``[b, c, h, w]``.
        sync: sum over the ranks of ``torch.distributed``. False: every process has a codebook of its own.
        process_group: the ranks that share the codebook, each of them a member; by default all.
        backend: as in :func:`fastvq.nearest_code`.
        device: where the buffers are created.

    Attributes:
        freeze_codebook: True stops initialisation and updates in training as well, and promises that the codes stay.

    Raises:
        TypeError, ValueError: an argument has the wrong type or is outside its range; the message names it.
    """

    def __init__(
        self,
        n_codes: int,
        embedding_dim: int,
        no_random_restart: bool = True,
        restart_thres: float = 1.0,
        ema_decay: float = 0.99,
        *,
        restart_threshold_relative: float | None = None,
        restart_resets_statistics: bool = False,
        init: str = "first_batch",
        kmeans_iterations: int = 10,
        metric: str = "euclidean",
        commitment_weight: float = 0.25,
        channel_first: bool = False,
        sync: bool = True,
        process_group: ProcessGroup | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
    ) -> None:
        check_count("n_codes", n_codes, 1)
        check_count("embedding_dim", embedding_dim, 1)
        check_count("kmeans_iterations", kmeans_iterations, 0)
        if not 0 <= ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {ema_decay}")
        thresholds = {"restart_thres": restart_thres, "restart_threshold_relative": restart_threshold_relative}
        for name, threshold in thresholds.items():
            if threshold is not None and not threshold >= 0:
                raise ValueError(f"{name} must be at least 0, got {threshold}")
        check_choice("init", init, _INITS)
        check_choice("metric", metric, _METRICS)
        check_backend(backend)
        check_group(process_group)
        codes = torch.randn(n_codes, embedding_dim, dtype=torch.float32, device=device)
        super().__init__(directions(codes) if metric == "cosine" else codes)
        self.n_codes = n_codes
        self.embedding_dim = embedding_dim
        self.no_random_restart = no_random_restart
        self.restart_thres = restart_thres
        self.ema_decay = ema_decay
        self.restart_threshold_relative = restart_threshold_relative
        self.restart_resets_statistics = restart_resets_statistics
        self.init = init
        self.kmeans_iterations = kmeans_iterations
        self.metric = metric
        self.commitment_weight = commitment_weight
        self.channel_first = channel_first
        self._ranks = Ranks(sync, process_group)
        self.backend = backend
        self.freeze_codebook = False
        self._accumulates = False
        self._overflow = Overflow(n_codes, self.N.device)

    @property
    def sync(self) -> bool:
        """Whether ranks share the codebook."""
        return self._ranks.sync

    @sync.setter
    def sync(self, sync: bool) -> None:
        self._ranks = Ranks(sync, self._ranks.group)

    @property
    def process_group(self) -> ProcessGroup | None:
        """The ranks that share the codebook, None for all. Pickles lose it: assign it again before training."""
        return self._ranks.group

    @process_group.setter
    def process_group(self, group: ProcessGroup | None) -> None:
        check_group(group)
        self._ranks = Ranks(self._ranks.sync, group)

    def forward(self, z: Tensor, mask: Tensor | None = None) -> Quantized:
        """Quantize ``z``; in training also update the codebook.

        Args:
            z: tokens ``[..., D]``, or ``[b, D, ...]`` with ``channel_first``; any floating dtype and strides.
            mask: bool ``[...]``, the shape of ``z`` without D, True for a real token. Padding gets index -1, a zero
                output and no gradient, and enters no statistics. Default: all tokens are real.

        Returns:
            ``(quantized, indices [...] int64, commitment loss)`` as :func:`fastvq.quantize`; ``quantized`` has the
            layout and the dtype of ``z``.

        Raises:
            TypeError, ValueError: as :func:`fastvq.quantize`.
        """
        tokens = tokens_last(z, self.embedding_dim, self.channel_first)
        check_same_device("z", tokens, self.embeddings)
        check_mask(mask, tokens)
        self._keep_float32()
        learns = self.training and not self.freeze_codebook
        if learns:
            check_writable(self._buffers)
            self._init_embeddings(z, mask)
        backend = backend_for(tokens, self.backend)
        cache = None if learns or (z.is_cuda and not self.freeze_codebook) else self._codebook_cache
        indices = search_codes(tokens, self.embeddings, self.metric, mask, backend, cache)
        if self.metric == "cosine":
            # NaN in padding would turn its gradient into NaN.
            tokens = directions(tokens if mask is None else torch.where(mask[..., None], tokens, 0))
        update = self._start_update(tokens, indices, backend) if learns else None
        quantized, loss = pass_through(tokens, self.embeddings, indices, mask, self.commitment_weight)
        if update is not None:
            self._update(update(), backend)
        return Quantized(as_given(quantized.to(z.dtype), z, self.channel_first), indices, loss)

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Training steps inside collect statistics; the first step after the block updates the codebook with all.

        The result is that of one step on all batches together, as ``no_sync()`` of DistributedDataParallel gives it
        for gradients, and no process waits for another inside. Initialisation takes the first batch. Collected
        statistics are no part of the state dict. A new codebook (:meth:`set_codes`, :meth:`initialize`,
        ``load_state_dict``) drops them; an exception drops those of its block.
        """
        before, pending = self._accumulates, self._pending
        self._accumulates = True
        try:
            yield
        except BaseException:
            self._pending = pending
            raise
        finally:
            self._accumulates = before

    def _start_update(self, tokens: Tensor, indices: Tensor, backend: Backend) -> Callable[[], Update] | None:
        """Collect the statistics and start their sum over the ranks, unless further batches are to come first."""
        if self.metric == "cosine":
            indices = torch.where(has_direction(tokens), indices, -1)
        statistics = collect(tokens, indices, self.n_codes, not self.no_random_restart, backend)
        if self._pending is not None:
            statistics = self._pending.plus(statistics)
        self._pending = statistics.added_up() if self._accumulates else None
        return None if self._accumulates else statistics.start_update(self._ranks)

    @torch.no_grad()
    def _update(self, update: Update, backend: Backend) -> None:
        before = self.embeddings.clone() if self.metric == "cosine" else None
        rule = self.restart_thres, self.restart_threshold_relative, self.restart_resets_statistics
        step = EMAStep(self.embeddings, self.N, self.z_avg, *update, self.ema_decay, *rule)
        self._overflow.record(backend.ema_step(step))
        if before is not None:
            self.embeddings.copy_(torch.where(self.N.sum() > 0, directions_or(self.embeddings, before), before))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Attributes that a module pickled by an earlier version lacks get their defaults."""
        options = signature(EMACodebook.__init__).parameters.values()
        defaults = {option.name: option.default for option in options if option.kind is option.KEYWORD_ONLY}
        for name in ("device", "sync", "process_group"):
            del defaults[name]
        state.pop("_kept", None)  # the codebook cache of earlier versions
        later = {"_accumulates": False, "_ranks": Ranks(state.pop("sync", True))}
        super().__setstate__({**defaults, **later, "_overflow": Overflow(state["n_codes"]), **state})

    def train(self, mode: bool = True) -> EMACodebook:
        """Switches the mode as in any module; the end of training names the codes that large tokens left alone."""
        if not mode:
            self._overflow.tell()
        return super().train(mode)

    def _save_to_state_dict(self, *args: Any) -> None:
        self._overflow.tell()
        super()._save_to_state_dict(*args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EMACodebook:
        super()._apply(fn, recurse)
        self._overflow = Overflow(self.n_codes, self.N.device)
        return self
