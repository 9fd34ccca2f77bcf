"""Exact vector quantization without the [tokens, codes] matrix."""

from fastvq import reference
from fastvq.backends.portable import portable
from fastvq.backends.prepared import PreparedCodebook, prepare
from fastvq.functional import code_statistics, lookup, nearest_code, quantize
from fastvq.learning.kmeans import KMeans, kmeans
from fastvq.nn.ema_codebook import EMACodebook
from fastvq.nn.pickles import register_old_names
from fastvq.reference import Quantized

register_old_names()

__version__ = "0.1.0"

__all__ = [
    "EMACodebook",
    "KMeans",
    "PreparedCodebook",
    "Quantized",
    "code_statistics",
    "kmeans",
    "lookup",
    "nearest_code",
    "portable",
    "prepare",
    "quantize",
    "reference",
]
