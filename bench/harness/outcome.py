"""The columns of a row: times of a contender that ran, status and note of one that did not."""

import os
import traceback

import numpy as np
import torch

from fastvq.testing.measure import Timing

# Messages of PyTorch's allocator of the CPU, of NumPy and of C++.
_OUT_OF_MEMORY = ("can't allocate memory", "cannot allocate memory", "unable to allocate", "bad_alloc")


class DoesNotApplyError(Exception):
    """A contender cannot solve a problem of this kind."""


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
    said = any(words in str(error).lower() for words in _OUT_OF_MEMORY)
    if said or isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return {"status": "out of memory", "note": describe(error, 1)}
    return {"status": "failed", "note": describe(error)}


def describe(error: BaseException, lines: int = 3) -> str:
    """Type, message (at most ``lines`` lines) and place of an error."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    message = [line for line in str(error).splitlines() if line.strip()]
    # A compiler's message begins with the source and ends with the mistake.
    kept = message if len(message) <= lines else [message[0], "...", *message[len(message) - lines + 1 :]]
    return f"{type(error).__name__}: {' | '.join(kept)[:500]}{place}"
