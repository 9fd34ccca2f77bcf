"""Other ways to multiply than the one that this processor and the size of a product call for."""

from fastvq import products

WAYS = ("MKL", "MKL in parallel", "oneDNN")
_ALWAYS, _NEVER = 1, 1 << 60


def multiply_by(patch, way):
    """One of WAYS for every product."""
    patch.setattr(products, "_mkl_is_slow", lambda: way != "MKL")
    for least in ("_LEAST_PARALLEL", "_LEAST_WORK"):
        patch.setattr(products, least, _ALWAYS)
    patch.setattr(products, "_FEWEST", _ALWAYS if way == "oneDNN" else _NEVER)


def set_product_values(patch, values):
    """Of a product, for every thread."""
    for dtype, bytes_per_thread in products._BYTES_PER_THREAD.items():
        patch.setitem(products._BYTES_PER_THREAD, dtype, dict.fromkeys(bytes_per_thread, values * dtype.itemsize))
