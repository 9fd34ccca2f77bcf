"""Exact vector quantization without the [tokens, codes] matrix."""

from fastvq import reference
from fastvq.clustering import KMeans, kmeans
from fastvq.codebook import EMACodebook
from fastvq.functional import code_statistics, lookup, nearest_code, quantize
from fastvq.reference import Quantized

__version__ = "0.1.0"

__all__ = [
    "EMACodebook",
    "KMeans",
    "Quantized",
    "code_statistics",
    "kmeans",
    "lookup",
    "nearest_code",
    "quantize",
    "reference",
]
