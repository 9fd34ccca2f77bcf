"""Other ways to multiply than the one that this processor and the size of a product call for."""

from fastvq.cpu import matmul as products

WAYS = ("MKL", "MKL in parallel", "oneDNN")
_ALWAYS, _NEVER = 1, 1 << 60


def multiply_by(patch, way):
    """One of WAYS for every product."""
    for name in ("_AMD", "_AVX512_AMD"):
        patch.setattr(products, name, way != "MKL")
    for least in ("_LEAST_PARALLEL", "_LEAST_WORK"):
        patch.setattr(products, least, _ALWAYS)
    patch.setattr(products, "_FEWEST", _ALWAYS if way == "oneDNN" else _NEVER)


def set_product_values(patch, values):
    """Of a product, for every thread."""
    for dtype in products._BYTES_PER_THREAD:
        patch.setitem(products._BYTES_PER_THREAD, dtype, values * dtype.itemsize)
