"""Other ways to multiply than the one that this processor and the size of a product call for."""

from fastvq.cpu import tuning

WAYS = ("MKL", "MKL in parallel", "oneDNN")
_ALWAYS, _NEVER = 1, 1 << 60


def multiply_by(patch, way):
    """One of WAYS for every product."""
    for name in ("AMD", "AVX512_AMD"):
        patch.setattr(tuning, name, way != "MKL")
    for least in ("LEAST_PARALLEL", "LEAST_WORK"):
        patch.setattr(tuning, least, _ALWAYS)
    patch.setattr(tuning, "FEWEST_ROWS", _ALWAYS if way == "oneDNN" else _NEVER)


def set_product_values(patch, values):
    """Values of a product for every thread."""
    for dtype in tuning.BYTES_PER_THREAD:
        patch.setitem(tuning.BYTES_PER_THREAD, dtype, values * dtype.itemsize)
