"""What became of a contender that did not run, in the words of a row."""

from __future__ import annotations

import os
import traceback

import torch

# What PyTorch's allocator of the CPU, NumPy and C++ say.
_OUT_OF_MEMORY = ("can't allocate memory", "cannot allocate memory", "unable to allocate", "bad_alloc")


class DoesNotApplyError(Exception):
    """A contender has no answer to a problem of this kind."""


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
