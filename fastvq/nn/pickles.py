"""Modules that were pickled before files moved name their classes by the old files."""

import sys
from types import ModuleType

from fastvq.backends.codebook_cache import CodebookCache
from fastvq.learning.batch_statistics import BatchStatistics
from fastvq.learning.restart import Draw
from fastvq.nn.ema_codebook import EMACodebook

_OLD_NAMES: dict[str, dict[str, type]] = {
    "fastvq.codebook": {"EMACodebook": EMACodebook},
    "fastvq.kept": {"KeptCodebook": CodebookCache},
    "fastvq.collect": {"Seen": BatchStatistics},
    "fastvq.restart": {"Draw": Draw},
}


def register_old_names() -> None:
    """Let ``pickle`` and ``torch.load`` find the classes where they used to be."""
    for name, classes in _OLD_NAMES.items():
        module = ModuleType(name, "Old names, for pickles only.")
        vars(module).update(classes)
        sys.modules[name] = module
