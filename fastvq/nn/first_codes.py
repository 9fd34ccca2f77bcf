"""Where the codes come from before they move: the first tokens, batches of choice, or other codes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastvq.backends.operators import is_traced, may_read
from fastvq.common.checks import check_codes, check_mask, check_moving_counts
from fastvq.common.directions import directions, has_direction
from fastvq.common.distributed import Ranks
from fastvq.learning import restart
from fastvq.learning.batch_statistics import BatchStatistics
from fastvq.learning.batches import Batches, TokenBatches, flatten
from fastvq.learning.kmeans import Array, Batch
from fastvq.learning.lloyd import cluster
from fastvq.nn.layout import tokens_last
from fastvq.nn.state import CodebookState

_Self = TypeVar("_Self", bound="FirstCodes")


class Seen:
    """What the host knows about the counts without waiting for a GPU. Copies and pickles are empty."""

    def __init__(self) -> None:
        self.counts: Tensor | None = None  # the buffer N of the last step
        self.has_codes = False  # True: its codebook has codes; False: not known

    def __reduce__(self) -> tuple[type[Seen], tuple[()]]:
        return Seen, ()


class FirstCodes(CodebookState):
    """Each training step decides from the buffers whether the codebook still lacks its first codes.

    It does while ``N = 0`` everywhere and ``z_avg = embeddings``, bit for bit: so it is built, and so the state dict
    needs no further key. Codes that somebody wrote to ``embeddings`` differ from ``z_avg`` and stay; so does a loaded
    state that has learned something.

    On a CPU every step reads the buffers. On a GPU that would wait for the device, so that a module remembers which
    buffer it saw with codes; where the first codes of another one (of ``torch.func.functional_call``) may be missing,
    and in compiled steps, the device decides. A compiled module trusts that its first batch holds a token.
    """

    n_codes: int
    embedding_dim: int
    init: str
    kmeans_iterations: int
    metric: str
    channel_first: bool
    backend: str
    _ranks: Ranks
    _pending: BatchStatistics | None

    def __init__(self, embeddings: Tensor) -> None:
        super().__init__(embeddings)
        self._pending = None
        self._seen = Seen()
        self._look()

    @property
    def _need_init(self) -> bool:
        """Whether the first codes are missing; True where the buffers cannot be read."""
        if is_traced(self.N):
            return True
        return not self.N.sum() and torch.equal(self.embeddings, self.z_avg)

    @_need_init.setter
    def _need_init(self, value: bool) -> None:
        """As the published classes let it be set: writes the buffers."""
        if value:
            self._start_from(self.embeddings, 0)
            self.z_avg.copy_(self.embeddings)
        elif self._need_init and not self.N.is_meta:
            self._start_from(self.embeddings, 1)
        self._look()

    def _look(self) -> None:
        """Let the host know the state as it is now."""
        self._seen.counts, self._seen.has_codes = self.N, not self._need_init

    @torch.no_grad()
    def set_codes(self, codes: Tensor, counts: Tensor | None = None) -> None:
        """Replace the codes, and let their averages start there: ``embeddings = codes``, ``z_avg = counts · codes``.

        Every rank of a process group calls this with the same tensors.

        Args:
            codes: ``[K, D]``, floating, finite; divided by their norms, none of them 0, with ``metric="cosine"``.
            counts: ``N [K]``, floating or integer, at least 0, not all 0: how many tokens the averages count as.
                Default: 1 for each code. With random restart a code below the threshold restarts in the next step.

        Raises:
            TypeError, ValueError: an argument has another shape, dtype or range; the message names it.
        """
        check_codes(codes, self.n_codes, self.embedding_dim)
        if counts is not None:
            check_moving_counts(counts, self.n_codes)
        codes = codes.detach().float()
        if self.metric == "cosine":
            if not has_direction(codes).all():
                raise ValueError("codes must have no zero row with metric='cosine'")
            codes = directions(codes)
        self._keep_float32()
        self._start_from(codes, 1 if counts is None else counts)

    def initialize(self, x: Array | Iterable[Batch], mask: Tensor | None = None) -> None:
        """Replace the codes now by codes learned from ``x`` as ``init`` says.

        Args:
            x: tokens as :meth:`forward` takes them, or an iterable of batches that can be iterated more than once, as
                :func:`fastvq.kmeans` takes it. Every rank of a process group calls this with its own tokens.
            mask: as in :meth:`forward`, for one batch.

        Raises:
            TypeError: ``x`` is an iterator, which can be read only once.
            ValueError: there is no finite token, or a shape does not match.
        """
        self._keep_float32()
        if not self._learn_codes(Batches(x, mask, self._candidates)):
            raise ValueError("x must hold at least one finite token, got none on any rank")

    def _tile(self, x: Tensor) -> Tensor:
        """``x`` repeated to at least K rows, as the published classes offer it."""
        return restart.tile(x, self.n_codes)

    def _candidates(self, z: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The tokens that the codebook learns from, float32 ``[n, D]``, and which of them may become a code ``[n]``."""
        tokens = tokens_last(z, self.embedding_dim, self.channel_first).detach()
        check_mask(mask, tokens)
        return flatten(tokens, mask, self.metric)

    def _init_embeddings(self, z: Tensor, mask: Tensor | None = None) -> None:
        """The first codes, where they are missing, from the first batch that holds a token on any rank."""
        N, seen = self.N, self._seen
        if _reads_freely(N):
            if not N.sum() and self._need_init:
                self._learn_codes([self._candidates(z, mask)])
            return
        is_new = N is not seen.counts
        if is_new:
            seen.counts, seen.has_codes = N, False
        if seen.has_codes or N.is_meta:
            return
        # A buffer that comes again is worth waiting for, once.
        if may_read(N) and not _is_captured(N) and (not is_new or self.init == "kmeans"):
            seen.has_codes = not self._need_init or self._learn_codes([self._candidates(z, mask)])
        else:
            self._learn_codes_on_device(z, mask)
            seen.has_codes = not may_read(N)

    @torch.no_grad()
    def _learn_codes(self, batches: TokenBatches) -> bool:
        """Whether there was a token to learn from."""
        if self.init == "kmeans":
            learned = cluster(batches, self.n_codes, self.kmeans_iterations, self.metric, self.backend, self._ranks)
            if learned is None:
                return False
            self._start_from(learned.codes, 1)
            return True
        rows, found = self._draw(batches)
        if not found:
            return False
        self._start_from(rows, 1)
        return True

    def _draw(self, batches: TokenBatches) -> tuple[Tensor, Tensor]:
        """Tokens of all ranks that may be codes ``[K, D]``, and whether there was one."""
        rows, found = restart.draw_codes(batches, self.n_codes, self._ranks)
        return directions(rows) if self.metric == "cosine" else rows, found

    @torch.no_grad()
    def _learn_codes_on_device(self, z: Tensor, mask: Tensor | None) -> None:
        """As :meth:`_learn_codes` where the first codes are missing, in operations that read nothing on the host."""
        if self.init == "kmeans":
            raise RuntimeError("init='kmeans' cannot be compiled: call initialize(batch) before the first step")
        rows, found = self._draw([self._candidates(z, mask)])
        lacks = found & (self.N.sum() == 0) & (self.embeddings == self.z_avg).all()
        for buffer, first in ((self.embeddings, rows), (self.z_avg, rows), (self.N, 1)):
            buffer.copy_(torch.where(lacks, first, buffer))

    @torch.no_grad()
    def _start_from(self, codes: Tensor, counts: Tensor | int) -> None:
        """Codes that have won themselves ``counts`` times, once in the published classes."""
        self.embeddings.copy_(codes)
        self.N.copy_(counts) if isinstance(counts, Tensor) else self.N.fill_(counts)
        self.z_avg.copy_(self.embeddings * self.N[:, None])
        self._pending = None  # statistics of the codes before
        self._seen.counts, self._seen.has_codes = self.N, not self.N.is_meta

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._pending = None
        codes = state_dict.get(prefix + "embeddings")
        if codes is not None and codes.shape == self.embeddings.shape and prefix + "z_avg" not in state_dict:
            # A checkpoint may come in pieces, the counts first.
            lacks_counts = prefix + "N" not in state_dict and (is_traced(self.N) or not self.N.sum())
            self._start_from(self.embeddings, 1 if lacks_counts else self.N)
        self._look()

    def _apply(self: _Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Self:
        self._pending = None  # statistics that were being collected do not move
        has_codes = self._seen.has_codes and self._seen.counts is self.N
        super()._apply(fn, recurse)
        self._seen.counts, self._seen.has_codes = self.N, has_codes and not self.N.is_meta
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes the state of earlier versions, which had a flag beside the buffers."""
        lacked_codes = state.pop("_need_init", True)
        super().__setstate__({"_pending": None, "_seen": Seen(), **state})
        if not lacked_codes:
            self._need_init = False
        self._look()


def _reads_freely(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and may_read(tensor)


def _is_captured(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
