"""The columns of a row: times of a contender that ran, status and note of one that did not."""

from __future__ import annotations

import os
import traceback

import numpy as np
import torch

from fastvq.testing.measure import Timing

# What PyTorch's allocator of the CPU, NumPy and C++ say.
_OUT_OF_MEMORY = ("can't allocate memory", "cannot allocate memory", "unable to allocate", "bad_alloc")


class DoesNotApplyError(Exception):
    """A contender has no answer to a problem of this kind."""


def seconds_row(timing: Timing) -> dict[str, float | int]:
    """Median, 20th and 80th percentile in seconds, median seconds of the host, and the number of calls."""
    low, high = np.percentile(timing.seconds, [20, 80])
    return {
        "seconds": timing.median,
        "seconds_p20": float(low),
        "seconds_p80": float(high),
        "host_seconds": timing.host,
        "calls": len(timing.seconds),
    }


def failure(error: BaseException) -> dict[str, str]:
    """The columns ``status`` and ``note`` of a row whose contender raised ``error``."""
    if isinstance(error, DoesNotApplyError):
        return {"status": "does not apply", "note": str(error)}
    if isinstance(error, ImportError):
        return {"status": "not installed", "note": str(error)}
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
        words in str(error).lower() for words in _OUT_OF_MEMORY
    ):
        return {"status": "out of memory", "note": describe(error, 1)}
    return {"status": "failed", "note": describe(error)}


def describe(error: BaseException, lines: int = 3) -> str:
    """Type and message of an error, cut to a few lines, with the place where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    message = [line for line in str(error).splitlines() if line.strip()]
    # A compiler's message ends with what is wrong and begins with the source it is about.
    kept = message if len(message) <= lines else [message[0], "...", *message[len(message) - lines + 1 :]]
    return f"{type(error).__name__}: {' | '.join(kept)[:500]}{place}"
