"""Other ways to multiply than the one that this processor and the size of a product call for."""

from fastvq.cpu import tuning

WAYS = ("MKL", "oneDNN")


def multiply_by(patch, way):
    """One of WAYS for every product in float32."""
    patch.setattr(tuning, "AVX512_AMD", way == "oneDNN")
    for least in ("LEAST_WORK", "FEWEST_ROWS"):
        patch.setattr(tuning, least, 1)


def set_product_values(patch, values):
    """Values of a product for every thread."""
    for dtype in tuning.BYTES_PER_THREAD:
        patch.setitem(tuning.BYTES_PER_THREAD, dtype, values * dtype.itemsize)
