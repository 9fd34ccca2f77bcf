"""Tells the user, once, which codes did not move because their averages would not be finite."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from fastvq.backends.operators import may_read

_MOST_NAMES = 8


class Overflow:
    """The codes that stayed in steps so far, until the user has been told. Copies and pickles start anew.

    A CPU tells at once. A GPU, which the host would have to wait for, and compiled steps write a record on the device,
    which :meth:`tell` reads.
    """

    def __init__(self, n_codes: int, device: torch.device | None = None) -> None:
        with torch.inference_mode(False):
            self._stayed = torch.zeros(n_codes, dtype=torch.bool, device=device)
        self._has_told = False

    def __reduce__(self) -> tuple[type[Overflow], tuple[int]]:
        return Overflow, (len(self._stayed),)

    def record(self, stayed: Tensor) -> None:
        """Take in the codes that a step left alone, bool ``[K]``."""
        if self._has_told:
            return
        if self._stayed.device != stayed.device:
            self._stayed = torch.zeros_like(stayed)
        # In place, so that the replay of a CUDA graph writes here too.
        self._stayed.logical_or_(stayed)
        if stayed.device.type == "cpu" and may_read(stayed):
            self.tell()

    def tell(self) -> None:
        """Warn, if a code has stayed; reads the device."""
        if self._has_told or self._stayed.is_meta or not self._stayed.any():
            return
        self._has_told = True
        codes = self._stayed.nonzero()[:, 0].tolist()
        names = ", ".join(map(str, codes[:_MOST_NAMES])) + (", ..." if len(codes) > _MOST_NAMES else "")
        warnings.warn(
            f"tokens are too large for averages in float32; {len(codes)} of {len(self._stayed)} codes kept their place "
            f"instead of becoming infinite: {names}. Codes do so from now on without a warning",
            stacklevel=2,
        )
